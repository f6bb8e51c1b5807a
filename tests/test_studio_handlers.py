"""The handlers of the page's controls: updates and error messages."""

import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from overpaint.edit import Change
from overpaint.studio import handlers, uploads
from overpaint.studio.handlers import Controls
from overpaint.studio.tasks import PromptSettings

CONTROLS = Controls("a cat in blob style", "blob style", 0, 1, 1)


def test_handlers_show_errors_in_the_page(studio):
    key = studio.open_session()
    empty, no_seed = Controls("a cat", "", 0, 1, 1), Controls("a", "a", None, 1, 1)
    faults = {
        "This is not a cell of the map": handlers.restore(studio, key, "../1"),
        "There is no map yet: press Trace first": handlers.restore(studio, key, "0,0"),
        "Seed, pictures and steps must be whole numbers": handlers.trace(studio, key, no_seed, False),
        "The concept is empty": handlers.trace(studio, key, empty, False),
        "Nothing to undo": handlers.undo(studio, key, CONTROLS),
        "No change is applied yet": handlers.set_strength(studio, key, 1),
        "The strength must be a number, got &#x27;x&#x27;": handlers.set_strength(studio, key, "x"),
        "The strength must be a number, got 1000": handlers.set_strength(studio, key, 10**400),
        "Seed, pictures and steps must be whole numbers: fill": handlers.draw(
            studio, key, Controls("a cat", "cat", 10**400, 1, 1)
        ),
        "The prompt must be a text, got 3": handlers.draw(studio, key, Controls(3, "", 0, 1, 1)),
        "There is no version &#x27;x&#x27;": handlers.compare(studio, key, CONTROLS, "x", "y"),
        "This file is no longer stored": handlers.open_upload(studio, key, CONTROLS, "x"),
        "Unknown model &#x27;/etc&#x27;": handlers.choose_model(studio, key, "/etc"),
    }  # fmt: skip
    for message, updates in faults.items():
        *_, final = updates
        assert f'<p class="op-alert" role="alert">{message}' in final["status"]
    assert studio.session(key).changes == ()


@pytest.mark.parametrize("method", ["auto", "quickfix"])
def test_special_tokens_are_refused_as_concepts(studio, method):
    key = studio.open_session()
    token = "<|endoftext|>"
    controls = Controls(f"a {token}", token, 0, 1, 1)
    for updates in (
        handlers.edit(studio, key, controls, "noto style", method, ""),
        handlers.edit(studio, key, CONTROLS, token, method, ""),
        handlers.trace(studio, key, controls, False),
    ):
        *_, final = updates
        assert "holds the special token &#x27;&lt;|endoftext|&gt;&#x27;" in final["status"]
    assert studio.session(key).changes == ()


def test_every_control_reports_a_closed_session(studio):
    some = Controls("a cat", "cat", 0, 1, 1)
    updates = [
        *handlers.trace(studio, "", some, False), *handlers.restore(studio, "", "0,0"), handlers.stop(studio, ""),
        *handlers.edit(studio, "", some, "dog", "auto", ""), *handlers.draw(studio, "", some),
        *handlers.set_strength(studio, "", 1), *handlers.undo(studio, "", some),
        *handlers.open_upload(studio, "", some, "x"), *handlers.compare(studio, "", some, "a", "b"),
        *handlers.choose_model(studio, "", studio.models[0]),
    ]  # fmt: skip
    assert len(updates) == 10
    assert all("This session has ended: load the page again" in u["status"] for u in updates)


def test_only_loading_a_page_opens_a_session(studio):
    layout = pytest.importorskip("overpaint.studio.layout", exc_type=ModuleNotFoundError)
    closed = []
    sessions = layout._PageSessions(studio, "overpaint-1", closed.append)
    cookie = {"cookie": f"overpaint-1={'v' * 22}"}
    first, second = (SimpleNamespace(session_hash=name, headers=cookie) for name in "ab")
    assert (sessions.key(first), len(studio)) == ("", 0)
    key = sessions.open(first)
    assert sessions.key(first) == sessions.open(first) == key
    assert studio.has_visitor("v" * 22) and not studio.has_visitor("")
    studio.close_session(key)
    assert not studio.has_session(sessions.key(first))
    sessions.open(second)
    assert list(sessions._keys) == ["b"]
    sessions.close(second)
    assert (sessions.key(second), len(studio), closed) == ("", 0, ["b"])


