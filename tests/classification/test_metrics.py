"""Metrics equal scikit-learn or a sum by hand; tables carry intervals over patients and name their seeds."""

import math
import warnings
from functools import partial

import dlordinal.metrics
import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings, strategies

from genailab_helpers.classification import metrics
from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.statistics import bootstrap_interval

K = 5


def graded(n=300, seed=0, k=K, skill=1.5):
    """Grades and the probabilities of a middling model."""
    generator = np.random.default_rng(seed)
    grades = generator.integers(k, size=n)
    logits = generator.normal(size=(n, k)) - skill * np.abs(np.arange(k) - grades[:, None])
    p = np.exp(logits)
    return grades, p / p.sum(1, keepdims=True)


LABEL_METRICS = {
    # without `labels`, scikit-learn closes the gap that an absent grade leaves and weighs distances anew
    metrics.qwk: partial(sk.cohen_kappa_score, weights="quadratic", labels=range(9)),
    metrics.accuracy: sk.accuracy_score,
    metrics.balanced_accuracy: sk.balanced_accuracy_score,
    metrics.mae: sk.mean_absolute_error,
    metrics.off_by_more_than_one: lambda y, p: 1 - dlordinal.metrics.accuracy_off1(y, p, labels=range(9)),
}


@pytest.mark.parametrize("metric", LABEL_METRICS, ids=lambda m: m.__name__)
@settings(max_examples=40, deadline=None)
@given(n=strategies.integers(2, 60), k=strategies.integers(2, 9), seed=strategies.integers(0, 10_000))
def test_metrics_of_predicted_grades_equal_their_reference(metric, n, k, seed):
    generator = np.random.default_rng(seed)
    y, p = generator.integers(k, size=n), generator.integers(k, size=n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is predicted but never true
        want = LABEL_METRICS[metric](y, p)
    assert metric(y, p) == pytest.approx(want, abs=1e-12, nan_ok=True)


PROBABILITY_METRICS = {
    metrics.nll: partial(sk.log_loss, labels=range(K)),
    metrics.macro_auroc: partial(sk.roc_auc_score, multi_class="ovr", labels=range(K)),
}


@pytest.mark.parametrize("metric", PROBABILITY_METRICS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_probabilities_equal_their_reference(metric, seed):
    y, p = graded(seed=seed)
    assert metric(y, p) == pytest.approx(PROBABILITY_METRICS[metric](y, p), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(n=strategies.integers(2, 50), levels=strategies.integers(1, 8), seed=strategies.integers(0, 10_000))
def test_auroc_equals_scikit_learn_also_with_ties(n, levels, seed):
    generator = np.random.default_rng(seed)
    positive, x = generator.random(n) < 0.4, generator.integers(levels, size=n)
    if positive.all() or not positive.any():
        assert math.isnan(metrics.auroc(positive, x))
    else:
        assert metrics.auroc(positive, x) == pytest.approx(sk.roc_auc_score(positive, x), abs=1e-12)


RATES = {
    metrics.sensitivity: sk.recall_score, metrics.specificity: lambda y, called: sk.recall_score(~y, ~called),
    metrics.ppv: sk.precision_score, metrics.npv: lambda y, called: sk.precision_score(~y, ~called)}


@pytest.mark.parametrize("metric", [metrics.auroc, *RATES, *LABEL_METRICS, *PROBABILITY_METRICS],
                         ids=lambda m: m.__name__)
def test_booleans_and_integers_from_0_to_1_give_the_same(metric):
    y, p = graded(k=2)
    outputs = p if metric in PROBABILITY_METRICS else p[:, 1] if metric is metrics.auroc else p.argmax(1)
    labels = outputs if outputs.dtype.kind == "f" else outputs == 1
    for positive in (y == 1, y.astype(np.uint8)):
        assert metric(positive, labels) == metric(y, outputs)
        assert metrics.score(metric, positive, {0: outputs}, n_resamples=20) == metrics.score(
            metric, y, {0: outputs}, n_resamples=20)
    assert metrics.choose_threshold(y, p[:, 1]) == metrics.choose_threshold(y == 1, p[:, 1])


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1], [0.0, 1.0], ["no", "yes"]])
def test_labels_of_two_classes_are_0_and_1(labels):
    for metric in (metrics.auroc, *RATES, metrics.choose_threshold):
        with pytest.raises(ValueError, match=r"^labels of two classes: expected booleans or .*$"):
            metric(np.array(labels), np.array([0, 1]))
    for rate in RATES:
        with pytest.raises(ValueError, match="labels of two classes"):
            rate(np.array([True, False]), np.array([0.2, 0.8]))  # probabilities are no predictions


