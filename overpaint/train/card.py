"""The card of a trained model: what made it, from what, and what it can do."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from overpaint.train.icon_world import PACKAGES

__all__ = ["LICENCES", "add_figures", "history", "stages", "write_card"]

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
    """
    sources = [
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
        "recipe_commit": _commit(),
        "recipe": recipe,
        "seed": seed,
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
        "stages": trained,
        "history": list(history),
        "sources": sources,
        "figures": figures,
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")
        },
        "sha256": {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        },
    }
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


def _write(path: Path, card: dict[str, Any]) -> Path:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(card, indent=1) + "\n")
    return beside.replace(path)


def _commit() -> str:
    """Return the commit the recipe ran from, or an empty string outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""
