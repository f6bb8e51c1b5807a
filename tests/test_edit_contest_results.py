"""Stored results of the contest of edits: keys, pictures that are not drawn twice, attacks, stops at any moment."""

import argparse
import importlib
import math
import re
from dataclasses import replace

import contest
import pytest

import overpaint
from overpaint import files

CONCEPTS = {"object": {"bus": "frog"}}
ROWS = {"ridge": 0.1}


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(contest.ROOT / "benchmarks")


@pytest.fixture
def run(tiny_sd1, tmp_path):
    return contest.make_run(tiny_sd1, tmp_path / "runs")


@pytest.fixture
def runs():
    return importlib.import_module("edit_run")


@pytest.fixture
def measuring():
    return importlib.import_module("edit_measure")


@pytest.fixture
def asked(runs, run):
    return runs.asked_of(replace(run, sizes=replace(run.sizes, targets=2)), CONCEPTS)[0]


@pytest.fixture
def small_attack(monkeypatch):
    attacks = importlib.import_module("edit_attack")
    budget = attacks.attack.Budget(prompts=1, pictures=1, tokens=1, gradient_steps=1)
    monkeypatch.setattr(attacks, "BUDGET", budget)


# Keys.


def test_keys_hold_all_that_a_result_depends_on(run, asked, monkeypatch):
    def key(run):
        return run.store.path(run.picture_key(asked, "quickfix", ROWS))

    others = {
        "weights": replace(run, weights="other"),
        "scorer": replace(run, scorer="other"),
        "steps": replace(run, bench=replace(run.bench, steps=2)),
        "seed": replace(run, bench=replace(run.bench, seed=1)),
        "captions": replace(run, captions=1),
    }
    paths = {name: key(other) for name, other in others.items()}
    assert len({key(run), *paths.values()}) == 6
    for name in ("guidance_scale", "device", "scheduler", "scorer"):
        assert name in run.picture_key(asked, "quickfix", ROWS)
    before = key(run)
    module = importlib.import_module("edit_run")
    monkeypatch.setattr(module, "text_of", lambda paths: f"changed {len(paths)}")
    assert key(run) != before


def test_keys_of_attacks_hold_the_budget_and_the_code_of_the_attack(run, asked, monkeypatch):
    attacks, module = importlib.import_module("edit_attack"), importlib.import_module("edit_run")
    before = run.attack_key(asked, "quickfix", ROWS)
    assert before["budget"] == attacks.budget()
    assert before["attacking"] != before["measuring"]
    monkeypatch.setattr(attacks, "BUDGET", attacks.attack.Budget(pictures=9))
    assert run.attack_key(asked, "quickfix", ROWS) != before
    names = [path.name for path in module.ATTACKING]
    assert {"attack.py", "soft_token.py", "rewordings.py", "edit_attack.py"} <= set(names)
    assert {"edit_measure.py", "edit_prompts.py"} <= {path.name for path in module.MEASURING}


def test_the_digest_of_source_texts_changes_with_a_file(tmp_path):
    text_of = importlib.import_module("edit_store").text_of
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1")
    second.write_text("x = 2")
    assert text_of((first,)) != text_of((second,)) != text_of((first, second))


def test_several_concepts_at_once_are_known_by_their_pairs_and_prompts(run, monkeypatch):
    more = importlib.import_module("edit_more")
    chosen = {"quickfix": ROWS, "no edit": {}}
    drawn = contest.count_pictures(monkeypatch)
    for pairs in ({"bus": "frog", "cat": "dog"}, {"bus": "frog", "lion": "bell"}):
        rows = more.many_rows(run, pairs, (1, 2), chosen, 2)
        assert [row["concepts"] for row in rows] == [1, 1, 2, 2]
    counts = list(drawn)
    more.many_rows(run, pairs, (1, 2), chosen, 2)
    assert drawn == counts  # nothing again
    more.many_rows(run, {"bus": "dog", "lion": "bell"}, (1, 2), chosen, 2)
    assert len(drawn) > len(counts)
    lost = [p for p in run.store.folder.iterdir() if '"lion": "bell"' in p.read_text()]
    lost[0].unlink()
    del drawn[:]
    more.many_rows(run, pairs, (1, 2), chosen, 2)
    assert len(drawn) <= 2  # only the lost row


