"""Self-checks of lesson 1, data exploration."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


@self_check("1.1")
def chance(chance_level: Any) -> None:
    """Accuracy of the most frequent answer."""
    for labels in (["a"], ["a", "b", "b", "c", "b"], ["x"] * 3 + ["y"] * 3):
        right = max(labels.count(name) for name in labels) / len(labels)
        got = float(chance_level(labels))
        if len(set(labels)) == 3 and abs(got - 1 / 3) < 1e-9:
            raise NotSolved("one over the number of classes is right only where all are equally frequent")
        expect_close(torch.tensor(got), torch.tensor(right), f"the chance level of {labels}")


@self_check("1.2")
def copies(find_copies: Any) -> None:
    """Groups of equal files."""
    with tempfile.TemporaryDirectory() as folder:
        contents = {"a.png": b"film", "b.png": b"other", "c.jpg": b"film", "d.png": b"third",
                    "e.png": b"film"}
        paths = [Path(folder, name) for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)
        groups = [sorted(Path(path).name for path in group) for group in find_copies(paths)]
    if any(len(group) == 1 for group in groups):
        raise NotSolved("a file alone is not a copy of anything; return only groups of two or more")
    if groups != [["a.png", "c.jpg", "e.png"]]:
        raise NotSolved("five files, of which a.png, c.jpg and e.png hold the same bytes: "
                        f"expected these three as the one group, got {groups}")


@self_check("1.3")
def likeness(likeness: Any) -> None:
    """Correlation that survives mirror and inversion."""
    generator = torch.Generator().manual_seed(13)
    a, b = torch.randn(2, 1, 16, 16, generator=generator)
    plain = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
    flipped = float(torch.corrcoef(torch.stack([a.flatten(), b.flip(-1).flatten()]))[0, 1])
    expect_close(torch.tensor(float(likeness(a, a))), torch.tensor(1.0), "a film and itself")
    for what, other in (("twice as bright", 2 * a + 0.3), ("mirrored", a.flip(-1)), ("inverted", -a),
                        ("mirrored and inverted", -a.flip(-1))):
        got = float(likeness(a, other))
        if abs(got - 1) > 1e-3:
            raise NotSolved(f"a film and itself {what} should have the likeness 1, got {got:.3f}")
    expect_close(torch.tensor(float(likeness(a, b))), torch.tensor(max(abs(plain), abs(flipped))),
                 "the likeness of two unlike films")


@self_check("1.4")
def leak(leaked_share: Any) -> None:
    """Share of test films whose patient is also in training."""
    patients = ["p", "p", "q", "q", "r", "s", "s", "s"]
    splits = ["train", "test", "test", "test", "test", "train", "val", "test"]
    got = float(leaked_share(patients, splits))
    if abs(got - 2 / 8) < 1e-9:
        raise NotSolved("divide by the films in test, not by all films")
    if abs(got - 3 / 5) < 1e-9:
        raise NotSolved("patient q has two films in test and none in training: that is no leak")
    expect_close(torch.tensor(got), torch.tensor(2 / 5), "the leaked share")
    expect_close(torch.tensor(float(leaked_share(["p", "q"], ["train", "test"]))), torch.tensor(0.0),
                 "the leaked share of a clean split")
