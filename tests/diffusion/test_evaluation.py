"""The evaluation agrees with its formulas, catches copiers and collapse, and accuses nobody else."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genailab_helpers.diffusion.evaluation import (
    COPY_BOUND,
    evaluate,
    frechet_distance,
    half_sample_intervals,
    kernel_distance,
    nearest_image,
    neighbourhoods,
    radial_spectrum,
)
from genailab_helpers.radiographs import read_radiograph


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path))


def blobs(n, seed, img_size=32):
    """Smooth random images on a common ground, as alike as films of one view are."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(n, 1, 5, 5, generator=generator)
    common = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(99))
    return F.interpolate(shapes + common, img_size, mode="bicubic").mul(0.6).tanh()


def disguise(films, seed):
    """Copies that a pixel comparison misses: mirrored, moved by one pixel, with noise of 0.02."""
    noise = 0.02 * torch.randn(films.shape, generator=torch.Generator().manual_seed(seed))
    moved = F.pad(films.flip(-1), (1, 0, 1, 0), mode="replicate")[..., :-1, :-1]
    return (moved + noise).clamp(-1, 1)


def gaussians(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_the_frechet_distance_of_one_axis_is_the_textbook_one():
    a, b = gaussians(50, 1, 0), 3 * gaussians(70, 1, 1, shift=2)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2  # Dowson and Landau 1982
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_follows_its_formula_in_all_axes():
    mix = gaussians(6, 6, 2)
    a, b = gaussians(200, 6, 3) @ mix, gaussians(150, 6, 4, shift=0.3)
    ca, cb = np.cov(a.T), np.cov(b.T)
    shared = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()  # by the unsymmetric product
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_of_a_set_to_itself_is_nothing_even_with_fewer_rows_than_axes():
    a = gaussians(20, 300, 5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(frechet_distance(gaussians(20, 300, 6), a))


def test_the_kernel_distance_is_the_mean_over_pairs():
    a, b = gaussians(9, 4, 7), gaussians(11, 4, 8, shift=1)

    def kernel(x, y):
        return (float(x @ y) / 4 + 1) ** 3

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-9)


def test_both_distances_are_those_of_the_agreed_protocol(real_data):
    file = real_data.parent / "fidelity_protocol.py"
    if not file.is_file():
        pytest.skip(f"{file} is absent: nothing to compare with")
    spec = importlib.util.spec_from_file_location("fidelity_protocol", file)
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    a, b = gaussians(150, 400, 9) ** 2, gaussians(130, 400, 10, shift=0.2) ** 2
    assert frechet_distance(a, b) == pytest.approx(protocol.fd(a, b), rel=1e-6)
    assert kernel_distance(a, b) == pytest.approx(protocol.kid(a, b), rel=1e-6)


def test_neighbourhoods_are_those_of_plain_loops():
    k, made, real = 3, gaussians(13, 2, 11), gaussians(17, 2, 12, shift=1)

    def ball(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    made_balls, real_balls = [ball(made, i) for i in range(13)], [ball(real, i) for i in range(17)]
    inside = [[np.linalg.norm(m - r) <= real_balls[j] for j, r in enumerate(real)] for m in made]
    around = [any(np.linalg.norm(m - r) <= made_balls[i] for i, m in enumerate(made)) for r in real]
    expected = (np.mean([any(row) for row in inside]), np.mean(around), np.sum(inside) / k / 13,
                np.mean([any(row[j] for row in inside) for j in range(17)]))
    assert neighbourhoods(made, real, k) == pytest.approx(expected)


def test_intervals_by_half_samples_cover_the_distance_of_known_gaussians():
    def sets(seed):
        return gaussians(200, 4, seed), gaussians(200, 4, 10_000 + seed, shift=0.5)

    # |0.5|^2 * 4, and the bias of n = 100 rows in d = 4 axes: 2 d / n of the means, and d (d + 1) / (2 n) of
    # the covariances, because near unit covariance their part is |A - B|^2 / 4
    expected = 1 + 8 / 100 + 20 / 200
    drawn = [frechet_distance(a[:100], b[:100]) for a, b in map(sets, range(5000, 5500))]
    assert np.mean(drawn) == pytest.approx(expected, abs=3 * np.std(drawn) / np.sqrt(500))
    hits, widths = 0, []
    for seed in range(100):
        (got,) = half_sample_intervals(lambda a, b: (frechet_distance(a, b),), *sets(seed), 100, seed)
        hits += got.low <= expected <= got.high
        widths.append(got.high - got.low)
    assert hits >= 88  # 95 expected, three binomial spreads of 2.2
    spread = np.std([frechet_distance(*sets(seed)) for seed in range(300)])
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.25)  # not covered by being too wide


def test_halves_share_no_film_and_follow_the_seed():
    rows = np.arange(40.0)[:, None]
    seen = []

    def compare(a, b):
        seen.append((a, b))
        assert len(a) == len(b) == 20
        assert not set(a.ravel()) & set(b.ravel())
        return (float(a.mean()),)

    first = half_sample_intervals(compare, rows, rows, 30, seed=1)
    assert first == half_sample_intervals(compare, rows, rows, 30, seed=1)
    assert first != half_sample_intervals(compare, rows, rows, 30, seed=2)
    with pytest.raises(ValueError, match="equally many"):
        half_sample_intervals(compare, rows, rows[1:], 30, seed=1)


@pytest.mark.parametrize("change", [
    lambda x: x, lambda x: x.flip(-1), lambda x: disguise(x, 0), lambda x: (0.5 * x + 0.3).clamp(-1, 1),
    lambda x: F.interpolate(x, 64, mode="bilinear"),
], ids=["same", "mirrored", "disguised", "contrast", "size"])
def test_the_film_that_was_copied_is_found(change):
    films = blobs(40, 0)
    distance, index = nearest_image(change(films[5:15]), films)
    assert index.tolist() == list(range(5, 15))
    assert distance.max() < 0.5 * np.median(nearest_image(blobs(40, 1), films)[0])


@pytest.mark.parametrize("step", [(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1)])
def test_a_copy_moved_by_a_pixel_is_still_a_copy(step):
    detail = torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    films = F.interpolate(detail, 34, mode="bilinear")
    dy, dx = 1 + step[0], 1 + step[1]
    distance, index = nearest_image(films[..., dy:dy + 32, dx:dx + 32], films[..., 1:33, 1:33])
    assert index.tolist() == [0, 1, 2, 3]
    assert distance.max() < 0.1  # not moved back, it would be above 0.5


def looks_copied(made, train, held_out, seed):
    """Whether the ratio of median distances that `evaluate` shows lies below the bound, interval and all."""
    n = min(len(made), len(held_out))
    near, usual = (nearest_image(films, train)[0][:n] for films in (made, held_out))
    return half_sample_intervals(lambda a, b: (np.median(a) / np.median(b),), near, usual, 100,
                                 seed)[0].high < COPY_BOUND


def test_copiers_are_caught_and_honest_generators_are_not_twenty_times_out_of_twenty():
    caught, accused = 0, 0
    for seed in range(20):
        train, held_out, honest = blobs(150, 1000 + seed).split(50)
        caught += looks_copied(disguise(train, seed), train, held_out, seed)
        accused += looks_copied(honest, train, held_out, seed)
    assert (caught, accused) == (20, 0)


def test_held_out_films_that_are_training_films_are_refused():
    films = blobs(30, 0)
    with pytest.raises(ValueError, match="held_out"):
        evaluate(blobs(30, 1), films, films)


def test_the_spectrum_of_a_wave_is_a_peak_and_of_noise_is_flat():
    x = torch.arange(64) / 64
    wave = 0.5 * torch.sin(2 * torch.pi * 7 * x).expand(2, 1, 64, 64)
    frequencies, log_power = radial_spectrum(wave)
    assert frequencies.tolist() == list(range(1, 33))
    assert frequencies[log_power.argmax()] == 7
    assert np.sort(log_power)[-2] < log_power.max() - 10
    noise = torch.rand(200, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = np.log10((1 / 3) / 64**2)  # the variance of even noise in [-1, 1], over the pixels
    assert np.abs(radial_spectrum(noise)[1] - expected).max() < 0.05
    with pytest.raises(ValueError, match="length"):  # of images that are not square
        radial_spectrum(torch.zeros(1, 1, 32, 48))


@pytest.fixture
def three_sets():
    return blobs(90, 7).split(30)


def test_the_table_has_its_rows_whatever_is_judged(three_sets):
    generated, train, held_out = three_sets
    table = evaluate(generated, train, held_out, n_resamples=20, reference_name="phantoms")
    assert [row.name for row in table.rows] == ["generated", "phantoms against phantoms",
                                                "copies of the training images", "one image repeated"]
    made, reference, copies, repeated = table.rows
    assert table.n == reference.frechet.n == 15
    assert copies.nn_ratio.high < 0.1 < reference.nn_ratio.low
    assert (copies.copied.value, reference.copied.value) == (1, 0)
    assert repeated.recall.value < 0.05 < reference.recall.value
    assert repeated.frechet.low > reference.frechet.high
    assert reference.kernel.low < 0 < reference.kernel.high
    assert abs(made.frechet.value / reference.frechet.value - 1) < 0.3
    assert table.verdict.startswith("neither copies nor collapsed")
    lines = str(table).splitlines()
    assert len({len(line) for line in lines[:9]}) == 1
    assert len(lines[0]) <= 115  # what an exported page holds without a break
    assert "real" not in str(table)
    assert lines[-1] == table.verdict


def test_the_table_repeats_itself_and_leaves_global_state_and_input_alone(three_sets):
    generated, train, held_out = three_sets
    before, state, numpy_state = generated.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate(generated, train, held_out, seed=1, n_resamples=5)
    assert evaluate(generated, train, held_out, seed=1, n_resamples=5) == first
    assert evaluate(generated, train, held_out, seed=2, n_resamples=5) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(generated, before)


@pytest.mark.parametrize(("make", "verdict"), [
    (lambda generated, train: disguise(train, 0), "copies its training images"),
    (lambda generated, train: torch.cat([train[:12], generated[:18]]), "copies some of its training images"),
    (lambda generated, train: (generated[:1] + 0.01 * disguise(generated, 0)).clamp(-1, 1), "collapsed"),
    (lambda generated, train: torch.rand(30, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1,
     "too unlike the reference"),
], ids=["copies", "some copies", "collapsed", "noise"])
def test_the_verdict_names_what_is_wrong(three_sets, make, verdict):
    generated, train, held_out = three_sets
    assert evaluate(make(generated, train), train, held_out, n_resamples=20).verdict.startswith(verdict)


def test_too_few_films_are_refused(three_sets):
    generated, train, held_out = three_sets
    with pytest.raises(ValueError, match="at least 20 images a set, got 19 generated, 30 train"):
        evaluate(generated[:19], train, held_out)


@pytest.mark.slow
def test_real_copiers_are_caught_and_honest_films_are_not_twenty_times_out_of_twenty(real_data):
    files = sorted((real_data / "covid_1125" / "No_findings").iterdir())
    films = torch.stack([F.interpolate(read_radiograph(f)[None], (64, 64), mode="bilinear", antialias=True)[0]
                         for f in files])
    patients = np.unique([f.name.split("_")[0] for f in files], return_inverse=True)[1]
    caught, accused = 0, 0
    for seed in range(20):
        part = np.random.default_rng(seed).choice(3, patients.max() + 1, p=[0.5, 0.25, 0.25])[patients]
        train, held_out, honest = (films[part == i] for i in range(3))
        copies = disguise(train[:len(honest)], seed)
        caught += looks_copied(copies, train, held_out, seed)
        accused += looks_copied(honest, train, held_out, seed)
    assert (caught, accused) == (20, 0)
    table = evaluate(honest, train, held_out, n_resamples=50)
    assert table.verdict.startswith("neither")
    assert table.rows[3].recall.value < 0.05
