"""The self-checks name the classic mistakes, say expected and got, and accept the right answers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genailab_helpers.lessons import check

RIGHT: list[tuple[str, Callable[..., Any]]] = []
MISTAKES: list[tuple[str, Callable[..., Any], str]] = []
for path in sorted(Path(__file__).parent.glob("answers_0*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    answers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    RIGHT += answers.RIGHT.items()
    MISTAKES += answers.MISTAKES


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=[number for number, _ in RIGHT])
def test_right_answer_passes(number: str, answer: Callable[..., Any],
                             capsys: pytest.CaptureFixture[str]) -> None:
    check(number, answer)
    assert capsys.readouterr().out == f"Exercise {number} solved.\n"


@pytest.mark.parametrize(("number", "answer", "words"), MISTAKES,
                         ids=[f"{number} {words}" for number, _, words in MISTAKES])
def test_mistake_is_named(number: str, answer: Callable[..., Any], words: str,
                          capsys: pytest.CaptureFixture[str]) -> None:
    check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"Exercise {number} not solved yet: ")
    assert words in said
    assert "got" in said or "not finite" in said


def test_every_exercise_has_an_answer_and_three_mistakes() -> None:
    numbers = {number for number, _ in RIGHT}
    assert numbers == {f"{lesson}.{exercise}" for lesson in range(1, 6) for exercise in range(1, 5)}
    for number in numbers:
        assert sum(wrong == number for wrong, *_ in MISTAKES) >= 3
