"""Settings of Sphinx for the site; `docs/site/build.py` gathers the pages and calls it."""

from pathlib import Path

from genailab_helpers.commands.pages import draw_formulas

HERE = Path(__file__).resolve().parent

project, author, copyright = "GenAI Lab", "the authors of GenAI Lab", "the authors of GenAI Lab, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
templates_path = [str(HERE / "templates")]

nb_execution_mode = "off"  # the outputs are those that were recorded, and that the tests compare
nb_ipywidgets_js: dict[str, object] = {}  # else a page asks other hosts for require.js
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
smartquotes = False  # would join the two hyphens of an option

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # a field of a data class has one description, not two
default_role = "code"

html_theme = "furo"
html_title = "GenAI Lab"
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sourcelink = html_copy_source = html_show_sphinx = False
html_use_index = html_domain_indices = False  # the list of modules and the search do the same
html_math_renderer = "drawn"


def draw_math(writer, node):
    """Write a formula as the pages of `genailab run` do."""
    from docutils.nodes import SkipNode, math_block

    mark = "$$" if isinstance(node, math_block) else "$"
    _, (drawing,) = draw_formulas(mark + node.astext() + mark)
    if drawing.startswith("$"):
        raise ValueError(f"matplotlib cannot draw {drawing}")
    writer.body.append(drawing)
    raise SkipNode


def setup(app):
    """Draw formulas while the site is built, so that no page loads MathJax."""
    app.add_html_math_renderer("drawn", (draw_math, None), (draw_math, None))
