"""The state of one user: applied changes, undo, strength, files."""

import threading
import time

import pytest

from overpaint.studio.session import AppliedChange, EditState, Session


def test_undo_restores_the_last_state_and_several_strengths_are_one_step(quickfix_change):
    change, session = quickfix_change, Session("icons")
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    with pytest.raises(ValueError, match="no change is applied yet, so no strength can be set"):
        session.set_strength(0.5)
    session.set_state(EditState((AppliedChange("blob → noto", change),), change))
    for strength in (0.2, 0.4, 0.5):
        session.set_strength(strength)
    assert session.state.change is not None
    assert session.state.change.digest == (0.5 * change).digest
    with pytest.raises(ValueError, match="must be -1 to 2, got 3"):
        session.set_strength(3)
    assert list(session.versions()) == [
        "original model", "edit 1: blob → noto", "all edits",
    ]  # fmt: skip
    session.undo()
    assert session.state.change is change
    session.undo()
    assert session.state.change is None and not session.can_undo


def test_a_session_runs_one_task_at_a_time():
    session = Session("icons")
    with session.reserved() as stop:
        with pytest.raises(ValueError, match="is still running: wait until it ends, or press"):
            session.reserved().__enter__()
        assert session.stop() and stop.is_set()
    assert not session.stop()


def test_a_task_waits_for_a_brief_one():
    session, order, started = Session("icons"), [], threading.Event()

    def save() -> None:
        with session.reserved(brief=True):
            started.set()
            time.sleep(0.2)
            order.append("brief")

    thread = threading.Thread(target=save)
    thread.start()
    started.wait()
    with session.reserved():
        order.append("next")
    thread.join()
    assert order == ["brief", "next"] and not session.stop()


def test_a_session_keeps_the_eight_files_opened_last(quickfix_change):
    session = Session("icons")
    for i in (0, 1, 2, 3, 4, 5, 6, 7, 0, 8):
        session.add_file(str(i), quickfix_change)
    assert list(session.files) == ["2", "3", "4", "5", "6", "7", "0", "8"]
