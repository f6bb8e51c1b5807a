"""Which module may import which, and which may print, hook or unpickle: read off the source of the package."""

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "overpaint"

# A room imports only the rooms of the lines above its own.
LEVELS = (
    ("errors", "files"),
    ("metrics", "probes", "zoo", "optim", "images"),
    ("scorers", "model"),
    ("trace", "edit", "match", "image_edit", "scene_text"),
    ("evaluate",),
    ("report",),
    ("demo", "train", "studio"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(LEVELS) for room in rooms}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


KNOWN = {name(path) for path in SOURCES}


def imports(path):
    """Yield the modules of the package that `path` imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("overpaint.")
                for a in node.names
                if a.name.startswith("overpaint")
            )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            if (node.module or "").partition(".")[0] == "overpaint":
                base = (node.module or "").removeprefix("overpaint").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    yield full if full in KNOWN else base


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_rooms_import_downwards_only(path):
    own = name(path).partition(".")[0]
    assert own in RANK, f"{own} has no place in LEVELS: add it"
    for module in imports(path):
        room = module.partition(".")[0]
        if module == "":  # `from overpaint import __version__`
            continue
        if room != own:
            assert RANK.get(room, 99) < RANK[own], f"{name(path)} must not import {module}"


def test_there_is_no_circle_of_imports():
    graph = {name(path): set(imports(path)) - {""} for path in SOURCES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " imports ".join(reversed(error.args[1])))


def test_only_the_command_line_imports_the_recipes():
    for path in SOURCES:
        rooms = {module.partition(".")[0] for module in imports(path)}
        if name(path).partition(".")[0] not in ("train", "cli"):
            assert "train" not in rooms, f"{name(path)} must not import train"


def test_at_most_three_modules_are_loose():
    loose = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert loose <= {"errors", "files", "demo"}


def test_no_module_bears_the_name_of_what_its_room_exports():
    for room in sorted(ROOT.rglob("__init__.py")):
        package = importlib.import_module(".".join(["overpaint", name(room)]).removesuffix("."))
        for exported in getattr(package, "__all__", ()):
            value = getattr(package, exported)
            if (room.parent / f"{exported}.py").exists():
                assert inspect.ismodule(value), (
                    f"overpaint.{name(room)}.{exported} is a module and another thing of that name"
                )


def calls(path):
    """Yield the dotted text of every call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_cli_prints_only_hooks_hooks_and_nothing_unpickles(path):
    for call in calls(path):
        last = call.rpartition(".")[2]
        assert last != "print" or name(path).startswith("cli."), f"{name(path)} prints"
        assert not last.startswith("register_forward") or name(path) == "model.hooks", (
            f"{name(path)} registers hooks"
        )
        assert call not in ("torch.load", "pickle.load", "pickle.loads"), f"{name(path)} unpickles"
        assert call != "os.replace" or name(path) == "files", f"{name(path)} renames by hand"


def test_importing_the_package_stays_free_of_heavy_extras():
    heavy = (
        "resvg_py",
        "matplotlib",
        "jinja2",
        "typer",
        "rich",
        "overpaint.train",
        "overpaint.cli",
    )
    code = f"import sys, overpaint; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
