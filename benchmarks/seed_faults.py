"""Put small faults into a copy of the tree, one at a time, and note who sees them.

`make test-faults` runs this: the faults of tests/faults/faults.toml, and 50 random mutants of single
operators in the files that compute most. It may be stopped and goes on from build/faults/. At the end it
writes docs/faults.md.

At first the unchanged lessons and quick tests are run with `coverage`, which tells what runs which line; a
fault is then shown to those alone that run its lines, until one of them fails. A lesson fails where one of
its cells differs from what is recorded (strict nbval), a unit test as always; of the test files the six
nearest are asked, and no slow test.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import nbformat
from report_determinism import declared_tolerance

from genailab_helpers.nbregression import compare_outputs, fingerprint

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "faults"
MUTATED = ("statistics", "classification/metrics", "classification/losses", "diffusion/denoiser",
           "diffusion/sampling", "phantoms/solids")
N_MUTANTS, SEED = 50, 0
LIMIT = 900  # seconds of one run; what hangs is noticed, too
N_TEST_FILES = 6  # its own, then those that run most of the module
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout=300")
STATIC = ("tests/notebooks", "tests/lessons")  # what looks at notebooks without running them


class Fault(NamedTuple):
    """A change of one file: what stood there, what stands there now."""

    name: str
    kind: str
    file: str
    old: str
    new: str
    where: str = "source"  # of a notebook: "source", "output" or "source and output"

    def applied(self, text: str) -> str:
        """Return the content of the file with the fault; raise ValueError unless `old` stands there once."""
        if not self.file.endswith(".ipynb"):
            return self._replaced(text)
        notebook = nbformat.reads(text, as_version=4)
        sources = [cell.source for cell in notebook.cells]
        if "source" in self.where:
            number = self._only([self.old in source for source in sources])
            notebook.cells[number].source = self._replaced(sources[number])
            self._renew(notebook.cells[number])
        if "output" in self.where:
            shown = [json.dumps(cell.get("outputs", []), ensure_ascii=False) for cell in notebook.cells]
            number = self._only([self.old in text for text in shown])
            changed = shown[number].replace(self.old, self.new)
            notebook.cells[number].outputs = nbformat.from_dict(json.loads(changed))
            if "source" in self.where:
                self._renew(notebook.cells[number])
        return nbformat.writes(notebook) + "\n"

    def is_code(self, text: str) -> bool:
        """Whether it stands in what is run, and not in a text or in what was recorded."""
        return not self.file.endswith(".ipynb") or ("source" in self.where and any(
            self.old in cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"))

    @staticmethod
    def _renew(cell: Any) -> None:
        """Give a cell the digest that recording would: what it shows has to tell the fault, not that."""
        if cell.cell_type == "code":
            cell.metadata["recorded"] = fingerprint(cell)

    def _replaced(self, text: str) -> str:
        self._only([True] * text.count(self.old))
        return text.replace(self.old, self.new)

    def _only(self, found: list[bool]) -> int:
        if sum(found) != 1:
            raise ValueError(f"{self.name}: its text stands {sum(found)} times in {self.file}, expected once")
        return found.index(True)

    def lines(self, text: str) -> set[int]:
        """Return the numbers of the lines of a module that the fault changes."""
        first = text.count("\n", 0, text.index(self.old)) + 1
        return set(range(first, first + self.old.rstrip("\n").count("\n") + 1))


def read_faults() -> list[Fault]:
    """Return the faults of the list."""
    listed = tomllib.loads((ROOT / "tests/faults/faults.toml").read_text(encoding="utf-8"))["fault"]
    return [Fault(*(fault[field] for field in Fault._fields[:5]), fault.get("in", "source"))
            for fault in listed]


# -------------------------------------------------------------------------------- mutants

SWAPS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=",
         ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.And: "or", ast.Or: "and"}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">",
         ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.And: "and", ast.Or: "or"}


def mutants(file: str) -> Iterator[Fault]:
    """Yield every change of a single operator or number in the functions of a module."""
    text = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def cut(node: ast.expr, end: bool = False) -> int:
        row, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[row - 1] + column  # type: ignore[operator]

    def fault(begin: int, end: int, old: str, new: str, line: int) -> Iterator[Fault]:
        """Widen the change to whole lines, so that its text stands in the file once."""
        if old not in (raw := text.encode()[begin:end].decode()):
            return
        low, high = starts[line - 1], next(start for start in starts if start >= end and start > begin)
        before, after = text.encode()[low:begin].decode(), text.encode()[end:high].decode()
        whole = before + raw + after
        if text.count(whole) == 1:
            yield Fault(f"{Path(file).stem}:{line} {old} to {new}", "mutant", file, whole,
                        before + raw.replace(old, new, 1) + after)

    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        in_messages = {inner for node in ast.walk(function) if isinstance(node, ast.JoinedStr)
                       for inner in ast.walk(node)}  # their places are not known before Python 3.12
        for node in set(ast.walk(ast.Module(function.body, []))) - in_messages:
            if isinstance(node, ast.BinOp | ast.Compare | ast.BoolOp):
                op = node.ops[0] if isinstance(node, ast.Compare) else node.op
                left, right = ((node.left, node.comparators[0]) if isinstance(node, ast.Compare) else
                               node.values[:2] if isinstance(node, ast.BoolOp) else (node.left, node.right))
                if type(op) in SWAPS:
                    yield from fault(cut(left, True), cut(right), SIGNS[type(op)], SWAPS[type(op)],
                                     left.end_lineno or 0)
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                number = text.encode()[cut(node):cut(node, True)].decode()
                yield from fault(cut(node), cut(node, True), number, repr(node.value + 1), node.lineno)


def draw_mutants() -> list[Fault]:
    """Draw mutants at random, as many of each file."""
    generator, chosen = random.Random(SEED), []
    for place, name in enumerate(MUTATED):
        every = sorted(set(mutants(f"genailab_helpers/{name}.py")))
        chosen += generator.sample(every, N_MUTANTS // len(MUTATED) + (place < N_MUTANTS % len(MUTATED)))
    return chosen


# ------------------------------------------------------------------------ who runs a line

def measure_lines(tree: Path) -> dict[str, dict[str, list[str]]]:
    """Run lessons and quick tests on the unchanged tree; return who runs each line, by file and line."""
    from coverage import CoverageData
    from coverage.exceptions import DataError

    # IPython runs cells itself: the kernel that nbval starts is killed before coverage is written
    runs = {f"notebooks/{path.name}": ["IPython", path.name]
            for path in sorted((tree / "notebooks").glob("*.ipynb"))}
    # those tests leave no room on the disk, not for coverage either
    runs[""] = ["pytest", "-q", "-m", "not slow and not browser", "-k", "not disk_without_room"]
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, arguments in runs.items():
        data = WORK / "coverage" / (Path(name).stem or "tests")
        data.mkdir(parents=True)
        config = data / "rc"
        config.write_text("[run]\nsource = genailab_helpers\npatch = subprocess\nparallel = true\n"
                          f"data_file = {data}/.coverage\n"
                          + "dynamic_context = test_function\n" * (not name))
        status, said = run(tree, ["coverage", "run", f"--rcfile={config}", "-m", *arguments], limit=3600,
                           folder="notebooks" if name else ".")
        if status:
            raise SystemExit(f"{name or 'quick tests'}: red on the unchanged tree\n{said}")
        for part in data.glob(".coverage.*"):
            recorded = CoverageData(part)
            with suppress(DataError):  # of a process that a test has killed
                recorded.read()
                for file in recorded.measured_files():
                    here = found[Path(file).relative_to(tree).as_posix()]
                    for line, contexts in recorded.contexts_by_lineno(file).items():
                        tests = {file for context in contexts for file in _test_file(tree, context)}
                        here[str(line)] |= {name} if name else tests
    return {file: {line: sorted(who) for line, who in lines.items()} for file, lines in found.items()}


def _test_file(tree: Path, context: str) -> Iterator[str]:
    """Yield the file of a test that coverage names as `tests.room.test_file.test_name`; nothing of others."""
    parts = context.split(".")[:-1]
    file = tree.joinpath(*parts).with_suffix(".py") if parts else tree
    if parts and file.is_file():
        yield file.relative_to(tree).as_posix()


def run(tree: Path, arguments: list[str], limit: int = LIMIT, folder: str = ".") -> tuple[int, str]:
    """Run a module of Python in a tree, with a cache of its own; return status and last lines."""
    cache = tree / "build" / "cache"
    shutil.rmtree(cache, ignore_errors=True)  # a faulty run must not spoil the next
    environment = {**os.environ, "PYTHONPATH": str(tree), "GENAILAB_CACHE": str(cache),
                   "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "MPLCONFIGDIR": str(tree.parent / "matplotlib")}
    environment.pop("GENAILAB_REAL_DATA", None)  # who sees a fault is the same with and without real images
    try:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tree / folder, env=environment,
                              timeout=limit, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return 9, f"hung for {limit} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


# ------------------------------------------------------------------------ show the faults

def who_runs(fault: Fault, lines: dict[str, dict[str, list[str]]]) -> tuple[list[str], list[str]]:
    """Return the lessons and the test files that run the lines of a fault, the quickest first."""
    if fault.file.endswith(".ipynb"):
        return [fault.file], list(STATIC)
    if not fault.file.endswith(".py"):
        name = Path(fault.file).name
        readers = [path.relative_to(ROOT).as_posix() for folder in ("notebooks", "tests")
                   for path in (ROOT / folder).rglob("*.*") if path.suffix in (".ipynb", ".py")
                   and name in path.read_text(encoding="utf-8", errors="replace")]
        return ([path for path in readers if path.endswith("b")],
                [*(path for path in readers if path.endswith("y")), *STATIC])
    of_file = lines.get(fault.file, {})
    here = {who for line in fault.lines((ROOT / fault.file).read_text(encoding="utf-8"))
            for who in of_file.get(str(line), ())}
    often = Counter(who for found in of_file.values() for who in found)
    tests = {who for who in here if who.endswith(".py")} or {who for who in often if who.endswith(".py")}
    speed = {"01": 0, "02": 1, "04": 2, "05": 3, "03": 4}
    lessons = sorted((who for who in here if who.endswith(".ipynb")),
                     key=lambda who: speed[Path(who).name[:2]])
    own = f"test_{Path(fault.file).stem}.py"  # those of the commands take a minute
    return lessons, sorted(tests, key=lambda who: (Path(who).name != own, who.startswith("tests/commands"),
                                                   -often[who]))[:N_TEST_FILES]


def show(fault: Fault, tree: Path, lines: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """Put a fault into a tree, ask those who run its lines, and take it out again."""
    path = tree / fault.file
    sound = path.read_text(encoding="utf-8")
    lessons, tests = who_runs(fault, lines)
    seen: dict[str, Any] = {"lessons run it": bool(lessons) and fault.is_code(sound)}
    path.write_text(fault.applied(sound), encoding="utf-8")
    try:
        asked = {"tests": [tests], "notebooks": [[lesson] for lesson in lessons] * (fault.kind != "mutant")}
        for who, groups in asked.items():
            seen[who] = ""
            for group in filter(None, groups):
                options = [*NBVAL] if who == "notebooks" else ["-m", "not slow and not browser"]
                if group == [fault.file]:
                    seen[who] = differs(fault, tree)
                    continue
                status, said = run(tree, ["pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *group])
                if status == 4:  # pytest did not understand what it was asked: nobody has seen anything
                    raise RuntimeError(said)
                if status not in (0, 5):
                    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
                    seen[who] = failed[0][:140] if failed else f"status {status}"
                    break
    finally:
        path.write_text(sound, encoding="utf-8")
    return seen


def differs(fault: Fault, tree: Path) -> str:
    """Run a lesson whose cells hold a fault and keep it; say what differs first."""
    path, sound = tree / fault.file, nbformat.reads((ROOT / fault.file).read_text("utf-8"), as_version=4)
    faulty = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    status, said = run(tree, ["genailab_helpers.nbregression", "record", fault.file])
    if status:
        return said.strip().splitlines()[-1][:140]
    kept = WORK / "executed" / f"{''.join(c if c.isalnum() else '_' for c in fault.name)}.ipynb"
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, kept)
    now = nbformat.read(path, as_version=4)
    number = 0
    for cell, other, recorded in zip(faulty.cells, now.cells, sound.cells, strict=True):
        number += cell.cell_type == "code"
        if cell.cell_type == "code" and compare_outputs(cell.outputs, other.outputs,
                                                        declared_tolerance(recorded)):
            return f"{Path(fault.file).name}, code cell {number}: outputs differ"
    return ""


def main() -> None:
    """Show all faults, two at a time, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    trees: Queue[Path] = Queue()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, check=True,
                            capture_output=True).stdout.splitlines()
    state = hashlib.sha256()
    for number in range(options.jobs):
        tree = WORK / f"tree_{number}"
        shutil.rmtree(tree, ignore_errors=True)
        for name in filter(os.path.isfile, listed):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
        trees.put(tree)
    for name in filter(os.path.isfile, sorted(listed)):
        if name.startswith(("tests/", "notebooks/", "genailab_helpers/", "data/")):
            state.update(Path(name).read_bytes())
    file = WORK / "lines.json"
    if not file.exists():
        file.write_text(json.dumps(measure_lines(WORK / "tree_0")))
    lines, results = json.loads(file.read_text()), WORK / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}

    def work(fault: Fault) -> None:
        # what was seen by both stays seen; what was missed is shown again to a tree that has changed
        known = found.get(fault.name, {})
        done = known.get("fault") == list(fault) and (known["state"] == state.hexdigest() or (
            known["tests"] and (known["notebooks"] or fault.kind == "mutant" or not known["lessons run it"])))
        if done or options.only not in fault.name:
            return
        tree = trees.get()
        try:
            found[fault.name] = show(fault, tree, lines) | {"fault": list(fault), "state": state.hexdigest()}
        finally:
            trees.put(tree)
        results.write_text(json.dumps(found, indent=1, ensure_ascii=False))
        told = {who: found[fault.name][who] or "-" for who in ("tests", "notebooks")}
        print(f"{fault.name}\n   tests: {told['tests']}\n   notebooks: {told['notebooks']}", flush=True)

    faults, changed = read_faults(), draw_mutants()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, [*faults, *changed]))
    page = report([(fault, found[fault.name]) for fault in faults if fault.name in found],
                  [(fault, found[fault.name]) for fault in changed if fault.name in found])
    (ROOT / "docs" / "faults.md").write_text(page, encoding="utf-8")
    print(page)


