"""The forward process, and the one denoiser that every sampler sees.

Two ways of writing the same thing. *Variance exploding* (EDM): an image plus noise of standard deviation
sigma. *Variance preserving* (DDPM): signal * image + noise level * noise, with squares that sum to one.
Dividing the second by its signal gives the first, with sigma = noise level / signal; so one denoiser D(x,
sigma) serves both.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genailab_helpers.checkpoints import fitting_weights, load_checkpoint, save_checkpoint
from genailab_helpers.diffusion.architectures import UNet2D

SIGMA_MIN, SIGMA_MAX = 0.02, 80.0  # Karras et al. 2022 end at 0.002, a quarter of a grey level of 8 bits
NOISE_MEAN, NOISE_STD = -1.6, 1.2  # of log sigma in training; strong noise is the linear estimate's affair
LINEAR_ABOVE = math.exp(NOISE_MEAN + 3 * NOISE_STD)  # 7.4; training draws stronger noise once in 750 times
WEIGHTS = "denoiser."  # prefix of a denoiser's tensors in a checkpoint


def linear_schedule(n_times: int = 1000) -> Tensor:
    """Return what is left of the signal's power at every time of the DDPM schedule.

    Parameters
    ----------
    n_times : int, default 1000
        Number of times.

    Returns
    -------
    Tensor
        (n_times,) float32, falling from nearly 1 to nearly 0; `alphas_cumprod` in diffusers.

    Notes
    -----
    alpha_bar_t = prod_s (1 - beta_s), beta linear in t (Ho et al. 2020, section 4): the first time replaces
    1e-4 of the power with noise, the last 0.02.
    """
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, n_times, dtype=torch.float64), 0).float()


def karras_sigmas(n_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX,
                  rho: float = 7.0) -> Tensor:
    """Return the noise levels that a sampler visits, dense where the image is decided.

    Parameters
    ----------
    n_steps : int
        Number of steps, at least 1.
    sigma_min, sigma_max : float, default 0.02 and 80
        Last level before zero, and first level.
    rho : float, default 7
        1 spaces the levels evenly; larger puts more of them near zero.

    Returns
    -------
    Tensor
        (n_steps + 1,) float32, falling, the last one 0.

    Raises
    ------
    ValueError
        If `n_steps` is below 1.

    Notes
    -----
    Karras et al. 2022, equation 5.

    Examples
    --------
    >>> [round(sigma, 2) for sigma in karras_sigmas(4).tolist()]
    [80.0, 12.68, 1.03, 0.02, 0.0]
    """
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}: expected at least 1")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (top + torch.linspace(0, 1, n_steps, dtype=torch.float64) * (bottom - top)) ** rho
    return torch.cat((levels, torch.zeros(1))).float()


def add_noise(images: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return images + sigma * noise, one `sigma` an image.

    Parameters
    ----------
    images, noise : Tensor
        (N, C, H, W)
    sigma : Tensor
        (N,) standard deviation of the noise; images are in [-1, 1].

    Returns
    -------
    Tensor
        (N, C, H, W)
    """
    return images + sigma.reshape(-1, 1, 1, 1) * noise


def _cosine_transform(size: int) -> Tensor:
    """Return the orthonormal DCT-II as a matrix, one wave a row."""
    k = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.float()


