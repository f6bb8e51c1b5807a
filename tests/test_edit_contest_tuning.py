"""Tuning in the contest of edits: one rule for all methods, remarks on edges of grids, and stale choices refused."""

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

import contest
import pytest

from overpaint import files

CONCEPTS = {"object": {"bus": "frog", "cat": "dog"}, "fact": {"flag of japan": "flag of china"}}


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(contest.ROOT / "benchmarks")


@pytest.fixture
def tuning():
    return importlib.import_module("edit_tune")


@pytest.fixture
def methods():
    return importlib.import_module("edit_methods").METHODS


@pytest.fixture
def run(tiny_sd1, tmp_path):
    return contest.make_run(tiny_sd1, tmp_path / "runs")


def test_each_round_has_one_concept_of_each_kind(tuning, run):
    asked = importlib.import_module("edit_run").asked_of(run, CONCEPTS)
    parts = tuning.rounds(asked)
    assert [[one.old for one in part] for part in parts] == [["bus", "flag of japan"], ["cat"]]
    lists = importlib.import_module("edit_concepts").load()["validation"]
    parts = tuning.rounds(importlib.import_module("edit_run").asked_of(run, lists))
    assert (
        [len({one.kind for one in part}) for part in parts] == [6, 6, 6] == [len(p) for p in parts]
    )


def test_the_better_half_goes_on_and_the_best_over_all_concepts_is_chosen(
    tuning, run, methods, monkeypatch
):
    """Scores by hand: ridge 1 leads on the first round, 0.1 over both."""
    first = {0.001: 0.1, 0.01: 0.2, 0.1: 0.8, 1.0: 0.9, 10.0: 0.7, 100.0: 0.0}
    second = {0.1: 0.9, 1.0: 0.2, 10.0: 0.5}
    seen = []

    def of_concept(one, result, plain):
        ridge, bare = result["ridge"], result["bare"]
        seen.append((one.old, ridge, bare))
        value = (second if one.old == "cat" else first)[ridge] - 0.15 * bare
        change = {"others_drop": 0.0, "rest_drop": 0.0, "scene_drop": 0.0}
        return {"harmonic": value, "seconds": 1.0, "bytes": 1, **change}

    def result(self, asked, name, settings):
        return {"ridge": settings.get("ridge"), "bare": settings.get("subject") == "bare"}

    monkeypatch.setattr(tuning, "of_concept", of_concept)
    monkeypatch.setattr(type(run), "result", result)
    found = tuning.tune(run, CONCEPTS, ["quickfix"])["quickfix"]
    assert found["chosen"] == {"ridge": 0.1}
    assert len(seen) == tuning.edits("quickfix", [2, 1]) == 7 * 2 + 4
    tried = {(row["settings"]["ridge"], "subject" in row["settings"]): row for row in found["tried"]}  # fmt: skip
    assert (
        tried[1.0, True]["concepts"] == 3
    )  # bare words are tried with the best of the first round
    assert tried[0.1, False]["harmonic"] == pytest.approx((0.8 + 0.8 + 0.9) / 3)
    assert tried[100.0, False]["concepts"] == 2
    assert set(seen[:12]) == {(o, r, False) for o in ("bus", "flag of japan") for r in first}


def test_of_equal_settings_the_first_is_chosen_and_unknown_ones_are_last():
    ranked = importlib.import_module("edit_figures").ranked
    rows = [{"harmonic": h, "i": i} for i, h in enumerate((None, 0.3, float("nan"), 0.5, 0.5))]
    assert [row["i"] for row in ranked(rows)] == [3, 4, 1, 0, 2]


def test_tuning_a_random_model_tries_everything_and_draws_nothing_again(tuning, run, monkeypatch):
    drawn = contest.count_pictures(monkeypatch)
    concepts = {"object": {"bus": "frog"}}
    found = tuning.tune(run, concepts, ["quickfix", "prompt filter", "no edit"])
    tried = [row["settings"] for row in found["quickfix"]["tried"]]
    assert tried[:2] == [{"ridge": 0.01}, {"ridge": 0.001}] and tried[6]["subject"] == "bare"
    assert found["quickfix"]["chosen"] in tried
    assert len(found["prompt filter"]["tried"]) == 1
    assert sum(drawn) > 0
    before = len(drawn)
    assert tuning.tune(run, concepts, ["quickfix", "prompt filter", "no edit"]) == found
    assert len(drawn) == before