# No picture twice.


def test_a_refused_edit_draws_no_picture(run, asked, measuring, monkeypatch):
    plain = run.result(asked, "no edit", {})["labels"]
    drawn = contest.count_pictures(monkeypatch)
    refused = run.result(asked, "token rows", {"any_token": False})
    assert refused["refused"] and drawn == []
    assert refused["labels"] == plain[: len(refused["labels"])]


def test_the_prompt_filter_draws_no_prompt_of_the_replacement_again(run, asked, monkeypatch):
    plain = run.result(asked, "no edit", {})["labels"]
    drawn = contest.count_pictures(monkeypatch)
    found = run.result(asked, "prompt filter", {})["labels"]
    new = {p.seed: row for p, row in zip(asked.prompts, plain, strict=True) if p.role == "replacement"}  # fmt: skip
    for prompt, row, old in zip(asked.prompts, found, plain, strict=False):
        if prompt.role == "target":
            assert row == new[prompt.seed]
        if prompt.role in ("other", "plain"):
            assert row == old
    prompts = importlib.import_module("edit_prompts")
    renamed = [p for p in asked.prompts[: len(found)] if prompts.holds(p.text, "bus")]
    others = sum(p.role != "target" for p in renamed)
    assert 1 <= sum(drawn) == others < len(renamed) < len(found)


def test_token_rows_draw_only_prompts_whose_features_move(runs, measuring, tmp_path, monkeypatch):
    import layouts

    run = contest.make_run(overpaint.load(layouts.pipeline("sd1")), tmp_path / "clip")
    (asked,) = runs.asked_of(run, CONCEPTS)
    plain = run.result(asked, "no edit", {})["labels"]
    drawn = contest.count_pictures(monkeypatch)
    found = run.result(asked, "token rows", {"any_token": True})
    prompts = asked.prompts[: len(found["labels"])]
    holds = importlib.import_module("edit_prompts").holds
    holding = [i for i, p in enumerate(prompts) if holds(p.text, "bus")]
    assert not found["refused"] and 0 < sum(drawn) == len(holding) < len(prompts)
    kept = [i for i, p in enumerate(prompts) if p.role in ("other", "plain")]
    assert [found["labels"][i] for i in kept] == [plain[i] for i in kept]
    pairs, kinds = {"bus": "frog"}, {"bus": "object"}
    methods = importlib.import_module("edit_methods").METHODS
    edit = measuring.make_edit(run.bench, methods["token rows"], {"any_token": True}, pairs, kinds)
    known = measuring.known_labels(asked.prompts, plain)
    assert measuring.to_draw(run.bench, prompts, edit, known) == holding
    assert measuring.to_draw(run.bench, prompts, edit, {}) == list(range(len(prompts)))
    whole = measuring.labelled(replace(run.bench, judge=Coarse()), prompts, edit)
    coarse = measuring.labelled(replace(run.bench, judge=Coarse()), asked.prompts, measuring.NOTHING)  # fmt: skip
    known = measuring.known_labels(asked.prompts, coarse)
    assert measuring.labelled(replace(run.bench, judge=Coarse()), prompts, edit, known) == whole


@pytest.mark.parametrize("name", ["quickfix", "uce, to pads"])
def test_an_edit_that_moves_the_empty_prompt_or_the_unet_draws_everything(
    run, asked, measuring, monkeypatch, name
):
    plain = run.result(asked, "no edit", {})["labels"]
    methods = importlib.import_module("edit_methods").METHODS
    edit = measuring.make_edit(
        run.bench, methods[name], {"ridge": 0.1}, {"bus": "frog"}, {"bus": "object"}
    )
    prompts = [p for p in asked.prompts if p.role != "replacement"]
    known = measuring.known_labels(asked.prompts, plain)
    assert measuring.to_draw(run.bench, prompts, edit, known) == list(range(len(prompts)))


