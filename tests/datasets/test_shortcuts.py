"""Shortcuts are found where they were planted and only there; labels carry signal where it was given."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from genailab_helpers.datasets import shortcuts
from genailab_helpers.datasets.shortcuts import ALPHA, N_PERMUTATIONS, audit_shortcuts, label_signal
from genailab_helpers.phantoms.chest import CONFOUNDERS, FINDINGS, ChestAnatomy, render_chests, sample_chests
from genailab_helpers.statistics import Interval

NORMAL_OR_PNEUMONIA = ("Normal", "Pneumonia")
SEEDS = range(20)


def noise_films(root: Path, n_films: int, size: tuple[int, int] = (32, 32), seed: int = 0,
                classes: Sequence[str] = NORMAL_OR_PNEUMONIA) -> Path:
    """Write films of noise, as many a class."""
    generator = np.random.default_rng(seed)
    for i in range(n_films):
        write(root / classes[i % len(classes)] / f"{i}.png", generator.integers(0, 256, size[::-1]))
    return root


def write(path: Path, levels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(np.uint8)).save(path, compress_level=1)


def chest_films(root: Path, anatomy: ChestAnatomy, labels: Sequence[str]) -> Path:
    images = render_chests(anatomy, 64).images[:, 0].add(1).mul(127.5).round().numpy()
    for i, (levels, label) in enumerate(zip(images, labels, strict=True)):
        write(root / label / f"{i}.png", levels)
    return root


def finding_names(anatomy: ChestAnatomy) -> list[str]:
    return [FINDINGS[place] for place in anatomy.finding.tolist()]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))


def test_noise_has_no_shortcut_and_alike_files_give_p_of_one(tmp_path: Path) -> None:
    report = audit_shortcuts(noise_films(tmp_path / "set", 40))
    rows = {row.name: row for row in report.rows}
    assert report.flagged == []
    assert rows["file properties"].p == 1.0
    assert rows["file properties"].score.value <= rows["file properties"].chance == 0.5
    assert "No shortcut" in str(report)


def test_films_all_alike_give_p_of_one_everywhere(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / "set" / FINDINGS[i % 2] / f"{i}.png", np.full((32, 32), 90))
    assert [row.p for row in audit_shortcuts(tmp_path / "set").rows] == [1.0] * 7


def test_size_tied_to_a_class_is_flagged_and_named(tmp_path: Path) -> None:
    noise_films(tmp_path / "set", 30, (32, 32), classes=["Normal"])
    noise_films(tmp_path / "set", 15, (48, 40), seed=1, classes=["COVID"])
    report = audit_shortcuts(tmp_path / "set")
    row = report.rows[0]
    assert "file properties" in report.flagged
    assert row.score.value == row.balanced == row.clearest_score == 1.0
    assert row.chance == pytest.approx(30 / 45)
    assert row.p == pytest.approx(1 / (N_PERMUTATIONS + 1))
    assert "Shortcut: file properties" in report.verdict
    assert "YES" in str(report)


def test_table_of_original_files_replaces_headers(tmp_path: Path) -> None:
    root = noise_films(tmp_path / "set", 30)
    lines = [f"{label},{i},PNG,L,{900 + 100 * (label == 'PNEUMONIA')},900"
             for i, label in enumerate(["NORMAL", "PNEUMONIA"] * 15)]
    table = tmp_path / "files.csv"
    table.write_text("\n".join(["class,stem,format,mode,width,height", *lines]), encoding="utf-8")
    assert audit_shortcuts(root, properties=table).flagged == ["file properties"]
    table.write_text("\n".join(["class,stem,format,mode,width,height", *lines[1:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"files.csv: no row for 1 of 30 films such as Normal/0.png"):
        audit_shortcuts(root, properties=table)
    table.write_text("file,size\na,3", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a CSV with the columns class"):
        audit_shortcuts(root, properties=table)


def test_masks_black_the_lungs_and_nothing_else(tmp_path: Path) -> None:
    """The classes differ in the lung alone: once it is blacked, nothing is left to tell them by."""
    root = noise_films(tmp_path / "set", 40)
    masks = tmp_path / "masks"
    lung = np.zeros((64, 48), dtype=np.uint8)  # another size than the film
    lung[8:24, 6:18] = 255  # rows 4 to 12, columns 4 to 12 of 32
    for path in root.glob("*/*.png"):
        levels = np.asarray(Image.open(path)).copy()
        levels[5:11, 5:11] = 40 + 170 * (path.parent.name == "Normal")
        write(path, levels)
        write(masks / path.parent.name / "masks" / path.name, np.stack([lung] * 3, 2))
    rows = {row.name: row for row in audit_shortcuts(root, masks=masks).rows}
    assert rows["whole film"].p < ALPHA
    assert rows["lungs blacked"].p > ALPHA
    assert not rows["whole film"].flagged  # films may differ there
    (masks / "Normal" / "masks" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"no mask for 1 of 40 films such as Normal/0.png"):
        audit_shortcuts(root, masks=masks)


def test_patients_with_two_labels_stay_out_of_the_test(tmp_path: Path) -> None:
    root = noise_films(tmp_path / "set", 40)
    for label in NORMAL_OR_PNEUMONIA:
        write(root / label / f"00000061_00{len(label) % 7}.png", np.zeros((32, 32)))
    report = audit_shortcuts(root)
    assert (report.n_films, report.left_out, report.rows[0].score.n) == (42, 2, 41)
    assert "p without 2 films" in str(report)


def test_patient_copies_do_not_count_as_evidence(tmp_path: Path) -> None:
    """Ten films of each of 14 patients, labels at random: folds by film would recognise the patients."""
    generator = np.random.default_rng(3)
    for patient, label in enumerate(generator.permutation(NORMAL_OR_PNEUMONIA * 7)):
        film = generator.integers(0, 256, (32, 32))
        for visit in range(10):
            noise = generator.integers(-3, 4, film.shape)
            write(tmp_path / "set" / label / f"{patient:08d}_{visit:03d}.png", (film + noise).clip(0, 255))
    report = audit_shortcuts(tmp_path / "set")
    assert report.flagged == []
    assert report.rows[-1].score.value < 0.9
    assert report.rows[-1].score.n == 14


@pytest.mark.parametrize("ask", [audit_shortcuts, label_signal])
def test_too_few_patients_is_one_clear_error(tmp_path: Path, ask: object) -> None:
    assert callable(ask)
    with pytest.raises(ValueError, match=r"too few patients to tell \(Normal 6, Pneumonia 6"):
        ask(noise_films(tmp_path / "two", 12))  # 924 ways to deal: p < 0.001 cannot be reached
    with pytest.raises(ValueError, match=r"too few patients to tell \(Normal 20"):
        ask(noise_films(tmp_path / "one", 20, classes=["Normal"]))


def test_classes_are_selected_by_any_name(tmp_path: Path) -> None:
    root = noise_films(tmp_path / "set", 60, classes=("Normal", "COVID", "Pneumonia"))
    assert audit_shortcuts(root, classes=["covid-19", "NORMAL"]).classes == ("Normal", "COVID")
    with pytest.raises(ValueError, match=r"no films of grade_1; it has Normal, Pneumonia, COVID"):
        audit_shortcuts(root, classes=["Doubtful", "Normal"])


def test_of_large_sets_whole_patients_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "MAX_FILMS", 50)
    root = noise_films(tmp_path / "set", 120)
    report = audit_shortcuts(root)
    assert report.n_films == 50
    assert str(report) == str(audit_shortcuts(root))  # the same ones every time


def test_figure_has_a_row_for_each_part_and_marks_shortcuts(tmp_path: Path) -> None:
    noise_films(tmp_path / "set", 20, (32, 32), classes=["Normal"])
    noise_films(tmp_path / "set", 20, (48, 40), seed=1, classes=["COVID"])
    report = audit_shortcuts(tmp_path / "set")
    figure = report.figure()
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [row.name for row in report.rows]
    assert sum(text.get_text() == "shortcut" for text in axes.texts) == len(report.flagged) >= 1
    FigureCanvasAgg(figure).draw()


def test_label_signal_tells_bright_from_dark_and_says_so(tmp_path: Path) -> None:
    root = noise_films(tmp_path / "set", 40)
    assert not label_signal(root).signal
    for path in (root / "Normal").glob("*.png"):
        write(path, np.asarray(Image.open(path)) // 2)
    found = label_signal(root)
    assert found.signal
    assert found.score.low > found.chance == 0.5
    assert "carry signal" in str(found)


@pytest.fixture
def _no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the resampling, which has no say in what is flagged."""
    monkeypatch.setattr(shortcuts, "bootstrap_interval",
                        lambda statistic, right, *arrays, **others: Interval(0, 0, 0, len(right)))


