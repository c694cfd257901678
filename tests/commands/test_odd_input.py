"""Models, notebooks and settings of others: no path out of them, no folder in them, no whim of a profile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from genailab_helpers.classification.losses import LOSSES
from genailab_helpers.classification.networks import build_backbone
from genailab_helpers.classification.training import Classifier, save_classifier
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import Denoiser, save_denoiser
from genailab_helpers.nbregression import record

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one class; the model is untrained."""
    folder = tmp_path / "inside" / "run"
    network = UNet2D(1, 1, base_channels=8, channel_multipliers=(1, 2))
    save_denoiser(folder / "model.safetensors", Denoiser(network, 16, 8))
    return folder


@pytest.mark.parametrize("classes", [
    {"../../../outside": 3}, {"/tmp/outside": 3}, {"..": 3}, {"a/b": 3}, {"...": 3}, {"": 3}, {"a\0": 3},
    {"A": 0}, {"A": -1}, {"A": "x"}, {"A": None}, {"A": 10**400}, ["A"], None])
def test_a_recipe_leads_nowhere(run: Path, tmp_path: Path, genailab, classes: object) -> None:
    (run / "recipe.json").write_text(json.dumps({"classes": classes}))
    line = genailab.refuse("sample", run, "--n-samples", 1, "--output", run.parent / "new")
    assert "recipe.json: expected classes that can be folders, with counts" in line
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{}"])
def test_a_recipe_that_is_none_is_one_line(run: Path, genailab, content: bytes) -> None:
    (run / "recipe.json").write_bytes(content)
    assert "recipe.json: expected classes" in genailab.refuse("sample", run, "--output", run.parent / "new")


def test_counts_of_a_recipe_cost_nothing(run: Path, genailab) -> None:
    (run / "recipe.json").write_text('{"classes": {"A": 1000000000000}}')
    genailab.run("sample", run, "--n-samples", 2, "--output", run.parent / "new")
    assert len(list((run.parent / "new" / "films" / "A").iterdir())) == 2


def test_one_unreadable_image_does_not_end_a_classification(tmp_path: Path, genailab) -> None:
    loss = LOSSES["cross_entropy"](2)
    model = Classifier(build_backbone("small_cnn", loss.head), loss, ["A", "B"], 32, "small_cnn")
    save_classifier(tmp_path / "model.safetensors", model, run={}, thresholds={"A": 0.5, "B": 0.5})
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file in (files[0], files[2]):
        Image.new("L", (40, 40), 90).save(file)
    files[1].write_bytes(b"broken")
    status, out, err = genailab("classify", tmp_path, *files)
    assert status == 2
    assert [line.partition(":")[0] for line in out.splitlines()[:2]] == [str(files[0]), str(files[2])]
    assert out.endswith("no patient of yours.\n")
    assert f"genailab: {files[1]}: neither PNG" in err
    assert len(err.splitlines()) == 1
    assert genailab.refuse("classify", tmp_path, files[1])


SOURCE = """DATA = None
print(DATA)
import os
1
print(os.path.expanduser('~') + '/x')
2"""


def test_a_run_names_no_folder_and_heeds_no_profile(tmp_path: Path, monkeypatch, genailab) -> None:
    """The user's own profile would show the 1 as well, and notebooks of others lie in the output already."""
    profile = tmp_path / "home" / ".ipython" / "profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_config.py").write_text("get_config().InteractiveShell.ast_node_interactivity = 'all'")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    (tmp_path / "secret (1)" / "NORMAL").mkdir(parents=True)
    Image.new("L", (32, 32), 90).save(tmp_path / "secret (1)" / "NORMAL" / "one.png")
    cells = [new_code_cell(source, metadata={"tags": ["parameters"] * (not i)})
             for i, source in enumerate(SOURCE.split("\n", 1))]
    lesson, build = tmp_path / "01_lesson.ipynb", tmp_path / "build"
    kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), lesson)
    build.mkdir()
    for foreign in ("foreign.ipynb", "page.html"):
        (build / foreign).write_text("")
    genailab.run("run", lesson, "--output", build, "-p", "DATA", tmp_path / "secret (1)")
    done = nbformat.read(build / "01_lesson.ipynb", 4)
    said = [output.get("text", output.get("data", {}).get("text/plain"))
            for cell in done.cells for output in cell.outputs]
    assert said == ["secret (1)\n~/x\n", "2"]
    for path in build.glob("*.*"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    index = (build / "index.html").read_text(encoding="utf-8")
    assert "01_lesson.html" in index
    assert "foreign" not in index
    assert "page.html" not in index
    monkeypatch.setenv("IPYTHONDIR", str(profile.parent))
    record(lesson)
    recorded = nbformat.read(lesson, 4).cells[1].outputs
    assert [output.get("data", {}).get("text/plain") for output in recorded] == [None, "2"]


def test_a_console_that_cannot_write_every_letter_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "genailab_helpers.commands", "data", "create", "--classes", "Été,Ω",
         "--output", "out"], cwd=tmp_path, capture_output=True, encoding="cp1252",
        env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u03a9" in done.stdout


def test_a_model_of_a_recipe_without_sense_is_one_line(run: Path, genailab) -> None:
    from genailab_helpers.checkpoints import load_checkpoint, save_checkpoint

    (run / "recipe.json").write_text('{"classes": {"A": 1}}')
    tensors, recipe = load_checkpoint(run / "model.safetensors")
    endless = recipe["network"] | {"num_res_blocks": 10**9}
    for wrong in ({"img_size": 0}, {"network": []}, {"n_components": "x"}, {"network": endless}):
        save_checkpoint(run / "model.safetensors", tensors, recipe | wrong)
        assert "model.safetensors" in genailab.refuse("sample", run, "--output", run.parent / "new")
    assert torch.is_tensor(tensors["denoiser.mean"])
