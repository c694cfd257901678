"""Build the site of the lessons, without executing them and without a network.

    python docs/site/build.py OUTPUT

Pages, notebooks and pictures are gathered in `OUTPUT.source/`, at the places they have in the repository,
so that links between them hold; Sphinx writes them to `OUTPUT/`. A warning of Sphinx, a link to nowhere, and
whatever a page would fetch from another host fail the build.
"""

import base64
import io
import pkgutil
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from PIL import Image

import genailab_helpers
from genailab_helpers.commands.pages import replace_widgets

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The figure that stands for a lesson on the first page, by words of its alternative text.
THUMBNAILS = {"01": "five edited versions", "02": "with coloured masks over both lungs",
              "03": "Two rows of generated chests", "04": "Three spines of grade 3 or above",
              "05": "One rendered chest four times"}
INNER = re.compile(r"\.(commands|nbregression|lessons\.checks)\b|\._|progress$")
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


def gather(source: Path) -> None:
    """Put all that Sphinx is to read into a new folder."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("site", "*.py", "*.json"))
    (source / "data").mkdir()
    for page in ("README.md", "CONTRIBUTING.md", "data/README.md"):
        shutil.copy(ROOT / page, source / page)
    (source / "notebooks").mkdir()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        lesson = nbformat.read(path, as_version=4)
        (source / "notebooks" / path.with_suffix(".png").name).write_bytes(thumbnail(lesson, path.name[:2]))
        nbformat.write(page_of(lesson), source / "notebooks" / path.name)
    index = (HERE / "index.md").read_text(encoding="utf-8")
    (source / "index.md").write_text(index.replace("LESSONS", lesson_cards()), encoding="utf-8")
    modules = [module.name for module in pkgutil.walk_packages(genailab_helpers.__path__, "genailab_helpers.")
               if not module.ispkg or module.name == "genailab_helpers.lessons"]
    listed = "\n".join(f"   {name}" for name in sorted(modules) if not INNER.search(name))
    (source / "api").mkdir()
    (source / "api" / "index.rst").write_text(
        "Functions of the package\n========================\n\n.. autosummary::\n   :toctree: modules\n"
        f"   :template: module.rst\n\n{listed}\n")


def page_of(lesson: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the lesson with sentences for its widgets, its solutions folded and its diagrams in place."""
    replace_widgets(lesson)
    for cell in lesson.cells:
        for name, picture in cell.pop("attachments", {}).items():
            cell.source = cell.source.replace(f"attachment:{name}",
                                              f"data:image/png;base64,{picture['image/png']}")
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
            cell.metadata.mystnb = {"code_prompt_show": "One way to solve it"}
    return lesson


def thumbnail(lesson: nbformat.NotebookNode, number: str) -> bytes:
    """Return a recorded figure of a lesson as a small PNG image."""
    html = "".join(output.data["text/html"] for cell in lesson.cells for output in cell.get("outputs", ())
                   if "text/html" in output.get("data", {}))
    figure = re.search(THUMBNAILS[number] + r'[^>]*base64,([^"]+)', html)
    if not figure:
        raise ValueError(f"lesson {number}: no figure whose alternative text says {THUMBNAILS[number]!r}")
    image, small = Image.open(io.BytesIO(base64.b64decode(figure[1]))).convert("RGB"), io.BytesIO()
    image.thumbnail((640, 640))
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def lesson_cards() -> str:
    """Return the rows of README's table of lessons as cards with a picture."""
    rows = re.findall(r"^\| \[(.+?)\]\((notebooks/.+?)\.ipynb\) \| (.+?) \| (\d+ minutes) \|",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    cards = [f"<div>\n\n![]({place}.png)\n\n**[{title}]({place}.ipynb)**\n\n"
             f"{what[0].upper()}{what[1:]} ({minutes}).\n\n</div>" for title, place, what, minutes in rows]
    return '<div class="lessons">\n' + "\n".join(cards) + "\n</div>"


class Page(HTMLParser):
    """Collect where a page links to, what it loads, the names of its places, and folds that are open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = re.findall(r"url\([\"']?([^)\"']+)", "".join(
            re.findall(r"<style.*?</style>", html, re.DOTALL)))
        self.places: set[str] = set()
        self.n_open = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        has = dict(attrs)
        self.places |= {has.get("id") or "", has.get("name") or ""}
        self.n_open += tag == "details" and "open" in has
        if tag == "a" and has.get("href"):
            self.links.append(str(has["href"]))
        if has.get(LOADED.get(tag, "")):
            self.loaded.append(str(has[LOADED[tag]]))


def mend(site: Path) -> None:
    """Give headings the level and folds the name that a screen reader says; Sphinx and myst-nb do not."""
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8").replace(' role="heading"', ' role="heading" aria-level="2"')
        path.write_text(html.replace(' aria-label="Toggle hidden content"', ""), encoding="utf-8")


def faults(site: Path) -> list[str]:
    """Return what is wrong with a built site: dead links inside it, loads from elsewhere, open folds."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: {page.n_open} folds are open"] if page.n_open else []
        found += [f"{name}: loads {url[:80]}" for url in page.loaded if re.match(r"(https?:)?//", url)]
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{name}: {url} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                found.append(f"{name}: {url} names a place that {target.name} has not")
    for path in site.rglob("*.css"):
        found += [f"{path.relative_to(site)}: loads {url}" for url in re.findall(
            r"(?:url\([\"']?|@import\s+[\"'])((?:https?:)?//[^)\"']+)", path.read_text(encoding="utf-8"))]
    return found


if __name__ == "__main__":
    from sphinx.cmd.build import main as sphinx

    output = Path(sys.argv[1]).resolve()
    source = output.with_name(output.name + ".source")
    gather(source)
    shutil.rmtree(output, ignore_errors=True)
    failed = sphinx(["-q", "-W", "--keep-going", "-c", str(HERE), "-d", str(source / ".doctrees"),
                     str(source), str(output)])
    mend(output)
    found = faults(output)
    print("\n".join(found) or output / "index.html")
    sys.exit(failed or bool(found))
