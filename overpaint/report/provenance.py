"""The protocol of each part of the page, and a warning if the parts belong to different changes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

__all__ = ["DIGEST", "Facts", "differing", "facts"]

DIGEST = "change_digest"


@dataclass(frozen=True)
class Facts:
    """The protocol of one part: its name, and each setting with its value."""

    name: str
    rows: tuple[tuple[str, Any], ...]


def facts(run: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> list[Facts]:
    """Return the protocol of the run and of each part of the page that has one.

    Args:
        run: Protocol of the run; may be empty.
        parts: Protocols by name of the part.
    """
    protocols = [Facts("The run", tuple((name, _public(value)) for name, value in run.items()))]
    protocols += [Facts(name, tuple(_rows(protocol))) for name, protocol in parts.items()]
    return [protocol for protocol in protocols if protocol.rows]


def differing(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a warning if the parts belong to different changes, else `""`; parts without a digest are ignored."""
    digests = {name: str(p[DIGEST]) for name, p in parts.items() if p.get(DIGEST)}
    if len(set(digests.values())) < 2:
        return ""
    names = ", ".join(f"{name} of {digest[:12]}" for name, digest in digests.items())
    return (
        f"The parts of this page are of different changes, by their digests: {names}. Do not compare them; "
        "write all results of one change into one folder."
    )


def _rows(protocol: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in protocol.items():
        shown = value
        if name == "versions" and isinstance(value, Mapping):
            shown = ", ".join(f"{package} {number}" for package, number in value.items())
        if isinstance(shown, str | int | float) and shown != "":
            yield name.replace("_", " ").capitalize(), _public(shown)


def _public(value: Any) -> Any:
    """Return a value without the folders of an absolute path, as results of earlier versions hold them."""
    if isinstance(value, str) and (
        value.startswith("~/") or PureWindowsPath(value).drive or Path(value).is_absolute()
    ):
        return PureWindowsPath(value).name
    return value
