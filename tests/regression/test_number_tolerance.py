"""Numbers in text agree within a tolerance, everything else to the letter."""

import pytest

from genailab_helpers.nbregression import TOLERANCE, compare_text

AGREE = [
    ("loss 0.1234", "loss 0.1235"), ("loss 1234.5 mm", "loss 1235.5 mm"),
    ("1,234.5 films", "1,235.5 films"), ("x=-0.5000, y=+0.5000", "x=-0.5004, y=+0.4996"),
    ("1.0000e-05 at step 7", "1.0009e-05 at step 7"), ("took 0.5000s", "took 0.5001s"),
    ("0.3333333333333333", "0.33333334"), ("0.5", "0.50"), ("mean 0.0", "mean -1.2e-17"),
    ("-0.0000", "0.0000"), ("[ 9.9999 1.5]", "[10.0001 1.5]"), ("[0.12345678 0.5 ]", "[0.1234567  0.5 ]"),
    ("12 films, sum 12.", "12 films, sum 12."),
]
DIFFER = [
    ("loss 0.1234", "loss 0.1236"), ("accuracy 0.12", "accuracy 0.13"),
    ("accuracy 84.5 %", "accuracy 84.6 %"), ("x = 0.5", "x = -0.5"), ("p = 1.0e-05", "p = 1.1e-05"),
    ("nan", "0.5"), ("loss 0.5", "loss nan"), ("1000 films", "1001 films"),
    ("there are 1000.", "there are 1001."), ("epoch 3: 0.5", "epoch 4: 0.5"),
    ("torch 2.13.0", "torch 2.13.1"), ("layer w0.1234", "layer w0.1235"), ("3", "3.0"), ("0.5 0.5", "0.5"),
    ("0.5 kg", "0.5kg"), ("a 0.5", "a  0.5"), ("one\n0.5", "one 0.5"), ("Loss 0.5", "loss 0.5"),
    ("0.5\n", "0.5\nmore\n"), ("#1e3a5f", "#1e3a5e"), ("rows 1-2.1234", "rows 2-2.1234"),
]


@pytest.mark.parametrize(("old", "new"), AGREE)
def test_agrees(old: str, new: str) -> None:
    assert compare_text(old, new) is None
    assert compare_text(new, old) is None


@pytest.mark.parametrize(("old", "new"), DIFFER)
def test_differs(old: str, new: str) -> None:
    assert compare_text(old, new)
    assert compare_text(new, old)


@pytest.mark.parametrize(("factor", "agrees"), [(1 + 0.99 * TOLERANCE, True), (1 + 1.01 * TOLERANCE, False)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_tolerance_is_relative(size: float, factor: float, agrees: bool) -> None:
    assert (compare_text(f"{size:.9e}", f"{size * factor:.9e}") is None) is agrees


def test_wider_tolerance_leaves_integers_exact() -> None:
    assert compare_text("loss 1.00 at 100", "loss 1.04 at 100", tolerance=0.05) is None
    assert compare_text("loss 1.00 at 100", "loss 1.06 at 100", tolerance=0.05)
    assert compare_text("loss 1.00 at 100", "loss 1.00 at 101", tolerance=0.05)


def test_report_shows_line_old_new_and_tolerance() -> None:
    report = compare_text("step 1: 0.1\nstep 2: 0.25", "step 1: 0.1\nstep 2: 0.5")
    assert report is not None
    assert report.splitlines() == [
        "line 2, old 0.25, new 0.5, relative difference 0.5, tolerance 0.001",
        "    old  step 2: 0.25", "    new  step 2: 0.5"]


def test_report_finds_the_line_that_is_not_there() -> None:
    assert compare_text("a\nb", "a") == "line 2, text\n    old  b\n    new  (no such line)"
