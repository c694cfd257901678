"""What holds of every notebook as it is committed, without running it.

A rule is a function from a notebook to what is wrong with it. Each is applied to every lesson, and shown to
find its own fault, and no other, in a small notebook that is right but for that fault.
"""

import ast
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from genailab_helpers.nbregression import changed_since, fingerprint

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES, MAX_BYTES, MIN_EXERCISES = 30, 2_000_000, 4
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
DATA_URI = re.compile(r"data:image/[\w+]+;base64,[A-Za-z0-9+/=\s]+")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# a folder below the root, where a URL, a relative path, a closing tag or a division does not stand before it
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<>~)\]}-])/\w[\w.-]*/[\w.-]+|\b[A-Za-z]:\\+Users\b|\bfile://")

# STYLE: the field's word in place of each; names of files and of the fields of recipes stay
RIDDLES = re.compile(
    r"(?<!all )\bfilms?\b(?!\.csv|/)|\bpictures?\b|\bmade-up\b|\buntold\b|\bdrown|\bby lot\b|silenced twin|"
    r"(?-i:\bFrechet\b)|\bmean and spread\b|\btold (?:apart|right|well)\b|\bshares? of the ill\b|"
    r"honest probabilit|\bdrawn (?:spine|chest|reader)|\bis called (?:ill|positive|COVID)\b|"
    r"labels? (?:is|are) withheld", re.I)

Rule = Callable[[NotebookNode], Iterator[str]]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Give every output with the number of its code cell, from 1."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            yield number, output


def markdown(notebook: NotebookNode) -> list[str]:
    """Give the markdown cells without their blocks of code."""
    return [FENCE.sub("", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]


def execution_counts(notebook: NotebookNode) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)) or not counts:
        yield f"execution counts are {counts}, expected 1 to {len(counts)}; run `make record`"


def recorded_as_it_stands(notebook: NotebookNode) -> Iterator[str]:
    """An output that was edited, a cell edited after recording, a table made anew: all of them are stale."""
    for changed in changed_since(notebook, FOLDER):
        yield f"{changed} changed since the notebook was recorded; run `make record`"


def no_warnings(notebook: NotebookNode) -> Iterator[str]:
    for number, output in outputs(notebook):
        if output.get("name") == "stderr":
            yield f"code cell {number} writes to stderr: {output.text[:200]}"


