"""Resumable sweeps: a long trace in a folder, one shard a finished unit of work.

The folder holds `protocol.json` (what makes the numbers, and the units), one parquet file for each finished unit,
and `lock`. A shard is written beside and then renamed, and carries a digest of protocol, unit and rows; one that is
damaged, or that another protocol made, is computed again. So a sweep that was killed at any moment continues and
ends in the very rows of one that was not.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overpaint.trace.effects import SCHEMA, Effects

__all__ = ["read", "sweep"]

Rows = list[dict[str, Any]]


def sweep(
    folder: str | Path | None,
    protocol: dict[str, Any],
    units: Sequence[str],
    compute: Callable[[str], Rows],
) -> Rows:
    """Compute every unit, or read it where it was finished before, and return all rows in order.

    Args:
        folder: Where finished units are kept; `None` keeps none.
        protocol: What makes the numbers; must survive JSON. On resuming, every field must be equal.
        units: Names of the units of work, each once, in the order of their rows.
        compute: From a unit's name to its rows, whose keys are columns of `SCHEMA`.

    Returns:
        Rows with every column of `SCHEMA`, `None` where `compute` gave nothing.

    Raises:
        ValueError: A unit is named twice, or the folder holds a sweep with another protocol.
        BlockingIOError: Another process is writing the folder.
        OSError: A shard cannot be written, for example because the disk is full; finished shards
            stay readable.
    """
    names = list(units)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"unit {twice[0]!r} is named twice: give each unit of work its own name.")
    if folder is None:
        return [row for unit in names for row in _table(compute(unit)).to_pylist()]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        for draft in place.glob("*.part"):  # of a process that was killed while writing
            draft.unlink()
        about = _agree(place, {**protocol, "units": names})
        return [row for unit in names for row in _finished(place, about, unit, compute)]


def read(folder: str | Path) -> Effects:
    """Return what a sweep has finished so far, also while it runs; damaged shards are left out.

    Raises:
        FileNotFoundError: The folder holds no sweep.
        ValueError: Its protocol is damaged.
    """
    place = Path(folder)
    about = _protocol(place)
    if about is None:
        raise FileNotFoundError(f"no sweep in {str(place)!r}: name the folder of a trace.")
    found = [_load(place, about, unit) for unit in about["units"]]
    rows = [row for shard in found if shard is not None for row in shard]
    return Effects.of(rows, {k: v for k, v in about.items() if k != "units"})


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it even if the process is killed."""
    import fcntl

    with open(place / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is tracing into {str(place)!r}: wait for it, or name another folder."
            ) from error
        yield


def _agree(place: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write the protocol, or check that the one there is equal; return it as JSON gives it back."""
    text = json.dumps(wanted, indent=1)
    about = json.loads(text)
    known = _protocol(place)
    if known is None:
        _write(place / "protocol.json", text.encode(), "its protocol")
        return about
    for name in (*about, *known):
        if name not in known or name not in about or known[name] != about[name]:
            raise ValueError(
                f"{str(place)!r} holds a trace whose protocol differs in {name!r}: {_brief(known, name)} there, "
                f"{_brief(about, name)} now. Repeat the settings it was begun with, or name another folder."
            )
    return about


def _brief(protocol: dict[str, Any], name: str) -> str:
    text = repr(protocol[name]) if name in protocol else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _protocol(place: Path) -> dict[str, Any] | None:
    path = place / "protocol.json"
    if not path.is_file():
        return None
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
        about["units"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is no protocol of a trace. Name another folder and trace again."
        ) from error
    return about


def _finished(
    place: Path, about: dict[str, Any], unit: str, compute: Callable[[str], Rows]
) -> Rows:
    """Return the rows of a unit from its shard; compute and keep them if there is no sound one."""
    rows = _load(place, about, unit)
    if rows is not None:
        return rows
    table = _table(compute(unit))
    rows = table.to_pylist()
    buffer = io.BytesIO()
    mark = {b"overpaint": _digest(about, unit, rows)}
    pq.write_table(table.replace_schema_metadata(mark), buffer)
    _write(_path(place, unit), buffer.getvalue(), f"the shard of {unit!r}")
    return rows


def _load(place: Path, about: dict[str, Any], unit: str) -> Rows | None:
    """Return the rows in a unit's shard, or `None` if it is absent, damaged or of another protocol."""
    path = _path(place, unit)
    if not path.is_file():
        return None
    try:
        table = pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return None
    mark = (table.schema.metadata or {}).get(b"overpaint")
    return rows if mark == _digest(about, unit, rows) else None


def _table(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _digest(about: dict[str, Any], unit: str, rows: Rows) -> bytes:
    """Return a checksum of all that a shard stands for; JSON keeps every bit of a float."""
    return hashlib.sha256(json.dumps([about, unit, rows]).encode()).hexdigest().encode()


def _path(place: Path, unit: str) -> Path:
    """Return a file name that is legible, fit for every file system, and the unit's own."""
    legible = re.sub(r"[^A-Za-z0-9-]+", "_", unit)[:60]
    return place / f"{legible}-{hashlib.sha256(unit.encode()).hexdigest()[:12]}.parquet"


def _write(path: Path, data: bytes, what: str) -> None:
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {what} into {str(path.parent)!r} ({error.strerror}): make room and run the same again; "
            "what is finished is kept."
        ) from error
