"""Refuse docstrings that are riddles and names that say nothing. Run by `make check`; needs the standard library only.

A docstring's first line says what the function returns or does, so it does not begin with What, Who, How or Whether.
Local names are nouns of the thing: `found`, `told`, `asked`, `kept` and `given` are refused.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
RIDDLES = ("What", "Who", "How", "Whether")
EMPTY_NAMES = ("found", "told", "asked", "kept", "given")
LINES, FUNCTION_LINES, PARAMETERS = 500, 60, 12
FOREIGN_INTERFACES = ("diffgrad.py",)  # parameters as in torch.optim.Adam


def names(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each name that `node` binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.lineno, node.id
    elif isinstance(node, ast.arg):
        yield node.lineno, node.arg
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.lineno, node.name


def function_faults(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield what is wrong with the size of a function; its docstring does not count."""
    text = node.body[0] if ast.get_docstring(node) else None
    docstring = (text.end_lineno or 0) - text.lineno + 1 if text else 0
    lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
    if lines > FUNCTION_LINES:
        yield f"{node.name} has {lines} lines, {FUNCTION_LINES} are allowed"
    arguments = node.args
    count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
    count -= bool(arguments.args and arguments.args[0].arg in ("self", "cls"))
    if count > PARAMETERS and not typer_verb(node):
        yield f"{node.name} has {count} parameters, {PARAMETERS} are allowed"


def typer_verb(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a verb of the command line, whose parameters are options."""
    return any("command" in ast.unparse(decorator) for decorator in node.decorator_list)


def faults(path: Path) -> Iterator[str]:
    """Yield the faults of one file, as `file:line text`."""
    source = path.read_text(encoding="utf-8")
    if source.count("\n") > LINES:
        yield f"{path}: {source.count(chr(10))} lines, {LINES} are allowed"
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(",:;") in RIDDLES:
                yield f"{path}:{line} docstring begins with {words[0]!r}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for fault in function_faults(node):
                if "parameters" not in fault or path.name not in FOREIGN_INTERFACES:
                    yield f"{path}:{line} {fault}"
        for place, name in names(node):
            if name in EMPTY_NAMES:
                yield f"{path}:{place} the name {name!r} says nothing"


def main(folders: list[str]) -> int:
    """Print the faults of all files of `folders`, by default the package, and return how many there are."""
    roots = [Path(folder) for folder in folders] or [Path("overpaint")]
    files = sorted(f for root in roots for f in (root.rglob("*.py") if root.is_dir() else [root]))
    rows = [fault for file in files for fault in faults(file)]
    for row in rows:
        sys.stdout.write(row + "\n")
    return len(rows)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
