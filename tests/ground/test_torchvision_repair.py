"""The guarded repair of torchvision, each time in a fresh process, beside wheels that need it and others."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MESSAGE = "operator torchvision::nms does not exist"


def python(code: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if first_on_path is not None:
        environment["PYTHONPATH"] = str(first_on_path)
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          env=environment, check=False)


def torchvision_that(folder: Path, does: str) -> Path:
    """Make a package named torchvision, with a submodule, that counts its loadings, then does something."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "part.py").write_text("import builtins\n"
                                     "builtins.part_loadings = getattr(builtins, 'part_loadings', 0) + 1\n")
    (package / "__init__.py").write_text("import builtins\n"
                                         "builtins.loadings = getattr(builtins, 'loadings', 0) + 1\n"
                                         "import torchvision.part\n" + textwrap.dedent(does))
    return folder


def test_the_installed_torchvision_works_after_genailab_helpers():
    done = python("""
        import genailab_helpers
        import torch, torchvision
        from torchvision.transforms import v2
        from torchvision import datasets, models, utils
        assert v2.Resize((8, 8))(torch.zeros(1, 20, 30)).shape == (1, 8, 8)
        assert models.resnet18(weights=None)(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
        assert utils.make_grid(torch.zeros(4, 1, 8, 8)).shape[0] == 3
        print("fine")
    """)
    assert done.stdout == "fine\n"
    assert done.stderr == ""


def test_a_healthy_torchvision_is_loaded_once_and_left_alone(tmp_path):
    done = python("""
        import genailab_helpers
        import torchvision, torchvision as again, builtins, torch
        assert (builtins.loadings, builtins.part_loadings) == (1, 1)
        assert not hasattr(torch.ops.torchvision, "nms")
        assert not genailab_helpers._torchvision._libraries
        print("untouched")
    """, torchvision_that(tmp_path, ""))
    assert (done.stdout, done.stderr) == ("untouched\n", "")


def test_a_broken_torchvision_is_loaded_again_as_a_whole_with_both_operators(tmp_path):
    done = python("""
        import genailab_helpers
        import torchvision, builtins, torch
        assert (builtins.loadings, builtins.part_loadings) == (2, 2)
        assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
        assert torchvision.part is __import__("sys").modules["torchvision.part"]
        print("repaired")
    """, torchvision_that(tmp_path, f"""
        import torch
        if not hasattr(torch.ops.torchvision, "nms"):
            raise RuntimeError("{MESSAGE}")
    """))
    assert (done.stdout, done.stderr) == ("repaired\n", "")


@pytest.mark.parametrize("error", ['RuntimeError("operator torchvision::roi_align does not exist")',
                                   'ImportError("libjpeg is missing")', f'ValueError("{MESSAGE}")'])
def test_any_other_error_passes_unchanged_after_one_try(tmp_path, error):
    done = python(f"""
        import genailab_helpers, builtins
        try:
            import torchvision
        except Exception as caught:
            assert repr(caught) == {error!r}.replace('"', "'"), repr(caught)
        assert builtins.loadings == 1
        assert not genailab_helpers._torchvision._libraries
        print("passed on")
    """, torchvision_that(tmp_path, f"raise {error}"))
    assert (done.stdout, done.stderr) == ("passed on\n", "")
