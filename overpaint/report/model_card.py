"""Scores on the model card of an edited model: a section, and the evaluation results that the hub reads."""

import html
import re
from pathlib import Path
from typing import Any

from overpaint.edit.export.model_card import NAME, plain
from overpaint.errors import listed
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.files import user_path, write_text
from overpaint.report import tables

__all__ = ["add_scores"]

_SECTION = re.compile(r"\n## (?:Evaluation|What a judge saw)\n.*?(?=\n## |\Z)", re.DOTALL)
_LIMITS = re.compile(r"\n## (?:Limits|What it is not)\n")  # the section that the scores precede


def add_scores(folder: str | Path, comparison: Comparison, *, method: str = "") -> Path:
    """Write the scores of one method into the card in `folder`, in the place of earlier ones, and return its path.

    Args:
        folder: Folder of an edited model, written by `overpaint apply`.
        comparison: The scores.
        method: Name of the method; by default the first that edits.

    Raises:
        FileNotFoundError: There is no card in the folder.
        ValueError: The comparison holds no such method, or the YAML head of the card is damaged.
    """
    from huggingface_hub import ModelCard

    path = user_path(folder, "model") / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no README.md: name a folder that `overpaint apply --out` wrote."
        )
    scores = _scores(comparison, method)
    try:
        card: Any = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the YAML head of {str(path)!r} is damaged ({error}): write the model again with `overpaint apply`."
        ) from error
    card.data.model_name = _title(card.text) or Path(folder).resolve().name
    card.data.eval_results = _results(scores)
    body = _SECTION.sub("", f"\n{card.text.strip()}\n").strip()
    limits = _LIMITS.search(body)
    end = limits.start() if limits else len(body)
    parts = [body[:end].strip(), _section(scores), body[end:].strip()]
    text = f"---\n{card.data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"
    return write_text(path, text)


def _scores(comparison: Comparison, method: str) -> Scores:
    edits = {name: scores for name, scores in comparison.scores.items() if name != "no edit"}
    name = method or next(iter(edits), "")
    if name not in edits:
        raise ValueError(
            f"the results hold no method {name!r}: choose one of {listed(edits)}, or evaluate an "
            "edit with `overpaint evaluate`."
        )
    return edits[name]


def _title(text: str) -> str:
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return html.unescape(re.sub(r"\\(.)", r"\1", match[1])) if match else ""


def _measures(scores: Scores) -> list[tuple[str, str, Paired]]:
    """Return the name, title and shares of each measure that has pictures."""
    measures = [
        ("target_recognised", f"recognised as {scores.erase}", scores.efficacy),
        ("replacement_recognised", f"recognised as {scores.replace}", scores.redirection),
        *(
            (f"{k.replace(' ', '_').replace('-', '_')}_recognised", f"recognised as {scores.erase}, {k}", pair)
            for k, pair in scores.generality.items()
        ),
        *(
            (f"{k}_kept", f"other pictures, {k} recognised", pair)
            for k, pair in scores.specificity.items()
        ),
    ]  # fmt: skip
    return [
        m for m in measures if m[2].after.n and (scores.replace or m[0] != "replacement_recognised")
    ]


def _results(scores: Scores) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="overpaint-questions",
            dataset_name=f"overpaint questions, {scores.protocol.get('judge', 'judge')}",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(pair.after.mean, 4),
        )
        for name, _, pair in _measures(scores)
    ]


def _section(scores: Scores) -> str:
    def share(pair: Paired, which: str) -> str:
        interval = getattr(pair, which)
        bounds = f"{100 * interval.low:.0f} to {100 * interval.high:.0f}"
        return f"{tables.percent(interval.mean)} ({bounds})"

    rows = [
        f"| {plain(title)} | {share(pair, 'before')} | {share(pair, 'after')} | {pair.after.n} |"
        for _, title, pair in _measures(scores)
    ]
    about = scores.protocol
    foot = (
        "Share of n pictures, with 95 % intervals over scenes, same prompts and seeds before and after. "
        f"Scorer {plain(about.get('judge', 'unknown'))}, {about.get('steps', '?')} steps, "
        f"seed {about.get('seed', '?')}."
    )
    heads = "| Pictures | Before | After | n |\n| --- | --- | --- | --- |"
    return "\n".join(["## Evaluation", "", heads, *rows, "", foot])
