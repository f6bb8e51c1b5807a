"""Resumable sweeps: a long trace saved in a folder, one shard for each finished unit of work.

The folder holds `protocol.json` (the settings that make the numbers, and the units), one Parquet file for each finished
unit, and `lock`. A shard is written atomically and contains a digest of protocol, unit and rows; a shard that is
damaged or belongs to another protocol is computed again. So a sweep that was killed at any moment continues, and its
rows equal those of a sweep that was not.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from overpaint import files
from overpaint.trace.effects import Effects
from overpaint.trace.parquet_files import read_table
from overpaint.trace.states import SCHEMA

__all__ = ["read", "sweep"]

Rows = list[dict[str, Any]]


def sweep(
    folder: str | Path | None,
    protocol: dict[str, Any],
    units: Sequence[str],
    compute: Callable[[str], Rows],
) -> Rows:
    """Compute each unit, or read it if it was finished before, and return all rows in order.

    Args:
        folder: Folder for finished units; nothing is saved if `None`.
        protocol: Settings that make the numbers, in types of JSON. On resuming, every field must be equal.
        units: Names of the units of work, each once, in the order of their rows.
        compute: Returns the rows of the unit with a given name; their keys are columns of `SCHEMA`.

    Returns:
        Rows with every column of `SCHEMA`, `None` where `compute` returned no value.

    Raises:
        ValueError: A unit is named twice, or the folder holds a sweep with another protocol.
        BlockingIOError: Another process is writing into the folder.
        OSError: A shard cannot be written, for example because the disk is full; finished shards
            stay readable.
    """
    names = list(units)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"unit {twice[0]!r} is named twice: give each unit of work its own name.")
    if folder is None:
        return [row for unit in names for row in _table(compute(unit)).to_pylist()]
    place = files.user_path(folder, "folder")
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        for draft in (*place.glob("*.part"), *place.glob("*.part.mode")):  # of killed processes
            draft.unlink()
        settings = _agreed_protocol(place, {**protocol, "units": names})
        return [row for unit in names for row in _rows(place, settings, unit, compute)]


def read(folder: str | Path) -> Effects:
    """Return the effects of the units that a sweep has finished, also while it runs; damaged shards are left out.

    Raises:
        FileNotFoundError: The folder holds no sweep.
        ValueError: Its protocol is damaged.
    """
    place = files.user_path(folder, "folder")
    protocol = _protocol(place)
    if protocol is None:
        raise FileNotFoundError(f"no sweep in {str(place)!r}: name the folder of a trace.")
    shards = [_load(place, protocol, unit) for unit in protocol["units"]]
    rows = [row for shard in shards if shard is not None for row in shard]
    return Effects.of(rows, {k: v for k, v in protocol.items() if k != "units"})


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases even if the process is killed."""
    lock = FileLock(place / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another process is tracing into {str(place)!r}: wait for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _agreed_protocol(place: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Write the protocol, or check that the saved one is equal; return it as JSON restores it."""
    current = json.loads(json.dumps(protocol))
    saved = _protocol(place)
    if saved is None:
        with _writing(place, "its protocol"):
            files.write_json(place / "protocol.json", current)
        return current
    for name in (*current, *saved):
        if name not in saved or name not in current or saved[name] != current[name]:
            raise ValueError(
                f"{str(place)!r} holds a trace whose protocol differs in {name!r}: {_brief(saved, name)} there, "
                f"{_brief(current, name)} now. Use the settings of that trace, or name another folder."
            )
    return current


def _brief(protocol: dict[str, Any], name: str) -> str:
    text = repr(protocol[name]) if name in protocol else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _protocol(place: Path) -> dict[str, Any] | None:
    path = place / "protocol.json"
    if not path.is_file():
        return None
    try:
        protocol = dict(files.from_json(path.read_text(encoding="utf-8")))
        if not all(isinstance(unit, str) for unit in protocol["units"]):
            raise TypeError("the names of its units are not texts")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is not the protocol of a trace. Name another folder and trace again."
        ) from error
    return protocol


def _rows(place: Path, protocol: dict[str, Any], unit: str, compute: Callable[[str], Rows]) -> Rows:
    """Return the rows of a unit from its shard; compute and save them if there is no valid shard."""
    rows = _load(place, protocol, unit)
    if rows is not None:
        return rows
    table = _table(compute(unit))
    rows = table.to_pylist()
    buffer = io.BytesIO()
    metadata = {b"overpaint": _digest(protocol, unit, rows)}
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    with (
        _writing(place, f"the shard of {unit!r}"),
        files.atomic(_path(place, unit)) as draft,
    ):
        draft.write_bytes(buffer.getvalue())
    return rows


def _load(place: Path, protocol: dict[str, Any], unit: str) -> Rows | None:
    """Return the rows in a unit's shard, or `None` if it is absent, damaged or of another protocol."""
    path = _path(place, unit)
    if not path.is_file():
        return None
    try:
        table = read_table(path)
        rows = table.to_pylist()
    except (OSError, ValueError):
        return None
    digest = (table.schema.metadata or {}).get(b"overpaint")
    # A shard of an earlier version lacks a column; its digest is of its own columns.
    return _table(rows).to_pylist() if digest == _digest(protocol, unit, rows) else None


def _table(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _digest(protocol: dict[str, Any], unit: str, rows: Rows) -> bytes:
    """Return a digest of a shard's protocol, unit and rows; JSON keeps every bit of a float."""
    return hashlib.sha256(json.dumps([protocol, unit, rows]).encode()).hexdigest().encode()


def _path(place: Path, unit: str) -> Path:
    """Return a readable file name that every file system allows and no other unit has."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", unit)[:60]
    return place / f"{readable}-{hashlib.sha256(unit.encode()).hexdigest()[:12]}.parquet"


@contextmanager
def _writing(place: Path, content: str) -> Iterator[None]:
    """Raise an `OSError` that says what could not be written, if the block raises one."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {content} into {str(place)!r} ({error.strerror}): free some space and run the same command "
            "again; finished results are kept."
        ) from error
