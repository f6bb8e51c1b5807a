"""One change, one safetensors file: tensors, and the rest as JSON in the file's metadata.

Files are written beside their place and then renamed, so that there is never half a file. Nothing is unpickled. A
checksum over the record and all tensors is part of the file: one wrong bit anywhere is found out, and what does not
hold together is refused before anything is made of it. Tensors that several movements share are written once, and of
the token embedding only the rows that move.
"""

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from overpaint.edit.weights import EMBEDDING, fingerprint, is_site

if TYPE_CHECKING:
    from overpaint.edit.change import Change, Movement

__all__ = ["FORMAT", "checksum", "pack", "read", "unpack", "write"]

FORMAT = "overpaint.change/3"
_OLD = ("overpaint.change/1", "overpaint.change/2")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_DTYPES = ("F16", "F32", "F64")
_ROWS = 2**18  # of a token embedding: five times those of CLIP
_FIELDS = {"site": str, "base_hash": str, "keys": int, "gram": int | None}


def pack(change: "Change", *, gram: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record that `write` takes; the preserve terms only if `gram`."""
    tensors: dict[str, Tensor] = {}
    owners: list[list[tuple[int, int]]] = []
    places: dict[Any, int] = {}
    movements: list[dict[str, Any]] = []
    for i, m in enumerate(change.movements):
        tensors |= {**_left(i, m), f"{i}.right": m.right, **_residuals(i, m)}
        place = places.setdefault((fingerprint(m.keys), m.owners), len(owners))
        if place == len(owners):
            tensors[f"keys.{place}"] = m.keys
            owners.append([(o, len(list(run))) for o, run in itertools.groupby(m.owners)])
        kept = None
        if gram and m.gram is not None:
            count = sum(name.startswith("gram.") for name in tensors)
            kept = places.setdefault(fingerprint(m.gram), count)
            tensors[f"gram.{kept}"] = m.gram
        movements.append({"site": m.site, "base_hash": m.base_hash, "keys": place, "gram": kept})
    record = {"movements": movements, "owners": owners}
    return tensors, {**record, "protocol": change.protocol, "report": change.report}


def _left(place: int, movement: "Movement") -> dict[str, Tensor]:
    """Return the left factor; of the token embedding its rows that are not zero, and which they are, (1, N)."""
    left = movement.left
    if movement.site != EMBEDDING:
        return {f"{place}.left": left}
    rows = (left != 0).any(1).nonzero().flatten()
    return {f"{place}.left": left[rows], f"{place}.rows": rows[None].double()}


def _residuals(place: int, movement: "Movement") -> dict[str, Tensor]:
    """Return the residuals as they are, or, for a compact movement, as combinations of the columns of `left`."""
    left, residuals = movement.left.double(), movement.residuals.double()
    whole = {f"{place}.residuals": movement.residuals}
    if movement.left.dtype == torch.float64 or not residuals.numel() or left.shape[1] >= len(left):
        return whole
    found = torch.linalg.lstsq(left, residuals.T, driver="gelsd").solution.T.float().contiguous()
    lost = (found.double() @ left.T - residuals).norm()
    return {f"{place}.combinations": found} if lost <= 1e-6 * residuals.norm() else whole


def unpack(path: str | Path, tensors: Mapping[str, Tensor], record: Any) -> list[dict[str, Any]]:
    """Return the fields of each movement of the change at `path`, checked.

    Raises:
        ValueError: They do not hold together.
    """
    fault = _record_fault(record) or _tensor_fault(tensors, record)
    if fault:
        _refuse(path, fault)
    fields: list[dict[str, Any]] = []
    for i, m in enumerate(record["movements"]):
        own: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in ("left", "right")}
        if f"{i}.rows" in tensors:
            left = own["left"].new_zeros(tensors[f"{i}.residuals"].shape[1], own["left"].shape[1])
            left[tensors[f"{i}.rows"][0].long()] = own["left"]
            own["left"] = left
        if _asked(i, tensors) == "combinations":
            own["residuals"] = tensors[f"{i}.combinations"].double() @ own["left"].double().T
        else:
            own["residuals"] = tensors[f"{i}.residuals"]
        runs = record["owners"][m["keys"]]
        own["keys"] = tensors[f"keys.{m['keys']}"]
        own["gram"] = None if m["gram"] is None else tensors[f"gram.{m['gram']}"]
        owners = tuple(owner for owner, count in runs for _ in range(count))
        fields.append({"site": m["site"], "base_hash": m["base_hash"], "owners": owners, **own})
    return fields


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
    text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
    own = {
        name: t.detach().contiguous().clone() for name, t in tensors.items()
    }  # none a view of another
    content = save(own, metadata=metadata)
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
            _check_format(path, metadata.get("format"))
            names = list(file.keys())
            if not all(_plain(file.get_slice(name)) for name in names):
                _refuse(path, "its tensors have the wrong dtype or shape")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no safetensors file ({error}): copy it again from where it was made."
        ) from error
    text = metadata.get("change", "")
    if metadata.get("sha256") != checksum(text, tensors):
        _refuse(path, "its content and its checksum differ")
    try:
        record = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: its record is no JSON. Copy it again, or remake it."
        ) from error
    return tensors, record


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a record and of the names, shapes, dtypes and bytes of its tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {fingerprint(tensors[name])}".encode())
    return digest.hexdigest()


def _check_format(path: Path, found: str | None) -> None:
    if found in _OLD:
        raise ValueError(
            f"{str(path)!r} is of the format {found!r}, which lacks what this release needs: make the change again, or "
            "use it with the release that wrote it."
        )
    if found != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no change of the format {FORMAT!r} (found {found!r}): give a file that "
            "`Change.save` wrote."
        )


def _plain(tensor: Any) -> bool:
    """Whether a tensor that is not read yet is a matrix of a kind that changes are made of."""
    shape = tensor.get_shape()
    return tensor.get_dtype() in _DTYPES and len(shape) == 2 and max(shape) < 2**31


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _refuse(path: str | Path, fault: str) -> NoReturn:
    raise ValueError(f"{str(path)!r} is damaged: {fault}. Copy it again, or remake it.")


def _record_fault(record: Any) -> str:
    """Return what is wrong with the record of a file, or an empty string."""
    kinds = {"movements": list, "owners": list, "protocol": dict, "report": dict}
    if not isinstance(record, dict) or set(record) != set(kinds):
        return "its record has other fields than a change"
    wrong = [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
    if wrong:
        return f"its `{wrong[0]}` is of the wrong type"
    movements = record["movements"]
    if not movements or not all(isinstance(m, dict) and set(m) == set(_FIELDS) for m in movements):
        return "its movements have other fields than a change's"
    for m in movements:
        wrong = [name for name, kind in _FIELDS.items() if not _is(m[name], kind)]
        if wrong:
            return f"its `{wrong[0]}` is of the wrong type"
        if not is_site(m["site"]) or not re.fullmatch(r"[0-9a-f]{64}", m["base_hash"]):
            return "its site or hash is not one that overpaint writes"
        if not 0 <= m["keys"] < len(record["owners"]):
            return "a movement names keys that it does not hold"
    if len({m["site"] for m in movements}) < len(movements):
        return "it moves one weight twice"
    return _protocol_fault(record["protocol"]) or _owner_fault(record)


def _protocol_fault(protocol: Mapping[str, Any]) -> str:
    """Return which of the settings that changes are added by is not what it should be."""
    pairs, strength = protocol.get("pairs", {}), protocol.get("strength", {})
    texts = [protocol.get("preserve", []), protocol.get("frames", [])]
    numbers = [protocol[n] for n in ("ridge", "preserve_weight") if protocol.get(n) is not None]
    whole = (
        isinstance(pairs, dict)
        and all(isinstance(new, str) for new in pairs.values())
        and isinstance(strength, dict)
        and all(isinstance(t, list) and all(isinstance(x, str) for x in t) for t in texts)
        and all(_is(n, int | float) for n in (*numbers, *strength.values()))
    )
    return "" if whole else "its protocol is of the wrong type"


def _owner_fault(record: Mapping[str, Any]) -> str:
    concepts = max(1, len(record["protocol"].get("pairs", {})))
    for runs in record["owners"]:
        whole = isinstance(runs, list) and all(
            isinstance(run, list) and len(run) == 2 and all(_is(n, int) and n >= 0 for n in run)
            for run in runs
        )
        if not whole or any(owner >= concepts for owner, _ in runs):
            return "its owners are not concepts that it holds"
    return ""


def _tensor_fault(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Return what is wrong with the tensors of a file whose record is sound, or an empty string."""
    movements: Sequence[Any] = record["movements"]
    asked = [_asked(i, tensors) for i in range(len(movements))]
    names = {f"{i}.{part}" for i in range(len(movements)) for part in ("left", "right", asked[i])}
    names |= {f"{i}.rows" for i, m in enumerate(movements) if m["site"] == EMBEDDING}
    names |= {f"keys.{i}" for i in range(len(record["owners"]))}
    names |= {f"gram.{m['gram']}" for m in movements if m["gram"] is not None}
    if set(tensors) != names:
        return "its tensors are not those of a change"
    for i, m in enumerate(movements):
        (out, rank), (inner, width) = tensors[f"{i}.left"].shape, tensors[f"{i}.right"].shape
        if m["site"] == EMBEDDING:
            whole = tensors[f"{i}.{asked[i]}"].shape[1]
            sane = asked[i] == "residuals" and whole <= _ROWS and rank <= out
            if not sane or not _are_rows(tensors[f"{i}.rows"], out, whole):
                return "its rows are not those of a matrix"
            out = whole
        n = sum(count for _, count in record["owners"][m["keys"]])
        wide = out if asked[i] == "residuals" else rank
        shapes = tensors[f"keys.{m['keys']}"].shape, tensors[f"{i}.{asked[i]}"].shape
        square = None if m["gram"] is None else tensors[f"gram.{m['gram']}"].shape
        if (
            rank != inner
            or shapes != ((n, width), (n, wide))
            or square not in (None, (width, width))
        ):
            return "its tensors do not fit one another"
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return "it holds NaN or infinity"
    return ""


def _are_rows(rows: Tensor, count: int, whole: int) -> bool:
    """Whether `rows` (1, N) are `count` places in ascending order of a matrix of `whole` rows."""
    if tuple(rows.shape) != (1, count) or not bool(rows.isfinite().all()):
        return False
    if not count:
        return True
    rising = bool((rows[0].diff() >= 1).all()) and torch.equal(rows, rows.floor())
    return rising and float(rows[0, 0]) >= 0 and float(rows[0, -1]) < whole


def _asked(place: int, tensors: Mapping[str, Tensor]) -> str:
    return "combinations" if f"{place}.combinations" in tensors else "residuals"


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of `kind`; `True` and `False` are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
