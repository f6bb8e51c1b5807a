"""The files that visitors have uploaded and the studio has not read yet, on disk, with limits on their size.

A file belongs to the browser that uploaded it. It is deleted as soon as the studio has read it, or when the last page
of the browser is closed.
"""

import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from overpaint.studio.uploads import MAX_BYTES, stored_name

__all__ = ["MAX_BYTES_OF_ALL", "MAX_BYTES_OF_ONE", "MAX_UPLOADS", "StoreFull", "UploadStore"]

FORM_BYTES = 2**16  # of the form that a browser sends around a file
MAX_BYTES_OF_ONE = 2 * (MAX_BYTES + FORM_BYTES)  # of one browser at a time
MAX_BYTES_OF_ALL = 4 * MAX_BYTES_OF_ONE  # of all browsers together
MAX_UPLOADS = 1000  # files of all browsers together, which may be small
_COPY = 2**20  # bytes copied at once


class StoreFull(ValueError):
    """Raised where an upload would exceed one of the limits."""


@dataclass(frozen=True)
class _Upload:
    visitor: str
    size: int


class UploadStore:
    """Uploaded files by random keys.

    Args:
        folder: Folder for the files, one folder for each; created at the first upload.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploads: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of stored files and of uploads that are not complete yet."""
        return len(self._uploads)

    @property
    def size(self) -> int:
        """Bytes of all stored files and announced bytes of uploads that are not complete yet."""
        return sum(upload.size for upload in list(self._uploads.values()))

    def reserve(self, visitor: str, size: int) -> str:
        """Reserve `size` bytes for an upload that begins, and return its key.

        The form around a file counts too, so a file of exactly `MAX_BYTES` needs a little more.

        Raises:
            StoreFull: The file is too large, or the limit for one browser or for all is reached.
        """
        if size > MAX_BYTES + FORM_BYTES:
            raise StoreFull(
                f"the file has {size / 2**20:.0f} MiB, and at most {MAX_BYTES // 2**20} are allowed: choose a smaller "
                "file."
            )
        with self._lock:
            uploads = self._uploads.values()
            if sum(u.size for u in uploads if u.visitor == visitor) + size > MAX_BYTES_OF_ONE:
                raise StoreFull(
                    f"more than {MAX_BYTES_OF_ONE // 2**20} MiB of uploads from this browser are not read yet: wait "
                    "until they are open, then choose the file again."
                )
            if sum(u.size for u in uploads) + size > MAX_BYTES_OF_ALL:
                raise StoreFull(
                    f"more than {MAX_BYTES_OF_ALL // 2**20} MiB of uploads of all visitors are not read yet: choose "
                    "the file again later."
                )
            if len(uploads) >= MAX_UPLOADS:
                raise StoreFull(
                    f"{MAX_UPLOADS} uploads of all visitors are not read yet: choose the file again later."
                )
            key = secrets.token_urlsafe(16)
            self._uploads[key] = _Upload(visitor, size)
        return key

    def write(self, key: str, name: str, content: BinaryIO) -> None:
        """Write the content of an upload.

        Raises:
            StoreFull: The content is larger than reserved, or the browser's last page was closed meanwhile.
            OSError: The file cannot be written.
        """
        upload = self._uploads.get(key)
        left = -1 if upload is None else upload.size
        folder = self._folder / key
        try:
            folder.mkdir(parents=True)
            with (folder / stored_name(name)).open("xb") as file:
                while left >= 0 and (chunk := content.read(_COPY)):
                    left -= len(chunk)
                    if left >= 0:
                        file.write(chunk)
            if left < 0 or key not in self._uploads:
                raise StoreFull(
                    "the upload was cancelled: load the page and choose the file again."
                )
        except BaseException:
            self.remove(key)
            shutil.rmtree(
                folder, ignore_errors=True
            )  # also if it was removed before the folder was made
            raise

    @contextmanager
    def opened(self, key: str, visitor: str) -> Iterator[Path]:
        """Yield the path of a visitor's file, which is deleted at the end of the block.

        Raises:
            ValueError: The visitor has no such file.
        """
        upload = self._uploads.get(key)
        paths = (
            [*(self._folder / key).iterdir()] if upload and (self._folder / key).is_dir() else []
        )
        if upload is None or upload.visitor != visitor or len(paths) != 1:
            raise ValueError("this file is no longer stored: choose it again.")
        try:
            yield paths[0]
        finally:
            self.remove(key)

    def remove(self, key: str) -> None:
        """Delete an upload; does nothing if it is deleted already."""
        with self._lock:
            upload = self._uploads.pop(key, None)
        if upload is not None:
            shutil.rmtree(self._folder / key, ignore_errors=True)

    def remove_all(self, visitor: str) -> None:
        """Delete the uploads of a visitor."""
        for key in [k for k, upload in list(self._uploads.items()) if upload.visitor == visitor]:
            self.remove(key)
