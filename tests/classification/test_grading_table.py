"""The recorded table of lesson 4 says what its own digits and its own recipe give."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from genailab_helpers.classification import metrics
from genailab_helpers.classification.training import load_classifier
from genailab_helpers.phantoms.spine import consensus, render_spines, sample_spines, simulate_raters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_grading")


@pytest.fixture(scope="module")
def table(bench: ModuleType) -> Any:
    return json.loads(bench.TABLE.read_text(encoding="utf-8"))


def test_the_recipe_is_that_of_the_script(bench: ModuleType, table: Any) -> None:
    films = {part: {"n": n, "seed": seed} for part, (n, seed) in bench.FILMS.items()}
    assert table["recipe"] == {"img_size": bench.IMG_SIZE, "batch_size": bench.BATCH_SIZE, "lr": bench.LR,
                               "films": films}


def test_every_arm_has_every_seed_once(bench: ModuleType, table: Any) -> None:
    wanted = {(arm.name, seed) for arm in bench.ARMS for seed in bench.SEEDS}
    assert len(table["rows"]) == len(wanted)
    assert {(row["arm"], row["seed"]) for row in table["rows"]} == wanted


def test_the_label_is_the_vote_of_the_drawn_readers(table: Any) -> None:
    n, seed = table["recipe"]["films"]["test"].values()
    vote = consensus(simulate_raters(sample_spines(n, seed).severity, seed=seed))
    assert table["label"] == "".join(map(str, vote.tolist()))


def test_the_numbers_of_a_row_are_those_of_its_digits(bench: ModuleType, table: Any) -> None:
    label = np.array([int(digit) for digit in table["label"]])
    for row in table["rows"]:
        grades = np.array([int(digit) for digit in row["grades"]])
        for metric in bench.GRADE_METRICS:
            assert row[metric.__name__] == pytest.approx(metric(label, grades), abs=5.1e-5), row["arm"]


def test_films_of_an_arm_are_the_first_of_each_grade(bench: ModuleType) -> None:
    import torch

    grades = torch.tensor([0, 4, 4, 1, 0, 2, 3, 3, 0, 2, 1, 4])
    assert bench.chosen(grades, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert bench.chosen(grades, None).tolist() == list(range(12))


def test_the_shipped_model_gives_the_recorded_grades(bench: ModuleType, table: Any) -> None:
    model = load_classifier(bench.MODEL)
    n, seed = table["recipe"]["films"]["test"].values()
    films = render_spines(sample_spines(n, seed)[:150], bench.IMG_SIZE).images
    row = next(row for row in table["rows"] if (row["arm"], row["seed"]) == (bench.SHIPPED.name, 0))
    given = "".join(map(str, model.predict(films).decoded.tolist()))
    # another processor may tip a film that lies on the edge of two grades
    assert sum(a != b for a, b in zip(given, row["grades"], strict=False)) <= 1
    assert model.temperature == pytest.approx(row["temperature"], abs=5.1e-5)


def test_no_loss_beats_the_shipped_one_beyond_chance(bench: ModuleType, table: Any) -> None:
    label = np.array([int(digit) for digit in table["label"]])
    runs = {arm: {row["seed"]: np.array([int(digit) for digit in row["grades"]]) for row in table["rows"]
                  if row["arm"] == arm.name} for arm in bench.ARMS}
    for arm in bench.ARMS:
        gap = metrics.difference(metrics.qwk, label, runs[arm], runs[bench.SHIPPED], n_resamples=300)
        assert gap.low <= 0, f"{arm.name}: {gap}"


def test_the_check_fails_where_a_bar_is_missed_or_a_row_cannot_be_repeated(
        bench: ModuleType, table: Any, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["arm"], row["seed"]): row for row in table["rows"]}

    def recorded(_measure: Any, jobs: list[tuple[Any, int]], better: float = 0.0) -> list[dict[str, Any]]:
        measured = (rows[arm.name, seed] for arm, seed in jobs)
        return [{**row, "off_by_more_than_one": 0.004, "qwk": row["qwk"] + better} for row in measured]

    monkeypatch.setattr(bench, "measure_all", recorded)
    assert bench.main() == 0
    assert capsys.readouterr().out.count("recorded") == len(bench.ARMS) + len(bench.SEEDS) - 1
    monkeypatch.setattr(bench, "measure_all", lambda m, jobs: recorded(m, jobs, 0.04))
    assert bench.main() == 1
    monkeypatch.setattr(bench, "measure_all",
                        lambda m, jobs: [{**row, "mae": 0.41} for row in recorded(m, jobs)])
    assert bench.main() == 1
    assert "MISSED  MAE" in capsys.readouterr().out
