"""`overpaint diff`: compare two change files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import Json, as_path
from overpaint.cli.terminal import print_facts

if TYPE_CHECKING:
    from overpaint.edit import Change

__all__ = ["diff"]

_LEFT_OUT = (
    "pairs", "strength", "versions", "preserve", "terms", "without", "vocabulary", "encoders",
)  # fmt: skip


def diff(
    first: Annotated[Path, typer.Argument(help="A change file.", parser=as_path)],
    second: Annotated[Path, typer.Argument(help="Another.", parser=as_path)],
    as_json: Json = False,
) -> None:
    """Compare two change files. Concepts, settings, weights, and the distance of their movements.

    \b
    overpaint diff a.safetensors b.safetensors
    overpaint diff a.safetensors b.safetensors --json
    """  # noqa: D301
    from overpaint.edit import Change

    a, b = Change.load(first), Change.load(second)
    facts = {"first": str(first), "second": str(second), "equal": a.digest == b.digest}
    print_facts({**facts, **_concepts(a, b), **_settings(a, b), **_weights(a, b)}, as_json=as_json)


def _concepts(a: "Change", b: "Change") -> dict[str, list[str]]:
    """Return the concepts of one change only, and those that both replace by something else."""
    first, second = (
        {old: new or "(nothing)" for old, new in change.pairs.items()} for change in (a, b)
    )
    both = first.keys() & second.keys()
    return {
        "concepts_first_only": [f"{old} → {new}" for old, new in first.items() if old not in both],
        "concepts_second_only": [f"{old} → {new}" for old, new in second.items() if old not in both],
        "concepts_in_both": [f"{old} → {first[old]}" for old in first if old in both and first[old] == second[old]],
        "replaced_otherwise": [
            f"{old} → {first[old]} / {second[old]}" for old in first if old in both and first[old] != second[old]
        ],
    }  # fmt: skip


def _settings(a: "Change", b: "Change") -> dict[str, list[str]]:
    """Return the settings in which the two differ."""
    first, second = _flat(a.protocol), _flat(b.protocol)
    rows = [(n, first.get(n), second.get(n)) for n in {**first, **second}]
    return {"settings": [f"{n}: {one} / {other}" for n, one, other in rows if one != other]}


def _flat(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to compare, with those of each text encoder under names such as `text2 layer`."""
    encoders = protocol.get("encoders")
    of_encoders = {
        f"{part} {name}": value
        for part, settings in (encoders.items() if isinstance(encoders, Mapping) else ())
        if isinstance(settings, Mapping)
        for name, value in settings.items()
        if name not in _LEFT_OUT and value != protocol.get(name)
    }
    return {name: value for name, value in protocol.items() if name not in _LEFT_OUT} | of_encoders


def _weights(a: "Change", b: "Change") -> dict[str, Any]:
    """Return for each weight the norm of the movements' difference over that of the larger one: 0 for equal ones."""
    first, second = ({m.site: m for m in change.movements} for change in (a, b))
    rows: list[str] = []
    for site in sorted(first.keys() | second.keys()):
        if site not in first or site not in second:
            rows.append(f"{site}: moved by the {'first' if site in first else 'second'} only")
            continue
        one, other = first[site], second[site]
        if not {one.base_hash, *one.casts} & {other.base_hash, *other.casts}:
            rows.append(f"{site}: made for different weights")
        elif one.delta.shape == other.delta.shape:
            size = max(float(one.delta.norm()), float(other.delta.norm()), 1e-300)
            rows.append(
                f"{site}: relative distance {float((one.delta - other.delta).norm()) / size:.3g}"
            )
    return {"weights": rows}  # fmt: skip