def test_the_mean_over_classes_leaves_out_an_absent_class():
    """The rule of scikit-learn, and of all rooms; to predict an absent class is a mistake."""
    y, predicted = np.array([0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 0])
    assert metrics.balanced_accuracy(y, predicted) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_rates_of_no_image_are_no_number_and_a_certain_mistake_costs_a_finite_nll():
    nothing = np.zeros(3, bool)
    assert math.isnan(metrics.ppv(~nothing, nothing))
    assert math.isnan(metrics.sensitivity(nothing, ~nothing))
    assert metrics.nll(np.array([1]), np.array([[1.0, 0.0]])) == pytest.approx(-math.log(np.finfo(float).eps))


def test_calibration_error_by_hand():
    # three of fifteen bins: confidences .45, .46 (one right of two) | .61 (right) | .9 (wrong)
    y = np.array([0, 1, 0, 1])
    p = np.array([[0.45, 0.35, 0.2], [0.46, 0.35, 0.19], [0.61, 0.3, 0.09], [0.9, 0.1, 0.0]])
    assert metrics.ece(y, p) == pytest.approx((abs(1 - 0.45 - 0.46) + 1 - 0.61 + 0.9) / 4)


def test_ppv_follows_prevalence_by_bayes():
    y, p = graded(k=2)
    positive, called = y == 1, p[:, 1] > 0.4
    rates = metrics.sensitivity(positive, called), metrics.specificity(positive, called)
    assert metrics.ppv_at_prevalence(*rates, positive.mean()) == pytest.approx(metrics.ppv(positive, called))
    # by hand: 90 % and 90 %, one in a hundred ill: 9 of 9 + 99 calls are right, per thousand
    assert metrics.ppv_at_prevalence(0.9, 0.9, [0.01, 1.0, 0.0]) == pytest.approx([9 / 108, 1, 0])


def test_the_threshold_is_the_best_one_and_lies_between_scores():
    assert metrics.choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == pytest.approx(0.5)
    y, p = graded(n=200, k=2)
    got = metrics.choose_threshold(y == 1, p[:, 1])
    fpr, tpr, _ = sk.roc_curve(y == 1, p[:, 1])
    called = p[:, 1] >= got
    youden = metrics.sensitivity(y == 1, called) + metrics.specificity(y == 1, called) - 1
    assert youden == pytest.approx((tpr - fpr).max())
    with pytest.raises(ValueError, match="both kinds"):
        metrics.choose_threshold([1, 1], [0.1, 0.2])


@pytest.mark.parametrize("name", LOSSES)
def test_temperature_finds_what_was_hidden_and_keeps_the_grades(name):
    loss = LOSSES[name](K)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, loss.n_outputs, generator=generator)
    logits = logits.sort(1, descending=True).values if name == "coral" else logits
    grades = loss.probabilities(logits).multinomial(1, generator=generator)[:, 0]
    boastful = 3 * logits
    temperature = metrics.fit_temperature(boastful, grades, loss.probabilities)
    assert temperature == pytest.approx(3, rel=0.05)  # the spread of the estimate is about 1 / sqrt(20,000)
    before, after = (loss.probabilities(z).numpy() for z in (boastful, boastful / temperature))
    assert metrics.ece(grades.numpy(), after) < 0.02 < metrics.ece(grades.numpy(), before)
    if name != "corn":
        assert (loss.decode(boastful / temperature) == loss.decode(boastful)).all()


def test_temperature_is_the_minimum_of_a_fine_grid():
    y, p = graded(skill=1.0)
    logits, labels = 4 * torch.tensor(p).log(), torch.tensor(y)
    grid = np.exp(np.linspace(-2, 3, 2001))
    losses = [torch.nn.functional.cross_entropy(logits / t, labels).item() for t in grid]
    got = metrics.fit_temperature(logits, labels, partial(torch.softmax, dim=1))
    assert got == pytest.approx(grid[np.argmin(losses)], rel=0.003)


def test_temperature_stays_within_its_bounds():
    """Labels that are never the most probable class have no best temperature."""
    logits, labels = torch.tensor([[1.0, 0.0]]).repeat(50, 1), torch.ones(50, dtype=torch.int64)
    got = metrics.fit_temperature(logits, labels, partial(torch.softmax, dim=1))
    assert got == pytest.approx(math.exp(5), rel=0.01)


def test_a_score_is_the_bootstrap_by_patient_of_the_mean_over_seeds():
    y, p = graded()
    _, q = graded(seed=1)
    patients = np.arange(300) // 3
    one = metrics.score(metrics.nll, y, {7: p}, patients)
    want = bootstrap_interval(metrics.nll, y, p, groups=patients)
    assert one == want._replace(seeds=(7,))
    assert str(one) == f"{want}, seeds 7"
    both = metrics.score(metrics.nll, y, {7: p, 8: q}, patients)
    assert both.value == pytest.approx((metrics.nll(y, p) + metrics.nll(y, q)) / 2)
    assert both.low < both.value < both.high
    assert str(both).endswith("n = 100, seeds 7 8")


