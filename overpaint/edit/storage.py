"""Read and write a change as one safetensors file: tensors, and the rest (the record) as JSON in the metadata.

Files are written atomically, and nothing is unpickled. A checksum over the record and all tensors is part of the file,
so that one wrong bit anywhere is detected. Sizes and types that do not fit one another are refused before a change is
built, and every count is bounded by the bytes of the file, so that a small file takes little memory. Tensors that
several movements share are written once. For a token embedding, only the rows that move are written.
"""

import errno
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from overpaint.edit.movement import Contents, Movement
from overpaint.edit.null_space import EXACT
from overpaint.edit.weights import fingerprint, is_embedding, is_site
from overpaint.files import atomic, from_json, user_path

__all__ = ["FORMAT", "checksum", "pack", "read", "unpack", "write"]

FORMAT = "overpaint.change/3"
_OLD = ("overpaint.change/1", "overpaint.change/2")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_DTYPES = ("F16", "F32", "F64")
_ROWS = 2**18  # of a token embedding: five times those of CLIP
_ENTRIES = 2**28  # of a weight: four times those of the largest token embedding of a CLIP
_UNPACKED = (
    2**23
)  # numbers that any change may have in memory; a larger file may have 16 for each of its own
_FIELDS = {"site": str, "base_hash": str, "keys": int, "gram": int | None}
_LATER_FIELDS = ("casts", "base_norm", "base_sample")  # older files lack them


