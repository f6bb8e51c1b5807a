"""One change, one safetensors file: tensors, and the rest as JSON in the file's metadata.

Files are written beside their place and then renamed, so that there is never half a file. Nothing is unpickled.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["FORMAT", "read", "write"]

FORMAT = "overpaint.change/1"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def write(path: str | Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON values of `record` to `path`, or leave everything as it was.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: The place cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"a change is saved as safetensors, not as {path.name!r}: end the name in '.safetensors'."
        )
    metadata = {"format": FORMAT, "change": json.dumps(record, allow_nan=False)}
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        reason = f"cannot write the change ({error.strerror}): name a file in a folder that exists and is yours"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of the change at `path`.

    Raises:
        ValueError: A pickle, a damaged file, or one that holds something else.
        OSError: The file cannot be read.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{str(path)!r} is a pickle, which can run any code when it is read: a change is a .safetensors file that "
            "`Change.save` wrote."
        )
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such change", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a change is a file, not a folder", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no safetensors file ({error}): copy it again from where it was made."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no change of the format {FORMAT!r} (found {metadata.get('format')!r}): give a file "
            "that `Change.save` wrote."
        )
    try:
        record = json.loads(metadata["change"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: its record is no JSON. Copy it again, or remake it."
        ) from error
    return tensors, record
