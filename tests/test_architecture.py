"""Who may import whom, and who may print, hook or unpickle: read off the source, so it cannot drift."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "overpaint"

# Each room may import the rooms of the lines above its own; within a room everything goes.
LEVELS = (
    ("errors",),
    (
        "figures",
        "metrics",
        "optim",
        "questions",
        "spans",
        "pictures",
        "sample",
        "probes",
        "zoo",
        "edit.solve",
        "match.flow",
    ),
    ("checkpoint", "scores", "features"),
    ("model",),
    ("sites",),
    ("hooks",),
    ("trace", "edit", "match"),
    ("evaluate",),
    ("attack",),
    ("report",),
    ("demo", "studio", "train"),
    ("terminal",),
    ("cli_edit", "cli_evaluate", "cli_export", "cli_match", "cli_studio", "cli_trace"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(LEVELS) for room in rooms}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__",))


def name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    return module if module in RANK else module.partition(".")[0]


def imports(path):
    """Yield the modules of the package that `path` imports, at any depth of its code."""
    known = {name(source) for source in SOURCES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("overpaint.") for a in node.names if "overpaint" in a.name
            )
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "overpaint"
        ):
            base = node.module.removeprefix("overpaint").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                yield full if full in known else base


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_one_way(path):
    own = room(name(path))
    assert own in RANK, f"{own} has no place in the table: give it one"
    for module in imports(path):
        other = room(module)
        if other == own or {own, other} in ({"edit", "edit.solve"}, {"match", "match.flow"}):
            continue
        if own == "zoo" and path.stem == "build":
            continue
        assert RANK.get(other, 99) < RANK[own], f"{name(path)} must not import {module}"


def test_only_the_command_line_imports_the_recipes_and_nobody_imports_it():
    for path in SOURCES:
        rooms = {room(module) for module in imports(path)}
        if room(name(path)) not in ("train", "cli"):
            assert "train" not in rooms, f"{name(path)} must not import train"
        if name(path) not in ("cli", "__main__"):
            assert "cli" not in rooms, f"{name(path)} must not import cli"


def calls(path):
    """Yield the dotted text of every call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_the_command_line_prints_only_hooks_hooks_and_nobody_unpickles(path):
    for call in calls(path):
        last = call.rpartition(".")[2]
        assert last != "print" or room(name(path)) in ("cli", "cli_trace", "terminal"), (
            f"{name(path)} prints"
        )
        assert not last.startswith("register_forward") or name(path) == "hooks", (
            f"{name(path)} hooks"
        )
        assert call not in ("torch.load", "pickle.load", "pickle.loads"), f"{name(path)} unpickles"


def test_functions_and_files_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{name(path)} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                head = (
                    node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                )
                lines = (node.end_lineno or 0) - head.lineno + 1
                assert lines <= 60, f"{name(path)}.{node.name} has {lines} lines"


def test_importing_the_package_stays_free_of_heavy_extras():
    import subprocess
    import sys

    heavy = (
        "resvg_py",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
        "overpaint.train",
        "overpaint.cli",
        "overpaint.terminal",
    )
    code = f"import sys, overpaint; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
