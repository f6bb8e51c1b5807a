"""What a judge saw, on the model card of an edited model: as a section, and as the hub's evaluation results."""

import html
import os
import re
from pathlib import Path
from typing import Any

from overpaint.edit.export.model_card import NAME, plain
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.report import tables

__all__ = ["add_scores"]

_SECTION = re.compile(r"\n## What a judge saw\n.*?(?=\n## |\Z)", re.DOTALL)


def add_scores(folder: str | Path, comparison: Comparison, *, method: str = "") -> Path:
    """Put the figures of one method on the card in `folder` and return its path; what stood there before goes.

    Args:
        folder: Of an edited model, as `overpaint apply` wrote it.
        comparison: Holds the figures.
        method: Which; by default the first that edits.

    Raises:
        FileNotFoundError: There is no card in the folder.
        ValueError: The comparison holds no such method, or the card has no readable head.
    """
    from huggingface_hub import ModelCard

    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no README.md: name a folder that `overpaint apply --out` wrote."
        )
    found = _scores(comparison, method)
    try:
        card: Any = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the head of {str(path)!r} is no card's ({error}): write the model again with `overpaint apply`."
        ) from error
    card.data.model_name = _title(card.text) or Path(folder).resolve().name
    card.data.eval_results = _results(found)
    body = _SECTION.sub("", f"\n{card.text.strip()}\n").strip()
    first, rest = body.partition("\n## What it is not")[::2]
    marked = f"\n\n## What it is not{rest}" if rest else ""
    text = f"---\n{card.data.to_yaml()}\n---\n\n{first.strip()}\n\n{_section(found)}{marked}\n"
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


def _scores(comparison: Comparison, method: str) -> Scores:
    edits = {name: found for name, found in comparison.scores.items() if name != "no edit"}
    name = method or next(iter(edits), "")
    if name not in edits:
        raise ValueError(
            f"the results hold no method {name!r}: choose one of {', '.join(edits) or 'none'}, or judge an edit with "
            "`overpaint evaluate`."
        )
    return edits[name]


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return html.unescape(re.sub(r"\\(.)", r"\1", found[1])) if found else ""


def _measures(found: Scores) -> list[tuple[str, str, Paired]]:
    """Return a name of its own, a title and the figures of each measure that has any."""
    measures = [
        ("target_recognised", f"recognised as {found.erase}", found.efficacy),
        ("replacement_recognised", f"recognised as {found.replace}", found.redirection),
        *(
            (f"{k.replace(' ', '_').replace('-', '_')}_recognised", f"recognised as {found.erase}, {k}", pair)
            for k, pair in found.generality.items()
        ),
        *(
            (f"{k}_kept", f"other pictures, {k} recognised", pair)
            for k, pair in found.specificity.items()
        ),
    ]  # fmt: skip
    return [
        m for m in measures if m[2].after.n and (found.replace or m[0] != "replacement_recognised")
    ]


def _results(found: Scores) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="overpaint-questions",
            dataset_name=f"overpaint questions, {found.protocol.get('judge', 'judge')}",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(pair.after.mean, 4),
        )
        for name, _, pair in _measures(found)
    ]


def _section(found: Scores) -> str:
    def share(pair: Paired, which: str) -> str:
        interval = getattr(pair, which)
        bounds = f"{100 * interval.low:.0f} to {100 * interval.high:.0f}"
        return f"{tables.percent(interval.mean)} ({bounds})"

    rows = [
        f"| {plain(title)} | {share(pair, 'before')} | {share(pair, 'after')} | {pair.after.n} |"
        for _, title, pair in _measures(found)
    ]
    about = found.protocol
    foot = (
        f"Share of n pictures, with 95 % bootstrap intervals over scenes, same prompts and seeds before and after. "
        f"Judge {plain(about.get('judge', 'unknown'))}, {about.get('steps', '?')} steps, seed {about.get('seed', '?')}."
    )
    heads = "| Pictures | Before | After | n |\n| --- | --- | --- | --- |"
    return "\n".join(["## What a judge saw", "", heads, *rows, "", foot])
