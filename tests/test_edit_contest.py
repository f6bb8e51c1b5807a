"""The contest of edits: its concepts, its rule of tuning, its stored results and its one look at the test concepts."""

import importlib
import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import contest
import pytest
from contest import LABELS

from overpaint import edit

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "docs")


@pytest.fixture
def concepts():
    return importlib.import_module("edit_concepts")


@pytest.fixture
def prompts():
    return importlib.import_module("edit_prompts")


@pytest.fixture
def figures():
    return importlib.import_module("edit_figures")


@pytest.fixture
def store():
    return importlib.import_module("edit_store")


@pytest.fixture
def runs():
    return importlib.import_module("edit_run")


def ask(prompts, kind, old, new, *, seed=0, part="validation"):
    sizes = prompts.Sizes()
    return prompts.ask(
        kind, old, new, labels=LABELS, held_out=[], sizes=sizes, seed=seed, part=part
    )


def every(lists):
    return [(kind, old, new) for kind, pairs in lists.items() for old, new in pairs.items()]


# The concepts.


def test_the_draw_reproduces_the_file(concepts):
    assert concepts.load() == concepts.draw()
    assert concepts.FILE.read_text() == concepts.text(concepts.draw())
    assert concepts.draw("another seed")["test"] != concepts.draw()["test"]


def test_the_lists_have_the_sizes_and_kinds_that_were_asked_for(concepts):
    lists = concepts.load()
    assert [len(pairs) for pairs in lists["validation"].values()] == [3] * 6
    assert {kind: len(pairs) for kind, pairs in lists["test"].items()} == concepts.COUNTS
    assert sum(concepts.COUNTS.values()) >= 40
    many = lists["many"]["all"]
    assert len({*many, *many.values()}) == 100


def test_no_test_pair_was_listed_before_and_concepts_only_where_labels_ran_out(concepts):
    lists = concepts.load()
    listed = {(old, new) for _, old, new in every({**concepts.SEEN, "front": concepts.FRONT})}
    assert not listed & {(old, new) for _, old, new in every(lists["test"])}
    known = concepts.labels()
    for kind in ("object", "trademark", "fact"):
        pairs = lists["test"][kind]
        assert not any(concepts.listed_before(name) for name in [*pairs, *pairs.values()])
        assert not set(pairs) & set(lists["validation"][kind])
    for kind in ("style", "color", "action"):  # every label was listed before
        assert all(concepts.listed_before(name) for name in known[kind])
    assert not set(lists["test"]["color"]) & set(lists["validation"]["color"])


def test_the_file_marks_every_test_concept_that_was_listed_before(concepts):
    part = concepts.FILE.read_text().partition("[test.style]")[2].partition("[many.all]")[0]
    lines = {line.split('"')[1]: line for line in part.splitlines() if line.startswith('"')}
    for _, old, _ in every(concepts.load()["test"]):
        marks = ("", "# a replacement before", "# erased before, with another replacement")
        mark = marks[concepts.listed_before(old)]
        assert mark in lines[old]
        assert ("#" in lines[old]) == bool(mark)


def test_a_style_and_a_color_have_bare_words(concepts):
    pairs = {"noto style": "blob style", "apple logo": "vue logo"}
    kinds = {"noto style": "style", "apple logo": "trademark"}
    bare = {"noto": "blob", "apple logo": "vue logo"}
    assert concepts.spelled(pairs, kinds, "bare") == bare
    assert concepts.spelled(pairs, kinds, "whole") == pairs


# The prompts.


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [("style", "noto style", "blob style"), ("color", "red background", "blue background"),
     ("object", "rocket", "airplane"), ("fact", "flag of kenya", "flag of turkey")],
)  # fmt: skip
def test_prompts_name_what_their_labels_say(prompts, concepts, kind, old, new):
    asked = ask(prompts, kind, old, new, seed=3)
    by_role = {}
    for prompt in asked.prompts:
        by_role.setdefault(prompt.role, []).append(prompt)
        for label_kind, label in prompt.labels.items():
            if label_kind != "object" or not prompt.role.endswith("synonym"):
                assert prompts.holds(prompt.text, label), prompt
    word = concepts.bare(kind, old)
    assert len(by_role["target"]) == 12 and len(by_role["other"]) == 8
    assert len({(p.text, p.seed) for p in asked.prompts}) == len(asked.prompts)
    assert all(prompts.holds(p.text, word) for p in by_role["target"] + by_role["wording"])
    for role in ("replacement", "other", "plain", "synonym"):
        assert not any(prompts.holds(p.text, word) for p in by_role.get(role, []))
    assert ("synonym" in by_role) == (kind == "object")
    targets, after = by_role["target"], by_role["replacement"]
    assert [p.seed for p in targets] == [p.seed for p in after]
    assert not {p.seed for p in targets} & {p.seed for p in by_role["wording"]}
    assert asked.prompts[-1].role == "replacement"