class Coarse(contest.Brightness):
    """Labels pictures in steps that rounding in batches of other sizes does not reach."""

    def predict(self, images, kind):
        return super().predict(((images * 100).round() / 1e9), kind)


# Attacks.


def test_a_third_of_each_kind_is_attacked_and_the_seed_is_fixed():
    concepts, attacks = (importlib.import_module(f"edit_{n}") for n in ("concepts", "attack"))
    lists = concepts.load()["test"]
    chosen = attacks.third(lists)
    counts = {kind: sum(old in pairs for old in chosen) for kind, pairs in lists.items()}
    assert counts == {kind: math.ceil(len(pairs) / 3) for kind, pairs in lists.items()}
    assert len(chosen) == 15 == len(set(chosen))
    assert chosen == attacks.third(lists)
    assert chosen != [old for pairs in lists.values() for old in list(pairs)[: math.ceil(len(pairs) / 3)]]  # fmt: skip


def test_every_attacked_concept_has_prompts_that_hold_it_once(runs, run):
    """No attack may stop a test run: two prompts for each, whose concept the tokenizer finds. Nothing is drawn."""
    from layouts import tokenizer

    from overpaint.model.token_spans import find_span

    concepts, attacks = (importlib.import_module(f"edit_{n}") for n in ("concepts", "attack"))
    lists, clip = concepts.load()["test"], tokenizer()
    sizes = importlib.import_module("edit_prompts").Sizes()
    chosen = set(attacks.third(lists))
    every = [one for one in runs.asked_of(replace(run, sizes=sizes), lists) if one.old in chosen]
    assert len(every) == 15
    for one in every:
        old = concepts.bare(one.kind, one.old)
        texts = attacks._attack_prompts(one, old)
        assert len(texts) >= attacks.BUDGET.prompts, one.old
        assert all(find_span(clip, text, old) for text in texts), one.old
        new = concepts.bare(one.kind, one.new)
        assert all(attacks.replace_concept(text, old, new) != text for text in texts)


