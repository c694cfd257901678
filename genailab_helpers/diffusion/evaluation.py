"""Is a generator any good? Distances, coverage, copying, beside rows that show what a number is worth.

A distance alone says little: a generator that hands out its training images has the best one there is.
`evaluate` therefore puts three rows of its own under every generator: reference against reference
(the best that is possible), images of the training set (the perfect copier), and one image repeated (the
collapse).
"""

from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import euclidean_distances, polynomial_kernel

from genailab_helpers.features import lite0_features
from genailab_helpers.radiographs import check_images
from genailab_helpers.statistics import Interval

COPY_BOUND = 0.5  # on two real sets disguised copies lie at 0.06 to 0.40, the mean image at 0.79
COPIED_BOUND = 0.05  # share of copies that is too many
COLLAPSE_BOUND = 0.05  # recall, and precision, that is as good as none
N_AXES = 64  # a few hundred images cannot fill 1,280; their covariance would be mostly chance
SHIFT = 2  # of 64 pixels, in each of the four directions: a copy that was moved so far is found


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features in the first 64 principal axes of the second.

    Parameters
    ----------
    a, b : numpy.ndarray
        (N, D) and (M, D) features, at least 2 rows each.

    Returns
    -------
    float
        At least 0, in squared units of the features.

    Notes
    -----
    `|mu_a - mu_b|^2 + tr(A + B - 2 (B^1/2 A B^1/2)^1/2)` (Dowson and Landau 1982, Heusel et al. 2017); the
    symmetric form needs only real eigenvalues. It falls with the number of images even when nothing else
    changes: compare only distances of equal N and M.
    """
    centre = b.mean(0)
    axes = np.linalg.svd(b - centre, full_matrices=False)[2][:N_AXES].T
    a, b = (a - centre) @ axes, (b - centre) @ axes
    covariance_a, covariance_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(covariance_b)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_a @ root), 0)).sum()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return max(0.0, float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two sets of features under the cubic kernel (x.y / D + 1)^3.

    Parameters
    ----------
    a, b : numpy.ndarray
        (N, D) and (M, D) features, at least 2 rows each.

    Returns
    -------
    float
        0 on average for two sets of one distribution, whatever their size, and so sometimes below 0.

    Notes
    -----
    The unbiased estimate of Binkowski et al. 2018 ("KID").
    """
    a_a, a_b, b_b = polynomial_kernel(a), polynomial_kernel(a, b), polynomial_kernel(b)
    within_a, within_b = ((k.sum() - k.trace()) / len(k) / (len(k) - 1) for k in (a_a, b_b))
    return float(within_a + within_b - 2 * a_b.mean())


def neighbourhoods(generated: np.ndarray, reference: np.ndarray,
                   k: int = 5) -> tuple[float, float, float, float]:
    """How two sets overlap, judged by balls that reach from each point to its k-th neighbour in its own set.

    Parameters
    ----------
    generated, reference : numpy.ndarray
        (N, D) and (M, D) features, more than k rows each.
    k : int, default 5
        The neighbour that sets the radius of a ball; a point is no neighbour of itself.

    Returns
    -------
    precision : float
        Share of generated points inside some ball of the reference.
    recall : float
        Share of reference points inside some ball of the generated set.
    density : float
        Reference balls around a generated point, divided by k; about 1 for equal distributions, may exceed 1.
    coverage : float
        Share of reference balls that hold a generated point.

    Notes
    -----
    Precision, recall: Kynkaanniemi et al. 2019; density, coverage: Naeem et al. 2020.
    """
    radii, reference_radii = (np.partition(euclidean_distances(points), k, axis=1)[:, k]
                              for points in (generated, reference))  # column 0 is the point itself
    distances = euclidean_distances(generated, reference)
    in_reference, in_generated = distances <= reference_radii, distances <= radii[:, None]
    return (float(in_reference.any(1).mean()), float(in_generated.any(0).mean()),
            float(in_reference.sum(1).mean() / k), float(in_reference.any(0).mean()))


