"""Every number in a lesson's text is printed by one of its cells, or has its source in constants.toml.

What counts as a number of the text: digits with their sign, thousands commas, decimals, exponent and "%", but

- not in code spans and blocks, HTML tags, link targets and addresses, arXiv and DOI numbers;
- not the numbering of headings ("# 2. Title", "## 2.1 Bones") and of lists, nor references to parts of the
  course ("lesson 3", "exercises 2.1 and 2.2");
- not in names ("Lite0", "COVID-19", "v2", "3D"), ordinals ("1st"), versions ("1.2.3") and the year of a
  citation in parentheses ("(Dar et al., 2024)", "Dar (2024)");
- in a formula, only what ends it and is the whole of it or follows =, <, > or an about-sign: the 2 in $x^2$
  or $h/2$ is structure, the 0.2 in $\\mu = 0.2$ a claim.

A number is printed if an output number of its own section (from one "## " to the next) rounds to it, at the
digits that the text gives: 0.85 agrees with an output of 0.8493, but not of 0.8 (too few digits) or 0.8449. A
whole number below 10 agrees with whole numbers only. Without a sign it agrees with both signs ("falls by 3").
A percentage agrees with a fraction, 85 % with 0.8493, and a fraction with a percentage.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CONSTANTS = tomllib.loads(Path(__file__).with_name("constants.toml").read_text("utf-8")).get("constant", [])

NUMBER = re.compile(
    r"(?<![\w.])(?<![A-Za-z]-)(?P<sign>(?<![\w)\]])[-+−])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<exponent>e[-+]?\d+)?(?!\d|\.\d|,\d{3}\b)"
    r"(?!(?:st|nd|rd|th|D)\b)(?P<percent>\s?(?:\\?%|percent\b|per cent\b))?")
PART = r"\d+(?:\.\d+)?"
NO_NUMBERS = [re.compile(pattern, re.MULTILINE | re.DOTALL | re.IGNORECASE) for pattern in (
    r"^(```|~~~).*?^\1", r"(`+).+?\1", r"!\[[^\]]*\]\(attachment:\S+\)",
    r"<!--.*?-->", r"<[a-z/][^>]*>", r"\]\([^)]*\)", r"\b(?:https?|ftp)://\S+",
    r"\b(?:arxiv|doi):\s?\S+", r"^\s*\d+[.)]\s", rf"^#+\s+{PART}\.?\s",
    rf"\b(?:exercise|lesson|notebook|section|figure|table)s?\s+{PART}(?:(?:,| and| to| or)\s+{PART})*")]
CITED_YEAR = re.compile(r"(?:[A-Z][a-z]+|et al\.),? \(?(?:19|20)\d\d\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
SCRIPT = re.compile(r"[_^](?:\{[^{}]*\}|\\\w+|.)")
CLAIM = re.compile(r"(?:^|[=<>]|\\(?:approx|sim|le|leq|ge|geq)\b)\s*"
                   r"([-+]?\d[\d,.]*(?:\s?\\?%)?)\s*(?:\\[,;: ].*)?$", re.DOTALL)
TIMES = re.compile(r"(?<=\d)[x×](?=\d)")
DATA_URI = re.compile(r"data:image/[\w+]+;base64,[A-Za-z0-9+/=\s]+")


@dataclass(frozen=True)
class Number:
    """A number as it is written."""

    written: str
    value: Decimal
    decimals: int
    signed: bool
    percent: bool


def find_numbers(text: str) -> list[Number]:
    found = []
    for match in NUMBER.finditer(TIMES.sub(" x ", text)):
        digits = match["digits"].replace(",", "")
        sign = (match["sign"] or "").replace("−", "-")
        value = Decimal(sign + digits + (match["exponent"] or ""))
        exponent = value.as_tuple().exponent
        assert isinstance(exponent, int)
        found.append(Number(match[0].strip(), value, max(0, -exponent), bool(sign), bool(match["percent"])))
    return found


def prose_numbers(markdown: str) -> list[Number]:
    """Find the numbers of a markdown cell that are claims."""
    for pattern in NO_NUMBERS:
        markdown = pattern.sub(" ", markdown)
    markdown = CITED_YEAR.sub(" ", markdown)
    return find_numbers(FORMULA.sub(_claim_of_formula, markdown))


def _claim_of_formula(formula: re.Match[str]) -> str:
    claim = CLAIM.search(SCRIPT.sub("", formula[1] or formula[2]).strip())
    return f" {claim[1]} " if claim else " "


def output_numbers(notebook: NotebookNode) -> list[Number]:
    return [number for text in _output_texts(notebook) for number in find_numbers(text)]


def _output_texts(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                yield output.text
            data = output.get("data", {})
            yield data.get("text/plain", "")
            yield re.sub(r"<[^>]*>", " ", DATA_URI.sub("", data.get("text/html", "")))


def is_printed(claim: Number, printed: list[Number]) -> bool:
    return any(_rounds_to(value, decimals, claim) for number in printed
               for value, decimals in _readings(number, claim))


def _readings(number: Number, claim: Number) -> Iterator[tuple[Decimal, int]]:
    """Give an output number as it is, and as a percentage or a fraction if the claim is one."""
    if not (number.percent and not claim.percent):
        yield number.value, number.decimals
    if claim.percent and not number.percent and abs(number.value) <= 1:
        yield 100 * number.value, max(0, number.decimals - 2)
    if number.percent and not claim.percent:
        yield number.value / 100, number.decimals + 2


def _rounds_to(value: Decimal, decimals: int, claim: Number) -> bool:
    if decimals < claim.decimals:
        return False
    if not claim.percent and claim.decimals == 0 and decimals > 0 and abs(claim.value) < 10:
        return False
    half = Decimal(1).scaleb(-claim.decimals) / 2
    return min(abs(value - claim.value), abs(value + claim.value) if not claim.signed else half + 1) <= half


def sections(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """Give what stands between two headings of the second order, each time as a notebook."""
    cells = [cell if cell.cell_type != "markdown" else nbformat.v4.new_markdown_cell(part)
             for cell in notebook.cells
             for part in (re.split(r"^(?=## )", cell.source, flags=re.MULTILINE)
                          if cell.cell_type == "markdown" else [""])]
    begins = [i for i, cell in enumerate(cells) if cell.source.startswith("## ")]
    for begin, end in pairwise([0, *begins, len(cells)]):
        yield nbformat.v4.new_notebook(cells=cells[begin:end])


def unbound_numbers(notebook: NotebookNode, constants: set[str]) -> list[str]:
    return [f"{claim.written!r} in: {cell.source[:60]!r}"
            for section in sections(notebook) for printed in [output_numbers(section)]
            for cell in section.cells if cell.cell_type == "markdown"
            for claim in prose_numbers(cell.source)
            if claim.written not in constants and not is_printed(claim, printed)]


def stale_constants(constants: list[dict[str, str]], notebooks: dict[str, NotebookNode]) -> list[str]:
    """Find constants without a source, or that no text of their notebook writes."""
    written = {name: {number.written for cell in notebook.cells if cell.cell_type == "markdown"
                      for number in prose_numbers(cell.source)} for name, notebook in notebooks.items()}
    return [f"{constant}" for constant in constants
            if not constant.get("source", "").strip()
            or constant["number"] not in written.get(constant["notebook"], set())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_the_text_are_printed_or_constants(path: Path) -> None:
    constants = {constant["number"] for constant in CONSTANTS if constant["notebook"] == path.stem}
    assert unbound_numbers(nbformat.read(path, as_version=4), constants) == []


def test_constants_are_used_and_have_a_source() -> None:
    assert stale_constants(CONSTANTS, {p.stem: nbformat.read(p, as_version=4) for p in NOTEBOOKS}) == []


# --------------------------------------------------------------------------------- the rules, both ways

@pytest.mark.parametrize(("text", "numbers"), [
    ("We draw 1,000 films of 64x64 pixels in 2.5 s.", ["1,000", "64", "64", "2.5"]),
    ("from -1 to +1, or −0.5", ["-1", "+1", "−0.5"]),
    ("0.86 to 0.88, that is 3-5 points or 3–5", ["0.86", "0.88", "3", "5", "3", "5"]),
    ("85 %, 84.9% and 7 percent", ["85 %", "84.9%", "7 percent"]),
    ("a 16-bit film (at 1e-3)", ["16", "1e-3"]),
    ("The end is 12. And 13, too", ["12", "13"]),
    ("- 4 lungs\n- **5** hearts\n\n| 6 | 7.5 |", ["4", "5", "6", "7.5"]),
    ("<details><summary>Hint 8</summary>\nUse 9.</details>", ["8", "9"]),
    ("[the 10 films](https://example.org/2020/11)", ["10"]),
    ("In 2020 we saw 3 films", ["2020", "3"]),
    (r"$\mu = 0.2$, $N \approx 1,000$, $0.85$, $a_1 < 3$, $t = 5\,\mathrm{cm}$, $2^{10} = 1024$, $9\%$",
     ["0.2", "1,000", "0.85", "3", "5", "1024", r"9\%"]),
])
def test_finds_claims(text: str, numbers: list[str]) -> None:
    assert [number.written for number in prose_numbers(text)] == numbers


@pytest.mark.parametrize("text", [
    "# 2. Synthetic X-rays", "## 2.1 Bones", "### Exercise 2.3: ribs", "1. First\n2. Second\n  3) Third",
    "as in lesson 3, exercises 2.1, 2.2 and 2.3", "`x = 3` and ``y = 4``", "```python\nx = 5\n```",
    "<img width=640 alt='7 ribs'>", "[here](film_7.png)",
    "![seven curves that cross at 0.5](attachment:curves.png)",
    "see https://example.org/10.1000/182 and arXiv:2006.11239",
    "COVID-19, EfficientNet-Lite0, Lite0, v2, 2D and 3D", "the 1st and the 12th rib", "torch 2.13.0",
    "(Thomas 2020), Dar et al. (2024), Dar (2024), (Ho and Jain, 2020)",
    r"$I = I_0 e^{-\mu t}$, $\frac{1}{2}$, $x^2 + 3x$, $h/2$",
    "$$x_{12} = \\frac{h_1 + 2}{3}$$",
])
def test_passes_over_what_is_no_claim(text: str) -> None:
    assert prose_numbers(text) == []


AGREE = [
    ("0.85", "0.8493"), ("0.85", "0.845"), ("0.85", "84.9 %"), ("85 %", "0.8493"), ("85 %", "85.2%"),
    ("85 %", "85"), ("5 %", "0.0512"), ("1,000", "1000"), ("1000", "1,000 films"), ("3", "-3"), ("-3", "-3"),
    ("12", "11.7"), ("0.5", "mean=0.50"), ("1e-3", "0.001"), ("2.5", "[2.5, 1]"), ("128", "(1, 128, 128)"),
    ("64x48", "48x64"), ("0.12", "<b>0.12</b>")]
DISAGREE = [
    ("0.85", "0.8449"), ("0.85", "0.8551"), ("0.850", "0.85"), ("0.85", "0.9"), ("85 %", "0.84"),
    ("85 %", "0.8"), ("85", "0.85"), ("-3", "3"), ("3", "3.2"), ("1000", "1001"), ("0.85", "x0.85"),
    ("20", "COVID-20"), ("7", "<b width=7>x</b>"),
    ("0.7", "<img src='data:image/png;base64,AA/0.7'>")]


def lesson(text: str, output: str) -> NotebookNode:
    shown = [nbformat.v4.new_output("display_data", {"text/html": output}),
             nbformat.v4.new_output("stream", text=output * ("<" not in output))]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"It is {text} here."),
                                           nbformat.v4.new_code_cell("show()", outputs=shown)])


@pytest.mark.parametrize(("text", "output"), AGREE)
def test_printed_number_binds(text: str, output: str) -> None:
    assert unbound_numbers(lesson(text, output), set()) == []


@pytest.mark.parametrize(("text", "output"), DISAGREE)
def test_other_number_does_not_bind(text: str, output: str) -> None:
    assert unbound_numbers(lesson(text, output), set()) == [f"{text!r} in: 'It is {text} here.'"]


def test_number_that_another_section_prints_does_not_bind() -> None:
    one, other = lesson("0.85", "0.85"), lesson("0.7", "0.3")
    other.cells[0].source = f"## Another\n\n{other.cells[0].source}"
    whole = nbformat.v4.new_notebook(cells=[*one.cells, *other.cells])
    assert len(unbound_numbers(whole, set())) == 1
    other.cells[0].source = other.cells[0].source.replace("0.7", "0.85")
    assert len(unbound_numbers(whole, set())) == 1
    other.cells[0].source = other.cells[0].source.replace("0.85", "0.3")
    assert unbound_numbers(whole, set()) == []


def test_constant_binds_as_written_and_must_be_used_with_a_source() -> None:
    notebook = lesson("85 % of 12", "")
    assert unbound_numbers(notebook, {"85 %", "12"}) == []
    assert len(unbound_numbers(notebook, {"85", "12"})) == 1
    used = {"notebook": "09_test", "number": "85 %", "source": "the handbook, p. 3"}
    assert stale_constants([used], {"09_test": notebook}) == []
    for change in ({"number": "86 %"}, {"notebook": "08_other"}, {"source": " "}):
        assert len(stale_constants([used | change], {"09_test": notebook})) == 1
