"""Networks that grade and classify: small ones, pretrained ones, and a frozen one below a linear layer.

Each takes images (N, 1, H, W) in [-1, 1] and returns logits (N, n_outputs).
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genailab_helpers.features import N_FEATURES, lite0_features, lite0_network

# Convolutions: channels in and out, side, stride. Each output of the local network sees 18 x 18 pixels and
# lies in their middle. The logits are then means over places of what each place says by itself, so that a
# map of the places is the decision and no illustration of it (Brendel and Bethge, BagNets, ICLR 2019). Such a
# network is weaker than one that sees the whole image.
CNNS = {
    "small_cnn": ((1, 24, 3, 2), (24, 48, 3, 2), (48, 96, 3, 2), (96, 96, 3, 1), (96, 192, 3, 2),
                  (192, 192, 3, 1)),
    "local_cnn": ((1, 32, 4, 2), (32, 64, 4, 2), (64, 96, 3, 1), (96, 192, 1, 1)),
}
OWN_BACKBONES = (*CNNS, "efficientnet_lite0", "frozen_lite0")
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of photographs from 0 to 1, averaged over the colours
DROPOUT, FROZEN_DROPOUT = 0.2, 0.5  # the second: more features than images


class Network(nn.Module):
    """A body made for photographs, behind a door for radiographs.

    Parameters
    ----------
    body : nn.Module
        From (N, channels, H, W) to logits.
    last_layer : str
        Name of the layer of the body that gives the logits; it is new even where the body is pretrained.
    channels : int, default 3
        The grey image is repeated so often.
    """

    def __init__(self, body: nn.Module, last_layer: str, channels: int = 3) -> None:
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # fast on CPUs
        self.last_layer, self.channels = last_layer, channels
        self.mean = nn.Buffer(torch.tensor(PIXEL_MEAN))  # buffers are stored with the weights
        self.std = nn.Buffer(torch.tensor(PIXEL_STD))

    @property
    def head(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.body.get_submodule(self.last_layer)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, n_outputs) for images (N, 1, H, W) in [-1, 1]."""
        scaled = ((images + 1) / 2 - self.mean) / self.std
        colours = scaled.expand(-1, self.channels, -1, -1)
        return self.body(colours.contiguous(memory_format=torch.channels_last))


class FrozenLite0(nn.Module):
    """The features of the frozen Lite0 network, standardised, below one layer that is trained.

    Features of images seen before come from the cache of `lite0_features`; images are described at their own
    size.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.dropout = head, nn.Dropout(FROZEN_DROPOUT)
        self.mean, self.std = nn.Buffer(torch.zeros(N_FEATURES)), nn.Buffer(torch.ones(N_FEATURES))

    def describe(self, images: Tensor) -> Tensor:
        """Return the features (N, 1280) of images (N, 1, H, W) in [-1, 1]."""
        return torch.from_numpy(lite0_features(images, side=images.shape[-1])).float().to(images.device)

    def fit(self, described: Tensor) -> None:
        """Standardise by the features (N, 1280) of the training images."""
        self.mean.copy_(described.mean(0))
        self.std.copy_(described.std(0).clamp(min=1e-3))  # a feature that never varies stays small

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, n_outputs) for images (N, 1, H, W) in [-1, 1]."""
        return self.head(self.dropout((self.describe(images) - self.mean) / self.std))


def _lite0_maps() -> nn.Module:
    """Return the pretrained EfficientNet-Lite0 up to its last maps, all weights trainable.

    Its batch norms are folded into the convolutions: a third faster, and nothing depends on the batch.
    """
    network = copy.deepcopy(lite0_network("cpu")).requires_grad_()  # folding froze the biases
    network._fc, network.forward = nn.Identity(), network.extract_features
    return nn.Sequential(OrderedDict(network=network))


def _cnn(layers: Sequence[tuple[int, int, int, int]]) -> nn.Module:
    """Return convolutions for images of one channel and any size."""
    maps: list[nn.Module] = []
    for before, after, side, stride in layers:
        padding = side // 2 - (side == 4)  # even kernels: no shift between image and maps
        convolution = nn.Conv2d(before, after, side, stride, padding, bias=False)
        maps += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*maps)


def _known_to_torchvision(name: str) -> Any:
    """Return `torchvision.models` if it has a classification model of that name."""
    from torchvision import models  # 0.6 s, which our own networks do without

    if name not in models.list_models(module=models):
        raise ValueError(f"backbone={name!r}: expected {', '.join(OWN_BACKBONES)}, or a classification model "
                         "of torchvision such as resnet18")
    return models


def _torchvision_model(name: str, head: Callable[[int], nn.Module], pretrained: bool) -> Network:
    """Return a torchvision model whose last linear layer is replaced."""
    models = _known_to_torchvision(name)
    try:
        body = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise OSError(f"backbone={name!r}: its weights are downloaded at first use, which failed ({error}); "
                      "connect once, or take efficientnet_lite0, whose weights are installed") from error
    linear = [path for path, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linear or getattr(body, "aux_logits", False):
        raise ValueError(f"backbone={name!r}: its outputs do not come from one linear layer; "
                         "take another, such as resnet18")
    body.set_submodule(linear[-1], head(body.get_submodule(linear[-1]).in_features))
    return Network(body, linear[-1])


def least_size(name: str) -> int:
    """Return a lower bound of the numbers that a backbone holds, without building it; ours are small.

    The networks of torchvision are listed with their 1000 classes, whose layer has 4.1 million at most.
    """
    if name in OWN_BACKBONES:
        return 0
    return _known_to_torchvision(name).get_model_weights(name).DEFAULT.meta["num_params"] - 4_100_000


def build_backbone(name: str, head: int | Callable[[int], nn.Module], pretrained: bool = True,
                   seed: int = 0) -> Network | FrozenLite0:
    """Build a network for one-channel images.

    Parameters
    ----------
    name : str
        `small_cnn` (from scratch, fast on a CPU); `local_cnn` (from scratch, each of its places sees 18
        pixels: weak, and easy to explain); `efficientnet_lite0` (ImageNet weights that are installed
        with this package); `frozen_lite0` (the same, never trained, below one layer that is); or any
        classification model of torchvision, such as `resnet18` (weights downloaded at first use).
    head : int or callable
        Number of outputs of a linear last layer; or a function from the number of features to that layer, as
        the `head` of a loss in `losses`.
    pretrained : bool, default True
        False downloads nothing: a model of torchvision has random weights then. `small_cnn` and `local_cnn`
        have no others, the two of EfficientNet-Lite0 always start from those that are installed.
    seed : int, default 0
        Of the random weights; the global generator stays as it is.

    Returns
    -------
    Network or FrozenLite0
        From images (N, 1, H, W) in [-1, 1] to logits, in training mode. `head` is its last layer.

    Raises
    ------
    ValueError
        If there is no such network, or its last layer cannot be replaced.
    OSError
        If weights have to be downloaded and cannot be.
    """
    make_head = partial(nn.Linear, out_features=head) if isinstance(head, int) else head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "frozen_lite0":
            return FrozenLite0(make_head(N_FEATURES))
        if name not in OWN_BACKBONES:
            return _torchvision_model(name, make_head, pretrained)
        maps = _cnn(CNNS[name]) if name in CNNS else _lite0_maps()
        body = nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(DROPOUT))
        body.add_module("head", make_head(CNNS[name][-1][1] if name in CNNS else N_FEATURES))
        return Network(body, "head", 1 if name in CNNS else 3).train()