# Edges.


def test_a_number_at_the_edge_of_its_grid_is_reported(tuning):
    grid = [
        {"keys": k, "ridge": r, "flag": f}
        for k in "ab" for r in (0.1, 1.0, 10.0) for f in (True, False)
    ]  # fmt: skip
    grid += [
        {"keys": "b", "ridge": 1000.0, "flag": True},
        {"keys": "c", "ridge": 1.0, "flag": True},
    ]
    inner = {"keys": "a", "ridge": 1.0, "flag": True}
    assert tuning.edges(grid, inner) == []
    assert tuning.edges(grid, inner | {"ridge": 0.1, "subject": "bare"}) == [
        "`ridge` 0.1 is the smallest of 3 values tried: add smaller ones to its grid"
    ]
    assert tuning.edges(grid, inner | {"ridge": 10.0}) == [
        "`ridge` 10 is the largest of 3 values tried: add larger ones to its grid"
    ]
    assert tuning.edges(grid, inner | {"ridge": 10.0, "keys": "b"}) == []  # 1000 was tried there
    assert tuning.edges(grid, {"keys": "c", "ridge": 1.0, "flag": True}) == []  # no other value
    assert tuning.edges([{}], {}) == []


def test_an_edge_is_stored_with_the_choice(tuning, run, methods):
    found = tuning.tune(run, {"object": {"bus": "frog"}}, ["loco"])["loco"]
    values = [settings["ridge"] for settings in methods["loco"].grid]
    chosen = found["chosen"]["ridge"]
    assert bool(found["edges"]) == (chosen in (min(values), max(values)))
    assert found["edges"] == tuning.edges(methods["loco"].grid, found["chosen"])


def test_no_method_is_starved(methods):
    for name, method in methods.items():
        numbers = [v for s in method.grid for v in s.values() if type(v) in (int, float)]
        if numbers:
            assert 6 <= len(method.grid) <= 15, name
        else:
            assert name in ("auto", "token rows", "prompt filter", "no edit")
        for key in ("ridge", "lr", "null_below", "erase_weight"):
            values = {s[key] for s in method.grid if key in s}
            assert not values or len(values) >= 3, (name, key)
    assert methods["random site"].grid == methods["quickfix, list"].grid
    assert methods["uce, last token"].grid == methods["uce, to pads"].grid


# Stale choices.


@pytest.fixture
def tuned(tuning, run, tmp_path):
    """A file of choices for two methods under the present circumstances."""
    path = tmp_path / "quality_edit_tuning.json"
    names = ["uce, to pads", "quickfix"]
    entries = {n: {"chosen": {}, "circumstances": tuning.circumstances(run, CONCEPTS, n)} for n in names}  # fmt: skip
    files.write_json(path, {"weights": "weights", "methods": entries, "layers": {}})
    return path


NAMES = ["uce, to pads", "quickfix"]


def test_a_choice_under_the_same_circumstances_is_taken(tuning, run, tuned):
    assert set(tuning.load_tuning(tuned, run, CONCEPTS, NAMES)["methods"]) == set(NAMES)
    later = replace(run, sizes=replace(run.sizes, targets=12), part="held out", captions=3)
    assert tuning.load_tuning(tuned, later, CONCEPTS, NAMES)


def test_a_missing_choice_or_other_weights_are_refused(tuning, run, tuned, tmp_path):
    missing = tmp_path / "none" / "quality_edit_tuning.json"
    with pytest.raises(
        tuning.NotTuned, match="there is no quality_edit_tuning.json.*--tune` first"
    ):
        tuning.load_tuning(missing, run, CONCEPTS, NAMES)
    with pytest.raises(tuning.NotTuned, match="of the weights weights, and the model has new"):
        tuning.load_tuning(tuned, replace(run, weights="new"), CONCEPTS, NAMES)
    with pytest.raises(tuning.NotTuned, match="has no settings of dp: run `.*--tune --methods dp`"):
        tuning.load_tuning(tuned, run, CONCEPTS, [*NAMES, "dp"])


