"""Data cards and downloads. No test touches the network: kagglehub and medmnist are stand-ins.

Run as a script, this file writes the cards into data/README.md.
"""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from genailab_helpers.datasets.download import CARDS, DOWNLOADS, cards, download
from genailab_helpers.datasets.names import FINDINGS, GRADES
from genailab_helpers.phantoms.chest import render_chests, sample_chests

README = Path(__file__).resolve().parents[2] / "data" / "README.md"
BEGIN, END = "<!-- cards: begin -->\n", "<!-- cards: end -->\n"


def readme_with_cards(text: str) -> str:
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{cards()}\n\n{END}{rest.split(END)[1]}"


def set_counts(monkeypatch, name: str, counts: dict[str, dict[str, int]]) -> None:
    monkeypatch.setitem(CARDS[name], "counts", counts)


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A stand-in for kagglehub: hands out `folder`, or raises `error`, and notes the handles asked for."""
    hub = SimpleNamespace(folder=tmp_path / "hub", error=None, asked=[])

    def dataset_download(handle: str) -> str:
        hub.asked.append(handle)
        if hub.error:
            raise hub.error
        return str(hub.folder)

    hub.dataset_download = dataset_download
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    return hub


@pytest.fixture
def chest(kaggle, put, monkeypatch):
    """The archive of the chest set in small: nested copy, macOS leftovers, links out of the tree."""
    set_counts(monkeypatch, "chest", {"train": {"Normal": 2, "Pneumonia": 1}, "test": {"Normal": 1}})
    for root in (kaggle.folder / "chest_xray", kaggle.folder / "chest_xray" / "chest_xray"):
        put(root, "train/NORMAL/IM-0001-0001.jpeg", "train/NORMAL/IM-0002-0001.jpeg",
            "train/PNEUMONIA/person1_virus_1.jpeg", "test/NORMAL/IM-0003-0001.jpeg")
    root = kaggle.folder / "chest_xray"
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._IM-0001-0001.jpeg").write_bytes(b"fork")
    (root / "train" / ".DS_Store").write_bytes(b"")
    private = put(kaggle.folder.parent / "private", "secret.png")
    (root / "train" / "NORMAL" / "link.png").symlink_to(put(kaggle.folder.parent / "own", "x.png") / "x.png")
    (root / "train" / "linked").symlink_to(private, target_is_directory=True)
    return kaggle


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Cards


def test_every_card_is_complete():
    for name, card in CARDS.items():
        for fact in ("title", "modality", "what", "origin", "licence", "patients", "privacy"):
            assert card[fact].strip(), (name, fact)
        assert re.match(r"https?://\S+$", card["url"]), name
        assert card["faults"], name
        assert card["access"], name
        classes = {of for split in card.get("counts", {}).values() for of in split}
        assert classes <= {*FINDINGS, *GRADES}, name
        assert classes <= card.get("meanings", {}).keys(), name
        assert "counts" in card or "kaggle" not in card, name  # `download` checks the counts of what it gets
    assert set(DOWNLOADS) <= CARDS.keys()


def test_cards_shows_one_or_all():
    text = cards("covid")
    assert text.startswith("### `covid`")
    assert "| COVID | 3,616 |" in text
    for name in CARDS:
        assert cards(name) in cards()
        assert f"| `{name}` |" in cards()
    with pytest.raises(ValueError, match=r"lungs: no card of that name; expected one of chest, covid"):
        cards("lungs")


def test_readme_holds_the_cards():
    text = README.read_text(encoding="utf-8")
    assert readme_with_cards(text) == text, "run: python tests/datasets/test_download.py"


# Downloads


def said_counts(message: str) -> list[str]:
    """Return the table at the start of what `download` says, with single spaces."""
    lines = [line for line in message.splitlines() if not line.startswith(("warning", "Next"))]
    return [" ".join(line.split()) for line in lines]


def test_chest_is_copied_once_and_counted(chest, tmp_path):
    message = download("chest", tmp_path / "out")
    assert chest.asked == ["paultimothymooney/chest-xray-pneumonia"]
    assert files_in(tmp_path / "out") == [
        "test/NORMAL/IM-0003-0001.jpeg", "train/NORMAL/IM-0001-0001.jpeg", "train/NORMAL/IM-0002-0001.jpeg",
        "train/PNEUMONIA/person1_virus_1.jpeg"]
    assert said_counts(message) == ["split test train", "class", "Normal 1 2", "Pneumonia 0 1"]
    assert message.endswith(f"Next: genailab data verify {tmp_path / 'out'}")
    assert "warning" not in message


def test_covid_keeps_masks_and_notes_and_counts_images_only(kaggle, put, tmp_path, monkeypatch):
    set_counts(monkeypatch, "covid", {"all": {"Normal": 1, "COVID": 2}})
    root = put(kaggle.folder / "COVID-19_Radiography_Dataset", "COVID/images/COVID-1.png",
               "COVID/images/COVID-2.png", "COVID/masks/COVID-1.png", "COVID/masks/COVID-2.png",
               "Normal/images/Normal-1.png")
    (root / "README.md.txt").write_text("sources")
    message = download("covid", tmp_path / "out")
    assert said_counts(message)[2:] == ["COVID 2", "Normal 1"]
    assert "warning" not in message
    assert {"COVID/masks/COVID-1.png", "README.md.txt"} <= set(files_in(tmp_path / "out"))


def test_counts_that_differ_from_the_card_are_warned_of(chest, monkeypatch, tmp_path, genailab):
    set_counts(monkeypatch, "chest", {"train": {"Normal": 2, "Pneumonia": 3}})
    for source in (["chest"], ["--kaggle", CARDS["chest"]["kaggle"]]):
        said = genailab.run("data", "download", *source, "--output", tmp_path / source[-1]).splitlines()
        assert [line for line in said if line.startswith("warning")] == [
            "warning: train Pneumonia: 1 images, the card says 3",
            "warning: test Normal: 1 images, the card says 0"]


@pytest.mark.parametrize("handle", ["spine", "../spine", "owner/..", "https://kaggle.com/a", "a/b/c", "/etc"])
def test_what_is_no_handle_is_refused(kaggle, tmp_path, handle):
    with pytest.raises(ValueError, match="expected the handle of a Kaggle set, owner/name"):
        download(kaggle=handle, output=tmp_path / "out")
    assert kaggle.asked == []


def test_a_failing_network_gives_one_line_with_the_way_by_hand(chest, tmp_path):
    chest.error = ConnectionError("Max retries exceeded\nwith url: /api")
    with pytest.raises(OSError, match="the download failed") as caught:
        download("chest", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert "ConnectionError: Max retries exceeded with url" in message
    assert CARDS["chest"]["url"] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "module"), [("covid", "kagglehub"), ("pneumoniamnist", "medmnist")])
def test_a_missing_extra_gives_one_line(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OSError, match=rf"{name}: .*{module}.*`pip install -e '\.\[download\]'`") as caught:
        download(name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert CARDS[name]["url"] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_nobody_serves_points_to_its_card(tmp_path):
    for name in CARDS.keys() - set(DOWNLOADS):
        with pytest.raises(ValueError, match=f"{name}: has to be .* by hand: `genailab data cards {name}`"):
            download(name, tmp_path / "out")


def arrays(side: int = 16, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """Give three images a split: one is normal, two show pneumonia; their grey is their number."""
    images = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((side, side), np.uint8)
    made = {}
    for split in ("train", "val", "test"):
        made |= {f"{split}_images": images, f"{split}_labels": np.array([[0], [1], [1]], dtype=np.uint8)}
    return made | changed


def test_pneumoniamnist_becomes_folders_of_images(monkeypatch, tmp_path):
    def medmnist(split: str, download: bool, size: int, root: str) -> None:
        np.savez(Path(root) / f"pneumoniamnist_{size}.npz", **arrays(size))

    monkeypatch.setitem(sys.modules, "medmnist", SimpleNamespace(PneumoniaMNIST=medmnist))
    message = download("pneumoniamnist", tmp_path / "out")
    assert said_counts(message)[2:] == ["Normal 1 1 1", "Pneumonia 2 2 2"]
    with Image.open(tmp_path / "out" / "val" / "Pneumonia" / "val_0002.png") as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (128, 128), 2)


def test_a_file_that_was_fetched_elsewhere_needs_no_library(monkeypatch, tmp_path, genailab):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    np.savez(tmp_path / "medmnist.npz", **arrays())
    said = genailab.run("data", "download", "pneumoniamnist", "--from", tmp_path / "medmnist.npz",
                        "--output", tmp_path / "out")
    assert said_counts(said)[2:] == ["Normal 1 1 1", "Pneumonia 2 2 2"]
    with Image.open(tmp_path / "out" / "val" / "Pneumonia" / "val_0002.png") as image:
        assert (image.size, image.getpixel((0, 0))) == ((16, 16), 2)


@pytest.mark.parametrize("changed", [
    {"val_labels": np.array([[0], [1], [2]])}, {"test_labels": np.array([[0], [1], [-1]])},
    {"train_images": np.zeros((2, 16, 16), np.uint8)}, {"train_labels": np.array([{}, {}, {}])}, None])
def test_another_file_is_refused_and_named(tmp_path, changed):
    file = tmp_path / "other.npz"
    if changed is None:
        file.write_bytes(b"PK no archive")
    else:
        np.savez(file, **arrays(**changed))
    with pytest.raises(ValueError, match=r"other\.npz: "):
        download("pneumoniamnist", tmp_path / "out", file=file)
    assert not (tmp_path / "out").exists()


# The page


@pytest.mark.slow
def test_quick_start_runs_as_written(tmp_path, monkeypatch, write, genailab):
    """On rendered images in folders that are called as people call them: four grades of opacity and none."""
    for grade, folder in enumerate(["0", "Doubtful", "grade 2", "grade_3", "4"]):
        finding = "Pneumonia" if grade else "Normal"
        images = render_chests(sample_chests(14, seed=grade, finding=finding), img_size=96).images
        for number, image in enumerate(images):
            write(tmp_path / "raw_data" / folder / f"image{grade}{number:02d}.png", image)
    block = README.read_text(encoding="utf-8").split("```bash\n")[1].split("```")[0]
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [line[2] for line in commands] == ["create", "organize", "verify", "split", "verify"]
    monkeypatch.chdir(tmp_path)
    for line in commands:
        assert line[0] == "genailab"
        genailab.run(*line[1:])
    images = [name for name in files_in(tmp_path / "dataset") if name.endswith(".png")]
    assert len(images) == 70
    assert {name.split("/")[0] for name in images} == {"train", "val", "test"}
    assert {name.split("/")[1] for name in images} == set(GRADES)


if __name__ == "__main__":
    README.write_text(readme_with_cards(README.read_text(encoding="utf-8")), encoding="utf-8")
