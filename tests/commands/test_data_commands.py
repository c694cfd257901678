"""`genailab data`: the flow of a user from a raw folder to labels, and one line for what is wrong."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from genailab_helpers import datasets
from genailab_helpers.commands import main
from genailab_helpers.datasets import catalog
from genailab_helpers.datasets.folders import index_films

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in an empty folder; give back exit status, stdout and stderr."""
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["data", *arguments])
        return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]

    return call


@pytest.fixture
def raw(run: Run) -> Path:
    """20 films each of healthy and severe spines, two of each patient, in a raw tree with a stray file."""
    for i in range(40):
        path = Path("raw", ("Healthy", "grade 4")[i // 20], f"case{i // 2:03}_{i}.png")
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
    assert "left out, not a film (1): notes.txt" in out
    assert run("preprocess", "--input", "organized", "--output", "grey", "--img-size", "32")[0] == 0
    status, out, _ = run("split", "--input", "grey", "--output", "dataset",
                         "--ratios", "0.6,0.2,0.2")
    assert status == 0
    assert "pairs of near duplicates (0)" in out  # they are noise, each of its own
    films = index_films("dataset")
    assert Counter((film.label, film.split) for film in films) == {
        (grade, part): n for grade in ("grade_0", "grade_4")
        for part, n in (("train", 12), ("val", 4), ("test", 4))}
    assert len({(film.patient, film.split) for film in films}) == 20
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


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_verify_prints_writes_and_ends_by_the_report(
        run: Run, monkeypatch: pytest.MonkeyPatch, ok: bool, status: int) -> None:
    asked = []

    class Report:
        def __init__(self) -> None:
            self.ok = ok

        def __str__(self) -> str:
            return "the report"

        def to_json(self) -> str:
            return '{"findings": []}'

    def audit_folder(*arguments: object) -> Report:
        asked.append(arguments)
        return Report()

    stand_in = SimpleNamespace(audit_folder=audit_folder)
    monkeypatch.setitem(sys.modules, "genailab_helpers.datasets.audit", stand_in)
    monkeypatch.setattr(datasets, "audit", stand_in, raising=False)
    assert run("verify", "films", "--table", "t.csv", "--json", "sub/report.json", "--patient-pattern", "p",
               "--classes", "A, B") == (status, "the report\n", "")
    assert asked == [(Path("films"), Path("t.csv"), ["A", "B"], "p")]
    assert json.loads(Path("sub/report.json").read_text()) == {"findings": []}


def test_download_and_cards_hand_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "download", lambda *arguments: f"download {arguments}", raising=False)
    monkeypatch.setattr(catalog, "cards", lambda *arguments: f"cards {arguments}", raising=False)
    assert run("download", "covid", "--output", "x")[1] == f"download {('covid', Path('x'), None)}\n"
    assert run("download", "--kaggle", "a/b", "--output", "x")[1] == f"download {(None, Path('x'), 'a/b')}\n"
    assert run("cards", "covid")[1] == "cards ('covid',)\n"
    assert run("cards")[1] == "cards (None,)\n"


def test_help_needs_no_torch() -> None:
    code = ("import sys\nfrom genailab_helpers.commands import main\n"
            "try:\n    main(['data', '--help'])\nexcept SystemExit:\n    pass\n"
            "assert not {'torch', 'scipy', 'PIL'} & set(sys.modules)")
    assert "organize" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                        check=True).stdout
