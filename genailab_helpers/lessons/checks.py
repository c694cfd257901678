"""Self-checks of the exercises: a small example each, what is expected, and the classic mistakes by name."""

import shutil
import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from genailab_helpers.classification.metrics import ppv_at_prevalence
from genailab_helpers.diffusion.denoiser import linear_schedule

CHECKS: dict[str, Callable[[Any], None]] = {}  # "lesson.exercise" -> f(answer), which raises NotSolved


class NotSolved(Exception):
    """What a self-check raises: what is wrong with an answer, without giving the right one."""


def self_check(number: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function `f(answer) -> None` as the self-check of an exercise, for example "2.1"."""
    def register(judge: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[number] = judge
        return judge
    return register


def expect(got: Any, want: Any, what: str, mistakes: Mapping[str, Any] | None = None,
           near: float = 1e-3) -> None:
    """Demand the right numbers; say what was expected, what came, and which mistake gives that.

    Parameters
    ----------
    got, want : array_like
        The learner's numbers and the right ones, of one shape.
    what : str
        What the numbers are, to begin the message with.
    mistakes : mapping of str to array_like, optional
        Words for a classic mistake, and the numbers that it gives.
    near : float, default 1e-3
        Numbers count as equal that differ by no more than this part of the largest right value (in size).

    Raises
    ------
    NotSolved
        If `got` is not made of numbers, has another shape, is not finite, or is not right.
    """
    def equal(some: Tensor, others: Tensor) -> Tensor:
        return (some - others).abs() <= near * torch.maximum(some.abs().max(), others.abs().max())

    right = torch.as_tensor(want, dtype=torch.float64, device="cpu").detach()
    try:
        numbers = torch.as_tensor(got, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotSolved(f"{what} should be made of numbers, yours is a {type(got).__name__}") from error
    if numbers.shape != right.shape:
        raise NotSolved(f"{what} should have shape {tuple(right.shape)}, yours has {tuple(numbers.shape)}")
    if n_infinite := int((~numbers.isfinite()).sum()):
        raise NotSolved(f"{what} should be finite, {n_infinite} of your {numbers.numel()} values are not")
    hint = ""
    for words, value in (mistakes or {}).items():
        wrong = torch.as_tensor(value, dtype=torch.float64)
        if wrong.shape == right.shape and equal(numbers, wrong).all() and not equal(wrong, right).all():
            hint = f"; {words}"
            break
    off = (numbers - right).abs() > near * right.abs().max()
    if hint or off.any():
        places = torch.nonzero(off if off.any() else numbers != right)
        place = tuple(places[0].tolist())
        where = f" at {list(place)} ({len(places)} of {right.numel()} places are wrong)" if place else ""
        raise NotSolved(f"{what}{where}: expected {right[place]:.4g}, got {numbers[place]:.4g}{hint}")


@self_check("1.1")
def _constant(constant_accuracy: Any) -> None:
    of_test = "you chose the most frequent label of the test set; the answer is chosen in training"
    expect(constant_accuracy(list("aaabb"), list("bbabbbb")), 1 / 7,
           "training labels aaabb, test labels bbabbbb", {
               of_test: 6 / 7,
               "that is the accuracy in training; score the answer on the test labels": 3 / 5,
               "you divided by the training images; divide by the test images": 1 / 5,
               "one over the number of classes is a random answer, not a constant one": 1 / 2,
               "you counted the right answers; divide by the test images": 1.0,
               "you scored in per cent; give a fraction": 100 / 7})
    expect(constant_accuracy(["x", "x", "y"], ["z", "y", "z"]), 0.0, "an answer that is never needed",
           {of_test: 2 / 3})


@self_check("1.2")
def _fingerprint(fingerprint: Any) -> None:
    grey = np.random.default_rng(12).choice(np.array([0, 255], np.uint8), (24, 16))
    changed = grey.copy()
    changed[5, 7] ^= 255
    with tempfile.TemporaryDirectory() as folder:
        def saved(name: str, image: np.ndarray, level: int = 6) -> Path:
            Image.fromarray(image).save(path := Path(folder, name), compress_level=level)
            return path

        first = saved("a.png", grey)
        others = {
            "a copy of the file, renamed: expected one value, got two; you used the name of the file":
                Path(shutil.copy(first, Path(folder, "b.png"))),
            "the same pixels, saved with another compression: expected one value, got two; you compared the "
            "bytes of the files; decode them first": saved("c.png", grey, 0),
            "one pixel of two images differs: expected two values, got one; use every pixel, at full size":
                saved("d.png", changed),
            "an image and its mirror image: expected two values, got one; a mean or a histogram forgets "
            "where a pixel was": saved("e.png", grey[:, ::-1].copy()),
            "24 x 16 and 16 x 24 pixels in the same order: expected two values, got one; you lost the shape":
                saved("f.png", grey.reshape(16, 24))}
        own = fingerprint(first)
        if not isinstance(own, Hashable):
            raise NotSolved(f"expected a key for a dictionary, got a {type(own).__name__}, which is none; "
                            "turn it into bytes, a tuple or a hash")
        for mistake, path in others.items():
            if (fingerprint(path) == own) != ("expected one value" in mistake):
                raise NotSolved(mistake)


@self_check("1.3")
def _likeness(likeness: Any) -> None:
    whole = torch.randn(1, 30, 30, generator=torch.Generator().manual_seed(13))
    smooth = F.avg_pool2d(whole[None], 5, 1)[0]  # (1, 26, 26)
    first, other = smooth[:, 3:-3, 3:-3], smooth.flip(1).roll(9, 2)[:, 3:-3, 3:-3]
    shifts = {"right": smooth[:, 3:-3, 1:-5], "left": smooth[:, 3:-3, 5:-1],
              "down": smooth[:, 1:-5, 3:-3], "up": smooth[:, 5:-1, 3:-3]}
    roll = ("what torch.roll pushes out comes back on the other side: compare only what both images show, "
            "and try shifts in all four directions")
    for what, image, mistake in (
            ("itself", first, "it is like itself"),
            ("its negative", -first, "you kept the sign of the correlation"),
            ("its mirror image", first.flip(-1), "you did not try the mirror image"),
            *((f"itself moved by 2 pixels {way}", image, roll) for way, image in shifts.items()),
            ("its mirror image, moved", shifts["left"].flip(-1), "combine mirror and shift")):
        got = float(likeness(first, image, 2))
        expect(got, 1.0, f"an image and {what}", {mistake: got})
    for what, image, most, mistake in (
            ("two different images", other, 0.9, "the likeness of everything is not 1"),
            ("an image moved by 3 pixels with reach=2", smooth[:, 3:-3, 6:], 0.97,
             "you searched further than reach")):
        got = float(likeness(first, image, 2))
        if got > most:
            raise NotSolved(f"{what}: expected less than {most}, got {got:.3f}; {mistake}")


@self_check("1.4")
def _leaked_fraction(leaked_fraction: Any) -> None:
    second = "a second image in test is no leak; the patient needs one in train"
    patients = ["p", "p", "q", "q", "r", "r", "s", "s", "s", "t", "t", "p"]
    splits = ["train", "test", "test", "test", "test", "test", "train", "val", "test", "val", "test", "test"]
    expect(leaked_fraction(patients, splits), 3 / 8, "8 test images, 3 of patients in training", {
        "you divided by all images; divide by the images in test": 3 / 12,
        "you divided by the images in training; divide by the images in test": 3 / 2,
        "you counted patients of val as known; the model is trained on train alone": 4 / 8,
        "you counted patients; count images": 2 / 5,
        second: 8 / 8,
        "you counted the leaked images; divide by the images in test": 3.0,
        "you gave the fraction that is clean": 5 / 8})
    expect(leaked_fraction(["p", "p", "q", "q"], ["test", "test", "train", "val"]), 0.0, "a clean split",
           {second: 1.0})


@self_check("2.1")
def _cortex(cortex: Any) -> None:
    distance, outer, inner = torch.tensor([0.0, 0.2, 0.45, 0.8]), 0.6, 0.4

    def chord(radius: float) -> Tensor:
        return 2 * (radius**2 - distance**2).clamp(min=0).sqrt()

    right, got = chord(outer) - chord(inner), torch.as_tensor(cortex(distance, outer, inner))
    if torch.isnan(got).any():
        raise NotSolved("expected 0 where a ray misses a cylinder, got nan (negative number under a root)")
    expect(got, right, "the path length in the wall at distances 0, 0.2, 0.45 and 0.8 cm", {
        "that is the path through a solid cylinder; leave out the marrow": chord(outer),
        "that is half of the path; a ray crosses the wall on both sides": right / 2,
        "that is a cylinder of radius outer - inner; take the difference of two paths, not the path of a "
        "difference": chord(outer - inner),
        "that is the wall's thickness everywhere; away from the axis a ray cuts the wall at a slant":
            torch.full_like(distance, 2 * (outer - inner))})


@self_check("2.2")
def _bone_thickness(bone_thickness: Any) -> None:
    mu, soft, bone = np.array([[0.24, 0.80], [0.18, 0.36]]), np.array([10.0, 15.0]), np.array([0.0, 1.5])
    low, high = (np.exp(-(row[0] * soft + row[1] * bone)) for row in mu)
    lines = -np.log(np.stack([low, high]))
    expect(bone_thickness(low, high, mu), bone, "the bone behind 10 cm and 15 cm of soft tissue", {
        "that is the soft tissue (10 and 15 cm); expected the bone (0 and 1.5 cm)": soft,
        "the line integral is minus the logarithm": -bone,
        "you solved for the fractions themselves; only their logarithms add up":
            np.linalg.solve(mu, np.stack([low, high]))[1],
        "the rows of mu are energies and its columns tissues; you used mu transposed":
            np.linalg.solve(mu.T, lines)[1],
        "you exchanged the low and the high energy": np.linalg.solve(mu, lines[::-1])[1],
        "you took log10; the Beer-Lambert law needs the natural logarithm": bone / np.log(10)})


@self_check("2.3")
def _heart_share(ratio: Any) -> None:
    heart, right_lung, left_lung = torch.zeros(3, 12, 20, dtype=torch.bool)
    heart[6:8, 7:11] = heart[8:10, 8:14] = True  # 7 columns in all, 6 in its widest row
    right_lung[2:7, 3:8] = right_lung[7:11, 1:7] = True
    left_lung[2:7, 12:17] = left_lung[7:11, 13:19] = True  # both: columns 1 to 18
    lungs = right_lung | left_lung
    expect(float(ratio(heart, right_lung, left_lung)), 7 / 18,
           "the ratio for a heart 7 columns wide in a chest 18 columns wide", {
               "that is a ratio of areas; take widths": float(heart.sum() / (lungs | heart).sum()),
               "that is a ratio of areas, without the heart in the chest": float(heart.sum() / lungs.sum()),
               "you counted pixels of the lungs in a row; what lies between the lungs is chest too": 7 / 12,
               "you took the heart's widest row; its two borders may be in another row each": 6 / 18,
               "the last column minus the first is one too few; both ends count": 6 / 17,
               "that is a ratio of heights; columns run across the chest, rows run down": 4 / 9,
               "one lung is not the width of the chest; go from the outer border of one to that of the other":
                   7 / 7,
               "that is the chest over the heart; expected the heart over the chest": 18 / 7})


@self_check("2.4")
def _noise_of(noise_of: Any) -> None:
    generator = torch.Generator().manual_seed(24)
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[5:30, 8:36] = True
    anatomy = torch.linspace(-0.1, 0.1, 40).expand(40, 40)
    for level in (0.02, 0.2):
        first, second = (anatomy + level * torch.randn(40, 40, generator=generator) for _ in range(2))
        difference = (first - second)[region]
        expect(noise_of(first, second, region), difference.std() / 2**0.5,
               f"two exposures with noise of about {level}", {
                   "that is one exposure, which holds the anatomy too": first[region].std(),
                   "that is the difference, which carries the noise of two exposures": difference.std(),
                   "you divided by 2; variances add up, standard deviations do not": difference.std() / 2,
                   "that is the variance; expected its square root": difference.var() / 2,
                   "that is the average of both, which holds the anatomy too":
                       ((first + second) / 2)[region].std(),
                   "you left out the region": (first - second).std() / 2**0.5}, near=5e-3)


@self_check("3.1")
def _ddpm_time(ddpm_time: Any) -> None:
    left = linear_schedule(1000)
    squared = (1 - left) / left
    for sigma in (0.1, 0.5, 3.0):
        def nearest(values: Tensor, sigma: float = sigma) -> int:
            return int((values / sigma).log().abs().argmin())

        expect(int(ddpm_time(sigma, left)), nearest(squared.sqrt()), f"the index of noise level {sigma}", {
            "you compared the noise alone, sqrt(1 - alpha_bar); the image has been shrunk, too":
                nearest((1 - left).sqrt()),
            "you compared powers; a noise level is a standard deviation, so take the root": nearest(squared),
            "you compared image to noise; it is noise to image": nearest(squared.rsqrt())})


@self_check("3.2")
def _best_fraction(best_fraction: Any) -> None:
    for sigma, s in ((0.4, 0.25), (0.1, 0.3), (2.0, 1.0)):
        want = s**2 / (s**2 + sigma**2)
        expect(float(best_fraction(sigma, s)), want, f"the fraction at sigma {sigma} and deviation {s}", {
            "deviations add up as squares: variances are what is compared": s / (s + sigma),
            "this is the fraction of the noise; much noise means: stay at the mean image": 1 - want,
            "the deviation of the images is not 1": 1 / (1 + sigma**2),
            "this c makes the variance right, not the error small": want**0.5})


@self_check("3.3")
def _heun(step: Any) -> None:
    x = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 + (x - 0.3) / (1 + sigma**2)

    for high, low in ((2.0, 0.5), (0.3, 0.1)):
        sigma, lower = torch.tensor(high), torch.tensor(low)
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (lower - sigma) * slope
        ahead = (euler - denoiser(euler, lower)) / lower
        expect(step(denoiser, x, sigma, lower), x + (lower - sigma) * (slope + ahead) / 2,
               f"the step from {high} to {low}", {
                   "this is Euler's step: the slope at the other end is not used": euler,
                   "only the slope at the other end is used: take the mean of both":
                       x + (lower - sigma) * ahead,
                   "the second half began where the trial landed: go back to x first":
                       euler + (lower - sigma) * (slope + ahead) / 2,
                   "the second slope was divided by sigma: where it is taken, the noise level is lower":
                       x + (lower - sigma) * (slope + ahead * lower / sigma) / 2})
    last = torch.as_tensor(step(denoiser, x, sigma, torch.tensor(0.0)))
    if not last.isfinite().all():
        raise NotSolved("at lower = 0 your step is not finite: there is no second slope there")
    expect(last, denoiser(x, sigma), "the step to noise level 0 (Euler's)")


@self_check("3.4")
def _novelty(novelty: Any) -> None:
    generator = torch.Generator().manual_seed(34)
    train, held_out, new = (torch.randn(n, 16, generator=generator) for n in (60, 41, 31))
    copies = train[:31] + 0.01 * torch.randn(31, 16, generator=generator)
    mixed = torch.cat([copies[:8], new[:23]])
    of_new, of_copies, of_mixed = (float(novelty(some, train, held_out)) for some in (new, copies, mixed))
    doubled = float(novelty(2 * new, 2 * train, 2 * held_out))
    expect(doubled, of_new, "new images at twice the contrast", {
        "the number should stay; divide by what held-out images have": doubled})
    if not of_copies < 0.1:
        raise NotSolved(f"copies with faint noise: expected nearly 0, got {of_copies:.3g}; only the "
                        "*nearest* training image counts, not the mean of all")
    for got, what, mistake in (
            (of_new, "new images", "compare generated with train, and held-out with train"),
            (of_mixed, "8 copies among 31 images", "by a median; the least distance is that of one image")):
        if not 0.8 < got < 1.25:
            raise NotSolved(f"{what}: expected about 1, got {got:.3g}; {mistake}")


@self_check("4.1")
def _kappa(kappa: Any) -> None:
    rng = np.random.default_rng(41)
    a = rng.integers(0, 5, 60)
    b = np.where(rng.random(60) < 0.6, a, rng.integers(0, 4, 60))
    prices = {None: lambda i, j: i != j, "linear": lambda i, j: np.abs(i - j),
              "quadratic": lambda i, j: (i - j) ** 2}
    for name, price in prices.items():
        right, seen = cohen_kappa_score(a, b, weights=name), float(np.mean(price(a, b)))
        uniform = float(np.mean(price(*np.meshgrid(np.arange(5), np.arange(5)))))
        expect(kappa(a, b, price), right, f"the {name or 'plain'} kappa of 60 images", {
            "this is the cost divided by the cost by chance; kappa is 1 minus that": 1 - right,
            "this knows no chance; divide the cost by the cost by chance before you subtract it": 1 - seen,
            "you divided sums; there are 60 pairs seen and 60 x 60 by chance, so divide means":
                1 - (1 - right) / 60,
            "chance is not that all grades are equally frequent; pair the grades that the raters gave":
                1 - seen / uniform})
    expect(kappa(a, a, prices["quadratic"]), 1.0, "the kappa of a rater with himself")


@self_check("4.2")
def _coral_loss(coral_loss: Any) -> None:
    for logits in (torch.tensor([2.0, 0.7, -0.4, -3.0]), torch.tensor([60.0, 30.0, -80.0, -200.0])):
        for grade in range(5):
            got = torch.as_tensor(coral_loss(logits, grade))
            what = f"the loss of logits {logits.tolist()} at grade {grade}"
            if got.numel() != 1:
                raise NotSolved(f"{what}: expected one number, got {got.numel()}; add up the four questions")
            if not got.isfinite():
                raise NotSolved(f"{what}: expected a finite number, got {float(got)}; the logarithm of a "
                                "sigmoid overflows, so use torch.nn.functional.logsigmoid")
            right, at_least, below = (
                float(F.binary_cross_entropy_with_logits(logits, yes.float(), reduction="sum"))
                for yes in (grade > torch.arange(4), grade >= torch.arange(4), grade <= torch.arange(4)))
            expect(got.reshape(()), right, what, {
                "this is the mean over the questions; CORAL adds them up": right / 4,
                "the question is whether the grade is above k, not at least k: grade 2 is not above 2":
                    at_least,
                "yes and no are swapped: a high logit says that the grade is above": below})


@self_check("4.3")
def _error_by_chance(error_by_chance: Any) -> None:
    confidence, sets = np.random.default_rng(43).uniform(0.55, 0.95, 60), []

    def error(right: np.ndarray, confidence: np.ndarray) -> float:
        sets.append(np.asarray(right, dtype=float))
        return float(np.abs(np.bincount((confidence > 0.75).astype(int), right - confidence)).sum() / 60)

    got = error_by_chance(confidence, error)
    simulated, rng = np.array(sets), np.random.default_rng(0)
    right = float(np.mean([error(rng.random(60) < confidence, confidence) for _ in range(2000)]))
    if not len(simulated):
        raise NotSolved("expected many calls of error(right, confidence), got none")
    if ((simulated != 0) & (simulated != 1)).any():
        raise NotSolved("expected arrays of True and False, got numbers between; each image is either right "
                        "or wrong, at random")
    if len(simulated) > 1 and (simulated == simulated[0]).all():
        raise NotSolved(f"expected test sets that differ, got {len(simulated)} times the same one; make the "
                        "generator once, before the loop, and draw anew for each test set")
    if len(simulated) < 50:
        raise NotSolved(f"expected the mean over 200 test sets, got {len(simulated)}; one of them is luck")
    chances = {"": confidence,
               "an image is right where the random number is below its confidence, not above": 1 - confidence,
               "each image has a probability of its own to be right: its confidence": np.full(60, 0.5),
               "all images got the same probability to be right; use the confidence of each image":
                   np.full(60, simulated.mean())}
    far = {mistake: np.abs(simulated.mean(0) - chance).mean() for mistake, chance in chances.items()}
    nearest = min(far, key=lambda mistake: far[mistake] + 0.01 * (mistake != ""))
    expect(got, right, "the mean error of 60 images", {nearest or "return the mean error": got},
           near=0.2 if not nearest else 0)


@self_check("4.4")
def _threshold_for(threshold_for: Any) -> None:
    rng = np.random.default_rng(44)
    positive = rng.random(83) < 0.35
    score = (rng.random(83) + 0.5 * positive).round(2)  # ties
    for wanted in (0.5, 0.8, 0.9, 1.0):
        caught = {t: (score[positive] >= t).mean() for t in score[positive]}
        right = max(t for t, fraction in caught.items() if fraction >= wanted - 1e-9)
        expect(threshold_for(wanted, positive, score), right, f"the threshold for {wanted:.0%}", {
            "this counts all images; the fraction is of the positive ones":
                np.sort(score)[::-1][int(np.ceil(wanted * 83)) - 1],
            "this catches all positive images, but it is not the highest that catches enough":
                score[positive].min(),
            "this is the quantile from the wrong end: it misses the wanted fraction":
                np.quantile(score[positive], wanted),
            "this lies between two scores of positive images; take one that occurs":
                np.quantile(score[positive], 1 - wanted)})
    hundred = np.arange(100) / 100
    expect(threshold_for(0.07, np.ones(100, dtype=bool), hundred), 0.93,
           "the threshold that catches seven of a hundred", {
               "0.07 * 100 is a hair above 7 in floating point; subtract a hair before you round up": 0.92})


@self_check("5.1")
def _screening_threshold(screening_threshold: Any) -> None:
    rng = np.random.default_rng(51)
    positive = np.arange(60) % 3 == 0  # 20 patients
    score = np.round(rng.normal(positive, 1.0), 3)
    patients, others = np.sort(score[positive])[::-1], score[~positive]
    for wanted, needed in ((0.95, 19), (0.87, 18), (1.0, 20)):
        got, want = float(screening_threshold(positive, score, wanted)), patients[needed - 1]
        found = int((patients >= got).sum())
        if found == needed and (others >= got).sum() == (others >= want).sum():
            continue  # between two scores there are many right thresholds
        expect(got, want, f"sensitivity {wanted}, so {needed} of 20 patients, and you find {found}", {
            "this leaves out a fraction of *all* images; only the patients count":
                np.quantile(score, 1 - wanted),
            "this is the threshold for the *specificity*; begin with the patients":
                np.quantile(others, wanted),
            "this is the lowest score of all, with the most false alarms; go up as far as you may":
                score.min(),
            "a quantile between two scores, or rounding down, loses one": got if found < needed else np.inf,
            "a higher threshold keeps the promise with fewer false alarms": got}, near=1e-9)


@self_check("5.2")
def _ppv_at(ppv_at: Any) -> None:
    for caught, spared, prevalence in ((0.9, 0.8, 0.01), (0.7, 0.95, 0.4), (0.99, 0.6, 0.001)):
        want = float(ppv_at_prevalence(caught, spared, prevalence))
        hit, alarm = caught * prevalence, (1 - spared) * (1 - prevalence)
        got = float(ppv_at(caught, spared, prevalence))
        expect(got, want, f"the PPV at a prevalence of {prevalence:.1%}", {
            "false alarms come from the healthy: weigh 1 - specificity by 1 - prevalence":
                hit / (hit + 1 - spared),
            "hits come from the ill: weigh the sensitivity by the prevalence": caught / (caught + alarm),
            "the prevalence is missing; your number is that of a population half of whom are ill":
                caught / (caught + 1 - spared),
            "you divided by all people; divide by those predicted positive": hit,
            "this is the false alarms' fraction; the PPV is that of the hits": 1 - want,
            "healthy people raise a false alarm with probability 1 - specificity, not specificity":
                hit / (hit + spared * (1 - prevalence))}, near=1e-6)


@self_check("5.3")
def _balanced_rows(balanced_rows: Any) -> None:
    rng = np.random.default_rng(53)
    labels = (rng.random(300) < 0.4).astype(int)
    marked = rng.random(300) < np.where(labels == 1, 0.9, 0.1)
    rows = np.asarray(balanced_rows(labels, marked))
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        mask = "; a Boolean mask cannot name an image twice" if rows.dtype == bool else ""
        raise NotSolved(f"expected row numbers, integers (N,), got {rows.dtype} {rows.shape}{mask}")
    groups = np.array([[np.sum((labels == k) & (marked == m)) for m in (False, True)] for k in (0, 1)])
    counts = np.array([[np.sum((labels[rows] == k) & (marked[rows] == m)) for m in (False, True)]
                       for k in (0, 1)])
    if counts.min() != counts.max():
        even = len(set(counts.sum(1))) == 1, len(set(counts.sum(0))) == 1  # of labels, of markers
        mistake = {(True, False): "you balanced the labels alone; the marker still tells them apart",
                   (False, True): "you balanced the marker alone; it still goes with the label"}
        raise NotSolved(f"expected four equally large groups, got {counts.ravel().tolist()}: "
                        + mistake.get(even, "count each pair of label and marker"))
    if missing := set(range(300)) - set(rows.tolist()):
        raise NotSolved(f"expected every image to be used, got {len(missing)} that are not: repeat the rare "
                        "ones, do not drop the common ones")
    if len(rows) > 4 * groups.max():
        raise NotSolved(f"expected {4 * groups.max()} rows, got {len(rows)}: the largest group needs no "
                        "repetition")


@self_check("5.4")
def _best_of(best_of: Any) -> None:
    for n_models, accuracy, n_images in ((5, 0.88, 1000), (12, 0.7, 200), (1, 0.6, 100)):
        below = binom.cdf(np.arange(n_images + 1), n_images, accuracy) ** n_models  # P(best has so many)
        want, error = float((1 - below).sum() / n_images), (accuracy * (1 - accuracy) / n_images) ** 0.5
        for _ in range(2):
            got = float(best_of(n_models, accuracy, n_images))
            expect(got, want, f"best of {n_models}, accuracy {accuracy}, {n_images} images", {
                "this is a count of images; divide by their number": got if got > 1 else np.inf,
                "this is the mean of all networks; the best one is reported": accuracy,
                "this is the worst of them; the best one is reported": 2 * accuracy - want,
                "too lucky: take the best of each play, then the mean of plays, not the best of all plays":
                    got if got > want + 1.5 * error else np.inf,
                "a few plays scatter; take the mean of thousands": got}, near=0.1 * error / want)