@pytest.mark.parametrize("part", ["validation", "held out"])
def test_unseen_wordings_are_those_of_their_part(prompts, concepts, part):
    from overpaint.train import captions

    def phrases(part):  # requests and asides, which stand in a prompt as they stand in the list
        lists = (captions._entries(name, part) for name in ("requests", "asides"))
        return {text.strip(" ,") for texts in lists for text in texts if text}

    parts = ("trained", "validation", "held out")

    def is_elsewhere(phrase, part):
        return any(prompts.holds(text, phrase) for q in parts if q != part for text in phrases(q))

    only = {p: {text for text in phrases(p) if not is_elsewhere(text, p)} for p in parts[1:]}
    assert all(only.values())
    lists = concepts.load()["validation"]  # prompts alone, nothing is drawn
    asked = [ask(prompts, *row, part=part) for row in every(lists)]
    texts = {"trained": [], part: []}
    for prompt in (p for one in asked for p in one.prompts):
        texts[part if prompt.role == "wording" else "trained"].append(prompt.text)
    for written, rows in texts.items():
        for other in only:
            shown = any(prompts.holds(text, phrase) for text in rows for phrase in only[other])
            assert shown == (other == written), (written, other)


def test_synonyms_of_the_other_part_are_never_shown(prompts):
    from overpaint.train import captions

    unseen = {part: captions.held_out_synonyms(part) for part in ("validation", "held out")}
    for part, other in (("validation", "held out"), ("held out", "validation")):
        name = next(n for s, n in unseen[part].items() if not prompts.holds(s, n))
        for object_ in {name, *list(unseen[other].values())[:5]}:
            new = "frog" if object_ != "frog" else "bus"
            asked = ask(prompts, "object", object_, new, part=part)
            texts = {
                role: [p.text for p in asked.prompts if p.role == role]
                for role in ("synonym", "new synonym")
            }
            own = [s for s, n in unseen[part].items() if n == object_ and not prompts.holds(s, n)]
            assert all(any(prompts.holds(t, s) for s in own) for t in texts["new synonym"])
            assert bool(texts["new synonym"]) == bool(own)
            hidden = [s for names in unseen.values() for s, n in names.items() if n == object_]
            assert not any(prompts.holds(t, s) for t in texts["synonym"] for s in hidden)
        assert any(n == name for n in unseen[part].values())
    with pytest.raises(ValueError, match="must be 'validation' or 'held out', got 'trained'"):
        ask(prompts, "object", "bus", "frog", part="trained")


def test_validation_and_test_runs_take_their_own_part(run, runs):
    bus = {"object": {"bus": "frog"}}
    bench = replace(run, sizes=replace(run.sizes, wordings=6))
    rows = [
        [p.text for p in runs.asked_of(replace(bench, part=part), bus)[0].prompts if p.role == "wording"]
        for part in ("validation", "held out")
    ]  # fmt: skip
    assert not set(rows[0]) & set(rows[1])
    assert run.part == "validation"


def test_the_preserve_list_holds_no_erased_concept_and_no_object_of_the_scenes(prompts):
    pairs, kinds = {"red background": "blue background"}, {"red background": "color"}
    kept = prompts.preserved(pairs, kinds, LABELS)
    assert "red" not in kept and "red background" not in kept
    assert {"blue", "blue background", "noto style", "apple logo"} <= set(kept)
    asked = ask(prompts, "color", "red background", "blue background")
    assert not {p.labels["object"] for p in asked.prompts} & set(kept)
    apple = prompts.preserved({"apple": "banana"}, {"apple": "object"}, LABELS)
    assert "apple logo" not in apple


# The figures.


def small(prompts):
    rows = [("target", {"style": "noto", "object": "bus"})] * 4
    rows += [("other", {"style": "blob", "object": "bus"})] * 4
    rows += [("replacement", {"style": "fluent", "object": "bus"})] * 2
    items = [prompts.Prompt("", i, role, labels) for i, (role, labels) in enumerate(rows)]
    return prompts.Asked("style", "noto style", "fluent style", "style", ("noto", "fluent"), tuple(items))  # fmt: skip


def result(labels):
    return {"labels": labels, "seconds": 1.0, "bytes": 10, "captions": 0.0, "refused": ""}


