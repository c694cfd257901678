"""The network of lesson 3: a small U-Net that is thin where the image is large.

A convolution costs height x width x channels squared. So the image is first folded (pixel-unshuffle: every
2x2 square of pixels becomes four channels), the first level has few channels and the deep ones, on a
sixteenth of the pixels, have most. That is what learns most in a minute on a processor without a graphics
card.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FourierEmbedding(nn.Module):
    """Turn one number an image into cosines and sines, so that a linear layer can tell near values apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.logspace(-2, 3, dim // 2, base=2) * 2 * math.pi, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Map (N,) to (N, dim)."""
        angles = t[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the time embedding scales and shifts between them."""

    def __init__(self, channels: int, emb_dim: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = _group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as its shortcut

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (N, channels, H, W) and (N, emb_dim) to (N, channels, H, W)."""
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return x + h


class _Blocks(nn.ModuleList):
    """Blocks of one level, one after the other."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (N, channels, H, W) and (N, emb_dim) to (N, channels, H, W)."""
        for block in self:
            x = block(x, emb)
        return x


class Attention(nn.Module):
    """Let every position of the smallest level look at every other one (the left lung at the right one)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)
        return x + self.out(h)


class UNet2D(nn.Module):
    """U-Net that maps a noisy image, a time and an optional label to an image of the same size.

    Parameters
    ----------
    in_channels, out_channels : int, default 1
        Channels of the image that goes in and of the one that comes out.
    base_channels : int, default 32
        Channels of the first level; the others have this times their multiplier.
    channel_multipliers : tuple of int, default (1, 2, 4)
        One number a level; each level has half the side of the one before.
    num_res_blocks : int, default 1
        Residual blocks of a level, on the way down and on the way up alike.
    time_emb_dim : int, default 128
        Length of the vector that carries time and label, an even number.
    num_classes : int, optional
        Number of labels. None makes a network that knows no labels.
    patch_size : int, default 2
        Side of the squares that are folded into channels before the first level; 1 folds nothing.

    Raises
    ------
    ValueError
        If there are more than 200 blocks a way.

    Notes
    -----
    U-Net: Ronneberger et al. 2015; with time embedding: Ho et al. 2020; scale and shift: Dhariwal
    and Nichol 2021. The last convolution starts at zero, so an untrained network returns zeros.

    Examples
    --------
    >>> network = UNet2D(num_classes=2)
    >>> network(torch.zeros(4, 1, 32, 32), torch.zeros(4), torch.tensor([0, 1, 0, 1])).shape
    torch.Size([4, 1, 32, 32])
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 1, base_channels: int = 32,
                 channel_multipliers: tuple[int, ...] = (1, 2, 4), num_res_blocks: int = 1,
                 time_emb_dim: int = 128, num_classes: int | None = None, patch_size: int = 2) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, out_channels=out_channels, base_channels=base_channels,
            channel_multipliers=list(channel_multipliers), num_res_blocks=num_res_blocks,
            time_emb_dim=time_emb_dim, num_classes=num_classes, patch_size=patch_size)  # ready for JSON
        if max(1, num_res_blocks) * len(channel_multipliers) > 200:  # a recipe could ask for any number
            raise ValueError(f"num_res_blocks={num_res_blocks}: expected at most 200 blocks on all levels")
        self.num_classes = num_classes
        self.smallest_step = patch_size * 2 ** (len(channel_multipliers) - 1)
        widths = [base_channels * m for m in channel_multipliers]

        self.time = nn.Sequential(FourierEmbedding(time_emb_dim),
                                  nn.Linear(time_emb_dim, time_emb_dim), nn.SiLU())
        if num_classes is not None:  # one more row: the label of an image whose label is not told
            self.label = nn.Embedding(num_classes + 1, time_emb_dim)

        self.first = nn.Sequential(nn.PixelUnshuffle(patch_size),
                                   nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.shrink.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
                self.grow.append(nn.ConvTranspose2d(width, widths[level - 1], 2, stride=2))
            self.down.append(_Blocks(ResBlock(width, time_emb_dim) for _ in range(num_res_blocks)))
            self.up.append(_Blocks(ResBlock(width, time_emb_dim) for _ in range(num_res_blocks)))
        self.attention = Attention(widths[-1])
        last = nn.Conv2d(widths[0], out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.last = nn.Sequential(_group_norm(widths[0]), nn.SiLU(), last, nn.PixelShuffle(patch_size))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        x : Tensor
            (N, in_channels, H, W); H and W multiples of `smallest_step`.
        t : Tensor
            (N,) one number an image, of the order of 1: `log(sigma) / 4` of `Denoiser`, or a time in [0, 1].
        labels : Tensor, optional
            (N,) integers from 0 to num_classes; num_classes itself, or None, means that the label is not
            told.

        Returns
        -------
        Tensor
            (N, out_channels, H, W)

        Raises
        ------
        ValueError
            If there are labels, and the network knows none.
        """
        emb = self.time(t)
        if self.num_classes is not None:
            if labels is None:
                labels = torch.full((len(x),), self.num_classes, device=x.device)
            emb = emb + self.label(labels)
        elif labels is not None:
            raise ValueError("labels were given to a network without classes: build it with num_classes")

        h = self.first(x)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            h = blocks(h, emb)
            skips.append(h)
        h = self.attention(h)
        for level in reversed(range(len(self.up))):
            h = self.up[level](h, emb)
            if level:
                h = self.grow[level - 1](h) + skips[level - 1]
        return self.last(h)
