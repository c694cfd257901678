"""Self-checks of lesson 5, COVID-19 classification."""

from typing import Any

import numpy as np
import torch

from genailab_helpers.classification import metrics
from genailab_helpers.datasets.index import image_hashes
from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


@self_check("5.1")
def rates(rates: Any) -> None:
    """Four shares of a table of two by two."""
    rng = np.random.default_rng(51)
    for share in (0.1, 0.5):
        positive = rng.random(200) < share
        called = (rng.random(200) + 0.4 * positive) > 0.6
        got = np.asarray(rates(positive, called), dtype=float)
        if got.shape != (4,):
            raise NotSolved(f"four numbers are wanted, but the shape {got.shape} came")
        for name, value in zip(("sensitivity", "specificity", "ppv", "npv"), got, strict=True):
            right = getattr(metrics, name)(positive, called)
            expect_close(value, right, f"the {name} of 200 films")


@self_check("5.2")
def ppv_at(ppv_at: Any) -> None:
    """Share of the ill among those called, at any prevalence."""
    # of 1,000 people 10 are ill; 9 of those are called, and 99 of the 990 others
    expect_close(ppv_at(0.9, 0.9, 0.01), 9 / 108, "the PPV at 1 %")
    for sensitivity, specificity, prevalence in ((0.7, 0.95, 0.5), (0.99, 0.6, 0.001), (0.5, 0.5, 0.3)):
        right = float(metrics.ppv_at_prevalence(sensitivity, specificity, prevalence))
        got = ppv_at(sensitivity, specificity, prevalence)
        expect_close(got, right, f"the PPV at a prevalence of {prevalence:.1%}")


@self_check("5.3")
def balanced_rows(balanced_rows: Any) -> None:
    """Rows that make every pair of class and mark equally common."""
    rng = np.random.default_rng(53)
    labels = rng.integers(0, 2, 300)
    marked = rng.random(300) < np.where(labels == 1, 0.9, 0.1)
    rows = np.asarray(balanced_rows(labels, marked))
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise NotSolved("row numbers are wanted: integers in one dimension")
    counts = [int(((labels[rows] == k) & (marked[rows] == m)).sum()) for k in (0, 1) for m in (False, True)]
    if len(set(counts)) != 1:
        raise NotSolved(f"the four groups should be equally large, but have {counts} rows")
    if missing := set(range(300)) - set(rows.tolist()):
        raise NotSolved(f"{len(missing)} films are used nowhere; repeat the rare, do not drop the common")
    if len(rows) > 4 * 160:
        raise NotSolved(f"{len(rows)} rows; the largest group needs no repetition")


@self_check("5.4")
def leaked(leaked: Any) -> None:
    """How many films a generator has seen."""
    films = torch.rand((12, 1, 16, 16), generator=torch.Generator().manual_seed(54)) * 2 - 1
    for n_seen in (0, 5):
        manifest = image_hashes(films[:6])
        got = leaked(manifest, films[6 - n_seen:])
        expect_close(got, n_seen, f"the number of films seen, where {n_seen} were")
    twice = torch.cat([films[:1], films[:1]])
    expect_close(leaked(image_hashes(films), twice), 2, "the number of images seen, where one comes twice")
