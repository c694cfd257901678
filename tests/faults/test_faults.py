"""The list of faults that `make test-faults` puts in: each can still be put in, and says what it is."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def seeding(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("seed_faults")


def test_every_fault_changes_what_it_names(seeding: ModuleType) -> None:
    faults = seeding.read_faults()
    assert len({fault.name for fault in faults}) == len(faults) >= 60
    for fault in faults:
        sound = (seeding.ROOT / fault.file).read_text(encoding="utf-8")
        assert fault.applied(sound) != sound, fault.name


def test_mutants_are_drawn_alike_and_are_modules(seeding: ModuleType) -> None:
    mutants = seeding.draw_mutants()
    assert mutants == seeding.draw_mutants()
    assert len({mutant.name for mutant in mutants}) > 40
    for mutant in mutants:
        compile(mutant.applied((seeding.ROOT / mutant.file).read_text(encoding="utf-8")), mutant.file, "exec")


def test_a_fault_whose_place_is_gone_is_named(seeding: ModuleType) -> None:
    fault = seeding.Fault("left out", "a kind", "genailab_helpers/statistics.py", "not there", "")
    with pytest.raises(ValueError, match="left out: its text stands 0 times in genailab_helpers"):
        fault.applied("some text")