class Denoiser(nn.Module):
    """A network wrapped once: D(x, sigma, labels) estimates the image behind the noise.

    The wrapping is the preconditioning of Karras et al. 2022 with one change. Theirs treats pixels as
    independent with mean 0: c_skip x is then the best linear estimate (the Wiener filter). Radiographs are
    aligned, so their mean image and their main directions of variation say far more; `fit` measures both, and
    the network only learns what the best linear estimate misses. Without `fit` this is exactly their table 1
    with sigma_data = 0.5.

    Parameters
    ----------
    network : UNet2D
        Maps (N, C, H, W), (N,) and labels to (N, C, H, W).
    img_size : int
        Side of the square images in pixels.
    n_components : int, default 256
        Directions of variation that `fit` may keep.

    Attributes
    ----------
    num_classes : int or None
        Number of labels that the network knows.
    image_shape : tuple of int
        (C, H, W) of an image.
    recipe : dict
        What `load_denoiser` needs to build the same denoiser again, ready for JSON.

    Raises
    ------
    ValueError
        If the network cannot halve `img_size` as often as it has levels.

    Notes
    -----
    With mean m, directions u_k of variance v_k, and what they leave, in the cosine waves w_j of variance r_j,
    the linear estimate is, with y = x - m and g(v) = v / (v + sigma^2),
    W(x) = m + sum_k g(v_k) u_k u_k^T y + sum_j g(r_j) w_j w_j^T (y - sum_k u_k u_k^T y).
    Then D(x) = W(x) + c_out F(c_in y, log(sigma) / 4); c_out^2 is the mean squared error that W leaves, the
    sum of sigma^2 g(v) over all v_k and r_j, divided by the number of pixels.
    """

    def __init__(self, network: UNet2D, img_size: int, n_components: int = 256) -> None:
        super().__init__()
        if img_size % network.smallest_step:
            raise ValueError(f"img_size={img_size} cannot be halved down to the network's last level: "
                             f"choose a multiple of {network.smallest_step}, or fewer levels")
        self.network, self.num_classes = network, network.num_classes
        self.image_shape = (network.config["in_channels"], img_size, img_size)
        size = math.prod(self.image_shape)
        self.n_components = min(n_components, size)
        self.recipe = {"network": network.config, "img_size": img_size, "n_components": self.n_components}
        self.mean = nn.Buffer(torch.zeros(size))
        self.directions = nn.Buffer(torch.zeros(self.n_components, size))
        self.variances = nn.Buffer(torch.zeros(self.n_components))
        self.rest = nn.Buffer(torch.full((size,), 0.25))
        self.cosines = nn.Buffer(_cosine_transform(img_size), persistent=False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Measure mean and main directions of variation, which the network need not learn then.

        Parameters
        ----------
        images : Tensor
            (N, C, H, W), at least 2; a few hundred are enough.
        """
        flat = images.flatten(1).double().cpu()
        self.mean.copy_(flat.mean(0))
        flat -= flat.mean(0)
        n, size = flat.shape
        kept = min(self.n_components, n // 4)  # with more, the images would explain themselves
        # Products between images and between pixels have the same spectrum; the smaller matrix is quicker.
        power, vectors = torch.linalg.eigh((flat @ flat.T if n < size else flat.T @ flat) / n)
        vectors = vectors.flip(1)[:, :kept].T
        vectors = F.normalize(vectors @ flat, dim=1) if n < size else vectors
        self.directions.zero_()[:kept] = vectors
        self.variances.zero_()[:kept] = power.flip(0)[:kept].clamp(min=0)
        rest = (flat - flat @ vectors.T @ vectors).reshape(n, *self.image_shape)
        cosines = self.cosines.double().cpu()
        self.rest.copy_((cosines @ rest @ cosines.T).square().mean(0).flatten().clamp(min=1e-6))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Estimate the images behind the noise.

        Parameters
        ----------
        x : Tensor
            (N, C, H, W) images plus noise of standard deviation `sigma`.
        sigma : Tensor
            (N,) or a single noise level, above 0.
        labels : Tensor, optional
            (N,) integers below num_classes; num_classes itself, or None, tells no label.

        Returns
        -------
        Tensor
            (N, C, H, W)
        """
        sigma = sigma.expand(len(x))
        with torch.autocast(x.device.type, enabled=False):  # half precision would add noise to the image
            c_out, c_in = self.scales(sigma)
            linear = self.linear_estimate(x, sigma)
            centred = x - self.mean.reshape(self.image_shape)
        return linear + c_out * self.network(c_in * centred, sigma.log() / 4, labels)

    def linear_estimate(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return W(x), the best linear estimate of the images behind `x`, (N, C, H, W); `sigma` is (N,)."""
        gain, rest_gain = self._gains(sigma)
        centred = x.flatten(1) - self.mean
        along = centred @ self.directions.T
        rest = (centred - along @ self.directions).reshape(x.shape)
        waves = self.cosines @ rest @ self.cosines.T
        rest = self.cosines.T @ (rest_gain.reshape(x.shape) * waves) @ self.cosines
        return rest + (self.mean + (gain * along) @ self.directions).reshape(x.shape)

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_out, the root mean square error of W, and c_in, each (N, 1, 1, 1); `sigma` is (N,)."""
        gain, rest_gain = self._gains(sigma)
        power = sigma[:, None] ** 2
        error = power * (gain.sum(1, keepdim=True) + rest_gain.sum(1, keepdim=True)) / len(self.mean)
        total = power + (self.variances.sum() + self.rest.sum()) / len(self.mean)
        return error.sqrt()[..., None, None], total.rsqrt()[..., None, None]

    def _gains(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        power = sigma[:, None] ** 2
        return self.variances / (self.variances + power), self.rest / (self.rest + power)


def save_denoiser(path: str | Path, denoiser: Denoiser, notes: dict[str, Any] | None = None,
                  half: bool = False) -> None:
    """Write a denoiser and its recipe into one safetensors file.

    Parameters
    ----------
    path : str or Path
        The file to make or to replace.
    denoiser : Denoiser
        What to save.
    notes : dict, optional
        More fields for the recipe (steps, seed, ...), ready for JSON.
    half : bool, default False
        Store matrices in 16 bits: half the size, three digits.
    """
    tensors = {f"{WEIGHTS}{name}": tensor for name, tensor in denoiser.state_dict().items()}
    save_checkpoint(path, tensors, {**(notes or {}), **denoiser.recipe}, half=half)


def load_denoiser(path: str | Path) -> Denoiser:
    """Read a denoiser that `save_denoiser` or `train_image_diffusion` wrote.

    Parameters
    ----------
    path : str or Path
        The safetensors file.

    Returns
    -------
    Denoiser
        In evaluation mode, on the CPU, channels last.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, of another kind, of another architecture, or holds weights that are not
        finite; the message says which.
    """
    tensors, recipe = load_checkpoint(path)

    def build() -> Denoiser:
        return Denoiser(UNet2D(**recipe["network"]), recipe["img_size"], recipe["n_components"])

    try:
        with torch.device("meta"):  # shapes that take no memory
            shapes = build()
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path}: the recipe describes no denoiser of this project; train again") from error
    weights = fitting_weights(shapes, tensors, path, WEIGHTS)
    denoiser = build()
    denoiser.load_state_dict(weights)
    # A tenth quicker
    denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser.eval()
