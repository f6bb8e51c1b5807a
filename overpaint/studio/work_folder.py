"""The temporary folder of a running studio, and removal of the folders that killed studios left behind."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["remove_left_overs", "work_folder"]

_PREFIX = "overpaint-studio-"
_LOCK = ".lock"  # locked while the studio runs; the system unlocks it when the process ends, however it ends
_UNLOCKED_AGE = 3600.0  # seconds after which a folder without a lock is removed; a studio that starts has none yet
_LOCKING_TIME = 2.0  # seconds in which a studio that starts locks the file that it made


@contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a new temporary folder and delete it at the end; those of killed studios are deleted before.

    Raises:
        OSError: The folder cannot be made.
    """
    remove_left_overs()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with FileLock(folder / _LOCK, timeout=0, thread_local=False):
            yield folder


def remove_left_overs() -> None:
    """Delete the temporary folders of this user's studios that no longer run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if re.fullmatch(r"[a-z0-9_]{8}", folder.name.removeprefix(_PREFIX)) and _is_left(
                folder
            ):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # deleted meanwhile, or of another user
            continue


def _is_left(folder: Path) -> bool:
    """Return True if a folder is this user's and no process has locked it."""
    facts = folder.lstat()
    if folder.is_symlink() or not folder.is_dir():
        return False
    if hasattr(os, "getuid") and facts.st_uid != os.getuid():
        return False
    if not (folder / _LOCK).exists():
        return time.time() - facts.st_mtime > _UNLOCKED_AGE
    if time.time() - (folder / _LOCK).stat().st_mtime < _LOCKING_TIME:
        return False
    try:
        with FileLock(folder / _LOCK, timeout=0, thread_local=False):
            return True
    except Timeout:
        return False
