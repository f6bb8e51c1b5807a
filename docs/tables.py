"""Markdown tables, numbers with intervals, and the line that says how a table was made."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, the others to the right."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(cell: float | Mapping[str, float], points: bool = False) -> str:
    """Return a share as percent, with its interval unless that has no width."""
    if not isinstance(cell, Mapping):
        return f"{100 * cell:.0f} %"
    unit = "points" if points else "%"
    mean, low, high = (f"{100 * cell[k] + 0.0:.0f}" for k in ("mean", "low", "high"))
    mean, low, high = (
        text.replace("-0", "0") if text == "-0" else text for text in (mean, low, high)
    )
    return f"{mean} {unit}" if low == high else f"{mean} {unit} [{low}, {high}]"


def number(cell: float | Mapping[str, float] | None, digits: int = 2) -> str:
    """Return a number with its interval, if it has one; nothing for a missing one."""
    if cell is None:
        return ""
    if not isinstance(cell, Mapping):
        return f"{cell:.{digits}f}"
    if cell["low"] is None:
        return f"{cell['mean']:.{digits}f} (equal in all)"
    mean, low, high = (f"{cell[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def triple(cell: Sequence[float]) -> str:
    """Return mean and interval that are stored as a list of three."""
    return number(dict(zip(("mean", "low", "high"), cell, strict=True)))


def origin(command: str, protocol: Run, *, commit: str | None = None, more: str = "") -> str:
    """Return the line that says how a table was made: command, commit, versions and settings."""
    commit = commit or protocol.get("commit")
    names = {"steps": "{} denoising steps", "guidance_scale": "guidance {}", "scheduler": "{}"}
    parts = [
        text.format(protocol[k])
        for k, text in names.items()
        if isinstance(protocol.get(k), str | int | float)
    ]
    parts += [more] if more else []
    parts += [str(protocol[k]) for k in ("device", "dtype") if k in protocol]
    parts += [f"{name} {version}" for name, version in protocol.get("versions", {}).items()]
    made = f"commit `{commit[:7]}`" if commit else "commit not recorded"
    return f"`{command}` ({made}; {', '.join(parts)})\n"


def wrapped(page: str, width: int = 120) -> str:
    """Return Markdown with its paragraphs wrapped; headings and tables stay as they are."""
    blocks = (
        block
        if block.startswith(("#", "|"))
        else textwrap.fill(block, width, break_long_words=False, break_on_hyphens=False)
        for block in page.strip().split("\n\n")
    )
    return "\n\n".join(blocks) + "\n"
