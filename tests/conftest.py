"""Fixtures that every room's tests share."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real films for tests, named by GENAILAB_REAL_DATA; skips where it is absent."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        pytest.skip("GENAILAB_REAL_DATA is not set: tests on real films need a folder of them")
    if not Path(folder).is_dir():
        pytest.skip(f"GENAILAB_REAL_DATA={folder} is no folder: tests on real films need one")
    return Path(folder)


@pytest.fixture(scope="module")
def load_script() -> Callable[[str], ModuleType]:
    """Give the function that imports a script of benchmarks/ by its name."""
    folder = Path(__file__).parents[1] / "benchmarks"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(folder))  # as for a script: it imports what lies beside it
        spec.loader.exec_module(module)
        sys.path.pop(0)
        return module

    return load
