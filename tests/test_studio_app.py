"""The tasks behind the buttons of the studio, without its page."""

import threading
from contextlib import ExitStack

import pytest
import torch

import overpaint as op
from overpaint.edit import Change
from overpaint.studio import html
from overpaint.studio.scheduler import PartialResult, Stopped
from overpaint.studio.session import ORIGINAL
from overpaint.studio.tasks import PromptSettings

SETTINGS = PromptSettings("a cat in blob style", "blob style", (3,), 1)


def test_a_closed_session_is_refused(studio):
    key = studio.open_session()
    studio.close_session(key)
    studio.close_session(key)
    with pytest.raises(ValueError, match="this session has ended: load the page again"):
        studio.session(key)
    assert len(studio) == 0


def test_of_too_many_sessions_the_least_recently_used_idle_one_is_closed(studio, monkeypatch):
    monkeypatch.setattr("overpaint.studio.app.MAX_SESSIONS", 3)
    first, second, third = (studio.open_session() for _ in range(3))
    studio.session(first)
    with studio.session(second).reserved():
        studio.session(first)
        assert studio.session(second).busy
        studio.open_session()
        assert [studio.has_session(key) for key in (first, second, third)] == [True, True, False]
        studio.open_session()
        assert [studio.has_session(key) for key in (first, second)] == [False, True]
    keys = list(studio._sessions)
    with ExitStack() as busy:
        for key in keys:
            busy.enter_context(studio.session(key).reserved())
        with pytest.raises(ValueError, match="the studio is full: all of its 3 sessions are busy"):
            studio.open_session()
    assert set(studio._sessions) == set(keys)


def test_no_file_is_written_for_a_closed_session(studio, result_of):
    key = studio.open_session()
    grid = result_of(studio.draw(key, SETTINGS))
    studio.close_session(key)
    with pytest.raises(ValueError, match="this session has ended"):
        studio.save_pictures(key, grid)
    assert not (studio.folder / key).exists()


def test_an_edit_shows_side_effects_before_pictures_and_undo_removes_it(studio, result_of):
    key = studio.open_session()
    events = list(studio.edit(key, SETTINGS, "noto style", method="quickfix"))
    parts = [event.value for event in events if isinstance(event, PartialResult)]
    assert type(parts[0]).__name__ == "SideEffects"
    assert [type(p).__name__ for p in parts[1:]] == ["PictureGrid", "PictureGrid"]
    assert parts[1].rows[1] == (None,)
    before, after = (row[0].tobytes() for row in events[-1].value.rows)
    assert before != after
    studio.session(key).undo()
    grid = result_of(studio.draw(key, SETTINGS))
    assert [row[0].tobytes() for row in grid.rows] == [before]


def test_edits_are_stacked_into_one_joint_change(studio, tiny_folder, result_of):
    key, model = studio.open_session(), op.load(tiny_folder)
    result_of(studio.edit(key, SETTINGS, "noto style", method="quickfix"))
    settings = PromptSettings("a dog", "dog", (0,), 1)
    result_of(studio.edit(key, settings, "cat", method="quickfix"))
    pairs = ({"blob style": "noto style"}, {"dog": "cat"})
    joint = op.edit.stack(model, [op.edit.quickfix(model, p) for p in pairs])
    change = op.Change.load(studio.save_change(key))
    assert change.digest == joint.digest
    assert change.pairs == joint.pairs


def test_edits_that_contradict_are_refused_and_nothing_changes(studio, result_of):
    key = studio.open_session()
    result_of(studio.edit(key, SETTINGS, "noto style", method="quickfix"))
    state = studio.session(key).state
    options = dict(method="quickfix", preserve=["a dog"])
    with pytest.raises(
        ValueError, match="cannot be solved jointly with the earlier ones: contradic"
    ):
        result_of(studio.edit(key, SETTINGS, "other style", **options))
    assert studio.session(key).state is state


def test_a_change_file_is_applied_and_can_be_compared(studio, tmp_path, quickfix_change, result_of):
    path = tmp_path / "mine.safetensors"
    quickfix_change.save(path)
    key = studio.open_session()
    assert type(result_of(studio.open_file(key, path))).__name__ == "SideEffects"
    assert studio.session(key).state.change.digest == quickfix_change.digest
    first, second = ORIGINAL, "file mine.safetensors"
    grid = result_of(studio.compare(key, SETTINGS, first, second))
    assert grid.names == (first, second)
    assert grid.rows[0][0].tobytes() != grid.rows[1][0].tobytes()
    with pytest.raises(ValueError, match="the version 'gone' no longer exists"):
        studio.compare(key, SETTINGS, "gone", second)


def test_a_change_file_that_does_not_stack_can_only_be_compared(
    studio, tiny_sd1, tmp_path, result_of
):
    key = studio.open_session()
    result_of(studio.edit(key, SETTINGS, "noto style", method="quickfix"))
    path = tmp_path / "uce.safetensors"
    op.edit.uce(tiny_sd1, {"blob style": "noto style"}).save(path)
    message = result_of(studio.open_file(key, path))
    assert message.startswith(
        "uce.safetensors can be compared, but not applied with the other edits: "
    )
    assert "file uce.safetensors" in studio.session(key).versions()
    assert len(studio.session(key).state.changes) == 1