def test_a_difference_is_paired():
    y, p = graded()
    first, second = p.argmax(1), np.where(np.arange(300) < 60, 4 - y, p.argmax(1))
    got = metrics.difference(metrics.qwk, y, {0: first}, {0: second})
    assert got.value == pytest.approx(metrics.qwk(y, first) - metrics.qwk(y, second))
    assert got.low > 0
    assert metrics.difference(metrics.qwk, y, {0: first}, {0: first})[:3] == (0, 0, 0)  # the same resamples
    assert metrics.difference(metrics.qwk, y, {0: first}, {0: second}, np.arange(300) // 3).n == 100
    # a baseline of one run beside a model of two
    two = metrics.difference(metrics.qwk, y, {0: first, 1: second}, {0: first})
    assert two.value == pytest.approx((metrics.qwk(y, second) - metrics.qwk(y, first)) / 2)
    assert two.seeds == (0, 1)


def test_each_subgroup_is_measured_alone():
    y, p = graded()
    hospital = np.array(["a", "b", "c"])[np.arange(300) % 3]
    predicted = np.where(hospital == "b", (y + 2) % K, p.argmax(1))
    got = metrics.subgroups(metrics.qwk, y, {0: predicted}, hospital, patients=np.arange(300) // 6)
    assert got.scores["b"].value == metrics.qwk(y[hospital == "b"], predicted[hospital == "b"])
    assert got.scores["b"].n == 50
    # a subgroup of one patient shows no spread, one of one class no AUROC
    lone = metrics.subgroups(metrics.auroc, y > 2, {0: p[:, 3:].sum(1)}, np.where(y == 4, "severe", "other"))
    assert math.isnan(lone.scores["severe"].value)
    single = metrics.subgroups(metrics.accuracy, y, {0: predicted}, np.where(np.arange(300) == 0, "x", "y"))
    assert math.isnan(single.scores["x"].low)
    with pytest.raises(ValueError, match="one length"):
        metrics.score(metrics.accuracy, [0, 1], {0: [0, 1]}, patients=[0])
    with pytest.raises(IndexError, match="did not match"):
        metrics.subgroups(metrics.qwk, y, {0: predicted}, hospital[:5])


def test_the_table_of_classes_uses_frozen_thresholds():
    y, p = graded(k=3)
    thresholds = [metrics.choose_threshold(y == k, p[:, k]) for k in range(3)]
    got = metrics.class_metrics(y, {0: p}, {0: thresholds}, n_resamples=50)
    assert got.accuracy.value == sk.accuracy_score(y, p.argmax(1))
    assert got.macro_auroc.value == pytest.approx(np.mean([s.value for s in got.auroc]))
    for k in range(3):
        for metric, reference in RATES.items():
            assert vars(got)[metric.__name__][k].value == reference(y == k, p[:, k] >= thresholds[k])


def test_absent_and_rare_classes_are_not_a_crash():
    y, p = graded(k=3)
    rows = y < 2
    rows[np.flatnonzero(y == 2)[0]] = True  # one image of class 2: absent from a third of the resamples
    rare = metrics.score(metrics.auroc, y[rows] == 2, {0: p[rows, 2]}, n_resamples=100)
    assert 0 <= rare.low <= rare.high <= 1
    rows = y < 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics.class_metrics(y[rows], {0: p[rows]}, {0: [0.5] * 3}, n_resamples=100)
    for found in (got.auroc[2], got.sensitivity[2]):
        assert math.isnan(found.value)
        assert math.isnan(found.low)
    assert "nan" in str(got.auroc[2])
    alone = metrics.score(metrics.qwk, np.zeros(9, int), {0: np.zeros(9, int)}, np.arange(9) // 3)
    assert math.isnan(alone.value)
    assert alone.n == 3


@pytest.mark.parametrize(("labels", "outputs", "message"), [
    ([0, 1], {}, "at least one array"),
    *[(labels, {0: labels}, "expected labels .*, integers from 0") for labels in ([0.0, 1.0], [0, -1], [])],
    ([0, 1], {0: [0, 1, 1]}, r"\(2,\); and .* \(3,\)"), ([0, 1], {0: [0, 1], 1: [0]}, "same shape"),
    ([0, 1], {0: [math.nan, 1]}, "finite"), ([0, 2], {0: [[0.5, 0.5], [1.0, 0.0]]}, "every class"),
    ([0, 1], {0: [[3.0, -2.0], [1.0, 0.5]]}, "rows summing to 1")])
def test_what_does_not_fit_is_refused(labels, outputs, message):
    with pytest.raises(ValueError, match=message):
        metrics.score(metrics.accuracy, labels, outputs)