def pack(change: Contents, *, gram: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record that `write` takes, with the preserve terms if `gram` is true."""
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
        gram_place = None
        if gram and m.gram is not None:
            count = sum(name.startswith("gram.") for name in tensors)
            gram_place = places.setdefault(fingerprint(m.gram), count)
            tensors[f"gram.{gram_place}"] = m.gram
        entry = {"site": m.site, "base_hash": m.base_hash, "keys": place, "gram": gram_place}
        base = {"casts": list(m.casts), "base_norm": m.base_norm}
        movements.append({**entry, **base, "base_sample": list(m.base_sample)})
    record = {"movements": movements, "owners": owners}
    return tensors, {**record, "protocol": change.protocol, "report": change.report}


def _left(place: int, movement: Movement) -> dict[str, Tensor]:
    """Return the left factor; for the token embedding its N nonzero rows and their indices, shape (1, N)."""
    left = movement.left
    if not is_embedding(movement.site):
        return {f"{place}.left": left}
    rows = (left != 0).any(1).nonzero().flatten()
    return {f"{place}.left": left[rows], f"{place}.rows": rows[None].double()}


def _residuals(place: int, movement: Movement) -> dict[str, Tensor]:
    """Return the residuals, or, for a compact movement, their coefficients in the columns of `left`."""
    left, residuals = movement.left.double(), movement.residuals.double()
    whole = {f"{place}.residuals": movement.residuals}
    if movement.left.dtype == torch.float64 or not residuals.numel() or left.shape[1] >= len(left):
        return whole
    fit = torch.linalg.lstsq(left, residuals.T, driver="gelsd").solution.T.float().contiguous()
    lost = (fit.double() @ left.T - residuals).norm()
    return {f"{place}.combinations": fit} if lost <= 1e-6 * residuals.norm() else whole


def unpack(path: str | Path, tensors: Mapping[str, Tensor], record: Any) -> Contents:
    """Return the change at `path`, from the checked tensors and record that `read` returned.

    Raises:
        ValueError: The tensors and the record do not fit one another.
    """
    fault = _record_fault(record) or _tensor_fault(tensors, record)
    if fault:
        _refuse(path, fault)
    owners = [tuple(o for o, count in runs for _ in range(count)) for runs in record["owners"]]
    movements = tuple(
        _movement(i, tensors, record, owners) for i in range(len(record["movements"]))
    )
    return Contents(movements, record["protocol"], record["report"])


def _movement(
    place: int,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    owners: Sequence[tuple[int, ...]],
) -> Movement:
    entry = record["movements"][place]
    left, right = (tensors[f"{place}.{name}"] for name in ("left", "right"))
    if f"{place}.rows" in tensors:
        whole = left.new_zeros(tensors[f"{place}.residuals"].shape[1], left.shape[1])
        whole[tensors[f"{place}.rows"][0].long()] = left
        left = whole
    name = f"{place}.{_residual_form(place, tensors)}"
    residuals = tensors[name]
    if name.endswith("combinations"):
        residuals = residuals.double() @ left.double().T
    return Movement(
        site=entry["site"],
        base_hash=entry["base_hash"],
        left=left,
        right=right,
        keys=tensors[f"keys.{entry['keys']}"],
        residual_data=residuals,
        owners=owners[entry["keys"]],  # one tuple for all movements of these keys
        gram=None if entry["gram"] is None else tensors[f"gram.{entry['gram']}"],
        casts=tuple(entry.get("casts", ())),
        base_norm=entry.get("base_norm"),
        base_sample=tuple(entry.get("base_sample", ())),
    )


def write(path: str | Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON values of `record` to `path`, atomically.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: The file cannot be written; an existing file is then as before.
    """
    path = user_path(path, "path")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"a change is saved as safetensors, not as {path.name!r}: end the name in '.safetensors'."
        )
    text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
    copies = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    content = save(copies, metadata=metadata)  # copies, since it refuses views of one another
    try:
        with atomic(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        reason = f"cannot write the change ({error.strerror}): name a file in a folder that exists and is writable"
        raise OSError(error.errno, reason, str(path)) from error


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of the change at `path`.

    Raises:
        ValueError: A pickle, a damaged file, or a file of another kind.
        OSError: The file cannot be read.
    """
    path = user_path(path, "path")
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
            if not all(_is_matrix(file.get_slice(name)) for name in names):
                _refuse(path, "its tensors have the wrong dtype or shape")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or not a safetensors file ({error}): copy it again."
        ) from error
    text = metadata.get("change", "")
    if metadata.get("sha256") != checksum(text, tensors):
        _refuse(path, "its content and its checksum differ")
    try:
        record = from_json(text)
        json.dumps(record, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: its record is not JSON. Copy it again, or remake it."
        ) from error
    return tensors, record


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a record and of the names, shapes, dtypes and bytes of its tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {fingerprint(tensors[name])}".encode())
    return digest.hexdigest()


def _check_format(path: Path, version: str | None) -> None:
    if version in _OLD:
        raise ValueError(
            f"{str(path)!r} is of the format {version!r}, which lacks fields that this release needs: make the change "
            "again, or use it with the release that wrote it."
        )
    if version != FORMAT:
        raise ValueError(
            f"{str(path)!r} is not a change of the format {FORMAT!r} (its format is {version!r}): use a file that "
            "`Change.save` wrote."
        )


def _is_matrix(tensor: Any) -> bool:
    """Return whether a tensor, which is not read yet, is a matrix of one of the dtypes in change files."""
    shape = tensor.get_shape()
    return tensor.get_dtype() in _DTYPES and len(shape) == 2 and max(shape) < 2**31


def _refuse(path: str | Path, fault: str) -> NoReturn:
    raise ValueError(f"{str(path)!r} is damaged: {fault}. Copy it again, or remake it.")


def _record_fault(record: Any) -> str:
    """Return the fault of the record of a file, or an empty string."""
    kinds = {"movements": list, "owners": list, "protocol": dict, "report": dict}
    if not isinstance(record, dict) or set(record) != set(kinds):
        return "its record has other fields than a change"
    wrong = [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
    if wrong:
        return f"its `{wrong[0]}` is of the wrong type"
    movements = record["movements"]
    required, known = set(_FIELDS), {*_FIELDS, *_LATER_FIELDS}
    if not movements or not all(
        isinstance(m, dict) and required <= set(m) <= known for m in movements
    ):
        return "its movements have other fields than a change's"
    for m in movements:
        wrong = [name for name, kind in _FIELDS.items() if not _is(m[name], kind)]
        if wrong:
            return f"its `{wrong[0]}` is of the wrong type"
        casts = m.get("casts", [])
        hashes = [m["base_hash"], *casts] if isinstance(casts, list) else [""]
        if not is_site(m["site"]) or len(hashes) > 4 or not all(map(_is_hash, hashes)):
            return "its site or hash is not one that overpaint writes"
        norm, sample = m.get("base_norm"), m.get("base_sample", [])
        if norm is not None and not (_is(norm, int | float) and 0 <= norm < 1e300):
            return "its `base_norm` is no norm of a weight"
        if not isinstance(sample, list) or not all(_is(n, float) and abs(n) < 1e39 for n in sample):
            return "its `base_sample` is no list of numbers of a weight"
        if not 0 <= m["keys"] < len(record["owners"]):
            return "a movement names keys that are not in the file"
    if len({m["site"] for m in movements}) < len(movements):
        return "it moves one weight twice"
    return (
        _protocol_fault(record["protocol"])
        or _report_fault(record["report"])
        or _owner_fault(record)
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _protocol_fault(protocol: Mapping[str, Any]) -> str:
    """Return the fault of the settings that `algebra.add` reads, or an empty string."""
    pairs, strength = protocol.get("pairs", {}), protocol.get("strength", {})
    aliases, encoders = protocol.get("aliases", {}), protocol.get("encoders", {})
    texts = [protocol.get("preserve", []), protocol.get("frames", [])]
    names = [protocol.get(n, "") for n in ("model", "method")]
    numbers = [
        protocol[n]
        for n in ("ridge", "preserve_weight")
        if protocol.get(n) is not None and (n, protocol[n]) != ("preserve_weight", EXACT)
    ]
    sound = (
        isinstance(pairs, dict)
        and all(isinstance(new, str) for new in pairs.values())
        and isinstance(strength, dict)
        and isinstance(aliases, dict)
        and all(isinstance(old, str) for old in aliases.values())
        and isinstance(encoders, dict)
        and isinstance(protocol.get("versions", {}), dict)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(chosen, dict) for chosen in encoders.values())
        and all(isinstance(t, list) and all(isinstance(x, str) for x in t) for t in texts)
        and all(_is(n, int | float) and abs(n) < 1e30 for n in (*numbers, *strength.values()))
    )
    return "" if sound else "its protocol is of the wrong type"


def _report_fault(report: Mapping[str, Any]) -> str:
    """Return what is wrong with the lists of concepts in a report, or an empty string."""
    for name in ("endangered", "not_kept"):
        rows = report.get(name) or []
        if not isinstance(rows, list) or not all(
            isinstance(row.get("concept") if isinstance(row, dict) else row, str) for row in rows
        ):
            return f"its `{name}` is no list of concepts"
    if not isinstance(report.get("collateral") or {}, dict):
        return "its `collateral` is of the wrong type"
    for name in ("aliases", "contained_kept", "unedited_encoders", "notes"):
        if not isinstance(report.get(name) or [], list | dict):
            return f"its `{name}` is of the wrong type"
    return ""


def _owner_fault(record: Mapping[str, Any]) -> str:
    concepts = max(1, len(record["protocol"].get("pairs", {})))
    for runs in record["owners"]:
        sound = isinstance(runs, list) and all(
            isinstance(run, list) and len(run) == 2 and all(_is(n, int) and n >= 0 for n in run)
            for run in runs
        )
        if not sound or any(owner >= concepts for owner, _ in runs):
            return "its owners are not concepts of the change"
    return ""


def _tensor_fault(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Return the fault of the tensors of a file, or an empty string; the record is already checked."""
    movements: Sequence[Any] = record["movements"]
    forms = [_residual_form(i, tensors) for i in range(len(movements))]
    names = {f"{i}.{part}" for i in range(len(movements)) for part in ("left", "right", forms[i])}
    names |= {f"{i}.rows" for i, m in enumerate(movements) if is_embedding(m["site"])}
    names |= {f"keys.{i}" for i in range(len(record["owners"]))}
    names |= {f"gram.{m['gram']}" for m in movements if m["gram"] is not None}
    if set(tensors) != names:
        return "its tensors are not those of a change"
    used = {m["keys"] for m in movements}
    if used != set(range(len(record["owners"]))):
        return "it holds keys that no movement uses"
    unpacked = 0
    for i, m in enumerate(movements):
        (out, rank), (inner, width) = tensors[f"{i}.left"].shape, tensors[f"{i}.right"].shape
        if is_embedding(m["site"]):
            whole = tensors[f"{i}.{forms[i]}"].shape[1]
            sound = forms[i] == "residuals" and whole <= _ROWS and rank <= out
            if not sound or not _are_rows(tensors[f"{i}.rows"], out, whole):
                return "its rows are not those of a matrix"
            out = whole
        n = sum(count for _, count in record["owners"][m["keys"]])
        wide = out if forms[i] == "residuals" else rank
        shapes = tensors[f"keys.{m['keys']}"].shape, tensors[f"{i}.{forms[i]}"].shape
        square = None if m["gram"] is None else tensors[f"gram.{m['gram']}"].shape
        if (
            rank != inner
            or shapes != ((n, width), (n, wide))
            or square not in (None, (width, width))
        ):
            return "its tensors do not fit one another"
        if not width or not out or out * width > _ENTRIES:
            return "its matrices have no columns, or are larger than any weight"
        unpacked += out * rank if is_embedding(m["site"]) else 0
        unpacked += n * out if forms[i] == "combinations" else 0
    if unpacked > max(_UNPACKED, 16 * sum(t.numel() for t in tensors.values())):
        return "it would take far more memory than the file"
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        return "it contains NaN or infinity"
    return ""


def _are_rows(rows: Tensor, count: int, whole: int) -> bool:
    """Return whether `rows` (1, N) are `count` ascending row indices of a matrix of `whole` rows."""
    if tuple(rows.shape) != (1, count) or not bool(rows.isfinite().all()):
        return False
    if not count:
        return True
    rising = bool((rows[0].diff() >= 1).all()) and torch.equal(rows, rows.floor())
    return rising and float(rows[0, 0]) >= 0 and float(rows[0, -1]) < whole


def _residual_form(place: int, tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the tensor that stores the residuals of a movement."""
    return "combinations" if f"{place}.combinations" in tensors else "residuals"


def _is(value: Any, kind: Any) -> bool:
    """Return whether `value` is of `kind`; `True` and `False` do not count as numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
