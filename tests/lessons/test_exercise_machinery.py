"""Stubs come from solutions; self-checks say what is wrong."""

import math
import textwrap

import nbformat
import numpy as np
import pytest
import torch

from genailab_helpers.lessons import check, checks, exercises
from genailab_helpers.lessons.checks import NotSolved, expect
from genailab_helpers.lessons.exercises import find_exercises, make_stub, refresh_stubs

SOLUTION = textwrap.dedent('''\
    def attenuate(mu, length):
        """Return the part of the rays that passes."""
        # BEGIN SOLUTION
        depth = mu * length
        return math.exp(-depth)
        # END SOLUTION

    check("99.1", attenuate)''')
STUB = textwrap.dedent('''\
    def attenuate(mu, length):
        """Return the part of the rays that passes."""
        ...  # your code here

    check("99.1", attenuate)''')


@pytest.fixture(autouse=True)
def _checks(monkeypatch):
    """Give every test its own exercise 99.1 and leave none behind."""
    def judge(attenuate):
        expect(attenuate(2.0, 3.0), math.exp(-6.0), "what passes through 3 cm")

    monkeypatch.setitem(checks.CHECKS, "99.1", judge)


# stubs

def test_a_stub_is_the_solution_without_its_blocks():
    assert make_stub(SOLUTION) == STUB
    assert make_stub(f"{SOLUTION}\n{SOLUTION}\n# a remark") == f"{STUB}\n{STUB}\n# a remark"


# cells of a notebook

def cell(source, *tags):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def exercise(number="99.1", stub="old", solution=SOLUTION):
    return [cell(stub, "exercise-stub", f"exercise-{number}"),
            cell(solution, "exercise-solution", f"exercise-{number}")]


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 99. A lesson"), *cells])


def test_stubs_are_refreshed_and_nothing_else_is_touched():
    book = notebook(*exercise(), cell("1 + 1"), *exercise("99.2"))
    before = [c.source for c in book.cells]
    assert find_exercises(book) == {"99.1": (1, 2), "99.2": (4, 5)}
    refresh_stubs(book)
    assert [c.source for c in book.cells] == [STUB if i in (1, 4) else s for i, s in enumerate(before)]
    nbformat.validate(book)


# self-checks

def verdict(capsys, answer, number="99.1"):
    check(number, answer)
    [line] = capsys.readouterr().out.splitlines()
    return line


def run(source):
    space = {"check": check, "math": math}
    exec(source, space)


def test_the_stub_fails_and_the_solution_passes(capsys):
    run(make_stub(SOLUTION))
    run(SOLUTION)
    assert capsys.readouterr().out.splitlines() == [
        "Exercise 99.1 not solved yet: nothing has been returned yet", "Exercise 99.1 solved."]


@pytest.mark.parametrize("blank", [None, ..., lambda mu, length: None, lambda mu, length: ...])
def test_a_blank_is_told_from_a_wrong_answer(capsys, blank):
    assert verdict(capsys, blank) == "Exercise 99.1 not solved yet: nothing has been returned yet"


def test_a_wrong_answer_is_told_what_was_expected_and_what_came(capsys):
    line = verdict(capsys, lambda mu, length: 1.25 * math.exp(-mu * length))
    assert line == ("Exercise 99.1 not solved yet: what passes through 3 cm: "
                    "expected 0.002479, got 0.003098")


def test_an_error_in_the_answer_is_one_line_with_its_type_and_message(capsys):
    def answer(mu, length):
        raise KeyError("no\nsuch\nthing " + "x " * 500)

    line = verdict(capsys, answer)
    assert line.startswith("Exercise 99.1 not solved yet: your code stopped with KeyError: ")
    assert "such" in line
    assert len(line) < 300
    assert "TypeError" in verdict(capsys, lambda: 1)  # takes too few arguments


def test_answers_that_are_no_functions_are_judged_as_they_are(capsys, monkeypatch):
    seen = []
    monkeypatch.setitem(checks.CHECKS, "99.2", seen.append)
    layer = torch.nn.Linear(1, 1)
    assert verdict(capsys, layer, "99.2") == "Exercise 99.2 solved."
    assert seen == [layer]


def test_an_unknown_exercise_is_an_error():
    with pytest.raises(ValueError, match=r"there is no exercise '99.7'; expected one of 1.1, .*5.4, 99.1"):
        check("99.7", 1)


# expectations

@pytest.mark.parametrize("got", [[1.0, 2.0], (1, 2), np.array([1, 2]), torch.tensor([1.0, 2.0005]),
                                 torch.tensor([1.0, 2.0], requires_grad=True)])
def test_right_numbers_of_any_kind_pass(got):
    expect(got, torch.tensor([1.0, 2.0]), "both")


@pytest.mark.parametrize(("got", "message"), [
    ([1.0, 2.2], r"both at \[1\] \(1 of 2 places are wrong\): expected 2, got 2.2"),
    ([1.0], r"both should have shape \(2,\), yours has \(1,\)"),
    ([1.0, math.nan], "both should be finite, 1 of your 2 values are not"),
    ("two", "both should be made of numbers, yours is a str"),
    ([[1.0], [1.0, 2.0]], "made of numbers, yours is a list"),
])
def test_wrong_numbers_are_told_with_the_right_ones(got, message):
    with pytest.raises(NotSolved, match=message):
        expect(got, [1.0, 2.0], "both")


@pytest.mark.parametrize("want", [0.01, 100.0])
def test_the_tolerance_is_relative(want):
    expect(want * (1 + 0.99e-3), want, "it")
    with pytest.raises(NotSolved, match=r"expected .*, got"):
        expect(want * (1 - 1.01e-3), want, "it")


def test_a_classic_mistake_is_named_unless_it_is_right_here():
    mistakes = {"you added them up": [3.0, 3.0], "you exchanged them": [2.0, 1.0]}
    with pytest.raises(NotSolved, match=r"both at \[0\] .*: expected 1, got 2; you exchanged them"):
        expect([2.0, 1.0], [1.0, 2.0], "both", mistakes)
    with pytest.raises(NotSolved, match=r"expected 1, got 4$"):
        expect(4.0, 1.0, "one", {"you added them up": 3.0})
    expect(3.0, 3.0, "one", {"you added them up": 3.0})


def test_zero_is_met_by_zero_alone():
    expect(torch.zeros(3), [0, 0, 0], "the background")
    with pytest.raises(NotSolved, match=r"expected 0, got 0\.5"):
        expect([0, 0.5, 0], torch.zeros(3), "the background")


def test_the_solution_never_takes_the_place_of_an_answer_that_passed(capsys, monkeypatch):
    monkeypatch.setattr(exercises, "_own", {})

    def solution(mu, length):
        # BEGIN SOLUTION
        return math.exp(-mu * length)
        # END SOLUTION

    def own(mu, length):
        return math.e ** (-mu * length)

    def wrong(mu, length):
        return mu * length

    assert check("99.1", wrong) is wrong
    assert check("99.1", solution) is solution
    assert check("99.1", own) is own
    capsys.readouterr()
    assert check("99.1", solution) is own
    assert capsys.readouterr().out == "Exercise 99.1 solved. Your own answer stays in use.\n"
    check("99.1", wrong)  # the reader broke it again
    assert check("99.1", solution) is solution
