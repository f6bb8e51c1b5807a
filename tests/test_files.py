"""Atomic writes: the old file or the new one, and no drafts that stay."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from overpaint import files


def test_a_finished_block_replaces_the_file(tmp_path):
    place = tmp_path / "a.txt"
    place.write_text("old")
    with files.atomic(place) as draft:
        draft.write_text("new")
        assert place.read_text() == "old"
    assert place.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_draft(tmp_path, error):
    place = tmp_path / "a.txt"
    place.write_text("old")
    with pytest.raises(error), files.atomic(place) as draft:
        draft.write_text("half")
        raise error
    assert place.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_written_as_a_whole(tmp_path):
    with files.atomic(tmp_path / "model") as draft:
        draft.mkdir()
        (draft / "config.json").write_text("{}")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    with pytest.raises(RuntimeError), files.atomic(tmp_path / "other") as draft:
        draft.mkdir()
        (draft / "config.json").write_text("{}")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_drafts_of_killed_processes_are_removed_and_those_of_running_ones_stay(tmp_path):
    code = (
        "import os, signal, sys; from overpaint.files import atomic\n"
        "with atomic(sys.argv[1]) as draft:\n"
        "    draft.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    place = tmp_path / "a.txt"
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    running = tmp_path / f".a.txt.{os.getppid()}.part"
    running.write_text("at work")
    files.write_text(place, "done")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([running.name, "a.txt"])


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = files.write_text(tmp_path / "a.txt", "text")
        with files.atomic(tmp_path / "folder") as draft:
            draft.mkdir()
            (draft / "private").touch(0o600)
    finally:
        os.umask(before)
    for file in (path, tmp_path / "folder" / "private"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_json_has_null_for_numbers_that_it_cannot_hold(tmp_path):
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": ("x", None)}
    path = files.write_json(tmp_path / "a.json", value)
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": ["x", None]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.to_json({"a": object()})


def test_a_folder_replaces_another_only_when_the_block_ends(tmp_path):
    place = tmp_path / "model"
    for text in ("1", "2"):
        with files.atomic_folder(place) as draft:
            (draft / "card.json").write_text(text)
        assert (place / "card.json").read_text() == text
        with pytest.raises(KeyboardInterrupt), files.atomic_folder(place) as draft:
            (draft / "card.json").write_text("half")
            raise KeyboardInterrupt
        assert (place / "card.json").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_is_as_before_when_a_rename_fails(tmp_path, monkeypatch, failing):
    place = tmp_path / "model"
    place.mkdir()
    (place / "card.json").write_text("old")
    rename, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"), files.atomic_folder(place) as draft:
        (draft / "card.json").write_text("new")
    assert (place / "card.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_a_killed_replacement_moved_aside_is_restored(tmp_path):
    code = (
        "import os, signal, sys; from overpaint import files\n"
        "rename = os.replace\n"
        "def kill(source, target):\n"
        "    if str(source).endswith('.part'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(source, target)\n"
        "os.replace = kill\n"
        "with files.atomic_folder(sys.argv[1]) as draft: (draft / 'card.json').write_text('new')"
    )
    place = tmp_path / "model"
    place.mkdir()
    (place / "card.json").write_text("old")
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert not place.exists()
    files.restore_folder(place)
    assert (place / "card.json").read_text() == "old"
    (tmp_path / f".model.{os.getpid()}.part").mkdir()  # of a killed process with this number
    with files.atomic_folder(place) as draft:
        (draft / "card.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_json_nested_deeper_than_64_is_refused():
    assert files.from_json("[" * 64 + "]" * 64)[0] is not None
    assert files.from_json(b'{"a": [1, NaN]}')["a"][0] == 1
    for deep in (65, 5_000, 500_000):
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            files.from_json("[" * deep + "]" * deep)
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            files.from_json('{"a":' * deep + "1" + "}" * deep)
    with pytest.raises(ValueError, match="Expecting"):
        files.from_json("{")


def test_threads_may_write_one_file_at_the_same_time(tmp_path):
    place, texts = tmp_path / "a.txt", [f"{i}" * 10_000 for i in range(8)]

    def write(text):
        for _ in range(25):
            files.write_text(place, text)
            assert place.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert list(tmp_path.iterdir()) == [place]


def test_threads_may_replace_one_folder_at_the_same_time(tmp_path):
    def write(number):
        for _ in range(25):
            with files.atomic_folder(tmp_path / "a") as draft:
                (draft / "number").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (tmp_path / "a" / "number").read_text() in "0123"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_json_with_whole_numbers_that_are_no_float_is_refused():
    assert float(files.from_json("-" + "9" * 299)) == -1e299
    for text in ("1" * 301, '{"a": [1, -' + "2" * 400 + "]}", "1" * 5_000):
        with pytest.raises(ValueError, match="a whole number in it has more than 300 digits"):
            files.from_json(text)


def test_drafts_of_every_name_in_a_folder_are_removed(tmp_path):
    dead = 2**22 + 1  # a number that no process has
    names = (f".a.txt.{dead}.part", f".b.{dead}.part.mode", f".c.{10**30}.part", f".d.{dead}.part")
    for name in names[:3]:
        (tmp_path / name).write_text("half")
    (tmp_path / names[3]).mkdir()
    (tmp_path / names[3] / "config.json").write_text("half")
    others = {".hidden", "c.part", f".e.{os.getpid()}.part", f".f.{os.getppid()}.part"}
    for name in others:
        (tmp_path / name).write_text("not of a killed process")
    files.remove_drafts_in(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others


def test_a_draft_of_a_killed_process_with_the_number_of_this_one_is_replaced(tmp_path):
    draft = tmp_path / f".model.{os.getpid()}.part"
    draft.mkdir()
    (draft / "old.bin").write_text("half")
    with files.atomic(tmp_path / "model") as place:
        place.mkdir()
        (place / "new.bin").write_text("whole")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new.bin"]


def test_a_temporary_folder_is_removed_also_by_the_next_process(tmp_path):
    code = (
        "import os, signal, sys; from overpaint import files\n"
        "with files.temporary_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    place = tmp_path / "fetch"
    subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with files.temporary_folder(place) as folder:
        assert list(folder.iterdir()) == [] and list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []
