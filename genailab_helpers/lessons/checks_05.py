"""Self-checks of lesson 5, COVID-19 classification."""

from typing import Any

import numpy as np
from scipy.stats import binom

from genailab_helpers.classification import metrics
from genailab_helpers.lessons.exercises import NotSolved, expect_close, self_check


@self_check("5.1")
def screening(screening_threshold: Any) -> None:
    """Highest threshold that finds enough of the patients."""
    rng = np.random.default_rng(51)
    positive = np.arange(60) % 3 == 0  # 20 patients
    score = np.round(rng.normal(positive, 1.0), 3)
    patients, others = np.sort(score[positive])[::-1], np.sort(score[~positive])
    for wanted, needed in ((0.95, 19), (0.87, 18), (1.0, 20)):
        got, want = float(screening_threshold(positive, score, wanted)), patients[needed - 1]
        found = int((patients >= got).sum())
        wrong = {
            "this leaves out a fraction of *all* images; only the patients count": np.quantile(
                score, 1 - wanted),
            "this is the threshold for the *specificity*; begin with the patients": np.quantile(
                others, wanted),
            "this is the lowest score of all, with the most false alarms; go up as far as you may":
                score.min(),
        }
        for mistake, value in wrong.items():
            if abs(got - value) < 1e-9 and abs(value - want) > 1e-9:
                raise NotSolved(f"sensitivity {wanted}: expected {want:.4g}, got {got:.4g}: {mistake}")
        if found < needed:
            raise NotSolved(f"sensitivity {wanted}: expected at least {needed} of 20 patients found, got "
                            f"{found}; a quantile between two scores, or rounding down, loses one")
        if found > needed:
            raise NotSolved(f"sensitivity {wanted}: expected {needed} of 20 patients found, got {found}; a "
                            "higher threshold keeps the promise with fewer false alarms")
        if (others >= got).sum() > (others >= want).sum():
            raise NotSolved(f"sensitivity {wanted}: expected {want:.4g}, got {got:.4g}: {found} patients are "
                            "found, but a higher threshold finds as many with fewer false alarms")


@self_check("5.2")
def ppv_at(ppv_at: Any) -> None:
    """Fraction of the ill among those predicted positive, at any prevalence."""
    for caught, spared, prevalence in ((0.9, 0.8, 0.01), (0.7, 0.95, 0.4), (0.99, 0.6, 0.001)):
        got = float(ppv_at(caught, spared, prevalence))
        want = float(metrics.ppv_at_prevalence(caught, spared, prevalence))
        hit, alarm = caught * prevalence, (1 - spared) * (1 - prevalence)
        for mistake, value in (
                ("false alarms come from the healthy: weigh 1 - specificity by 1 - prevalence",
                 hit / (hit + 1 - spared)),
                ("hits come from the ill: weigh the sensitivity by the prevalence",
                 caught / (caught + alarm)),
                ("the prevalence is missing; your number is that of a population half of whom are ill",
                 caught / (caught + 1 - spared)),
                ("you divided by all people; divide by those predicted positive", hit),
                ("this is the false alarms' fraction; the PPV is that of the hits", 1 - want),
                ("healthy people raise a false alarm with probability 1 - specificity, not specificity",
                 hit / (hit + spared * (1 - prevalence)))):
            if abs(got - value) < 1e-6 and abs(value - want) > 1e-6:
                raise NotSolved(f"at a prevalence of {prevalence:.1%}: expected {want:.4g}, got {got:.4g}: "
                                + mistake)
        expect_close(got, want, f"the PPV at a prevalence of {prevalence:.1%}")


@self_check("5.3")
def balanced_rows(balanced_rows: Any) -> None:
    """Rows that make every pair of class and mark equally common."""
    rng = np.random.default_rng(53)
    labels = (rng.random(300) < 0.4).astype(int)
    marked = rng.random(300) < np.where(labels == 1, 0.9, 0.1)
    rows = np.asarray(balanced_rows(labels, marked))
    if rows.dtype == bool:
        raise NotSolved("expected row numbers, got a Boolean mask, which cannot name an image twice")
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise NotSolved(f"expected row numbers, integers (N,), got {rows.dtype} {rows.shape}")
    counts = {(k, m): int(((labels[rows] == k) & (marked[rows] == m)).sum())
              for k in (0, 1) for m in (False, True)}
    got = f"expected four equally large groups, got {list(counts.values())}: "
    if len(set(counts.values())) != 1:
        of_labels, of_marks = np.bincount(labels[rows], minlength=2), np.bincount(marked[rows], minlength=2)
        if of_labels[0] == of_labels[1] and of_marks[0] != of_marks[1]:
            raise NotSolved(got + "you balanced the labels alone; the marker still tells them apart")
        if of_marks[0] == of_marks[1] and of_labels[0] != of_labels[1]:
            raise NotSolved(got + "you balanced the marker alone; it still goes with the label")
        raise NotSolved(got + "count each pair of label and marker")
    if missing := set(range(300)) - set(rows.tolist()):
        raise NotSolved(f"expected every image to be used, got {len(missing)} that are not: repeat the rare "
                        "ones, do not drop the common ones")
    largest = max(int(((labels == k) & (marked == m)).sum()) for k, m in counts)
    if len(rows) > 4 * largest:
        raise NotSolved(f"expected {4 * largest} rows, got {len(rows)}: the largest group needs no "
                        "repetition")


@self_check("5.4")
def best_of(best_of: Any) -> None:
    """Mean accuracy of the luckiest of several equally good networks."""
    for n_models, accuracy, n_images in ((5, 0.88, 1000), (12, 0.7, 200), (1, 0.6, 100)):
        first, again = (float(best_of(n_models, accuracy, n_images)) for _ in range(2))
        right = np.arange(n_images + 1)
        below = binom.cdf(right, n_images, accuracy) ** n_models  # P(the best has at most so many right)
        want = float((1 - below).sum() / n_images)
        error = (accuracy * (1 - accuracy) / n_images) ** 0.5
        what = f"best of {n_models}, accuracy {accuracy}, {n_images} images: expected about {want:.4f}, "
        if first > 1:
            raise NotSolved(what + f"got {first:.4g}: a count of images; divide by their number")
        if abs(first - want) <= 0.1 * error and abs(again - want) <= 0.1 * error:
            continue
        for mistake, value in (
                ("this is the mean of all networks; the best one is reported", accuracy),
                ("this is the worst of them; the best one is reported", 2 * accuracy - want)):
            if abs(first - value) <= 0.1 * error:
                raise NotSolved(what + f"got {first:.4f}: {mistake}")
        if first > want + 1.5 * error:
            raise NotSolved(what + f"got {first:.4f}: too lucky. Take the best of each play, then the mean "
                            "of the plays, not the best of all plays")
        raise NotSolved(what + f"got {first:.4f}: a few plays scatter; take the mean of thousands")
