"""The recorded table of lesson 4 says what its own digits and its own recipe give."""


import numpy as np
import pytest

from genailab_helpers.classification import metrics
from genailab_helpers.classification.training import load_classifier
from genailab_helpers.phantoms.raters import consensus, simulate_raters
from genailab_helpers.phantoms.spine import render_spines, sample_spines
from genailab_helpers.statistics import bootstrap_interval

SCRIPT = "bench_grading"


def test_the_recipe_is_that_of_the_script_and_every_arm_has_every_seed_once(bench, table):
    assert table["recipe"] == {
        "img_size": bench.IMG_SIZE, "batch_size": bench.BATCH_SIZE, "lr": bench.LR,
        "films": {part: {"n": n, "seed": seed} for part, (n, seed) in bench.FILMS.items()}}
    wanted = sorted((arm.name, seed) for arm in bench.ARMS for seed in bench.SEEDS)
    assert sorted((row["arm"], row["seed"]) for row in table["rows"]) == wanted


def digits(text):
    return np.array([int(digit) for digit in text])


def test_the_label_is_the_vote_of_the_drawn_readers(table):
    n, seed = table["recipe"]["films"]["test"].values()
    vote = consensus(simulate_raters(sample_spines(n, seed).severity, seed=seed))
    assert table["label"] == "".join(map(str, vote.tolist()))


def test_the_numbers_of_a_row_are_those_of_its_digits(bench, table):
    for row in table["rows"]:
        for metric in bench.GRADE_METRICS:
            found = metric(digits(table["label"]), digits(row["grades"]))
            assert row[metric.__name__] == pytest.approx(found, abs=5.1e-5), row["arm"]


def test_the_shipped_model_gives_the_recorded_grades(bench, table):
    model = load_classifier(bench.MODEL)
    n, seed = table["recipe"]["films"]["test"].values()
    films = render_spines(sample_spines(n, seed)[:150], bench.IMG_SIZE).images
    row = next(row for row in table["rows"] if (row["arm"], row["seed"]) == (bench.SHIPPED.name, 0))
    given = "".join(map(str, model.predict(films).decoded.tolist()))
    # another processor may tip a film that lies on the edge of two grades
    assert sum(a != b for a, b in zip(given, row["grades"], strict=False)) <= 1
    assert model.temperature == pytest.approx(row["temperature"], abs=5.1e-5)


def test_no_loss_beats_the_shipped_one_beyond_chance(bench, table):
    runs = {arm: {row["seed"]: digits(row["grades"]) for row in table["rows"] if row["arm"] == arm.name}
            for arm in bench.ARMS}
    rivals = [arm for arm in bench.ARMS if arm != bench.SHIPPED and arm.a_grade is None]

    def gap(truth, *grades):
        scores = [metrics.qwk(truth, one) for one in grades]
        return np.mean(scores[:len(bench.SEEDS)]) - np.mean(scores[len(bench.SEEDS):])

    for arm in rivals:  # as many comparisons: Bonferroni
        grades, gaps = [*runs[arm].values(), *runs[bench.SHIPPED].values()], []
        bootstrap_interval(lambda *a, gaps=gaps: gaps.append(gap(*a)) or gaps[-1], digits(table["label"]),
                           *grades)
        assert np.quantile(gaps, 0.025 / len(rivals)) <= 0, arm.name
