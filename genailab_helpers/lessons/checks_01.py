"""Self-checks of lesson 1, data exploration."""

import shutil
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


def _expect(got: Any, right: float, what: str, mistakes: Mapping[str, float]) -> None:
    """Demand a number; where it is the result of a classic mistake, say which."""
    try:
        number = float(got)
    except (TypeError, ValueError) as error:
        raise NotSolved(f"{what} should be one number, got a {type(got).__name__}") from error
    for mistake, wrong in mistakes.items():
        if abs(number - wrong) < 1e-6 < abs(wrong - right):
            raise NotSolved(f"{what}: expected {right:.3f}, got {number:.3f}; {mistake}")
    expect_close(number, right, what)


@self_check("1.1")
def constant(constant_accuracy: Any) -> None:
    """Accuracy in test of the answer that is most frequent in training."""
    _expect(constant_accuracy(list("aaabb"), list("bbabbbb")), 1 / 7,
            "training labels aaabb, test labels bbabbbb", {
                "you chose the most frequent label of the test set; the answer is chosen in training": 6 / 7,
                "that is the accuracy in training; score the answer on the test labels": 3 / 5,
                "you divided by the training images; divide by the test images": 1 / 5,
                "one over the number of classes is a random answer, not a constant one": 1 / 2,
                "you counted the right answers; divide by the test images": 1.0,
                "you scored in per cent; give a fraction": 100 / 7})
    _expect(constant_accuracy(["x", "x", "y"], ["z", "y", "z"]), 0.0,
            "an answer that the test set never needs", {
                "you chose the most frequent label of the test set; the answer is chosen in training": 2 / 3})


@self_check("1.2")
def pixels(fingerprint: Any) -> None:
    """One value for one image, however it was saved."""
    grey = np.random.default_rng(12).choice(np.array([0, 255], np.uint8), (24, 16))
    changed = grey.copy()
    changed[5, 7] ^= 255
    with tempfile.TemporaryDirectory() as folder:
        def saved(name: str, image: np.ndarray, level: int = 6) -> Path:
            Image.fromarray(image).save(path := Path(folder, name), compress_level=level)
            return path

        first = saved("a.png", grey)
        path_of = {"copy": Path(shutil.copy(first, Path(folder, "b.png"))), "again": saved("c.png", grey, 0),
                   "changed": saved("d.png", changed), "mirrored": saved("e.png", grey[:, ::-1].copy()),
                   "reshaped": saved("f.png", grey.reshape(16, 24))}
        own, prints = fingerprint(first), {name: fingerprint(path) for name, path in path_of.items()}
    if not isinstance(own, Hashable):
        raise NotSolved(f"expected a value that can be a key of a dictionary, got a {type(own).__name__}: "
                        "a list or an array cannot; turn it into bytes, a tuple or a hash")
    for name, mistake in (
            ("copy", "a copy of the file under another name: expected one value, got two; "
                     "you used the name of the file"),
            ("again", "the same pixels, saved with another compression: expected one value, got two; "
                      "you compared the bytes of the files; decode them first")):
        if prints[name] != own:
            raise NotSolved(mistake)
    for name, mistake in (
            ("changed", "one pixel of two images differs: expected two values, got one; use every pixel, "
                        "at full size"),
            ("mirrored", "an image and its mirror image: expected two values, got one; a mean or a histogram "
                         "forgets where a pixel was"),
            ("reshaped", "24 x 16 and 16 x 24 pixels in the same order: expected two values, got one; you "
                         "lost the shape")):
        if prints[name] == own:
            raise NotSolved(mistake)


@self_check("1.3")
def moved(likeness: Any) -> None:
    """Correlation that survives inversion, mirror and a small shift."""
    whole = torch.randn(1, 30, 30, generator=torch.Generator().manual_seed(13))
    smooth = F.avg_pool2d(whole[None], 5, 1)[0]  # (1, 26, 26)
    first, other = smooth[:, 3:-3, 3:-3], smooth.flip(1).roll(9, 2)[:, 3:-3, 3:-3]
    shifts = {"right": smooth[:, 3:-3, 1:-5], "left": smooth[:, 3:-3, 5:-1],
              "down": smooth[:, 1:-5, 3:-3], "up": smooth[:, 5:-1, 3:-3]}
    for what, image, mistake in (
            ("itself", first, ""),
            ("its negative", -first, "; you kept the sign of the correlation"),
            ("its mirror image", first.flip(-1), "; you did not try the mirror image"),
            *((f"itself moved by 2 pixels {way}", image,
               "; what torch.roll pushes out comes back on the other side: compare only what both images show"
               if _by_roll(first, image, likeness) else "; try shifts in all four directions")
              for way, image in shifts.items()),
            ("its mirror image, moved", shifts["left"].flip(-1), "; combine mirror and shift")):
        got = float(likeness(first, image, 2))
        if abs(got - 1) > 1e-3:
            raise NotSolved(f"an image and {what}: expected 1.000, got {got:.3f}{mistake}")
    got = float(likeness(first, other, 2))
    if got > 0.9:
        raise NotSolved(f"two different images: expected less than 0.9, got {got:.3f}; "
                        "the likeness of everything is not 1")
    far = float(likeness(first, smooth[:, 3:-3, 6:], 2))
    if far > 0.97:
        raise NotSolved(f"an image moved by 3 pixels with reach=2: expected less than 0.97, got {far:.3f}; "
                        "you searched further than reach")


def _by_roll(a: torch.Tensor, b: torch.Tensor, likeness: Any) -> bool:
    """Tell whether the likeness is what a search with torch.roll finds."""
    rows = torch.stack([image.roll((down, right), (-2, -1)).flatten() for image in (b, b.flip(-1))
                        for down in range(-2, 3) for right in range(-2, 3)])
    best = max(abs(float(torch.corrcoef(torch.stack([a.flatten(), row]))[0, 1])) for row in rows)
    return abs(float(likeness(a, b, 2)) - best) < 1e-3


@self_check("1.4")
def leak(leaked_fraction: Any) -> None:
    """Fraction of test images whose patient is also in training."""
    patients = ["p", "p", "q", "q", "r", "r", "s", "s", "s", "t", "t", "p"]
    splits = ["train", "test", "test", "test", "test", "test", "train", "val", "test", "val", "test", "test"]
    what = "8 test images, 3 of patients with an image in training"
    _expect(leaked_fraction(patients, splits), 3 / 8, what, {
        "you divided by all images; divide by the images in test": 3 / 12,
        "you divided by the images in training; divide by the images in test": 3 / 2,
        "you counted patients of val as known; the model is trained on train alone": 4 / 8,
        "you counted patients; count images": 2 / 5,
        "a second image in test is no leak; the patient needs one in train": 8 / 8,
        "you counted the leaked images; divide by the images in test": 3.0,
        "you gave the fraction that is clean": 5 / 8})
    _expect(leaked_fraction(["p", "p", "q", "q"], ["test", "test", "train", "val"]), 0.0, "a clean split", {
        "a second image in test is no leak; the patient needs one in train": 1.0})
