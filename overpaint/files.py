"""Write files so that a reader sees the old file or the new one, never half of one.

A file or folder is written as a draft beside its place and renamed when it is complete. A draft is named
`.<name>.<process id>.part`. It is removed when writing fails, and the next write to the same place removes the drafts
of processes that were killed.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["atomic", "remove_drafts", "to_json", "write_json", "write_text"]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield the path of a draft that becomes `path` when the block ends without an exception.

    The block writes the draft as a file, or makes it a folder. A file replaces an existing file; a folder replaces
    nothing, so the caller removes an existing folder first. The result has the permissions that the umask gives.

    Args:
        path: Where the file or folder is to be. Its parent must exist.

    Raises:
        OSError: The draft cannot be written or renamed. `path` is then as before, and no draft is left.
    """
    place = Path(path)
    remove_drafts(place)
    draft = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, place)
    finally:
        _remove(draft)


def remove_drafts(path: str | Path) -> None:
    """Remove the drafts of `path` that processes which no longer run left behind."""
    place = Path(path)
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(\d+)\.part")
    with suppress(OSError):
        for entry in place.parent.iterdir():
            match = pattern.fullmatch(entry.name)
            if match and int(match[1]) != os.getpid() and not _is_running(int(match[1])):
                _remove(entry)


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


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # there `os.kill` with signal 0 would interrupt the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