@pytest.mark.slow
@pytest.mark.usefixtures("_no_intervals")
def test_planted_marks_are_flagged_20_of_20(tmp_path: Path) -> None:
    for seed in SEEDS:
        mark = CONFOUNDERS[seed % len(CONFOUNDERS)]
        anatomy = sample_chests(200, seed, NORMAL_OR_PNEUMONIA, {mark: {"Pneumonia": 1.0}})
        root = chest_films(tmp_path / str(seed), anatomy, finding_names(anatomy))
        assert audit_shortcuts(root).flagged, (seed, mark)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_intervals")
def test_clean_phantoms_are_flagged_0_of_20(tmp_path: Path) -> None:
    for seed in SEEDS:
        anatomy = sample_chests(200, 100 + seed, (NORMAL_OR_PNEUMONIA, FINDINGS)[seed % 2])
        root = chest_films(tmp_path / str(seed), anatomy, finding_names(anatomy))
        assert audit_shortcuts(root).flagged == [], seed


def graded_chests(root: Path, seed: int) -> tuple[Path, Path]:
    """Write chests graded by the severity of their pneumonia, and the same with random grades."""
    anatomy = sample_chests(200, 200 + seed, "Pneumonia")
    grades = [f"grade_{min(4, int(5 * severity))}" for severity in anatomy.severity]
    mixed = np.random.default_rng(seed).permutation(grades).tolist()
    return chest_films(root / "graded", anatomy, grades), chest_films(root / "mixed", anatomy, mixed)


