"""Model card of an edited model: `README.md` with a YAML head, as the Hugging Face hub reads it.

The card lists the changed weights, the method and its settings, the expected effects and limits, and how to load the
model. All of it comes from the change; `overpaint report --card` adds a section with the scores of pictures. Texts of
users, such as names of concepts, are escaped so that they are shown and not interpreted as Markdown or HTML.
"""

import html
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from overpaint import files
from overpaint.edit import verdict
from overpaint.edit.change import Change

__all__ = ["NAME", "plain", "save", "text"]

NAME = "README.md"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SOURCES = {
    "auto": ("Overpaint's automatic edit, after Diff-QuickFix", "https://arxiv.org/abs/2310.13730"),
    "quickfix": ("Diff-QuickFix (Basu et al., 2024)", "https://arxiv.org/abs/2310.13730"),
    "uce": ("Unified Concept Editing (Gandikota et al., 2024)", "https://arxiv.org/abs/2308.14761"),
    "debias": ("Unified Concept Editing (Gandikota et al., 2024)", "https://arxiv.org/abs/2308.14761"),
    "time": ("TIME (Orgad et al., 2023)", "https://arxiv.org/abs/2303.08084"),
    "loco": ("LocoEdit (Basu et al., 2024)", "https://arxiv.org/abs/2405.01008"),
}  # fmt: skip
_SETTINGS = (
    "layer", "positions", "ridge", "preserve_weight", "strength", "contexts", "background", "bound", "steps", "seed",
)  # fmt: skip


def save(folder: str | Path, change: Change, *, model: str, notes: Sequence[str] = ()) -> Path:
    """Write the card into `folder` and return its path.

    Args:
        folder: Folder of the edited model.
        change: The applied change.
        model: Name, folder or hub id of the model that it was applied to.
        notes: Further sentences about what the folder holds.

    Raises:
        OSError: The folder cannot be written.
    """
    return files.write_text(
        files.user_path(folder, "folder") / NAME, text(change, model=model, notes=notes)
    )


def text(change: Change, *, model: str, notes: Sequence[str] = ()) -> str:
    """Return the text of the card.

    Args:
        change: The applied change.
        model: Name, folder or hub id of the model that it was applied to.
        notes: Further sentences about what the folder holds.
    """
    from huggingface_hub import ModelCardData

    hub = _HUB.fullmatch(model) is not None and not Path(model).exists()
    base = model if hub else Path(model).name  # a card may be published, so it holds no local path
    head = ModelCardData(
        base_model=base if hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="as-the-base-model",
        tags=["overpaint", "model-editing", "concept-editing"],
    ).to_yaml()
    parts = (
        f"# {_title(change, base)}",
        " ".join([_lead(change, base), *notes]),
        _changed(change),
        _expected(change.report),
        _limits(),
        _use(),
        _made(change, base),
    )
    return f"---\n{head}\n---\n\n" + "\n\n".join(parts) + "\n"


def plain(words: object) -> str:
    """Return `words` on one line, escaped so that Markdown and HTML show them unchanged."""
    line = html.escape(" ".join(str(words).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#!~$])", r"\\\1", line)


def _title(change: Change, base: str) -> str:
    pairs = [f"{plain(old)} → {plain(new or '(nothing)')}" for old, new in change.pairs.items()]
    listed = "; ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    return f"{plain(base)}, edited: {listed}" if listed else f"{plain(base)}, edited"


def _lead(change: Change, base: str) -> str:
    weights = "one weight" if len(change.movements) == 1 else f"{len(change.movements)} weights"
    how = _method(change.protocol)
    return (
        f"This is the text-to-image model {plain(base)} with {weights} moved so that it reads some concepts as others. "
        f"Nothing else of it differs. The movement was made by {how}."
    )


def _method(protocol: Mapping[str, Any]) -> str:
    name = str(protocol.get("method", "an edit"))
    if name not in _SOURCES:
        return plain(name)
    label, link = _SOURCES[name]
    return f"[{label}]({link})"


def _changed(change: Change) -> str:
    concepts = _table(
        ("Concept", "Read as"),
        [(plain(old), plain(new or "(nothing)")) for old, new in change.pairs.items()],
    )
    weights = _table(
        ("Weight", "Rank of the movement", "Bytes it was made for (SHA-256)"),
        [
            (f"`{m.site}`", str(m.left.shape[1]), f"`{m.base_hash[:16]}…`")
            for m in change.movements[:64]
        ],
    )
    return "\n\n".join(part for part in ("## What was changed", concepts, weights) if part)


def _expected(report: Mapping[str, Any]) -> str:
    """Return the effects that the solve computed from text alone."""
    rows: list[str] = []
    if (missed := report.get("missed")) is not None:
        rows.append(f"{100 * (1 - missed):.0f} % of the target movement is reached.")
    if (drift := report.get("empty_prompt_drift")) is not None:
        rows.append(
            f"The empty prompt, which guidance reads for every picture, moves by {100 * drift:.1f} %."
        )
    if endangered := [_name(row) for row in report.get("endangered") or []]:
        rows.append(f"Preserved, since they would have changed: {_listed(endangered)}.")
    if lost := [_name(row) for row in report.get("not_kept") or []]:
        rows.append(f"**Not preserved**, expect these to change too: {_listed(lost)}.")
    if moved := verdict.everyday(report):
        rows.append(f"{moved}.")
    if not rows:
        rows.append(
            "The edit reports nothing about other concepts: look at pictures before you use it."
        )
    foot = "These figures are computed from text alone, before any picture was drawn."
    return "\n".join(["## What to expect", "", *(f"- {row}" for row in rows), "", foot])


def _limits() -> str:
    return """## What it is not

- It is no protection against deliberate attempts: a concept that is no longer drawn for its name may be drawn for
  another wording, a picture prompt or an adversarial prompt.
- Pictures were not evaluated for this card, unless it has a section *Evaluation*.
- The unedited model cannot be restored from these weights: keep it, and the change file.
- The terms of the base model apply."""


def _use() -> str:
    return """## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("a prompt").images[0].save("picture.png")
```"""


def _made(change: Change, base: str) -> str:
    settings = [(k, change.protocol[k]) for k in _SETTINGS if change.protocol.get(k) is not None]
    listed = ", ".join(f"{k} {v}" for k, v in settings if isinstance(v, str | int | float))
    rows = [
        ("Base model", plain(base)),
        ("Method", plain(change.protocol.get("method", "–"))),
        *([("Settings", plain(listed))] if listed else []),
        ("Change (SHA-256)", f"`{change.digest}`"),
        ("Made with", f"overpaint {version('overpaint')}"),
    ]
    return "## How it was made\n\n" + _table(("", ""), rows)


def _name(row: object) -> str:
    return str(row["concept"]) if isinstance(row, Mapping) else str(row)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(plain(name) for name in names[:20]) + more


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
