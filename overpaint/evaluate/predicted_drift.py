r"""Drift of unrelated concepts, predicted from text features before any picture is drawn.

A change of a text encoder also moves the features of prompts that it was not made for. The drift of a concept is
:math:`\|E'(p) - E(p)\| / \|E(p) - E(\text{""})\|` over the prompts `p` of the concept, with the encoder before, `E`,
and after, `E'`. Guidance follows the difference of a prompt to the empty prompt, so this is the relative change of
the UNet's condition. The report compares it with the loss that the scorer measures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overpaint.edit import Change
from overpaint.edit.drift import feature_drift
from overpaint.evaluate.saved_json import load_json
from overpaint.files import user_path, write_json
from overpaint.model import TextToImage
from overpaint.probes.questions import Question

__all__ = ["FILE", "PredictedDrift", "load", "predict", "save"]

FILE = "drift.json"
PredictedDrift = dict[str, dict[str, float]]
"""Drift by method and concept."""


def predict(
    model: TextToImage,
    changes: Mapping[str, Change | None],
    questions: Sequence[Question],
    *,
    kind: str,
) -> PredictedDrift:
    """Return the drift of each other concept under each change; no picture is drawn.

    Args:
        model: The model, which is left unchanged.
        changes: Changes by name; those that are `None` or move more than text encoders are left out.
        questions: Their prompts of role `other` and `other held out` are used, by label of `kind`.
        kind: Kind of the concept that was edited.
    """
    prompts: dict[str, list[str]] = {}
    for question in questions:
        if question.role.startswith("other"):
            prompts.setdefault(question.label(kind), []).append(question.prompt)
    texts = list(dict.fromkeys(text for rows in prompts.values() for text in rows))
    rows_of = {concept: [texts.index(t) for t in rows] for concept, rows in prompts.items()}
    before, empty = model.encode(texts), model.encode([""])
    distance = before.double() - empty.double()
    drift: PredictedDrift = {}
    for name, change in changes.items():
        if change is None or not all(site.startswith("text") for site in change.sites):
            continue
        with change.applied(model):
            after = model.encode(texts)
        drift[name] = {
            concept: feature_drift(before[rows], after[rows], relative_to=distance[rows])
            for concept, rows in rows_of.items()
        }
    return drift


def save(drift: PredictedDrift, folder: str | Path) -> Path:
    """Write `drift.json` into `folder` and return its path.

    Raises:
        OSError: The folder cannot be written.
    """
    content = {
        "what": "norm of the movement of the text features of a concept's prompts, in units of their distance from the "
        "empty prompt's",
        "predicted": drift,
    }  # fmt: skip
    return write_json(user_path(folder, "folder") / FILE, content)


def load(folder: str | Path) -> PredictedDrift:
    """Load drift that `save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    remedy = "Make it again with `overpaint demo`, or delete it."
    return load_json(user_path(folder, "folder") / FILE, _parse, remedy=remedy)


def _parse(content: Mapping[str, Any]) -> PredictedDrift:
    return {
        name: {concept: float(value) for concept, value in rows.items()}
        for name, rows in content["predicted"].items()
    }
