"""How the tests of recorded tables get at the scripts that make them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Give the function that imports a script of this folder by its name."""
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(Path(__file__).parent))  # as for a script: it imports what lies beside it
        spec.loader.exec_module(module)
        sys.path.pop(0)
        return module

    return load
