"""Intervals hold what they promise, and patients stay whole."""

import math

import numpy as np
import pytest

from genailab_helpers.statistics import Interval, bootstrap_interval, grouped_folds


@pytest.mark.parametrize(("interval", "text"), [
    (Interval(0.8512, 0.8101, 0.8798, 300), "0.85 [0.81, 0.88], n = 300"),
    (Interval(127.31, 107.24, 154.4, 50), "127.3 [107.2, 154.4], n = 50"),  # never without a decimal
    (Interval(0.5, 0.5, 0.5, 9), "0.500 [0.500, 0.500], n = 9"),
    (Interval(0.97261, 0.97012, 0.97499, 9000), "0.9726 [0.9701, 0.9750], n = 9000"),
    (Interval(0.5, 0.4999, 0.5001, 40), "0.50000 [0.49990, 0.50010], n = 40"),
    (Interval(0.5, 0.49999998, 0.50000002, 40), "0.500000 [0.500000, 0.500000], n = 40"),  # six at most
    (Interval(1e-17, -1e-17, 2e-17, 40), "0.000 [0.000, 0.000], n = 40"),  # rounding errors
])
def test_an_interval_reads_well(interval, text):
    assert str(interval) == text


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    x = np.random.default_rng(0).normal(size=400)
    got = bootstrap_interval(np.mean, x, n_resamples=4000)
    assert got.value == x.mean()
    assert got.n == 400
    # the standard deviation of a 2.5 % quantile of 4,000 is about 3 % of the width
    assert got.high - got.low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(400), rel=0.1)
    error = x.std() / math.sqrt(400)
    for end, z in ((got.low, -1.96), (got.high, 1.96)):
        assert end == pytest.approx(x.mean() + z * error, abs=0.1 * error)


def test_ten_images_of_a_patient_count_once():
    x = np.random.default_rng(2).normal(size=50)
    alone = bootstrap_interval(np.mean, x)
    images, patients = np.repeat(x, 10), np.repeat([f"p{i:02}" for i in range(50)], 10)
    shuffled = np.random.default_rng(3).permutation(500)
    grouped = bootstrap_interval(np.mean, images[shuffled], groups=patients[shuffled])
    assert grouped[:4] == pytest.approx(alone[:4])
    ungrouped = bootstrap_interval(np.mean, images)
    width = (alone.high - alone.low) / math.sqrt(10)
    assert ungrouped.high - ungrouped.low == pytest.approx(width, rel=0.15)


def test_the_seed_decides_and_the_global_state_is_left_alone():
    x = np.arange(20.0)
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    assert bootstrap_interval(np.mean, x, seed=1) == bootstrap_interval(np.mean, x, seed=1)
    assert bootstrap_interval(np.mean, x, seed=1) != bootstrap_interval(np.mean, x, seed=2)
    assert (np.random.get_state()[1] == state).all()


def test_resamples_without_a_value_are_left_out_unless_they_are_many():
    x = np.array([0.0] * 4 + [1.0] * 4)
    got = bootstrap_interval(lambda a: float(a.mean()) if 0 < a.mean() < 1 else math.nan, x)
    assert 0 < got.low < got.high < 1
    rarely = bootstrap_interval(lambda a: 1.0 if a.mean() == 0.5 else math.nan, x)
    assert rarely.value == 1
    assert math.isnan(rarely.low)
    assert math.isnan(rarely.high)
    assert math.isnan(bootstrap_interval(np.mean, x, groups=[0] * 8).low)  # one patient shows no spread


@pytest.mark.parametrize(("arrays", "groups"), [(([1, 2], [1, 2, 3]), None), (([1, 2],), [0]), (([],), None)])
def test_arrays_that_do_not_match_are_refused(arrays, groups):
    with pytest.raises(ValueError, match="length"):
        bootstrap_interval(lambda *a: 0.0, *arrays, groups=groups)


@pytest.mark.parametrize("with_labels", [False, True])
def test_folds_keep_patients_whole_and_test_each_row_once(with_labels):
    generator = np.random.default_rng(8)
    groups = generator.integers(60, size=300).astype(str)
    labels = generator.choice(3, 300, p=[0.6, 0.3, 0.1]) if with_labels else None
    folds = grouped_folds(groups, 5, seed=0, labels=labels)
    assert len(folds) == 5
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(300))
    for train, test in folds:
        assert len(train) + len(test) == 300
        assert not set(groups[train]) & set(groups[test])
        assert 40 <= len(test) <= 80  # a fifth, as far as patients of 5 images allow
        if labels is not None:
            assert (labels[test] == 2).mean() == pytest.approx((labels == 2).mean(), abs=0.05)


def test_more_folds_than_patients_are_refused():
    with pytest.raises(ValueError, match="at least 5 patients for 5 folds, got 2"):
        grouped_folds(["a", "a", "b", "b", "b"], 5, seed=0)
