"""Where a network looks, and whether that is where the truth lies.

Only phantoms know their lesions to the pixel, so only on them can an explanation be scored. A score means
something beside those of the same network with shuffled weights: `control`.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genailab_helpers.radiographs import check_images
from genailab_helpers.statistics import Interval


def grad_cam(network: nn.Module, images: Tensor, score: Callable[[Tensor], Tensor],
             min_side: int = 2) -> Tensor:
    """Map what speaks for a score of the network.

    Parameters
    ----------
    network : nn.Module
        From images to logits; used in evaluation mode, and left as it was.
    images : torch.Tensor
        (N, 1, H, W) float32 in [-1, 1].
    score : callable
        From logits (N, n_outputs) to the number (N,) to explain, such as `lambda z: z[:, 2]`.
    min_side : int, default 2
        Pixels that maps must have on each side. The last layer with such maps (N, C, h, w) is weighed: the
        last maps know most and are coarsest, so small findings need finer ones.

    Returns
    -------
    torch.Tensor
        (N, H, W) float32 on the CPU, at least 0, in units of the score; 0 where nothing speaks for it.

    Raises
    ------
    ValueError
        If the images are no such images, or no layer gives maps to which gradients flow.

    Notes
    -----
    relu(sum_c a_c A_c), A the maps and a_c the mean over the pixels of d score / d A_c, enlarged bilinearly
    (Selvaraju et al., Grad-CAM, ICCV 2017).
    """
    check_images(images)
    images = images.to(next(network.parameters()).device)
    was_training = network.training
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[-2:]) >= min_side:
            seen.append(output)

    with nn.modules.module.register_module_forward_hook(keep), torch.enable_grad():
        total = score(network.eval()(images)).sum()
    network.train(was_training)
    if not seen or not seen[-1].requires_grad:
        raise ValueError(f"network: expected a layer that gives maps of {min_side} pixels a side or more and "
                         "lets gradients through; a frozen network has none")
    maps, (slopes,) = seen[-1], torch.autograd.grad(total, seen[-1])
    cam = (slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    return F.interpolate(cam, images.shape[-2:], mode="bilinear")[:, 0].detach().cpu()


def widen(masks: Tensor, pixels: int) -> Tensor:
    """Add to masks (N, H, W) bool what lies within so many pixels of them, across, down or diagonally.

    A map that is coarser than a finding cannot point at it to the pixel; scored on widened masks, it needs
    not. Chance grows with them.
    """
    side = 2 * pixels + 1
    return F.max_pool2d(masks.float()[:, None], side, 1, pixels)[:, 0] > 0


def pointing_game(cams: Tensor, masks: Tensor) -> Tensor:
    """Tell for each image whether the brightest pixel of its map lies on the lesion.

    Parameters
    ----------
    cams : torch.Tensor
        (N, H, W), at least 0.
    masks : torch.Tensor
        (N, H, W) bool; chance is the fraction of pixels that they cover.

    Returns
    -------
    torch.Tensor
        (N,) float32, 1 for a hit and 0 for a miss. Where several pixels are equally bright, the fraction of
        them on the lesion, which is what pointing at one of them at random scores. A map that is 0
        throughout therefore scores chance: it knows nothing, and a miss would say that it avoids the lesion.

    Raises
    ------
    ValueError
        If the shapes differ or an image has no lesion.

    Notes
    -----
    Zhang et al., Top-down neural attention by excitation backprop, 2016; for their tolerance, `widen`.
    """
    _check(cams, masks)
    brightest = cams == cams.amax((1, 2), keepdim=True)
    return (brightest & masks).sum((1, 2)) / brightest.sum((1, 2))


def energy_in_mask(cams: Tensor, masks: Tensor) -> Tensor:
    """Return for each image the fraction of its map that lies on the lesion.

    Parameters and errors are those of `pointing_game`; (N,) in [0, 1], and chance where the map is 0
    throughout, as for a map that is 1 throughout. Wang et al., Score-CAM, 2020.
    """
    _check(cams, masks)
    cams = torch.where(cams.amax((1, 2), keepdim=True) > 0, cams, 1.0)
    return (cams * masks).sum((1, 2)) / cams.sum((1, 2))


def control(measure: Callable[[Tensor, Tensor], Tensor], network: nn.Module, images: Tensor,
            score: Callable[[Tensor], Tensor], masks: Tensor, min_side: int = 2) -> Interval:
    """Score the maps of networks that have learned nothing: copies with shuffled weights.

    Parameters
    ----------
    measure : callable
        `pointing_game` or `energy_in_mask`.
    network, images, score, min_side
        As for `grad_cam`.
    masks : torch.Tensor
        As for `pointing_game`.

    Returns
    -------
    Interval
        The mean over 20 copies, and between which ends 95 % of them lie; `n` counts copies. Maps of
        one copy resemble each other, so one copy is one observation, however many images it sees. A map
        explains something if its score lies above the interval.
    """
    scores = [measure(grad_cam(randomise_weights(network, seed), images, score, min_side=min_side),
                      masks).mean().item() for seed in range(20)]
    low, high = np.quantile(scores, [0.025, 0.975]).tolist()
    return Interval(float(np.mean(scores)), low, high, len(scores))


def randomise_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of a network whose weights are shuffled within each layer.

    It keeps the size of the weights and forgets what was learned: a map that looks the same explains nothing
    (Adebayo et al., Sanity checks for saliency maps, 2018, who draw new weights). The global random state
    stays as it is.
    """
    copied, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in copied.parameters():
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.copy_(p.flatten()[order].reshape(p.shape))
    return copied


def _check(cams: Tensor, masks: Tensor) -> None:
    if cams.shape != masks.shape or masks.dtype != torch.bool or not masks.flatten(1).any(1).all():
        raise ValueError(f"masks: expected bool {tuple(cams.shape)} as the maps (N, H, W), each with a "
                         f"lesion to point at, got {masks.dtype} {tuple(masks.shape)}")