def test_a_choice_of_other_steps_scorer_or_concepts_is_refused_for_all_methods(tuning, run, tuned):
    other = {"object": {"bus": "frog"}}
    for words, changed, concepts in (
        ("denoising steps", replace(run, bench=replace(run.bench, steps=2)), CONCEPTS),
        ("scorer", replace(run, scorer="other"), CONCEPTS),
        ("validation concepts", run, other),
    ):
        with pytest.raises(tuning.NotTuned) as caught:
            tuning.load_tuning(tuned, changed, concepts, NAMES)
        text = str(caught.value)
        assert f"uce, to pads ({words}); quickfix ({words})" in text
        assert text.endswith("run `python benchmarks/quality_edit.py --tune`.")


@pytest.mark.parametrize(
    ("key", "words"), [("method", "code of the method"), ("grid", "grid of settings")]
)
def test_a_choice_with_other_code_names_the_method_and_the_command(tuning, run, tuned, key, words):
    content = files.from_json(tuned.read_bytes())
    content["methods"]["uce, to pads"]["circumstances"][key] = "older"
    files.write_json(tuned, content)
    with pytest.raises(tuning.NotTuned) as caught:
        tuning.load_tuning(tuned, run, CONCEPTS, NAMES)
    text = str(caught.value)
    assert f"other circumstances for uce, to pads ({words}): run" in text
    assert text.endswith("--tune --methods 'uce, to pads'`.") and "quickfix" not in text
    assert tuning.load_tuning(tuned, run, CONCEPTS, ["quickfix"])


def test_the_circumstances_follow_the_code_of_the_method_alone(tuning, run, methods, monkeypatch):
    before = {name: tuning.circumstances(run, CONCEPTS, name) for name in NAMES}
    assert before["quickfix"]["method"] != before["uce, to pads"]["method"]
    narrower = replace(methods["quickfix"], grid=methods["quickfix"].grid[:3])
    monkeypatch.setitem(methods, "quickfix", narrower)
    after = {name: tuning.circumstances(run, CONCEPTS, name) for name in NAMES}
    assert after["uce, to pads"] == before["uce, to pads"]
    assert after["quickfix"]["grid"] != before["quickfix"]["grid"]


# The plan.


def test_the_plan_counts_the_pictures_that_are_drawn(tuning, run, monkeypatch):
    plan = importlib.import_module("edit_plan")
    asked = importlib.import_module("edit_run").asked_of(run, CONCEPTS)
    drawn = contest.count_pictures(monkeypatch)
    tuning.tune(run, CONCEPTS, ["quickfix", "prompt filter", "no edit"])
    parts = plan.tuning_parts(asked, ["quickfix", "prompt filter", "no edit"])
    assert sum(part.pictures for part in parts) >= sum(drawn) > 0
    by_name = {part.name: part for part in parts}
    assert by_name["unedited model"].pictures == sum(len(one.prompts) for one in asked)
    others = [p for p in asked[0].prompts if p.role != "replacement"]
    assert by_name["quickfix"].pictures == (7 * 2 + 4) * len(others)
    assert plan.text(parts).splitlines()[-1].split()[0] == "all"


def test_a_full_run_fits_into_a_session(tiny_sd1, tmp_path):
    main = importlib.import_module("quality_edit")
    methods = importlib.import_module("edit_methods").METHODS
    bench = importlib.import_module("edit_measure").Bench(tiny_sd1, contest.Brightness(), 8, 0)
    options = {"quick": False, "size": None, "captions": 100, "attack": True, "methods": list(methods)}  # fmt: skip
    minutes = {}
    for tune in (True, False):
        plan = argparse.Namespace(tune=tune, **options)
        table = main.planned(plan, bench, tmp_path)
        minutes[tune] = float(table.splitlines()[-1].split()[-1])
    assert minutes[True] <= 100 and minutes[False] <= 150
    assert not list(Path(tmp_path).rglob("*.json"))  # nothing is drawn
