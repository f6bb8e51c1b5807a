"""Write files so that a reader sees the old file or the new one, never half of one.

A file or folder is written as a draft beside its place and renamed when it is complete. A draft is named
`.<name>.<process id>.part`. It is removed when writing fails, and the next write to the same place removes the drafts
of processes that were killed. Threads write to one place one after another. JSON that others may have changed is read
with bounds on its nesting and its numbers.
"""

import json
import math
import os
import re
import shutil
import stat
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

__all__ = [
    "atomic",
    "atomic_folder",
    "from_json",
    "public_name",
    "remove_drafts",
    "remove_drafts_in",
    "restore_folder",
    "temporary_folder",
    "to_json",
    "user_path",
    "write_json",
    "write_text",
]

_NESTING = 64  # of lists and objects in JSON
_DIGITS = 300  # of a whole number in JSON; one with 310 is no float
_locks: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
_locks_lock = threading.Lock()
_DRAFT = re.compile(r"\.(.+)\.(\d+)\.part(\.mode)?")


@contextmanager
def atomic(path: str | Path) -> Generator[Path, None, None]:
    """Yield the path of a draft that becomes `path` when the block ends without an exception.

    The block writes the draft as a file, or makes it a folder. A file replaces an existing file; a folder replaces
    nothing, so the caller removes an existing folder first. The result has the permissions that the umask gives.

    Args:
        path: Where the file or folder is to be. Its parent must exist.

    Raises:
        OSError: The draft cannot be written or renamed. `path` is then as before, and no draft is left.
    """
    place = user_path(path, "path")
    draft = place.with_name(f".{place.name}.{os.getpid()}.part")
    with _lock(place):  # the draft has one name for all threads
        remove_drafts(place)
        _remove(draft)  # left by a killed process of the same number, as in a restarted container
        try:
            yield draft
            _apply_umask(draft)
            os.replace(draft, place)
        finally:
            _remove(draft)


@contextmanager
def atomic_folder(path: str | Path) -> Generator[Path, None, None]:
    """Yield an empty folder that replaces the folder `path` when the block ends without an exception.

    The old folder is renamed to `.<name>.old` before the new one takes its place, and then removed. If the process is
    killed between the two renames, `restore_folder` brings the old folder back.

    Args:
        path: Where the folder is to be. Its parent must exist.

    Raises:
        OSError: The folder cannot be written or renamed. `path` is then as before, and no draft is left.
    """
    place = user_path(path, "path")
    with _lock(place):
        restore_folder(place)
        try:
            with atomic(place) as draft:
                draft.mkdir()
                yield draft
                if place.exists():
                    os.replace(place, _aside(place))
        finally:
            restore_folder(place)


def restore_folder(path: str | Path) -> None:
    """Rename `.<name>.old`, which a killed `atomic_folder` left, to `path`; remove it if `path` exists."""
    place = Path(path)
    if place.exists():
        _remove(_aside(place))
    elif _aside(place).exists():
        os.replace(_aside(place), place)


@contextmanager
def temporary_folder(path: str | Path) -> Generator[Path, None, None]:
    """Yield an empty folder beside `path`, which must not exist, and remove the folder when the block ends.

    If the process is killed, the next block for the same `path` removes what was left.

    Raises:
        OSError: The folder cannot be made.
    """
    place = Path(path)
    folder = place.with_name(f".{place.name}.{os.getpid()}.part")
    with _lock(place):
        remove_drafts(place)
        _remove(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            _remove(folder)


def remove_drafts(path: str | Path) -> None:
    """Remove the drafts of `path` that processes which no longer run left behind."""
    place = Path(path)
    _remove_drafts(place.parent, place.name)


def remove_drafts_in(folder: str | Path) -> None:
    """Remove the drafts of all files and folders in `folder` that processes which no longer run left behind."""
    _remove_drafts(Path(folder), None)


def public_name(source: str | Path) -> str:
    """Return a zoo name or hub id as it is, and the last part of the path of a folder or file.

    Results may be published, so their protocols hold no paths of the machine that made them.
    """
    name, path = str(source), Path(source)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not path.exists():
        return name
    return path.name or path.resolve().name or name


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Return `path` as a `Path`.

    Args:
        path: What a caller gave as a file or folder.
        name: Name of the argument, for the message.

    Raises:
        ValueError: The text is empty or blank, which `Path` would read as the current folder.
    """
    if isinstance(path, str) and not path.strip():
        raise ValueError(f"`{name}` is empty: name a file or folder; '.' is the current folder.")
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, atomically, and return the path.

    Raises:
        OSError: The file cannot be written; an existing file is then as before.
    """
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> Path:
    """Write `value` as JSON to `path`, atomically, and return the path. NaN and infinities become null.

    Raises:
        OSError: The file cannot be written; an existing file is then as before.
        TypeError: JSON cannot hold the value.
    """
    return write_text(path, to_json(value, indent=indent) + "\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON in which NaN and infinities are null.

    Raises:
        TypeError: JSON cannot hold the value.
    """
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: The text is not JSON, is nested more than 64 deep, or holds a whole number of more than 300 digits.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    level: list[Any] = [value]
    for _ in range(_NESTING):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(_too_deep())


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number in it has more than {_DIGITS} digits")
    return int(text)


def _children(value: Any) -> list[Any]:
    """Return the lists and objects that a value of JSON holds."""
    if isinstance(value, dict):
        value = list(cast(dict[str, Any], value).values())
    if not isinstance(value, list):
        return []
    return [child for child in cast(list[Any], value) if isinstance(child, dict | list)]


def _too_deep() -> str:
    return f"its lists and objects are nested more than {_NESTING} deep"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {key: _without_nan(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in cast(list[Any] | tuple[Any, ...], value)]
    return value


def _lock(place: Path) -> Any:
    """Return the lock of this process for writing to a place."""
    with _locks_lock:
        return _locks.setdefault(place.absolute(), threading.RLock())


def _remove_drafts(folder: Path, name: str | None) -> None:
    """Remove drafts of processes that no longer run, of the file `name` or, for `None`, of every file."""
    with suppress(OSError):
        for entry in folder.iterdir():
            match = _DRAFT.fullmatch(entry.name)
            if match is None or name not in (None, match[1]):
                continue
            if int(match[2]) != os.getpid() and not _is_running(int(match[2])):
                _remove(entry)


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there `os.kill` with signal 0 would interrupt the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number so large
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


def _apply_umask(draft: Path) -> None:
    """Give the files of a draft the permissions of a new file: those of safetensors can be read by the owner only."""
    probe = draft.with_name(f"{draft.name}.mode")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        for path in (draft, *draft.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
    finally:
        _remove(probe)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
