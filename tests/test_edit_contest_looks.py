"""Looks at the test concepts of the contest of edits: written before the first picture, kept for ever, counted once."""

import importlib
import json

import contest
import pytest

from overpaint import files


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(contest.ROOT / "benchmarks")


@pytest.fixture
def looks():
    return importlib.import_module("edit_looks")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "quality_edit.json"


def begin(looks, path, **changed):
    values = {"concepts": {"object": {"bus": "frog"}}, "list_digest": "list", "weights": "weights",
              "settings": "settings", "commit": "abc", "again": False}  # fmt: skip
    return looks.begin(path, **(values | changed))


def stored(path):
    return files.from_json(path.read_bytes())


def end(looks, path, found, **result):
    looks.finish(path, found, {"result": result, "tables": {"methods": []}, "test": {"concepts": {}}})  # fmt: skip


def test_a_look_is_in_the_file_before_the_run_and_the_file_is_plainly_unfinished(looks, path):
    path.write_text('{"result": {"target_after": 0.1}, "tables": {"overall": []}}')  # of before
    assert looks.read_looks(path) == []
    (look,) = begin(looks, path)
    content = stored(path)
    assert content["test"]["looks"] == [look]
    assert {k: look[k] for k in ("list", "weights", "settings", "commit", "again")} == {
        "list": "list", "weights": "weights", "settings": "settings", "commit": "abc", "again": False
    }  # fmt: skip
    assert look["unfinished"] and look["date"]
    assert "has not ended, so there are no figures" in content["unfinished"]
    assert content["result"] == {} and content["tables"] == {}


def test_a_continued_run_is_no_second_look(looks, path):
    first = begin(looks, path)
    assert begin(looks, path) == first and len(stored(path)["test"]["looks"]) == 1
    assert begin(looks, path, commit="later", again=True) == first
    end(looks, path, first, beats_all=1.0)
    content = stored(path)
    (look,) = content["test"]["looks"]
    assert "unfinished" not in content and "unfinished" not in look
    assert look["result"] == {"beats_all": 1.0} and look["ended"]
    assert content["test"]["list"] == "list"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"settings": "other"}, "an unfinished run with other settings or other code"),
        ({"weights": "other"}, "on other weights"),
    ],
)
def test_other_settings_or_weights_are_a_second_look_even_if_the_first_is_unfinished(
    looks, path, changed, words
):
    (first,) = begin(looks, path)
    with pytest.raises(looks.AlreadyRun, match=words):
        begin(looks, path, **changed)
    assert stored(path)["test"]["looks"] == [first]
    again = begin(looks, path, again=True, **changed)
    assert len(again) == 2 and again[0] == first and again[1]["again"]
    assert begin(looks, path, **changed) == again  # continued


def test_a_finished_run_is_refused_and_recorded_if_forced(looks, path):
    end(looks, path, begin(looks, path), x=1)
    date = stored(path)["test"]["looks"][0]["date"]
    with pytest.raises(looks.AlreadyRun, match=f"{date}: a test is run once.*pass --again"):
        begin(looks, path)
    second = begin(looks, path, again=True)
    assert [look.get("result") for look in second] == [{"x": 1}, None]
    assert [look["again"] for look in stored(path)["test"]["looks"]] == [False, True]


def test_looks_of_other_lists_stay_for_ever(looks, path):
    end(looks, path, begin(looks, path, list_digest="older"), x=1)
    begin(looks, path)  # another list is no second look, and it is not finished
    end(looks, path, begin(looks, path, list_digest="newest"), x=3)
    kept = stored(path)["test"]["looks"]
    assert [look["list"] for look in kept] == ["older", "list", "newest"]
    assert kept[1]["unfinished"]
    going_on = begin(looks, path)  # the unfinished one goes on, behind the others
    assert [look["list"] for look in going_on] == ["older", "newest", "list"]


def test_a_damaged_result_file_is_not_taken_for_one_without_looks(looks, path):
    path.write_text('{"test": {"looks": [')
    with pytest.raises(ValueError):
        begin(looks, path)
    assert path.read_text() == '{"test": {"looks": ['


def test_the_settings_of_a_look_cover_the_choices_and_the_attack(looks, tiny_sd1, tmp_path):
    from dataclasses import replace

    main = importlib.import_module("quality_edit")
    run = contest.make_run(tiny_sd1, tmp_path / "runs", attack=("bus",))
    chosen = {"quickfix": {"ridge": 0.1}}
    digests = {
        main.settings_digest(run, chosen, {"bus": "frog"}),
        main.settings_digest(run, {"quickfix": {"ridge": 1.0}}, {"bus": "frog"}),
        main.settings_digest(run, chosen, {"bus": "dog"}),
        main.settings_digest(replace(run, attack=()), chosen, {"bus": "frog"}),
        main.settings_digest(replace(run, scorer="other"), chosen, {"bus": "frog"}),
        main.settings_digest(replace(run, layers={"object": [1]}), chosen, {"bus": "frog"}),
        main.settings_digest(replace(run, bench=replace(run.bench, steps=2)), chosen, {"bus": "frog"}),
    }  # fmt: skip
    assert len(digests) == 7
    assert main.settings_digest(run, chosen, {"bus": "frog"}) in digests
    assert json.loads(json.dumps(list(digests)))
