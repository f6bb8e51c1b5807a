"""The tables of `benchmarks/quality_match.py`, also for a quick run without controls."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_match

    yield quality_match
    for name in [n for n in sys.modules if n == "quality_match" or n.startswith("match_")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def measured(benchmark, folder, extra):
    """Return errors of a quick run, made up."""
    plan = SimpleNamespace(quick=True)
    plan.sets = benchmark.sizes(plan)
    store = benchmark.Store(folder, lambda method: "mark")
    numbers = itertools.count(1)
    for name in plan.sets:
        methods = [*benchmark.BASELINES, benchmark.OURS]
        if benchmark.is_ablated(name):
            methods += [*benchmark.ABLATIONS, *extra]
        names = [f"{f} {u}" for f in ("spearman", "ause") for u in benchmark.UNCERTAINTIES]
        rows = {
            m: dict.fromkeys(("aepe", "pck1", "pck5", *names), 1 / next(numbers)) for m in methods
        }
        store.add(name, 0, benchmark.Origin("photo", "lens"), rows)
    return benchmark.Errors(plan, store)


@pytest.mark.parametrize("extra", [[], ["control a/b", "control a/b, no refinement", "seed a/b"]])
def test_every_table_has_rows_and_becomes_markdown(benchmark, tmp_path, extra):
    tables = benchmark.tables(measured(benchmark, tmp_path, extra), extra)
    assert ("uncertainty, of controls" in tables) == bool(extra)
    for title, rows in tables.items():
        lines = benchmark.markdown(rows, title).splitlines()
        assert len(lines) == len(rows) + 5  # a blank line, the title, a blank line, two of the head
        assert len({line.count("|") for line in lines[3:]}) == 1


def test_the_modules_that_fingerprints_are_made_of_exist(benchmark):
    mark = benchmark.marks({benchmark.OURS: "a", "control": "b"})
    names = [mark(method) for method in (benchmark.OURS, "control", "zero", "initial")]
    assert len(set(names)) == 4
    assert names[1].startswith("b-")
    assert len(benchmark.pairs_code()) == 12