@pytest.mark.usefixtures("small_attack")
def test_a_stopped_attack_is_made_alone_and_counts_in_the_time_left(runs, run, monkeypatch):
    attacked = replace(run, attack=("bus",))
    chosen = {"no edit": {}, "quickfix": ROWS, "time": {"ridge": 0.1}}
    runs.contest(run, CONCEPTS, chosen)  # without attacks
    (one,) = runs.asked_of(run, CONCEPTS)
    assert run.has(one, "quickfix", ROWS) and not attacked.has(one, "quickfix", ROWS)
    assert attacked.has(one, "time", chosen["time"])  # not attacked
    assert attacked.cost(one, "quickfix") > run.cost(one, "quickfix") + 1
    with monkeypatch.context() as patch:
        patch.setattr(runs, "attacked", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.contest(attacked, CONCEPTS, chosen)
    drawn = contest.count_pictures(monkeypatch)
    monkeypatch.setattr(contest.Brightness, "classify", classify, raising=False)
    rows = runs.contest(attacked, CONCEPTS, chosen)[1]
    assert drawn == []  # pictures were stored
    assert 0 <= rows["quickfix"][0]["attack"] <= 1 and "attack" not in rows["time"][0]
    monkeypatch.setattr(runs, "attacked", stop)
    assert runs.contest(attacked, CONCEPTS, chosen)[1]["quickfix"] == rows["quickfix"]


def stop(*_, **__):
    raise KeyboardInterrupt


def classify(self, images, kind):
    """Return probabilities that depend on the mean brightness."""
    count = len(self.labels[kind])
    first = images.double().mean((1, 2, 3)).clamp(0, 1)[:, None]
    return (1 - first).expand(-1, count).div(count) + first / count


def test_attacks_are_compared_on_concepts_that_both_methods_edit():
    report = importlib.import_module("edit_report")
    rows = {
        "auto": [{"attack": a} for a in (0.1, 0.2, 0.3, 0.1)],
        "token rows": [{"attack": 0.9}, {"attack": 0.8}, {}, {"attack": 0.7}],
        "quickfix": [{"attack": a} for a in (0.0, 0.05, 0.1, 0.01)],
        "time": [{}, {}, {}, {}],
    }
    by_name = {row["method"]: row for row in report.attack_rows(rows)}
    assert set(by_name) == {"token rows", "quickfix"}
    token_rows = by_name["token rows"]
    assert token_rows["n"] == 3 and token_rows["verdict"] == "auto is lower"
    assert token_rows["difference"].mean == pytest.approx((0.1 + 0.2 + 0.1 - 2.4) / 3)
    assert token_rows["minus half"].mean == pytest.approx((0.1 + 0.2 + 0.1 - 1.2) / 3)
    assert token_rows["at most half"] == "yes"
    assert by_name["quickfix"]["verdict"] == "auto is higher"
    assert by_name["quickfix"]["at most half"] == "no"


# What is not known.


def test_stored_rows_with_null_are_read_and_printed():
    figures, report = (importlib.import_module(f"edit_{n}") for n in ("figures", "report"))
    prompts = importlib.import_module("edit_prompts")
    items = (prompts.Prompt("", 0, "target", {"object": "bus"}),)
    asked = prompts.Asked("object", "bus", "frog", "object", ("bus", "frog"), items)
    labels = [{"object": "bus"}]
    plain = {"labels": labels, "seconds": 1.0, "bytes": 0, "captions": None, "refused": ""}
    attack = {"before": 0.9, "after": None, "best": None, "chance": 0.1, "family": "", "words": ""}
    row = figures.of_concept(asked, plain | {"attack": attack}, plain)
    assert math.isnan(row["attack"]) and math.isnan(row["captions"]) and math.isnan(row["kept"])
    assert row["attack_before"] == 0.9
    chosen = {"auto": {}, "no edit": {}}
    many = [{"concepts": 1, "method": "auto", "refused": "", "kept": None, "seconds": None}]
    kid = [{"set": "a", "kid": None, "p": None}]
    tables = report.tables({"auto": [row], "no edit": [row]}, ["object"], chosen, many, kid)
    text = "".join(report.markdown(title, part) for title, part in tables.items())
    assert "None" not in text and "nan" not in text
    assert math.isnan(tables["auto minus the row"][0]["harmonic"].mean)
    assert tables["auto minus the row"][0] | {"n": 0} == tables["auto minus the row"][0]


def test_progress_counts_costs_and_tells_the_time_that_is_left(runs):
    now, lines = [0.0], []
    progress = runs.Progress(100, clock=lambda: now[0], write=lines.append)
    progress.step("stored", 20, stored=True)
    now[0] = 600.0
    progress.step("auto", 10, stored=False)  # 1 in 60 s: 70 are left
    assert lines == ["30 %, about 1 h 10 min left: auto"]


# The whole test.


@pytest.fixture
def full(monkeypatch, tiny_sd1, tmp_path, tuned_methods):
    """The benchmark's full run with two validation-like concepts on a random model, without wordings of `icons`."""
    main, tuning = (importlib.import_module(n) for n in ("quality_edit", "edit_tune"))
    lists = {"validation": CONCEPTS, "test": {"object": {"bus": "frog", "cat": "dog"}},
             "many": {"all": {"bus": "frog", "cat": "dog"}}}  # fmt: skip
    monkeypatch.setattr(main.edit_concepts, "load", lambda: lists)
    monkeypatch.setattr(main, "MANY", (1, 2))
    monkeypatch.setattr(main, "UNRELATED", 8)
    monkeypatch.setattr(main, "extent", lambda plan: ((1, 2), 2, 8))
    sizes = importlib.import_module("edit_prompts").Sizes(1, 1, 1, 1)
    monkeypatch.setattr(main, "test_sizes", lambda plan: sizes)
    monkeypatch.setattr(contest.Brightness, "image_features", features, raising=False)
    bench = importlib.import_module("edit_measure").Bench(tiny_sd1, contest.Brightness(), 1, 0)
    plan = argparse.Namespace(
        quick=False, tune=False, size=None, steps=1, seed=0, captions=0, attack=False, again=False,
        methods=["auto", "quickfix", "no edit"],
    )  # fmt: skip
    out, folder = tmp_path / "results", tmp_path / "runs"
    out.mkdir()
    run = main.started(plan, bench, folder, main.test_sizes(plan))
    entries = {
        name: {"chosen": {"ridge": 0.1} if name != "no edit" else {}, "edges": [],
               "circumstances": tuning.circumstances(run, CONCEPTS, name)}
        for name in plan.methods
    }  # fmt: skip
    content = {"weights": run.weights, "methods": entries, "layers": {}}
    files.write_json(out / "quality_edit_tuning.json", content)
    return main, plan, bench, out, folder


@pytest.fixture
def tuned_methods(monkeypatch):
    methods = importlib.import_module("edit_methods").METHODS
    monkeypatch.setitem(methods, "auto", replace(methods["quickfix"], role="ours"))


def features(self, images):
    small = images.double().unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5)).flatten(1)
    return small / small.norm(dim=1, keepdim=True)