# ------------------------------------------------------------------------------- the page

def report(faults: list[tuple[Fault, dict[str, Any]]], changed: list[tuple[Fault, dict[str, Any]]]) -> str:
    """Write what saw what."""
    def row(name: str, group: list[tuple[Fault, dict[str, Any]]]) -> str:
        both = Counter((bool(seen["notebooks"]), bool(seen["tests"])) for _, seen in group)
        counts = [both[True, True], both[True, False], both[False, True], both[False, False]]
        return f"| {name} | {len(group)} | " + " | ".join(map(str, counts)) + " |"

    of_kind = defaultdict(list)
    for fault, seen in faults:
        of_kind[fault.kind].append((fault, seen))
    run_by_lessons = [(fault, seen) for fault, seen in faults if seen["lessons run it"]]
    caught = sum(bool(seen["notebooks"] or seen["tests"]) for _, seen in faults)
    by_lessons = sum(bool(seen["notebooks"]) for _, seen in run_by_lessons)
    killed = sum(bool(seen["tests"]) for _, seen in changed)
    listed, drawn = len(read_faults()), len(draw_mutants())
    rest = [] if (len(faults), len(changed)) == (listed, drawn) else [
        f"**Not finished**: {len(faults)} of {listed} faults and {len(changed)} of {drawn} mutants were "
        "shown so far; `make test-faults` goes on.", ""]
    missed = [f"- {fault.name} (`{fault.file}`): {reason(fault.name)}"
              for fault, seen in [*faults, *changed]
              if not (seen["notebooks"] or seen["tests"])]
    alone = [f"- {fault.name} (`{fault.file}`): {'; '.join(seen['tests'].split(' - ')[:1])}"
             for fault, seen in run_by_lessons if seen["tests"] and not seen["notebooks"]]
    return "\n".join([
        "# Faults put in on purpose, and who sees them", "",
        "`make test-faults` writes this page: see `benchmarks/seed_faults.py` for how, and "
        "`tests/faults/faults.toml` for the list.", "", *rest,
        f"- **{caught} of {len(faults)} faults are seen** by the notebooks, the unit tests or both.",
        f"- The notebooks alone see **{by_lessons} of the {len(run_by_lessons)}** in lines that lessons run.",
        f"- The unit tests see **{killed} of {len(changed)} random mutants** (one operator or number each, "
        f"seed {SEED}) of {', '.join(MUTATED)}.", "",
        "| kind | faults | both | notebooks alone | unit tests alone | nobody |", "|---|---|---|---|---|---|",
        *(row(kind, of_kind[kind]) for kind in sorted(of_kind)), row("**all**", faults), "",
        "## Seen by nobody", "", *(missed or ["None."]), "",
        "## In lines that lessons run, and seen by unit tests alone", "", *(alone or ["None."]), ""])


def reason(name: str) -> str:
    """Return why a fault may pass, from tests/faults/reasons.toml."""
    reasons = tomllib.loads((ROOT / "tests/faults/reasons.toml").read_text(encoding="utf-8"))
    return reasons.get(name, "no reason yet")


if __name__ == "__main__":
    main()
