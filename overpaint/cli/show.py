"""`overpaint show`: print the content of a change file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import Json, as_path
from overpaint.cli.terminal import print_facts

if TYPE_CHECKING:
    from overpaint.edit import Change

__all__ = ["show"]

_SETTINGS = ("ridge", "preserve_weight", "positions", "layer", "projection", "encoder", "seed")


def show(
    change: Annotated[Path, typer.Argument(help="The change file.", parser=as_path)],
    as_json: Json = False,
) -> None:
    """Print the content of a change file. No model is loaded.

    \b
    overpaint show change.safetensors
    overpaint show change.safetensors --json
    """  # noqa: D301
    from overpaint.edit import Change, verdict

    loaded = Change.load(change)
    facts = {
        "verdict": verdict.describe(loaded),
        "change": str(change),
        "bytes": change.stat().st_size,
        **_facts(loaded),
    }
    print_facts(facts, as_json=as_json)


def _facts(change: "Change") -> dict[str, Any]:
    """Return the content of a change: names, and values that fit on one line."""
    from overpaint.cli.edit import moved_and_endangered

    protocol: Mapping[str, Any] = change.protocol
    strength = protocol.get("strength", {})
    concepts = [
        f"{old} → {new or '(nothing)'}"
        + (f", strength {strength[old]:g}" if old in strength else "")
        for old, new in change.pairs.items()
    ]
    weights = [
        f"{m.site}: {m.left.shape[0]} x {m.right.shape[1]}, rank {m.left.shape[1]}, made for {m.base_hash[:12]}"
        for m in change.movements
    ]
    settings = {name: protocol[name] for name in _SETTINGS if protocol.get(name) is not None}
    versions = ", ".join(
        f"{name} {number}" for name, number in protocol.get("versions", {}).items()
    )
    return {
        "method": protocol.get("method", "unknown"),
        "model": protocol.get("model", "unknown"),
        "concepts": concepts,
        "weights": weights,
        **settings,
        "preserved_prompts": len(protocol.get("preserve", [])),
        **moved_and_endangered(change.report),
        "versions": versions,
        "digest": change.digest[:12],
    }  # fmt: skip
