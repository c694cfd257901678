"""Where a network looks, and whether that is where the truth lies.

Only phantoms know their lesions to the pixel, so only on them can an explanation be scored. A score means
something beside that of the same network with random weights: `randomise_weights`.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genailab_helpers.radiographs import check_images


def grad_cam(network: nn.Module, images: Tensor, score: Callable[[Tensor], Tensor],
             layer: nn.Module | None = None, min_side: int = 2) -> Tensor:
    """Map what speaks for a score of the network.

    Parameters
    ----------
    network : nn.Module
        From images to logits; used in evaluation mode, and left as it was.
    images : torch.Tensor
        (N, 1, H, W) float32 in [-1, 1].
    score : callable
        From logits (N, n_outputs) to the number (N,) to explain, such as `lambda z: z[:, 2]`.
    layer : nn.Module, optional
        Its output (N, C, h, w) is weighed. By default the last one whose maps are not too small.
    min_side : int, default 2
        Pixels that maps must have on each side where no layer is named. The last maps know most and are
        coarsest: small findings want finer ones.

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
    network.eval()
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[-2:]) >= min_side:
            outputs.append(output)

    hooked = [layer] if layer is not None else [m for m in network.modules() if m is not network]
    hooks = [module.register_forward_hook(keep) for module in hooked]
    try:
        with torch.enable_grad():
            total = score(network(images)).sum()
            if not outputs or not outputs[-1].requires_grad:
                raise ValueError("layer: expected one that gives maps (N, C, h, w) and lets gradients "
                                 "through; a frozen network has none")
            maps = outputs[-1]
            (slopes,) = torch.autograd.grad(total, maps)
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)
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
    """Tell for each film whether the brightest pixel of its map lies on the lesion.

    Parameters
    ----------
    cams : torch.Tensor
        (N, H, W), at least 0.
    masks : torch.Tensor
        (N, H, W) bool; chance is the share of pixels that they cover.

    Returns
    -------
    torch.Tensor
        (N,) bool; False where the map is 0 throughout.

    Raises
    ------
    ValueError
        If the shapes differ or a film has no lesion.

    Notes
    -----
    Zhang et al., Top-down neural attention by excitation backprop, 2016; for their tolerance, `widen`.
    """
    _check(cams, masks)
    flat = cams.flatten(1)
    hit = masks.flatten(1).gather(1, flat.argmax(1, keepdim=True))[:, 0]
    return hit & (flat.amax(1) > 0)


def energy_in_mask(cams: Tensor, masks: Tensor) -> Tensor:
    """Return for each film the share of its map that lies on the lesion.

    Parameters and errors are those of `pointing_game`; (N,) in [0, 1], and 0 where the map is 0 throughout.
    Wang et al., Score-CAM, 2020.
    """
    _check(cams, masks)
    return (cams * masks).sum((1, 2)) / cams.sum((1, 2)).clamp(min=torch.finfo(cams.dtype).tiny)


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
    if cams.ndim != 3 or cams.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(f"masks: expected bool {tuple(cams.shape)} as the maps (N, H, W), "
                         f"got {masks.dtype} {tuple(masks.shape)}")
    if not masks.any(2).any(1).all():
        raise ValueError("masks: a film without lesion cannot be pointed at; leave such films out")