def test_texts_above_the_limits_of_the_page_are_refused(studio):
    key = studio.open_session()
    for lengths in ((2001, 0, 0, 0), (0, 401, 0, 0), (0, 0, 401, 0), (0, 0, 0, 8001)):
        prompt, concept, new, preserve = ("a" * length or "a" for length in lengths)
        controls = Controls(prompt, concept, 0, 1, 1)
        (final,) = handlers.edit(studio, key, controls, new, "quickfix", preserve)
        limit = max(lengths) - 1
        assert f"must be at most {limit} characters, got {limit + 1}: shorten" in final["status"]


def test_a_bug_is_reported_and_the_studio_continues(studio, monkeypatch):
    key = studio.open_session()

    def fail(*_, **__):
        raise RuntimeError("<script>alert(1)</script>")

    monkeypatch.setattr("overpaint.studio.tasks.solve_edit", fail)
    *_, final = handlers.edit(studio, key, CONTROLS, "noto style", "quickfix", "")
    assert "A bug in overpaint: RuntimeError: &lt;script&gt;" in final["status"]
    monkeypatch.undo()
    *_, final = handlers.edit(studio, key, CONTROLS, "noto style", "quickfix", "a dog\n\n")
    assert final["status"] == "" and "<img" in final["drawn"]
    (applied,) = studio.session(key).changes
    assert applied.change.protocol["preserve"] == ["a dog"]


def test_stop_while_drawing_keeps_the_finished_edit(studio):
    key = studio.open_session()
    controls = Controls("a cat", "cat", 0, 4, 30)
    for update in handlers.edit(studio, key, controls, "dog", "quickfix", ""):
        if "side_effects" in update:
            assert "Stopping after this step" in handlers.stop(studio, key)["status"]
    assert "Stopped. Results that were finished before are kept." in update["status"]
    assert len(studio.session(key).changes) == 1
    assert "No task is running" in handlers.stop(studio, key)["status"]


def set_strength_and_redraw(studio, key, controls):
    yield from handlers.set_strength(studio, key, 0.5)
    yield from handlers.redraw(studio, key, controls)


@pytest.mark.parametrize("action", [handlers.undo, set_strength_and_redraw])
def test_stop_while_predicting_draws_nothing(studio, monkeypatch, action):
    key = studio.open_session()
    for concept in ("blob style", "a cat"):
        controls = Controls("a cat in blob style", concept, 0, 1, 1)
        *_, final = handlers.edit(studio, key, controls, "noto style", "quickfix", "")
        assert "<img" in final["drawn"]

    def stop_and_report(*_, on_progress):
        handlers.stop(studio, key)
        on_progress(0, 1, "predicting")

    monkeypatch.setattr("overpaint.studio.side_effects.predict", stop_and_report)
    updates = list(action(studio, key, CONTROLS))
    assert "Stopped. Results that were finished before are kept." in updates[-1]["status"]
    assert not any("drawn" in update for update in updates)


def test_a_new_strength_replaces_the_drawing_of_the_last_one(studio):
    key = studio.open_session()
    controls = Controls("a cat in blob style", "blob style", 0, 4, 30)
    one = Controls("a cat in blob style", "blob style", 0, 1, 1)
    list(handlers.edit(studio, key, one, "noto style", "quickfix", ""))
    list(handlers.set_strength(studio, key, 0.5))
    updates = []
    drawing = threading.Thread(
        target=lambda: updates.extend(handlers.redraw(studio, key, controls))
    )
    drawing.start()
    while not updates:
        time.sleep(0.01)
    (update,) = handlers.set_strength(studio, key, 0.75)
    drawing.join()
    assert "strength" not in update and update["saved_strength"] == 0.75
    assert Change.load(update["download"].value).protocol["strength"] == {"blob style": 0.75}
    assert not any(
        "op-alert" in u.get("status", "") or "Stopped" in u.get("status", "") for u in updates
    )
    *_, final = handlers.redraw(studio, key, one)
    assert final["drawn"].count("<img") == 2
    assert list(handlers.redraw(studio, key, one)) == []


