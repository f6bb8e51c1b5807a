"""Edits of several text encoders: select the encoders, and join their changes into one change.

Each encoder of SDXL is solved on its own keys. The joined change contains the movements of all encoders.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from overpaint.edit.change import Change
from overpaint.edit.weights import encoder_index
from overpaint.model import TextToImage
from overpaint.model.sites import TEXT_PARTS

__all__ = ["Encoder", "edited_parts", "joined", "separated", "unread_layer"]

Encoder = Literal["all", "text", "text2"]
_SETTINGS = ("layer", "ridge", "preserve_weight", "terms")  # of `auto`, chosen for each encoder


def edited_parts(model: TextToImage, encoder: str) -> tuple[str, ...]:
    """Return the names of the encoders to edit: all of the model for `"all"`, else the one named.

    Raises:
        UnknownSite: The model has no encoder of that name.
    """
    if encoder == "all":
        return tuple(TEXT_PARTS[: len(model.text_encoders)])
    encoder_index(model, encoder)
    return (encoder,)


def joined(model: TextToImage, changes: Mapping[str, Change]) -> Change:
    """Return one change with the movements of one change for each encoder.

    The entry `encoder` of the protocol is `"all"` or the name of the only encoder; `encoders` has the settings that
    `auto` chose for each. In the report, a number is the largest of the encoders' numbers, that of `concept_movement`
    the smallest, a list joins their lists, `encoders` has the report of each, and `unedited_encoders` names the
    encoders that do not change. If guidance reads zeros for the empty prompt, its drift is 0 and the report has
    `guidance_reads_zeros`.

    Args:
        model: The model that the changes were made for.
        changes: Name of an encoder to its change; all with the same pairs.
    """
    changes = {part: _with_guidance(model, change) for part, change in changes.items()}
    parts = list(changes)
    first = changes[parts[0]]
    rest = [p for p in TEXT_PARTS[: len(model.text_encoders)] if p not in changes]
    unedited = {"unedited_encoders": rest} if rest else {}
    protocol = {**first.protocol, "encoder": "all" if len(parts) > 1 else parts[0]}
    if len(parts) == 1:
        return Change(first.movements, protocol, {**first.report, **unedited})
    reports = {  # without what an edit of one encoder reports of the others
        part: {name: v for name, v in change.report.items() if name != "unedited_encoders"}
        for part, change in changes.items()
    }
    if "terms" in first.protocol:
        protocol["encoders"] = {
            part: {name: change.protocol[name] for name in _SETTINGS}
            for part, change in changes.items()
        }
    movements = tuple(m for change in changes.values() for m in change.movements)
    report = _joint_report(list(reports.values())) | {"encoders": reports} | unedited
    return Change(movements, protocol, report)


def _with_guidance(model: TextToImage, change: Change) -> Change:
    """Return `change` with a report of the features that guidance reads for the empty prompt, if they are zero."""
    if not model.guidance_reads_zeros:
        return change
    report = {**change.report, "guidance_reads_zeros": True}
    if "empty_prompt_drift" in report:
        report["empty_prompt_drift"] = 0.0
    return Change(change.movements, change.protocol, report)


def separated(change: Change) -> dict[str, Change]:
    """Return the change of each encoder that `change` edits, as `joined` takes them."""
    parts = [p for p in TEXT_PARTS if any(s.startswith(f"{p}.") for s in change.sites)]
    chosen: Mapping[str, Any] = change.protocol.get("encoders", {})
    parts = [p for p in TEXT_PARTS if p in chosen] or parts[:1] or ["text"]
    common = {k: v for k, v in change.protocol.items() if k != "encoders"}
    reports: Mapping[str, Any] = change.report.get("encoders", {})
    return {
        part: Change(
            tuple(m for m in change.movements if m.site.startswith(f"{part}.")),
            {**common, **chosen.get(part, {}), "encoder": part},
            reports.get(part, change.report),
        )
        for part in parts
    }


def unread_layer(model: TextToImage, part: str, layer: int, count: int) -> str:
    """Return a remark if the UNet reads the text features before `layer`, else an empty string.

    Args:
        model: The model.
        part: The encoder, `"text"` or `"text2"`.
        layer: Edited layer, from 0.
        count: Number of layers of the encoder.
    """
    skipped = model.clip_skip + (len(model.text_encoders) == 2)
    if layer < count - skipped:
        return ""
    pooled = part == "text2"
    return (
        f"the UNet reads the text features of {part!r} before layer {layer}, so the edit moves "
        + ("the pooled vector alone" if pooled else "nothing that it reads")
        + f": edit one of the layers 0 to {count - skipped - 1}."
    )


def _joint_report(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    joint: dict[str, Any] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report[name] for report in reports if name in report]
        joint[name] = values[0] if name in ("scan", "layers") else _joint(name, values)
    return joint


def _joint(name: str, values: Sequence[Any]) -> Any:
    """Return one entry of a report from those of several encoders."""
    if all(isinstance(v, int | float) for v in values):
        return max(values)
    if name == "concept_movement":
        return {key: min(v[key] for v in values if key in v) for value in values for key in value}
    if all(isinstance(v, Mapping) for v in values):
        keys = dict.fromkeys(key for value in values for key in value)
        parts = {key: [value[key] for value in values if key in value] for key in keys}
        if name == "seconds":
            return {key: round(sum(part), 6) for key, part in parts.items()}
        return {key: _joint(key, part) for key, part in parts.items()}
    if all(isinstance(v, list) for v in values):
        return _joint_rows([row for value in values for row in value])
    return values[0]


def _joint_rows(rows: Sequence[Any]) -> list[Any]:
    """Return rows without repetition; of rows about one concept the one with the largest drift."""
    distinct: dict[str, Any] = {}
    drifting = all(isinstance(row, Mapping) and "drift_before" in row for row in rows)
    ordered = sorted(rows, key=lambda row: -row["drift_before"]) if drifting and rows else rows
    for row in ordered:
        key = str(row["concept"]) if drifting else repr(row)
        distinct.setdefault(key, row)
    return list(distinct.values())
