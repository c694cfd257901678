"""Notebooks as HTML pages: hints and solutions folded, formulas drawn, so that nothing needs a network."""

import copy
import re
from html import escape
from typing import Any

# nbconvert shows hidden sources, and closes `<details>` before the text that it is to fold. On a narrow
# page it cuts code off, and its greys and greens are too pale for some.
_FOLDED = """{% extends 'lab/index.html.j2' %}{% block html_head_css %}{{ super() }}<style>
body.jp-Notebook pre { white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere }
body.jp-Notebook .jp-RenderedHTMLCommon a { text-decoration: underline }
body.jp-Notebook { --jp-cell-prompt-not-active-opacity: 1; --jp-mirror-editor-comment-color: #2e6060;
--jp-mirror-editor-number-color: #060; --jp-mirror-editor-operator-color: #81c }
</style>{% endblock %}{% block input %}
{%- if cell.metadata.get('jupyter', {}).get('source_hidden') -%}
<details><summary style="font-family:sans-serif">One way to solve it</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}{% endblock %}"""
_DETAILS = re.compile(r"(<details>\s*<summary>.*?</summary>)(.*?)(</details>)", re.DOTALL)
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+(?:\n[^$\n]+)?)\$", re.DOTALL)
_FETCHED = re.compile(
    r"<script[^>]*\bsrc=[^>]*>\s*</script>|<!-- MathJax configuration -->.*?configuration -->", re.DOTALL)
_PLACE = re.compile(r"formula-no-(\d+)-here")
_WIDGET = "application/vnd.jupyter.widget-view+json"
_SIZE = 14.0  # pixels, that of the text around


def export_page(notebook: Any, title: str) -> str:
    """Write a notebook as an HTML page."""
    from nbconvert import HTMLExporter
    from nbconvert.filters import markdown2html

    def fold(block: re.Match[str]) -> str:
        inner = markdown2html(block[2]).strip()  # no empty line: there the block would end
        return block[1] + re.sub(r"\n(?=\n)", "\n&#10;", inner).replace("&#10;\n", "&#10;") + block[3]

    page = copy.deepcopy(notebook)
    replace_widgets(page)
    drawn: list[str] = []
    for cell in page.cells:
        if cell.cell_type == "markdown":
            source, formulas = draw_formulas(cell.source, len(drawn))
            drawn += formulas
            cell.source = _DETAILS.sub(fold, source)
    exporter = HTMLExporter(embed_images=True, raw_template=_FOLDED)
    html, _ = exporter.from_notebook_node(page, {"metadata": {"name": title}})
    return _PLACE.sub(lambda place: drawn[int(place[1])], _FETCHED.sub("", str(html)))


def replace_widgets(notebook: Any) -> None:
    """Put a sentence in the place of controls, which need a kernel; drop progress bars, which are over."""
    for cell in notebook.cells:
        shown = []
        for output in cell.get("outputs", ()):
            if _WIDGET in output.get("data", {}):
                if output.output_type == "display_data":
                    continue
                output.data = {"text/plain": "Controls: open the notebook in JupyterLab to move them."}
            shown.append(output)
        if cell.cell_type == "code":
            cell.outputs = shown


def draw_formulas(markdown: str, n_before: int = 0) -> tuple[str, list[str]]:
    """Put a placeholder where a formula stands outside of code, and return the drawings.

    nbconvert would tear an SVG in the text apart. What matplotlib cannot draw stays TeX.
    """
    drawn: list[str] = []

    def place(formula: re.Match[str]) -> str:
        drawn.append(_draw(formula))
        return f"formula-no-{n_before + len(drawn) - 1}-here"

    pieces = _CODE.split(markdown)
    return "".join(piece if i % 2 else _FORMULA.sub(place, piece) for i, piece in enumerate(pieces)), drawn


def _draw(formula: re.Match[str]) -> str:
    """Draw a formula as SVG that stands on the line of the text."""
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    tex = " ".join((formula[1] or formula[2]).split())
    size = _SIZE * (1.15 if formula[1] else 1.0)
    try:
        drawn = TextPath((0, 0), f"${tex}$", size=size)
    except ValueError:
        return formula[0]
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    outline = "".join(letters[code] + ("" if code == Path.CLOSEPOLY else " ".join(
        f"{value:.2f}" for value in (places.reshape(-1, 2) * (1, -1)).ravel()))
        for places, code in drawn.iter_segments(simplify=False))  # in SVG, y grows downwards
    box = drawn.get_extents()
    width, height = box.x1 + 1, box.y1 - box.y0 + 1
    svg = (f'<svg role="img" aria-label="{escape(tex)}" width="{width:.1f}" height="{height:.1f}" '
           f'viewBox="0 {-box.y1 - 0.5:.1f} {width:.1f} {height:.1f}" '
           f'style="vertical-align:{box.y0 - 0.5:.1f}px"><path d="{outline}" fill="currentColor"/></svg>')
    return f'<span style="display:block;text-align:center;margin:.6em 0">{svg}</span>' if formula[1] else svg