def test_a_strength_that_cannot_be_set_is_replaced_in_the_page(studio):
    key = studio.open_session()
    list(handlers.edit(studio, key, CONTROLS, "noto style", "quickfix", ""))
    assert list(handlers.set_strength(studio, key, None)) == []
    (left,) = handlers.leave_strength(studio, key, None)
    with studio.session(key).reserved():
        busy, _ = *handlers.set_strength(studio, key, 0.5), None
    (wrong,) = handlers.set_strength(studio, key, 7)
    assert [u["strength"].value for u in (left, busy, wrong)] == [1.0, 1.0, 1.0]
    assert "still running" in busy["status"] and "must be -1 to 2, got 7" in wrong["status"]


def test_an_uploaded_picture_fills_the_controls(studio, tmp_path):
    settings = PromptSettings("a dog", "dog", (7, 8), 9)
    path = uploads.save_picture(Image.new("RGB", (2, 2)), settings, "icons", tmp_path / "a.png")
    *_, final = handlers.open_file(studio, studio.open_session(), str(path), CONTROLS)
    assert {n: final[n] for n in ("prompt", "concept", "seed", "pictures", "steps")} == {
        "prompt": "a dog", "concept": "dog", "seed": 7, "pictures": 2, "steps": 9,
    }  # fmt: skip


def test_a_picture_of_another_model_names_that_model_and_the_remedy(studio, tiny_folder, tmp_path):
    key, settings = studio.open_session(), PromptSettings("a dog", "dog", (7,), 9)
    studio.models = (*studio.models, "icons")
    current = tiny_folder.name
    for model, message in (
        (str(tiny_folder), ""),
        ("icons", f"but icons drew it and the model is now {current}: choose icons above to draw"),
        ("<b>sd", f"but &lt;b&gt;sd drew it and the model is now {current}: start the studio with &lt;b&gt;sd to"),
    ):  # fmt: skip
        path = uploads.save_picture(Image.new("RGB", (2, 2)), settings, model, tmp_path / "a.png")
        assert str(tmp_path).encode() not in path.read_bytes()
        *_, final = handlers.open_file(studio, key, str(path), CONTROLS)
        assert final["prompt"] == "a dog"
        assert ("op-alert" in final["status"], message in final["status"]) == (bool(message), True)


def test_the_map_gives_the_reason_if_the_judge_cannot_score_the_pictures(studio):
    key = studio.open_session()
    reason = "Text features were measured instead of pictures: the shipped judge reads 64 × 64 pixels, and this model"
    for pictures in (False, True):
        *_, final = handlers.trace(studio, key, CONTROLS, pictures)
        assert (reason in final["map"]) == pictures
        assert "share of the change in text features that this recovers" in final["map"]
    *_, selected = handlers.restore(studio, key, "0,0")
    assert reason in selected["map"]


def test_a_sheet_of_pictures_can_be_saved_and_opened(studio):
    key = studio.open_session()
    controls = Controls("a cat in blob style", "blob style", 5, 2, 1)
    *_, final = handlers.edit(studio, key, controls, "noto style", "quickfix", "")
    path = final["saved"].value
    assert path.name == "a-cat-in-blob-style.png"
    *_, result = studio.draw(key, handlers.prompt_settings(controls))
    images = [image for row in result.value.rows for image in row]
    side = images[0].width
    with Image.open(path) as sheet:
        assert sheet.size == (2 * side + 2, 2 * side + 2)
        corners = [(j * (side + 2), i * (side + 2)) for i in (0, 1) for j in (0, 1)]
        tiles = [sheet.crop((x, y, x + side, y + side)).tobytes() for x, y in corners]
    assert tiles == [image.tobytes() for image in images]
    *_, opened = handlers.open_file(studio, key, str(path), CONTROLS)
    assert (opened["seed"], opened["pictures"]) == (5, 2)


def test_closing_a_session_deletes_its_files(studio):
    key = studio.open_session()
    *_, final = handlers.edit(studio, key, CONTROLS, "noto style", "quickfix", "")
    path = studio.save_change(key)
    assert path.is_file()
    studio.close_session(key)
    assert not path.parent.exists()