def nearest_image(images: torch.Tensor, others: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find the image that each image could have been copied from.

    Parameters
    ----------
    images : torch.Tensor
        (N, 1, H, W) float32 in [-1, 1].
    others : torch.Tensor
        (M, 1, H, W) float32 in [-1, 1], of any size.

    Returns
    -------
    distance : numpy.ndarray
        (N,) float64 in [0, sqrt 2]: sqrt(2 - 2 r), r the largest correlation with any image, mirrored or not,
        shifted by up to 1/32 of the side in steps of 1/64.
    index : numpy.ndarray
        (N,) that image's number.

    Raises
    ------
    ValueError
        If one of the sets is not a float32 batch in [-1, 1].

    Notes
    -----
    Pixels at low resolution, not Lite0 features: noise of 0.02 that nobody sees moves a copy 1.08 times as
    far in Lite0 space as another patient lies (measured on 500 images at 64 px), and 0.03 times as far here.
    The correlation forgives brightness and contrast, the search mirroring and shifts: a copy stays a copy.
    """
    check_images(images)
    check_images(others)
    queries, sought = _window(_side_64(images), SHIFT, SHIFT), _side_64(others)
    best, index = torch.full((len(images),), -1.0), torch.zeros(len(images), dtype=torch.long)
    for mirrored in (sought, sought.flip(-1)):
        for dy, dx in product(range(2 * SHIFT + 1), repeat=2):
            highest, where = (queries @ _window(mirrored, dy, dx).T).max(1)
            index = torch.where(highest > best, where, index)
            best = torch.maximum(best, highest)
    return np.sqrt(np.maximum(2 - 2 * best.double().numpy(), 0)), index.numpy()


def _side_64(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images.cpu(), (64, 64), mode="bilinear", antialias=True, align_corners=False)


def _window(images: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Cut a window, halve it to 30x30 pixels, and scale it to mean 0 and norm 1 (a blank one to 0)."""
    side = 64 - 2 * SHIFT
    pixels = F.avg_pool2d(images[:, :, dy:dy + side, dx:dx + side], 2).flatten(1)
    return F.normalize(pixels - pixels.mean(1, keepdim=True), eps=1e-6)


def radial_spectrum(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of a set of images at each spatial frequency: blur and noise show here before anywhere else.

    Parameters
    ----------
    images : torch.Tensor
        (N, 1, H, H) float32 in [-1, 1], square.

    Returns
    -------
    frequencies : numpy.ndarray
        (H // 2,) 1 to H // 2 cycles per image.
    log_power : numpy.ndarray
        (H // 2,) log10 of `|FFT / H^2|^2`, averaged over directions (within half a cycle) and images.
        White noise of variance v lies at log10(v / H^2) everywhere. Silence reads as -20.

    Raises
    ------
    ValueError
        If the images are not a float32 batch in [-1, 1] or not square.
    """
    check_images(images)
    side = images.shape[-1]
    power = sum((torch.fft.fft2(block[:, 0].double(), norm="forward").abs() ** 2).sum(0)
                for block in images.cpu().split(512)) / len(images)
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = torch.hypot(cycles[:, None], cycles).round().long().flatten().numpy()
    mean = np.bincount(radius, torch.as_tensor(power).flatten().numpy()) / np.bincount(radius)
    frequencies = np.arange(1, side // 2 + 1)
    return frequencies, np.log10(np.maximum(mean[frequencies], 1e-20))


# One set of images, judged against the held-out images: its name, and an `Interval` for each metric
EvaluationRow = namedtuple("EvaluationRow", [
    "name", "frechet", "kernel", "precision", "recall", "density", "coverage", "nn_ratio", "copied"])


class EvaluationTable(NamedTuple):
    """What `evaluate` found; `print` it.

    Attributes
    ----------
    rows : tuple of EvaluationRow
        `name` and the metrics `frechet`, `kernel`, `precision`, `recall`, `density`, `coverage`, `nn_ratio`
        and `copied`, each an `Interval`, of the generator, the reference
        against itself, the copied training images, one image repeated.
    n : int
        How many images stand on each side of every comparison.
    """

    rows: tuple[EvaluationRow, ...]
    n: int

    @property
    def verdict(self) -> str:
        """One line on the generator: copies, collapsed, too unlike the reference to tell, or its distance."""
        generated, reference = self.rows[:2]
        if generated.nn_ratio.high < COPY_BOUND:
            return f"copies its training images: nearest-neighbour ratio {generated.nn_ratio}"
        if generated.copied.low > COPIED_BOUND:
            return f"copies some of its training images: {generated.copied.value:.0%} of what it made"
        if max(generated.recall.value, generated.precision.value) < COLLAPSE_BOUND:
            return f"too unlike the reference to judge: precision and recall below {COLLAPSE_BOUND}"
        if generated.recall.value < COLLAPSE_BOUND:
            return f"collapsed: recall {generated.recall.value:.3f}, nearly all kinds of images are missing"
        times = generated.frechet.value / reference.frechet.value
        return f"neither copies nor collapsed; Fréchet distance {times:.1f} times that of {reference.name}"

    def __str__(self) -> str:
        """Put one set in a column, so that the table fits a page; brackets hold 95 % intervals."""
        texts = {"frechet": "{:.1f} [{:.1f}, {:.1f}]", "kernel": "{:.3f} [{:.3f}, {:.3f}]",
                 "nn_ratio": "{:.2f} [{:.2f}, {:.2f}]"}  # the metrics that show their interval
        _, *metrics = EvaluationRow._fields
        table = pd.DataFrame({name: [texts.get(metric, "{:.2f}").format(*interval)
                                     for metric, interval in zip(metrics, row, strict=True)]
                              for name, *row in self.rows}, [metric.replace("_", " ") for metric in metrics])
        text = table.to_string(col_space=[len(name) + 1 for name in table])
        return f"{text}\nn = {self.n} images on each side of every comparison\n{self.verdict}"


def evaluate(generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, seed: int = 0,
             n_resamples: int = 100, reference_name: str = "real") -> EvaluationTable:
    """Judge a generator beside three rows that show what each number is worth.

    Parameters
    ----------
    generated : torch.Tensor
        (G, 1, H, W) float32 in [-1, 1]; a few hundred images make a useful table.
    train : torch.Tensor
        (T, 1, H, W) the images that the generator has seen, all of them.
    held_out : torch.Tensor
        (R, 1, H, W) images of other patients, the reference of every row.
    seed : int, default 0
        Start of the random numbers.
    n_resamples : int, default 100
        Random halves for the intervals.
    reference_name : str, default "real"
        What the reference images are: say "phantoms" where they are drawn.

    Returns
    -------
    EvaluationTable
        Sets, a column each where it is printed: the generator; one half of the held-out images against the
        other; training images handed out as if generated; the most ordinary generated image, repeated with
        noise of 0.01. Metrics: Fréchet distance, kernel distance, precision, recall, density, coverage (all
        in the frozen Lite0 space), nearest-neighbour ratio, and `copied`, the share of images that are nearer
        to a training image than `COPY_BOUND` times what is usual for a held-out image.

    Raises
    ------
    ValueError
        If a set has fewer than 20 images or is no float32 batch in [-1, 1], or if half of the held-out images
        are training images.

    Notes
    -----
    The Fréchet distance falls with the number of images, so every figure compares n with n, n being half
    of the smallest set: only then can the reference be compared with itself. Values and intervals are those
    of `half_sample_intervals`. `frechet_distance` of all features is smaller, its n being larger.
    """
    n_images = min(len(generated), len(train), len(held_out)) // 2 * 2
    if n_images < 20:
        raise ValueError(f"evaluate: expected at least 20 images a set, got {len(generated)} generated, "
                         f"{len(train)} train, {len(held_out)} held out; sample or read more")
    generator = np.random.default_rng(seed)
    generated, copies, held_out = (some[generator.permutation(len(some))[:n_images]]
                                   for some in (generated, train, held_out))

    def describe(images: torch.Tensor) -> np.ndarray:
        """One row an image: its distance to the training images, then its features."""
        return np.column_stack([nearest_image(images, train)[0], lite0_features(images)])

    made, reference = describe(generated), describe(held_out)
    if np.median(reference[:, 0]) < 0.01:
        raise ValueError("held_out: half of these or more are training images; hold out other patients")
    noise = torch.from_numpy(generator.normal(0, 0.01, tuple(generated.shape)).astype(np.float32))
    most_ordinary = ((made[:, 1:] - made[:, 1:].mean(0)) ** 2).sum(1).argmin()
    repeated = (generated[most_ordinary].cpu() + noise).clamp(-1, 1)
    sets = {"generated": made, f"{reference_name} against {reference_name}": reference,
            "copies of the training images": describe(copies), "one image repeated": describe(repeated)}
    rows = tuple(EvaluationRow(name, *half_sample_intervals(_compare, one, reference, n_resamples, seed))
                 for name, one in sets.items())
    return EvaluationTable(rows, n_images // 2)


def _compare(made: np.ndarray, reference: np.ndarray) -> list[float]:
    """Compute the metrics of a row: distances to the training images, (n, 1), beside features, (n, D)."""
    near, usual, features = made[:, 0], np.median(reference[:, 0]), (made[:, 1:], reference[:, 1:])
    return [frechet_distance(*features), kernel_distance(*features), *neighbourhoods(*features),
            float(np.median(near) / usual), float((near < COPY_BOUND * usual).mean())]


def half_sample_intervals(compare: Callable[[np.ndarray, np.ndarray], Sequence[float]], images: np.ndarray,
                          reference: np.ndarray, n_resamples: int, seed: int) -> list[Interval]:
    """Compare random halves of two sets again and again: the mean, with a 95 % interval, of each figure.

    Parameters
    ----------
    compare : callable
        Takes rows of `images` and rows of `reference` and returns a fixed number of figures.
    images, reference : numpy.ndarray
        Equally many rows. Give the same array twice to compare the two halves of one set.
    n_resamples : int
        How many halvings.
    seed : int
        Start of the random numbers.

    Returns
    -------
    list of Interval
        One a figure; `n` is the size of a half. The value is what two sets of n images show on average, the
        bias of so few images included.

    Notes
    -----
    A bootstrap would repeat rows, which shrinks covariances and radii and pushes distances up. Halves drawn
    without replacement repeat nothing, and the spread of a smooth figure over them is the standard error of
    the same figure on the whole set: the factor (n - d) / d of the delete-d jackknife is 1 at d = n / 2
    (Shao and Wu 1989). Where both halves come from one set, the interval tells instead where two sets of n
    images lie.
    """
    if len(images) != len(reference):
        raise ValueError(f"expected equally many rows, got {len(images)} and {len(reference)}")
    generator = np.random.default_rng(seed)
    half = len(images) // 2
    values = []
    for _ in range(n_resamples):
        order = generator.permutation(len(images))
        values.append(compare(images[order[:half]], reference[order[half:2 * half]]))
    ends = np.vstack([np.mean(values, axis=0), np.quantile(values, [0.025, 0.975], axis=0)])
    return [Interval(value, low, high, half) for value, low, high in ends.T.tolist()]