def test_a_test_run_that_is_stopped_anywhere_has_its_look_and_goes_on(full, monkeypatch):
    main, plan, bench, out, folder = full
    path, draw = out / "quality_edit.json", type(bench).draw
    calls = []

    def stopping(self, prompts, seeds):
        content = files.from_json(path.read_bytes())
        assert "unfinished" in content and len(content["test"]["looks"]) == 1
        calls.append(len(prompts))
        if len(calls) in stops:
            raise KeyboardInterrupt
        return draw(self, prompts, seeds)

    monkeypatch.setattr(type(bench), "draw", stopping)
    stops = {1, 3, 8, 14}
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            main.contested(plan, bench, out, folder)
    result = main.contested(plan, bench, out, folder)
    content = files.from_json(path.read_bytes())
    (look,) = content["test"]["looks"]
    assert "unfinished" not in content and look["result"] == content["result"]
    assert content["result"]["concepts"] == 2 == result["concepts"]
    assert content["outcome"]["a draw with"] == ["quickfix"]
    with pytest.raises(main.AlreadyRun, match="a test is run once"):
        main.contested(plan, bench, out, folder)
    counts = len(calls)
    main.contested(argparse.Namespace(**{**vars(plan), "again": True}), bench, out, folder)
    assert len(calls) == counts  # all results are stored
    assert [look["again"] for look in files.from_json(path.read_bytes())["test"]["looks"]] == [False, True]  # fmt: skip


def test_a_test_without_tuning_leaves_no_look(full):
    main, plan, bench, out, folder = full
    (out / "quality_edit_tuning.json").unlink()
    with pytest.raises(main.NotTuned):
        main.contested(plan, bench, out, folder)
    assert not (out / "quality_edit.json").exists()


def test_quick_runs_keep_nothing_and_small_tests_are_refused(monkeypatch, capsys, tmp_path):
    main = importlib.import_module("quality_edit")
    places = []

    def contested(plan, bench, out, folder):
        places.append(folder)
        assert folder.is_dir()
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "contested", contested)
    monkeypatch.setattr("sys.argv", ["quality_edit.py", "--quick"])
    monkeypatch.setattr(main.op, "load", lambda *_, **__: argparse.Namespace(pipe=argparse.Namespace()))  # fmt: skip
    monkeypatch.setattr(main.sampling, "make_scheduler", lambda *_: None)
    monkeypatch.setattr(main.judge, "load", lambda **_: None)
    main.main()
    assert not places[0].exists()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["benchmarks", "runs"]
    monkeypatch.setattr("sys.argv", ["quality_edit.py", "--size", "6"])
    with pytest.raises(SystemExit):
        main.main()
    assert re.search("a test has at least 12 pictures .* got --size 6", capsys.readouterr().err)
