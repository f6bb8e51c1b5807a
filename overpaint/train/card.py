"""The card of a trained model: what made it, from what, and what it can do."""

import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from overpaint.train.icon_world import PACKAGES

__all__ = [
    "LICENCES",
    "add_figures",
    "check_target",
    "commit",
    "history",
    "replacing",
    "stages",
    "write_card",
]

LICENCES = {
    "twemoji": "CC-BY-4.0",
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "openmoji": "CC-BY-SA-4.0",
    "fluent-emoji-flat": "MIT",
    "fluent-emoji-high-contrast": "MIT",
    "circle-flags": "MIT",
    "logos": "CC0-1.0",
}


def write_card(
    folder: Path,
    *,
    recipe: dict[str, Any],
    seed: int,
    device: str,
    trained: dict[str, Any],
    figures: dict[str, float],
    history: Sequence[dict[str, Any]] = (),
    sources: Sequence[dict[str, str]] | None = None,
    optimizer_note: str = "",
) -> Path:
    """Write `card.json` into `folder`: recipe, sources, hardware, minutes, figures and the hash of every file.

    Args:
        folder: The model's folder, all other files written.
        recipe: Every knob, by name.
        seed: Of the run.
        device: What it was trained on.
        trained: Steps and minutes of each stage.
        figures: What the judge, or the real artwork, gave.
        history: Earlier runs that this one went on from, oldest first.
        sources: Package, version, SHA-256 and licence of what it was made from; without it, the icon sets.
        optimizer_note: What updated which weights, and what is known of other choices; left out where empty.
    """
    icon_sets = [
        {
            "package": f"@iconify-json/{name}",
            "version": release,
            "sha256": digest,
            "licence": LICENCES[name],
        }
        for name, (release, digest) in PACKAGES.items()
    ]
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "card.json")
    card = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "recipe_commit": commit(),
        "recipe": recipe,
        "seed": seed,
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
        "stages": trained,
        "history": list(history),
        "sources": icon_sets if sources is None else list(sources),
        "figures": figures,
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")
        },
        "sha256": {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        },
    }
    if optimizer_note:
        card["optimizer_note"] = optimizer_note
    return _write(folder / "card.json", card)


def add_figures(folder: Path, figures: dict[str, float]) -> Path:
    """Put `figures` into the card of the model in `folder`, in place of those of the same names."""
    path = folder / "card.json"
    card = json.loads(path.read_text())
    card["figures"] |= figures
    return _write(path, card)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the runs behind the model in `folder`, its last one too; empty where there is no card."""
    path = folder / "card.json"
    if not path.is_file():
        return []
    card = json.loads(path.read_text())
    last = {key: card[key] for key in ("date", "recipe_commit", "hardware", "stages", "figures")}
    return [*card.get("history", []), last]


def stages(work: Path, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return steps and minutes of each stage, read from its checkpoint in `work`."""
    found = {}
    for name in names:
        with safe_open(work / f"{name}.safetensors", framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
        found[name] = {"steps": progress["step"], "minutes": round(progress["spent"] / 60, 1)}
    return found


def check_target(out: Path) -> None:
    """Make sure that a model may be written to `out`: a new or empty folder, or one that a recipe wrote.

    Raises:
        ValueError: The folder holds something else, which would be lost.
    """
    if out.exists() and not (
        out.is_dir() and ((out / "card.json").is_file() or not any(out.iterdir()))
    ):
        raise ValueError(
            f"{str(out)!r} holds something else than a model of ours, which would be replaced: name a new folder with "
            "--out."
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to fill; at the end it takes the place of `out`, which goes only then.

    Raises:
        ValueError: As `check_target`.
    """
    out = out.resolve()
    check_target(out)
    beside, old = (out.with_name(f".{out.name}.{end}") for end in ("partial", "old"))
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if out.exists():
            out.rename(old)
        beside.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)


def _write(path: Path, card: dict[str, Any]) -> Path:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(card, indent=1) + "\n")
    return beside.replace(path)


def commit() -> str:
    """Return the commit of the checkout that this runs from; an empty string outside one, or without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