@pytest.mark.slow
def test_severity_is_signal_and_random_grades_are_none_20_of_20(tmp_path: Path) -> None:
    for seed in SEEDS:
        graded, mixed = graded_chests(tmp_path / str(seed), seed)
        assert label_signal(graded).signal, seed
        assert not label_signal(mixed).signal, seed  # the same films, so their features are remembered


COVID_1125 = {  # whole-set accuracy of three classes, and of COVID against normal, on the public set
    "whole film": (0.755, 0.966), "centre 62 % blacked": (0.727, 0.951),
    "centre 75 % blacked": (0.682, 0.923),
    "2-pixel frame": (0.670, 0.911), "four corners": (0.595, 0.873), "mean and spread": (0.576, 0.744),
}


@pytest.mark.slow
def test_measured_shortcuts_of_a_real_set_come_out(real_data: Path) -> None:
    """The set of Ozturk et al. 2020; the figures were measured once, apart from this code."""
    root, table = real_data / "covid_1125", real_data / "covid_1125_original_files.csv"
    for column, classes in enumerate((None, ("COVID", "Normal"))):
        report = audit_shortcuts(root, properties=table, classes=classes)
        rows = {row.name: row for row in report.rows}
        for name, expected in COVID_1125.items():
            assert rows[name].score.value == pytest.approx(expected[column], abs=0.03), name
        assert rows["whole film"].chance == pytest.approx((0.445, 0.801)[column], abs=0.001)
        assert rows["file properties"].clearest_score == pytest.approx(1.0, abs=(0.0005, 0.005)[column])
        assert report.flagged == ["file properties", "2-pixel frame", "four corners"]


def test_a_verdict_never_argues_with_an_accuracy_below_chance() -> None:
    def report(clearest_score: float) -> str:
        score = Interval(0.41, 0.38, 0.44, 300)
        row = shortcuts.ShortcutRow("2-pixel frame", score, 0.31, 0.27, 0.0002, True, "grade_0",
                                    clearest_score, 0.73)
        return shortcuts.ShortcutReport((row,), tuple(f"grade_{k}" for k in range(5)), 300, 0, 0).verdict

    assert "grade_0 or not, accuracy 0.760, chance 0.730" in report(0.76)
    assert "balanced accuracy 0.310, chance 0.200" in report(0.68)
    assert "0.680" not in report(0.68)
    assert "2-pixel frame gives the class away" in report(0.76)
