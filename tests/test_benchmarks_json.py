"""The last line of a benchmark is valid JSON, and its shares have intervals at 0 and 1 too."""

import ast
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from overpaint import files

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_benchmark_prints_or_saves_json_that_can_hold_nan(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, inner = ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]
        if name == "print" or name.endswith("write_text"):
            assert not any("json.dumps" in text for text in inner) or path.stem == "match_store", (
                f"{path.name}:{node.lineno} writes JSON with json.dumps, which can write NaN"
            )


def test_a_correlation_of_a_constant_is_null():
    from overpaint import metrics

    line = files.to_json({"drift_to_lost": metrics.spearman([1.0, 1.0], [0.0, 0.5])})
    assert json.loads(line, parse_constant=pytest.fail) == {"drift_to_lost": None}


def test_equal_seeds_have_no_interval_of_width_zero():
    interval = importlib.import_module("quality_diffgrad").interval
    assert interval(np.array([0.1, 0.2, 0.3]))[1] < 0.1
    mean, low, high = interval(np.zeros(5))
    assert mean == 0
    assert math.isnan(low) and math.isnan(high)


def test_concepts_that_are_all_erased_have_the_exact_interval_over_concepts():
    one = {
        "target": 0.0,
        "kept": 1.0,
        "others_drop": 0.0,
        "rest_drop": 0.0,
        "scene_drop": 0.0,
        "seconds": 1.0,
        "bytes": 8,
    }
    rows = importlib.import_module("edit_figures").summary([one] * 5)
    bound = 1 - 0.025 ** (1 / 5)  # five concepts
    assert (rows["target"].low, rows["target"].high) == (0, pytest.approx(bound))
    assert rows["kept"].low == pytest.approx(1 - bound)
    assert rows["others_drop"].high == pytest.approx(bound)
