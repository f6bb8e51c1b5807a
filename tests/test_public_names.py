"""The public names of the package and its rooms, and the version."""

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
    "image_edit",
    "images",
    "match",
    "metrics",
    "model",
    "optim",
    "probes",
    "report",
    "scene_text",
    "scorers",
    "trace",
    "zoo",
)


def test_public_names_of_the_package():
    assert set(op.__all__) >= {
        "Change", "Effects", "Pictures", "Scores", "Site", "TextToImage", "load", "trace", "edit", "evaluate",
        "match", "optim", "probes", "report", "images", "metrics", "scene_text", "scorers",
    }  # fmt: skip


def test_every_public_name_exists_and_names_are_sorted():
    assert [n for n in op.__all__ if not hasattr(op, n)] == []
    assert op.__all__ == sorted(op.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_in_a_rooms_all_exists(room):
    module = importlib.import_module(f"overpaint.{room}")
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    assert module.__doc__


def test_version_is_the_same_in_code_project_and_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert head is not None
    assert op.__version__ == project["version"] == head[1]


def test_constraints_pin_the_torch_of_the_makefile_and_all_dependencies():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    assert torch in (ROOT / "Makefile").read_text()
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[\[<>=]", d)[0] for d in project["dependencies"]}
    assert required <= names
