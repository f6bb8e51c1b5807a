"""What each part of the page was measured with, and whether all parts are of one change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DIGEST", "Facts", "differing", "facts"]

DIGEST = "change_digest"


@dataclass(frozen=True)
class Facts:
    """The protocol of one part: its name, and each setting with its value."""

    name: str
    rows: tuple[tuple[str, Any], ...]


def facts(run: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> list[Facts]:
    """Return the protocol of the run, as it tells it, and of each part of the page that has one.

    Args:
        run: Protocol of the run; may be empty.
        parts: Protocols by the part's name.
    """
    shown = [Facts("The run", tuple(run.items()))]
    shown += [Facts(name, tuple(_told(protocol))) for name, protocol in parts.items()]
    return [one for one in shown if one.rows]


def differing(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a warning if the parts are of different changes, else `""`; a part that does not say is passed over."""
    said = {name: str(protocol[DIGEST]) for name, protocol in parts.items() if protocol.get(DIGEST)}
    if len(set(said.values())) < 2:
        return ""
    which = ", ".join(f"{name} of {digest[:12]}" for name, digest in said.items())
    return (
        f"The parts of this page are of different changes, by their digests: {which}. Do not read them together; "
        "measure one change with all of them in a folder of its own."
    )


def _told(protocol: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kept = {k: v for k, v in protocol.items() if isinstance(v, str | int | float) and v != ""}
    if isinstance(versions := protocol.get("versions"), Mapping):
        kept["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [(name.replace("_", " ").capitalize(), value) for name, value in kept.items()]