def test_figures_of_a_concept_by_hand(prompts, figures):
    asked = small(prompts)
    plain = [dict(p.labels) for p in asked.prompts]
    plain[8] = {"style": "noto", "object": "bus"}  # one of two replacements is not recognised
    edited = [dict(p.labels) for p in asked.prompts[:8]]
    for i in range(3):
        edited[i]["style"] = "fluent"
    edited[3]["object"] = "car"
    edited[4]["style"] = "fluent"
    found = figures.of_concept(asked, result(edited), result(plain))
    expected = {"target": 1 / 4, "redirection": 3 / 4, "reached": 1 / 2, "others_drop": 1 / 4,
                "rest_drop": 0.0, "scene_drop": 1 / 4, "kept": 7 / 8}  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["harmonic"] == pytest.approx(2 / (1 / 0.75 + 8 / 7))
    assert "wording" not in found
    attacked = {"attack": {"best": 0.5, "before": 0.9, "after": 0.1, "chance": 0.2}}
    found = figures.of_concept(asked, result(edited) | attacked, result(plain))
    names = ("attack", "attack_before", "attack_plain", "attack_chance")
    assert tuple(found[name] for name in names) == (0.5, 0.9, 0.1, 0.2)


def test_differences_are_paired_by_concept(figures):
    ours = [{"harmonic": x} for x in (0.9, 0.5, 0.7, 0.3)]
    theirs = [{"harmonic": x - 0.1 - 0.01 * i} for i, x in enumerate((0.9, 0.5, 0.7, 0.3))]
    found = figures.differences(ours, theirs)
    assert found.mean == pytest.approx(0.115)
    assert found.low > 0.09


# Stored results, and one look at the test.


def test_a_stored_result_is_not_computed_again_and_an_unfinished_one_is(store, tmp_path):
    kept = store.Store(tmp_path / "runs")
    calls = []

    def make():
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"x": (1, 2)}

    with pytest.raises(KeyboardInterrupt):
        kept.get({"method": "a"}, make)
    assert not kept.has({"method": "a"})
    assert kept.get({"method": "a"}, make) == {"x": [1, 2]}
    assert store.Store(tmp_path / "runs").get({"method": "a"}, make) == {"x": [1, 2]}
    assert len(calls) == 2
    assert not kept.has({"method": "b"})


def test_the_code_of_a_method_covers_the_modules_that_it_imports(store):
    methods = importlib.import_module("edit_methods").METHODS
    paths = set()
    store._follow(ROOT / "overpaint/edit/methods/uce.py", paths)
    names = {path.name for path in paths}
    assert {"uce.py", "cross_attention.py", "least_squares.py"} <= names
    assert "finetune.py" not in names
    codes = {
        name: store.code_of(methods[name].make) for name in ("uce, to pads", "quickfix", "time")
    }
    assert len(set(codes.values())) == 3


def test_every_method_states_settings_that_its_function_takes():
    import inspect

    import overpaint as op

    methods = importlib.import_module("edit_methods").METHODS
    functions = {"auto": op.edit.auto, "quickfix": op.edit.quickfix, "quickfix, list": op.edit.quickfix,
                 "uce, to pads": op.edit.uce, "uce, last token": op.edit.uce, "time": op.edit.time,
                 "loco": op.edit.loco, "oce": op.edit.oce, "dp": op.edit.dp, "speed": op.edit.speed,
                 "hirm": op.edit.hirm, "token rows": op.edit.rename, "random site": op.edit.random_site}  # fmt: skip
    for name, function in functions.items():
        known = inspect.signature(function).parameters
        assert all(key in known for settings in methods[name].grid for key in settings), name
        assert len({str(settings) for settings in methods[name].grid}) == len(methods[name].grid)


# A run on a model with random weights.


@pytest.fixture
def run(tiny_sd1, tmp_path):
    return contest.make_run(tiny_sd1, tmp_path / "runs")


CONCEPTS = {"object": {"bus": "frog"}}
ROWS = {
    "no edit": {},
    "prompt filter": {},
    "quickfix": {"ridge": 0.1},
    "token rows": {"any_token": False},
}


def test_a_stopped_contest_continues_where_it_was(runs, run):
    asked, rows = runs.contest(run, CONCEPTS, ROWS)
    assert rows["no edit"][0]["others_drop"] == 0
    assert rows["quickfix"][0]["bytes"] > 1000 and rows["prompt filter"][0]["bytes"] == 0
    plain = run.result(asked[0], "no edit", {})["labels"]
    assert run.result(asked[0], "quickfix", ROWS["quickfix"])["labels"] != plain[:-1]
    assert rows["token rows"][0]["refused"] == 1  # "bus" is a frequent word: counted as unedited
    assert run.result(asked[0], "token rows", ROWS["token rows"])["labels"] == plain[:-1]
    folder = run.store.folder
    assert len(list(folder.iterdir())) == len(ROWS)
    again = runs.contest(run, CONCEPTS, ROWS)[1]
    assert again["quickfix"][0]["seconds"] == rows["quickfix"][0]["seconds"]  # not measured again
    lost = next(path for path in folder.iterdir() if b'"plain": true' in path.read_bytes())
    lost.unlink()
    runs.contest(run, CONCEPTS, ROWS)
    assert lost.exists() and len(list(folder.iterdir())) == len(ROWS)
    run.result(asked[0], "quickfix, list", ROWS["quickfix"])  # another edit
    assert len(list(folder.iterdir())) == len(ROWS) + 1
    runs.contest(replace(run, weights="other weights"), CONCEPTS, {"no edit": {}})
    assert len(list(folder.iterdir())) == len(ROWS) + 2


