"""Limits of uploads and of opened changes that hold for the whole studio, whoever sends the files."""

import io

import pytest

from overpaint.edit import Change, quickfix
from overpaint.studio import app, upload_store
from overpaint.studio.scheduler import Result
from overpaint.studio.upload_store import StoreFull, UploadStore
from overpaint.studio.uploads import MAX_BYTES, bytes_of


def test_the_bytes_that_wait_are_limited_for_all_browsers_together(tmp_path):
    store = UploadStore(tmp_path / "uploads")
    keys = []
    for browser in range(4):  # each at its own limit
        keys += [store.reserve(f"browser {browser}", MAX_BYTES) for _ in range(2)]
        with pytest.raises(
            StoreFull, match="512 MiB of uploads from this browser are not read yet"
        ):
            store.reserve(f"browser {browser}", MAX_BYTES)
    with pytest.raises(StoreFull, match="2048 MiB of uploads of all visitors are not read yet"):
        store.reserve("a new browser", MAX_BYTES)
    assert store.size <= upload_store.MAX_BYTES_OF_ALL
    store.remove(keys[0])
    store.reserve("a new browser", MAX_BYTES)


def test_the_files_that_wait_are_limited_for_all_browsers_together(tmp_path):
    store = UploadStore(tmp_path / "uploads")
    keys = [store.reserve(f"browser {i}", 1) for i in range(upload_store.MAX_UPLOADS)]
    with pytest.raises(StoreFull, match="1000 uploads of all visitors are not read yet: choose"):
        store.reserve("a new browser", 1)
    store.remove(keys[0])
    store.write(store.reserve("a new browser", 4), "a.png", io.BytesIO(b"abcd"))


@pytest.fixture(scope="module")
def files(tiny_sd1, tmp_path_factory):
    """Files of two changes that can be applied together."""
    folder = tmp_path_factory.mktemp("changes")
    for old in ("cat", "fish"):
        quickfix(tiny_sd1, {old: "dog"}).save(folder / f"{old}.safetensors")
    return folder


def opened(studio, key, path):
    events = studio.open_file(key, path)
    return [event for event in events if isinstance(event, Result)][-1].value


def test_the_changes_in_memory_are_limited_for_all_sessions_together(studio, files, monkeypatch):
    size = bytes_of([Change.load(files / "cat.safetensors")])
    monkeypatch.setattr(app, "MAX_BYTES_OPEN", int(2.5 * size))
    first, second, third = (studio.open_session(f"browser {i}") for i in range(3))
    for key in (first, second):
        assert opened(studio, key, files / "cat.safetensors").drifts
    state = studio.session(third).state
    with pytest.raises(ValueError, match="MiB of changes of all visitors are open: load the page"):
        opened(studio, third, files / "fish.safetensors")
    assert studio.session(third).state is state
    assert studio.session(third).files == {} and studio._opening == []
    studio.close_session(first)
    assert opened(studio, third, files / "fish.safetensors").drifts


def test_steps_that_undo_would_restore_count_and_shared_tensors_count_once(studio, files):
    key = studio.open_session("browser")
    opened(studio, key, files / "cat.safetensors")
    session = studio.session(key)
    once = bytes_of(session.stored_changes())
    session.set_strength(0.5)
    assert bytes_of(session.stored_changes()) == once
    opened(studio, key, files / "fish.safetensors")
    twice = bytes_of(session.stored_changes())
    session.undo()
    assert once < bytes_of(session.stored_changes()) < twice


def test_a_failed_or_stopped_opening_releases_its_memory(studio, files, monkeypatch):
    key = studio.open_session("browser")

    def fail(*_):
        raise RuntimeError("failed")

    monkeypatch.setattr(app, "_predict", fail)
    with pytest.raises(RuntimeError, match="failed"):
        opened(studio, key, files / "cat.safetensors")
    assert studio._opening == [] and studio.session(key).files == {}
