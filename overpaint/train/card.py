"""The card of a trained model: its recipe, sources, hardware, figures and the hash of every file."""

import datetime
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from overpaint import files
from overpaint.train.icon_world import PACKAGES
from overpaint.train.loop import damage_named

__all__ = [
    "LICENCES",
    "add_figures",
    "commit",
    "history",
    "icon_sources",
    "prepare",
    "read",
    "save",
    "stages",
]

_RUN = (
    "date",
    "recipe_commit",
    "hardware",
    "stages",
    "figures",
)  # entries of a card that its history stores
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


def save(
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
    """Write `card.json` into `folder` and return its path.

    Args:
        folder: The model's folder, with all other files written.
        recipe: The recipe's settings by name.
        seed: Seed of the run.
        device: Device that it was trained on.
        trained: Steps and minutes of each stage.
        figures: Measured by the judge, or on real artwork.
        history: Earlier runs that this one continued, oldest first.
        sources: Package, version, SHA-256 and licence of the training data; by default those of the icon sets.
        optimizer_note: Which optimiser updated which weights, and measured alternatives; left out if empty.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "card.json")
    card = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "recipe_commit": commit(),
        "recipe": recipe,
        "seed": seed,
        "hardware": f"{device}, {os.cpu_count()} cores, {platform.machine()}",
        "stages": trained,
        "history": list(history),
        "sources": icon_sources() if sources is None else list(sources),
        "figures": figures,
        "versions": {
            name: version(name) for name in ("torch", "diffusers", "transformers", "tokenizers")
        },
        "sha256": {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths
        },
    }
    if optimizer_note:
        card["optimizer_note"] = optimizer_note
    return files.write_json(folder / "card.json", card)


def icon_sources() -> list[dict[str, str]]:
    """Return package, version, SHA-256 and licence of each icon set."""
    return [
        {
            "package": f"@iconify-json/{name}",
            "version": release,
            "sha256": digest,
            "licence": LICENCES[name],
        }
        for name, (release, digest) in PACKAGES.items()
    ]


def read(path: Path) -> dict[str, Any]:
    """Return the content of the card at `path`.

    Raises:
        ValueError: The card is damaged.
    """
    with damage_named(path):
        card = dict(files.from_json(path.read_bytes()))
        if not isinstance(card.get("figures"), dict):
            raise ValueError("it has no figures")
    return card


def add_figures(folder: Path, figures: dict[str, float]) -> Path:
    """Add `figures` to the card of the model in `folder`, replacing those of the same names."""
    path = folder / "card.json"
    card = read(path)
    card["figures"] |= figures
    return files.write_json(path, card)


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that trained the model in `folder`, oldest first; empty if it has no card."""
    path = folder / "card.json"
    if not path.is_file():
        return []
    card = read(path)
    with damage_named(path):
        last = {key: card[key] for key in _RUN}
        return [*card.get("history", []), last]


def stages(work: Path, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return steps and minutes of each stage, read from its checkpoint in `work`."""
    result = {}
    for name in names:
        path = work / f"{name}.safetensors"
        with damage_named(path), safe_open(path, framework="pt") as file:
            progress = files.from_json(file.metadata()["progress"])
            minutes = round(progress["spent"] / 60, 1)
            result[name] = {"steps": progress["step"], "minutes": minutes}
    return result


def prepare(out: Path) -> Path:
    """Return the absolute path of `out` after checking that a model may be written there.

    `out` may be a new or empty folder, or one that a recipe wrote. A model that a killed run left under its temporary
    name is renamed to `out` first.

    Raises:
        ValueError: The folder holds something else, which would be lost.
    """
    out = out.resolve()
    files.restore_folder(out)
    if out.exists() and not (
        out.is_dir() and ((out / "card.json").is_file() or not any(out.iterdir()))
    ):
        raise ValueError(
            f"{str(out)!r} holds something else than a model of ours, which would be replaced: name a new folder with "
            "--out."
        )
    return out


def commit() -> str:
    """Return the commit of the checkout that this module belongs to; an empty string outside one, or without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
