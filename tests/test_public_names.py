"""The public surface is a fact, not a habit."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

import overpaint as op

ROOT = Path(__file__).parent.parent
ROOMS = (
    "edit",
    "evaluate",
    "images",
    "match",
    "metrics",
    "model",
    "optim",
    "probes",
    "report",
    "scorers",
    "trace",
    "zoo",
)


def test_the_surface_of_the_package():
    assert set(op.__all__) >= {
        "Change", "Effects", "Scores", "Site", "TextToImage",
        "load", "trace", "edit", "evaluate", "probes", "report",
    }  # fmt: skip


def test_every_public_name_is_there_and_sorted():
    assert [n for n in op.__all__ if not hasattr(op, n)] == []
    assert op.__all__ == sorted(op.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_states_its_names_and_has_them(room):
    module = importlib.import_module(f"overpaint.{room}")
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    assert module.__doc__


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert head is not None
    assert op.__version__ == project["version"] == head[1]


def test_torch_is_pinned_in_constraints_as_the_makefile_installs_it():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    assert torch in (ROOT / "Makefile").read_text()
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[<>=]", d)[0] for d in project["dependencies"]}
    assert wanted <= names