def test_a_file_whose_opening_was_stopped_is_not_kept(
    studio, tmp_path, monkeypatch, quickfix_change, result_of
):
    path = tmp_path / "mine.safetensors"
    quickfix_change.save(path)
    key = studio.open_session()

    def stopped(*_, on_progress):
        studio.session(key).stop()
        on_progress(0, 1, "predicting")

    monkeypatch.setattr("overpaint.studio.side_effects.predict", stopped)
    with pytest.raises(Stopped):
        result_of(studio.open_file(key, path))
    assert studio.session(key).files == {}


def test_a_stopped_edit_leaves_the_state_as_it_was(studio, result_of):
    key = studio.open_session()
    events = studio.edit(
        key, PromptSettings("a cat in blob style", "blob style", (0, 1), 50), "noto style"
    )
    next(events)
    studio.session(key).stop()
    with pytest.raises(Stopped):
        result_of(events)
    assert studio.session(key).state.changes == ()
    assert not studio.scheduler.busy
    result_of(studio.draw(key, SETTINGS))


def test_six_sessions_at_once_draw_what_each_draws_alone(studio, tiny_folder, result_of):
    """The expected pictures come from a second model, whose weights are edited in place."""
    model = op.load(tiny_folder)
    words = ("cat", "dog", "fox", "bear", "fish", "bird")
    settings = [PromptSettings(f"a {w} in blob style", w, (i,), 2) for i, w in enumerate(words)]
    alone = []
    for one in settings:
        with op.edit.quickfix(model, {one.concept: "apple"}).applied(model):
            picture = model.generate(one.prompt, seed=one.seeds[0], steps=2)
            alone.append(picture.pil()[0].tobytes())
    keys = [studio.open_session() for _ in settings]
    results = {}

    def visit(key, one):
        results[key] = result_of(studio.edit(key, one, "apple", method="quickfix"))

    threads = [
        threading.Thread(target=visit, args=pair, daemon=True)
        for pair in zip(keys, settings, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)  # bounds a hang only
    together = [results[key].rows[1][0].tobytes() for key in keys]
    assert together == alone
    assert len(set(alone)) == 6
    shared = studio._loaded[str(tiny_folder)]
    encoders = (shared.text_encoder, model.text_encoder)
    for parameter, other in zip(*(e.parameters() for e in encoders), strict=True):
        assert parameter.equal(other)


def test_a_new_edit_keeps_the_strength(studio, result_of):
    key = studio.open_session()
    result_of(studio.edit(key, SETTINGS, "noto style", method="quickfix"))
    session = studio.session(key)
    session.set_strength(0.5)
    result_of(studio.edit(key, PromptSettings("a dog", "dog", (0,), 1), "cat", method="quickfix"))
    assert session.state.strength == 0.5
    assert session.state.change.digest == (0.5 * session.state.joint).digest


def test_a_file_saved_at_half_strength_is_shown_and_applied_at_half_strength(
    studio, tmp_path, result_of, quickfix_change
):
    half = 0.35 * quickfix_change
    half.save(tmp_path / "half.safetensors")
    key = studio.open_session()
    result_of(studio.open_file(key, tmp_path / "half.safetensors"))
    session = studio.session(key)
    assert session.state.strength == 0.35
    assert session.state.change.digest == half.digest
    session.set_strength(1.0)
    full = session.state.change
    assert "strength" not in full.protocol
    torch.testing.assert_close(full.delta, quickfix_change.delta, rtol=1e-5, atol=1e-7)
    session.set_strength(0.35)
    assert session.state.change.digest == half.digest
    assert Change.load(studio.save_change(key)).protocol["strength"] == {"blob style": 0.35}


def test_a_new_edit_on_top_of_a_file_counts_the_file_at_full_strength(
    studio, tmp_path, result_of, quickfix_change
):
    (0.5 * quickfix_change).save(tmp_path / "half.safetensors")
    key = studio.open_session()
    result_of(studio.open_file(key, tmp_path / "half.safetensors"))
    result_of(
        studio.edit(key, PromptSettings("a cat", "a cat", (0,), 1), "a dog", method="quickfix")
    )
    state = studio.session(key).state
    assert (state.strength, state.joint_strength) == (0.5, 1.0)
    assert state.joint.protocol.get("strength", {}) == {}
    assert set(state.change.protocol["strength"].values()) == {0.5}


@pytest.mark.parametrize("strength, shown", [(3.0, 1.0), (-0.5, -0.5)])
def test_strengths_that_the_slider_cannot_show_are_listed(
    studio, tmp_path, result_of, quickfix_change, strength, shown
):
    (strength * quickfix_change).save(tmp_path / "a.safetensors")
    key = studio.open_session()
    result_of(studio.open_file(key, tmp_path / "a.safetensors"))
    assert studio.session(key).state.strength == shown
    assert (f"strength {strength:g}" in html.changes(studio.session(key).state)) == (shown == 1.0)


def test_a_file_saved_at_strength_zero_can_only_be_compared(
    studio, tmp_path, result_of, quickfix_change
):
    (0.0 * quickfix_change).save(tmp_path / "none.safetensors")
    key = studio.open_session()
    text = result_of(studio.open_file(key, tmp_path / "none.safetensors"))
    assert "it was saved at strength 0, so it moves nothing" in text
    assert studio.session(key).changes == () and list(studio.session(key).files)
