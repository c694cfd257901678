"""Count what a reader of the code has to read, a room at a time: `python benchmarks/count_code.py [ROOT]`.
 A line of code holds a token that is neither a comment nor part of a docstring. Statements are those of
Python's own grammar, docstrings left out, so that long lines win nothing. A line above 110 columns is named
and ends with status 1.
"""

import ast
import sys
import tokenize
from collections import Counter
from pathlib import Path

WIDTH = 110
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER, tokenize.ENCODING}


def count(path: Path) -> tuple[int, int]:
    """Return the lines of code and the statements of a file."""
    tree = ast.parse(path.read_bytes())
    docstrings = [node.body[0] for node in ast.walk(tree)
                  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                  and ast.get_docstring(node, clean=False) is not None]
    told = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    with path.open("rb") as file:
        lines = {line for token in tokenize.tokenize(file.readline) if token.type not in NOT_CODE
                 for line in range(token.start[0], token.end[0] + 1)}
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(docstrings)
    return len(lines - told), statements


def room(path: Path) -> str:
    """Name the room that a file of the package belongs to: a folder or a file of its first floor."""
    return path.parts[1] if len(path.parts) > 2 else path.name


def main() -> int:
    """Print a table of the package by room, then tests and benchmarks; return the exit status."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    lines: Counter[str] = Counter()
    statements: Counter[str] = Counter()
    wide = []
    for top in ("genailab_helpers", "tests", "benchmarks"):
        for path in sorted((root / top).rglob("*.py")):
            name = room(path.relative_to(root)) if top == "genailab_helpers" else f"({top})"
            n_lines, n_statements = count(path)
            for key in {name, "= package"} if top == "genailab_helpers" else {name}:
                lines[key] += n_lines
                statements[key] += n_statements
            wide += [f"{path}:{i}" for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
                     if len(line) > WIDTH and top == "genailab_helpers"]
    print(f"{'room':<24}{'lines':>7}{'statements':>12}")
    for name in sorted(lines, key=lambda name: ("=" in name, "(" in name, name)):
        print(f"{name:<24}{lines[name]:>7}{statements[name]:>12}")
    if "phantoms" in lines:
        print(f"{'= without phantoms':<24}{lines['= package'] - lines['phantoms']:>7}"
              f"{statements['= package'] - statements['phantoms']:>12}")
    for place in wide:
        print(f"above {WIDTH} columns: {place}")
    return bool(wide)


if __name__ == "__main__":
    sys.exit(main())
