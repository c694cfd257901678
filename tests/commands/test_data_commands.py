"""`genailab data`: the flow of a user from a raw folder to labels, and one line for what is wrong."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.datasets import download
from genailab_helpers.datasets.folders import RadiographFolder
from genailab_helpers.datasets.index import index_images

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(genailab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `genailab data` in an empty folder; give back exit status, stdout and stderr."""
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return partial(genailab, "data")


@pytest.fixture
def raw(run: Run) -> Path:
    """20 films each of healthy and severe spines, two of each patient, in a raw tree with a stray file."""
    for i in range(40):
        path = Path("raw", ("grade 0", "grade 4")[i // 20], f"case{i // 2:03}_{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30), dtype=np.uint8)).save(path)
    Path("raw", "notes.txt").write_text("no film")
    return Path("raw")


def test_from_raw_films_to_labels(run: Run, raw: Path) -> None:
    assert run("create", "--preset", "spine", "--output", "dataset")[0] == 0
    assert len(list(Path("dataset").glob("*/grade_?"))) == 15
    status, out, _ = run("organize", "--input", "raw", "--output", "organized")
    assert status == 0
    assert "grade_4" in out
    assert "left out, not an image (1): notes.txt" in out
    assert run("preprocess", "--input", "organized", "--output", "grey", "--img-size", "32")[0] == 0
    status, out, _ = run("split", "--input", "grey", "--output", "dataset",
                         "--ratios", "0.6,0.2,0.2", "--replace")
    assert status == 0
    assert "pairs of near duplicates (0)" in out  # they are noise, each of its own
    images = index_images("dataset")
    assert Counter(zip(images["class"], images["split"], strict=True)) == {
        (grade, part): n for grade in ("grade_0", "grade_4")
        for part, n in (("train", 12), ("val", 4), ("test", 4))}
    assert len(set(zip(images["patient"], images["split"], strict=True))) == 20
    assert " 12  60.0%" in out
    status, out, _ = run("label", "--input", "dataset")
    assert status == 0
    assert "grade_4 4" in out
    assert len(json.loads(Path("dataset/dataset.json").read_text())["labels"]) == 40


def test_dry_run_prints_and_leaves_no_trace(run: Run, raw: Path) -> None:
    for command in (["create", "--classes", "A,B"], ["organize", "--input", "raw", "--output", "out"],
                    ["preprocess", "--input", "raw", "--output", "out"],
                    ["split", "--input", "raw", "--output", "out", "--no-near-duplicates"],
                    ["label", "--input", "raw"]):
        status, out, _ = run(*command, "--dry-run")
        assert status == 0
        assert "dry run: nothing was written" in out
    assert [path.name for path in Path().iterdir()] == ["raw"]
    assert not Path("raw/dataset.json").exists()


def test_a_full_target_is_refused_until_told(run: Run, raw: Path) -> None:
    organize = ["organize", "--input", "raw", "--output", "out"]
    assert run(*organize)[0] == 0
    status, out, err = run(*organize)
    assert (status, out) == (2, "")
    assert err.startswith("genailab: ")
    assert "--replace" in err
    assert run(*organize, "--replace", "--classes", "grade_0")[0] == 0
    assert [path.name for path in Path("out").iterdir() if path.is_dir()] == ["grade_0"]


@pytest.mark.parametrize(("arguments", "says"), [
    (["create", "--preset", "knee"], "spine, covid, chest"),
    (["create", "--preset", "spine", "--classes", "A"], "either --preset"),
    (["create"], "either --preset"),
    (["organize", "--input", "absent", "--output", "out"], "absent: no such folder"),
    (["organize", "--input", "raw", "--output", "raw/out"], "folder apart"),
    (["organize", "--input", "raw", "--output", "out", "--table", "absent.csv"], "absent.csv"),
    (["organize", "--input", "raw", "--output", "out", "--classes", "Normal"], "known class"),
    (["preprocess", "--input", "raw", "--output", "out", "--img-size", "3"], "img_size=3"),
    (["preprocess", "--input", "raw", "--output", "out", "--fit", "stretch"], "letterbox"),
    (["split", "--input", "raw", "--output", "out", "--ratios", "70,x"], "0.7,0.15,0.15"),
    (["split", "--input", "raw", "--output", "out", "--ratios", "70,15,15"], "sum to 1"),
    (["split", "--input", "raw", "--output", "out", "--mode", "move"], "manifest"),
    (["split", "--input", "raw", "--output", "out", "--patient-pattern", "("], "regular expression"),
    (["split", "--input", "raw", "--output", "out", "--patient-pattern", "xyz"], "finds no patient"),
    (["label", "--input", "raw", "--output", "labels.json"], "start there"),
])
def test_bad_input_ends_in_one_line_and_status_two(
        run: Run, raw: Path, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err
    assert [path.name for path in Path().iterdir()] == ["raw"]


def test_verify_prints_writes_and_ends_by_the_report(run: Run, raw: Path) -> None:
    Path("t.csv").write_text("file,patient\ncase000_0.png,a\nabsent.png,b\n")
    for status, says, options in ((0, "20 patients known by the file", ["--classes", "grade 0, grade 4"]),
                                  (1, "by the pattern", ["--table", "t.csv", "--patient-pattern", r"_\d"])):
        found, out, _ = run("verify", "raw", "--json", "sub/report.json", *options)
        assert found == status
        assert says in out
        assert json.loads(Path("sub/report.json").read_text())["ok"] == (status == 0)
        assert ("t.csv names 1 image that the folder does not hold" in out) == (status == 1)
        assert ("No image of grade_1" in out) == (status == 1)


def test_the_cache_says_its_size_and_is_emptied(run: Run, raw: Path, tmp_path: Path) -> None:
    def files() -> list[Path]:
        return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    RadiographFolder(raw, 160)
    assert files()
    assert run("cache")[1] == f"{tmp_path / 'cache'}: 1 MB\n"
    assert files()
    assert run("cache", "--clear")[0] == 0
    assert not files()
    assert len(RadiographFolder(raw, 160)) == 40  # it can be deleted at any time


def test_a_tilde_is_the_home_folder_and_no_foreign_file_is_overwritten(
        run: Run, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text("{}")
    for option in (["--json=~/mine.json"], ["--json", "~/mine.json"]):
        status, _, err = run("verify", "raw", *option)
        assert status == 2
        assert f"{tmp_path / 'mine.json'}: exists and is no report" in err
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_download_and_cards_hand_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "download", lambda *arguments: f"download {arguments}", raising=False)
    monkeypatch.setattr(download, "cards", lambda *arguments: f"cards {arguments}", raising=False)
    assert run("download", "covid", "--output", "x")[1] == f"download {('covid', Path('x'), None, None)}\n"
    said = run("download", "--kaggle", "a/b", "--output", "x")[1]
    assert said == f"download {(None, Path('x'), 'a/b', None)}\n"
    assert run("cards", "covid")[1] == "cards ('covid',)\n"
    assert run("cards")[1] == "cards (None,)\n"