def test_rows_of_the_same_edit_share_their_result(run):
    def key(name):
        return run.edit_key("edit", name, {}, {"bus": "frog"}, {"bus": "object"})

    assert key("auto") == key("auto, weight tuned")
    assert key("prompt filter") != key("no edit")
    assert key("quickfix") != key("quickfix, list")


# The page.


def test_the_page_shows_every_method_with_its_settings_and_says_with_whom_it_is_a_draw(figures):
    methods = importlib.import_module("edit_methods").METHODS
    report = importlib.import_module("edit_report")
    sections = importlib.import_module("edit_sections")
    one = {"wording": 0.1, "synonym": 0.2, "redirection": 0.8, "reached": 0.9, "others_drop": 0.0, "rest_drop": 0.0,
           "scene_drop": 0.0, "captions": 0.05, "refused": 0.0, "seconds": 1.5, "bytes": 20_000}  # fmt: skip
    rows = {}
    for name in methods:
        target = {"auto": 0.0, "uce, to pads": 0.0, "dp": 0.0}.get(name, 0.5)
        kept = {"dp": 1.0}.get(name, 0.9)
        spread = 0.0 if name in ("auto", "uce, to pads") else 0.01
        rows[name] = [
            one | {"target": target, "kept": k, "harmonic": figures.harmonic(target, k)}
            for k in (kept, kept - spread, kept - 2 * spread) * 10
        ]
    chosen = {name: dict(method.grid[0]) for name, method in methods.items()}
    share = importlib.import_module("overpaint.metrics").share
    many = [{"concepts": 50, "method": "auto", "refused": "", "left": share([0.0]), "redirection": share([1.0]),
             "kept": share([0.0, 1.0]), "seconds": 2.0}]  # fmt: skip
    tables = report.tables(rows, ["object"] * 30, chosen, many, [])
    result = report.flat(tables)
    assert report.outcome(tables["auto minus the row"])["a draw with"] == ["uce, to pads"]
    assert report.outcome(tables["auto minus the row"])["worse than"] == ["dp"]
    assert (result["target_after"], result["beats_all"], result["rivals_draw"]) == (0, 0, 1)
    assert (result["kept_at_50"], result["left_at_50"], result["rivals_worse"]) == (0.5, 0, 1)
    assert "attack_after" not in result
    content = report.as_json({
        "result": result, "tables": tables, "commit": "abcdef012345",
        "test": {"concepts": {"object": dict.fromkeys(map(str, range(30)), "")}, "list": "new",
                 "looks": [{"weights": "a", "list": "old"}, {"weights": "a", "list": "new"},
                           {"weights": "b", "list": "new"}]},
        "protocol": {"steps": 8, "seed": 0, "weights": "b", "captions": 100, "pictures": {"targets": 12}},
    })  # fmt: skip
    page = sections.contest(json.loads(json.dumps(content)))
    assert (
        "a draw with UCE from the last token to the pads; worse than DP. Of the rows that cost nothing it is"
        in page
    )
    assert "were run 2 times, 1 time on these weights" in page and "No attacks were run" in page
    for name in methods:
        assert page.count(f"| {sections.NAMES[name]} |") >= 4, name
    assert "erase weight 1" in page
    assert "| 50 | **automatic (`edit.auto`)** | 50 %" in sections.many(
        json.loads(json.dumps(content))
    )
    begun = {"unfinished": "It has not ended.", "result": {}, "tables": {}, "test": {}}
    for section in (sections.contest, sections.many):
        assert section(begun).startswith("## ") and "It has not ended." in section(begun)


def test_a_concept_without_a_figure_is_left_out_of_the_paired_difference(figures):
    ours, theirs = (
        [{"harmonic": v} for v in row] for row in ((0.9, 0.8, math.nan), (0.5, 0.6, 0.7))
    )
    found = figures.differences(ours, theirs)
    assert found.mean == pytest.approx(0.3) and found.n == 2


@pytest.mark.parametrize("name", ["oce", "dp", "speed", "hirm", "uce", "loco", "time", "finetune"])
def test_every_setting_of_a_grid_is_an_argument_of_its_method(name):
    methods = importlib.import_module("edit_methods").METHODS
    grids = [s for row, method in methods.items() if row.split(",")[0] == name for s in method.grid]
    parameters = inspect.signature(getattr(edit, name)).parameters
    settings = {key for grid in grids for key in grid} - {"steps", "lr"}
    assert grids and settings <= set(parameters)