def no_errors(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"code cell {number} stopped with {output.ename}"


def no_absolute_path(notebook: NotebookNode) -> Iterator[str]:
    for text in _texts([[cell.source, cell.get("outputs", [])] for cell in notebook.cells]):
        for path in ABSOLUTE_PATH.finditer(DATA_URI.sub("", text)):
            yield f"the path {path[0]} is of one machine"


def _texts(node: Any) -> Iterator[str]:
    """Give all texts in an output or a source, encoded pictures left out."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if not key.startswith("image/"):
                yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


def kernel(notebook: NotebookNode) -> Iterator[str]:
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3; run `make record`"


def title(notebook: NotebookNode) -> Iterator[str]:
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \d+\. \S", first.source):
        yield "the first cell does not begin with `# N. Title`"
    titles = [line for text in markdown(notebook) for line in text.splitlines() if re.match(r"#\s", line)]
    if len(titles) > 1:
        yield f"there is more than one title: {titles}"


def disclaimer(notebook: NotebookNode) -> Iterator[str]:
    if "not for diagnosis" not in " ".join(markdown(notebook)[:1]).lower():
        yield "the first text does not say that this is not for diagnosis"


def leaves_torchvision_to_the_package(notebook: NotebookNode) -> Iterator[str]:
    """The package mends a torchvision that was built for another torch; a lesson's own import would not."""
    for cell in code_cells(notebook):
        for module in re.findall(r"^(?:import|from) (torchvision|diffusers|monai|timm)\b", cell.source, re.M):
            yield f"imports {module} itself; take what the package offers"


def parameters(notebook: NotebookNode) -> Iterator[str]:
    tagged = [n for n, cell in enumerate(code_cells(notebook), start=1) if "parameters" in tags(cell)]
    if tagged != [2]:
        yield f"code cells {tagged} have the tag `parameters`, expected the second alone"


def short_cells(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(code_cells(notebook), start=1):
        lines = len(cell.source.splitlines())
        if lines > MAX_LINES:
            yield f"code cell {number} has {lines} lines, at most {MAX_LINES} are expected"


def prose_before_code(notebook: NotebookNode) -> Iterator[str]:
    number = 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        number += 1
        before = notebook.cells[i - 1] if i else None
        if before and "exercise-stub" in tags(before) and "exercise-solution" in tags(cell):
            continue  # the folded solution belongs to the task above its stub
        lines = before.source.splitlines() if before and before.cell_type == "markdown" else []
        if not any(line.strip() and not line.startswith("#") for line in lines):
            yield f"code cell {number} has no text before it"


def every_cell_is_compared(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(code_cells(notebook), start=1):
        if re.search(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_(IGNORE_OUTPUT|SKIP)", cell.source, re.MULTILINE) \
                or {"nbval-ignore-output", "nbval-skip"} & set(tags(cell)):
            yield f"code cell {number} is not compared"


class _Images(HTMLParser):
    """Collect the alternative texts of `<img>`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.alts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append((dict(attrs).get("alt") or "").strip())


def alternative_texts(notebook: NotebookNode) -> Iterator[str]:
    for number, output in outputs(notebook):
        data = output.get("data", {})
        if "" in _Images(data.get("text/html", "")).alts:
            yield f"code cell {number} shows an <img> without alternative text"
        if any(kind.startswith("image/") for kind in data):
            yield f"code cell {number} shows a bare picture, which carries no alternative text; use HTML"
    for text in markdown(notebook):
        if "" in _Images(text).alts or re.search(r"!\[\s*\]\(", text):
            yield f"a picture in the text has no alternative text: {text[:80]}"


def alternative_texts_differ(notebook: NotebookNode) -> Iterator[str]:
    alts = [alt for _, output in outputs(notebook)
            for alt in _Images(output.get("data", {}).get("text/html", "")).alts]
    alts += [alt for cell in notebook.cells if cell.cell_type == "markdown"
             for alt in re.findall(r"!\[(.+?)\]\(", cell.source)]
    for alt in {alt for alt in alts if alts.count(alt) > 1}:
        yield f"two figures have the alternative text {alt[:80]!r}"


def sentences(source: str) -> Iterator[str]:
    """Give the texts of more than one word that code holds: captions, messages, docstrings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.value


def plain_words(notebook: NotebookNode) -> Iterator[str]:
    texts = [re.sub(r"`[^`]*`|\]\([^)]*\)|https?:\S+", "", text) for text in markdown(notebook)]
    texts += [text for cell in code_cells(notebook) for text in sentences(cell.source)]
    texts += [output.text for _, output in outputs(notebook) if output.get("name") == "stdout"]
    for word in RIDDLES.finditer("\n".join(texts)):
        yield f"{word[0]!r}: {word.string[max(0, word.start() - 40):word.end() + 40]!r}; use the field's word"


def exercises(notebook: NotebookNode) -> Iterator[str]:
    solved = sum("exercise-solution" in tags(cell) for cell in notebook.cells)
    if solved < MIN_EXERCISES:
        yield f"there are {solved} exercises, at least {MIN_EXERCISES} are expected"


def widgets_outlive_the_lesson(notebook: NotebookNode) -> Iterator[str]:
    """A slider redraws long after "Run All": what its function reads must not be something else by then."""
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    functions: dict[str, ast.FunctionDef] = {}
    for number, tree in enumerate(trees, start=1):
        functions |= {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "explore":
                drawn = call.args[0].id if call.args and isinstance(call.args[0], ast.Name) else ""
                read = global_names(drawn, functions)
                for later, rebound in enumerate(map(bound_names, trees[number:]), start=number + 1):
                    if both := sorted(read & rebound):
                        yield f"code cell {later} binds {', '.join(both)} anew, which the widget of cell " \
                              f"{number} reads"


def global_names(name: str, functions: dict[str, ast.FunctionDef],
                 seen: frozenset[str] = frozenset()) -> set[str]:
    """Return what a function, and those of the notebook that it calls, read from outside."""
    if name not in functions or name in seen:
        return set()
    names = [node for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {argument.arg for argument in ast.walk(functions[name]) if isinstance(argument, ast.arg)}
    read = {node.id for node in names} - own
    return read.union(*(global_names(other, functions, seen | {name}) for other in read))


def bound_names(tree: ast.Module) -> set[str]:
    """Return what a cell binds outside of functions and comprehensions."""
    bound, todo = set(), list(tree.body)
    inner = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif not isinstance(node, inner):
            todo += ast.iter_child_nodes(node)
    return bound


def widgets(notebook: NotebookNode) -> Iterator[str]:
    if not any(WIDGET_VIEW in output.get("data", {}) for _, output in outputs(notebook)):
        yield "there is no widget"


RULES: list[Rule] = [
    execution_counts, recorded_as_it_stands, no_warnings, no_errors, no_absolute_path, kernel, title,
    disclaimer, leaves_torchvision_to_the_package, parameters, short_cells, prose_before_code,
    every_cell_is_compared, alternative_texts, alternative_texts_differ, plain_words, exercises, widgets,
    widgets_outlive_the_lesson]


def broken_rules(notebook: NotebookNode) -> dict[str, list[str]]:
    found = {rule.__name__: list(rule(notebook)) for rule in RULES}
    return {name: problems for name, problems in found.items() if problems}


def test_there_are_lessons() -> None:
    assert NOTEBOOKS, f"{FOLDER} has no notebook"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson(path: Path, rule: Rule) -> None:
    assert list(rule(nbformat.read(path, as_version=4))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lesson_is_small_numbered_and_valid(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith(f"# {int(path.name[:2])}. ")


# ------------------------------------------------------------------------------ the rules find their faults

def code(source: str, *shown: dict[str, Any], **metadata: Any) -> NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata=metadata, outputs=nbformat.from_dict([*shown]))


def data(**contents: Any) -> dict[str, Any]:
    kinds = {"html": "text/html", "plain": "text/plain", "png": "image/png", "widget": WIDGET_VIEW}
    return {"output_type": "display_data", "metadata": {}, "data": {kinds[k]: v for k, v in contents.items()}}


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def text(source: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(source)


def right_notebook() -> NotebookNode:
    cells = [text("# 3. A title\n\nNot for diagnosis. See https://example.org/data/films."),
             code("import genailab_helpers\nimport os"),
             text("The parameters."), code("DATA = '../data/films'", tags=["parameters"]),
             text("An image.\n\n```bash\n# no title\n```"),
             code("show(figure)", data(html="<img alt='a chest' src='data:image/png;base64,/root/work/AA'>",
                                       plain="a chest")),
             text("A widget; half is 1/2 and $f:\\mathbb{R}$."),
             code("def draw(size=1):\n    return figure * size\n\nexplore(draw)",
                  data(widget={}, plain="VBox()")),
             text("It fails."),
             code("1 / 0", {"output_type": "error", "ename": "E", "evalue": "", "traceback": []},
                  tags=["raises-exception"])]
    for i in range(4):
        cells += [text(f"### Exercise 3.{i}\n\nThe task."),
                  code("...", stream("not solved"), tags=["exercise-stub"]),
                  code("1", stream("solved"), tags=["exercise-solution"])]
    cells += [text("The claim."), code("print(1)", stream("1\n"))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for count, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = count
    return stamped(notebook)


def stamped(notebook: NotebookNode) -> NotebookNode:
    for cell in code_cells(notebook):
        cell.metadata["recorded"] = fingerprint(cell)
    return notebook


def test_right_notebook_breaks_no_rule() -> None:
    assert broken_rules(right_notebook()) == {}


def with_code(number: int, **changes: Any) -> Callable[[NotebookNode], None]:
    """Change attributes of a code cell, counted from 1."""
    return lambda notebook: code_cells(notebook)[number - 1].update(nbformat.from_dict(changes))


def with_text(position: int, source: str) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[position].update(source=source)


LAST = 14  # the right notebook's last code cell: it prints, and no rule asks for it
FAULTS: list[tuple[str, Callable[[NotebookNode], Any]]] = [
    ("execution_counts", with_code(LAST, execution_count=None)),
    ("recorded_as_it_stands", with_code(LAST, outputs=[stream("2\n")])),
    ("recorded_as_it_stands", with_code(LAST, source="print(2)")),
    ("recorded_as_it_stands", with_code(LAST, metadata={})),
    ("recorded_as_it_stands", lambda notebook: notebook.metadata.update(samples={"gone.json": "0" * 16})),
    ("recorded_as_it_stands", with_code(LAST, source="open('../data/samples/covid_table.json')")),
    ("no_warnings", with_code(LAST, outputs=[stream("careful", "stderr")])),
    ("no_errors", with_code(5, metadata={})),
    ("no_absolute_path", with_code(LAST, outputs=[stream("read /home/me/chest.png")])),
    ("no_absolute_path", with_code(LAST, source="open('/work/images/a.png')")),
    ("kernel", lambda notebook: notebook.metadata.update(kernelspec={"name": "my-env"})),
    ("title", with_text(-2, "# 4. Another\n\nThe claim.")),
    ("disclaimer", with_text(0, "# 3. A title\n\nFor all.")),
    ("leaves_torchvision_to_the_package", with_code(1, source="import os\nfrom torchvision import io")),
    ("parameters", with_code(LAST, metadata={"tags": ["parameters"]})),
    ("short_cells", with_code(LAST, source="\n".join(["x = 1"] * 31))),
    ("prose_before_code", with_text(-2, "## Only a heading\n")),
    ("every_cell_is_compared", with_code(LAST, metadata={"tags": ["nbval-ignore-output"]})),
    ("every_cell_is_compared", with_code(LAST, source="# NBVAL_IGNORE_OUTPUT")),
    ("alternative_texts", with_code(3, outputs=[data(html="<img alt='one'><img alt=' ' src='a.png'>")])),
    ("alternative_texts", with_code(3, outputs=[data(png="AAAA", plain="<Figure>")])),
    ("alternative_texts", with_text(-2, "Look: ![](chest.png)")),
    ("alternative_texts_differ", with_code(LAST, outputs=[data(html="<img alt='a chest'>")])),
    ("plain_words", with_text(-2, "The films were told apart.")),
    ("plain_words", with_code(LAST, source="print('one film repeated')")),
    ("plain_words", with_code(LAST, outputs=[stream("drawn by lot")])),
    ("exercises", with_code(7, metadata={"tags": ["exercise-stub"]})),
    ("widgets_outlive_the_lesson", with_code(LAST, source="figure = 3")),
    ("widgets", with_code(4, outputs=[data(plain="VBox()")])),
]


@pytest.mark.parametrize(("rule", "fault"), FAULTS,
                         ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(FAULTS)])
def test_fault_breaks_its_rule_alone(rule: str, fault: Callable[[NotebookNode], Any]) -> None:
    notebook = right_notebook()
    fault(notebook)
    if rule != "recorded_as_it_stands":
        stamped(notebook)
    allowed = {rule, "prose_before_code"} if rule == "exercises" else {rule}
    assert rule in broken_rules(notebook)
    assert broken_rules(notebook).keys() <= allowed


def test_messages_of_the_package_use_plain_words() -> None:
    for path in sorted((FOLDER.parent / "genailab_helpers").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
        docstrings = {ast.get_docstring(node, clean=False)
                      for node in ast.walk(tree) if isinstance(node, documented)}
        texts = [text for text in sentences(path.read_text(encoding="utf-8")) if text not in docstrings]
        found = [word[0] for text in texts for word in RIDDLES.finditer(text)]
        assert found == [], path.name
