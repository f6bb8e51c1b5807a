"""Scores and comparisons: what an evaluation found, and how it is kept.

A `Comparison` is a folder: `comparison.json`, readable by anything, and `gallery.safetensors` with the pictures of a
few scenes under every method, uint8.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.metrics import Interval
from overpaint.probes.questions import Question

__all__ = ["Comparison", "Paired", "Scores", "flipped", "interval", "save_json"]


@dataclass(frozen=True)
class Paired:
    """A share before and after, and the change picture by picture."""

    before: Interval
    after: Interval
    change: Interval

    @property
    def drop(self) -> float:
        """How much was lost: positive when `after` is lower."""
        return 0.0 - self.change.mean


@dataclass(frozen=True)
class Scores:
    """What one change did.

    Attributes:
        name: Of the method.
        kind: Of the concept: `"style"`, `"object"` or `"color"`.
        erase: The judge's label of the concept to erase.
        replace: Of what should stand in its place; `""` if the judge knows none.
        efficacy: Target pictures recognised as `erase`.
        redirection: Target pictures recognised as `replace`.
        generality: As efficacy, on `"unseen wordings"` and `"held-out pairs"`.
        others: Pictures of each other concept of the kind, recognised as that concept.
        specificity: Pictures not about the target, by kind of label: recognised as their prompts say.
        empty_drift: Relative movement of the empty prompt's features.
        protocol: What the figures were measured with.
    """

    name: str
    kind: str
    erase: str
    replace: str
    efficacy: Paired
    redirection: Paired
    generality: Mapping[str, Paired]
    others: Mapping[str, Paired]
    specificity: Mapping[str, Paired]
    empty_drift: float
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def aliases(self) -> dict[str, Interval]:
        """Return the same shares under the names of UnlearnCanvas and EasyEdit, with their intervals.

        `UA` (unlearning accuracy): target pictures not recognised as the concept. `IRA` and `CRA` (in-domain and
        cross-domain retain accuracy): other pictures recognised for what they name, of the concept's own kind and of
        the other (objects for a style, styles for all else). `reliability` is UA, `generality` the same in unseen
        wordings, `locality` is IRA.

        Source: Zhang et al., 2024 (UnlearnCanvas), https://arxiv.org/abs/2402.11846; Wang et al., 2023 (EasyEdit),
        https://arxiv.org/abs/2308.07269. Deviations: EasyEdit's locality asks for the same answer as before the edit,
        this one for the right answer.
        """
        across = "object" if self.kind == "style" else "style"
        unlearned, kept = flipped(self.efficacy.after), self.specificity[self.kind].after
        found = {"UA": unlearned, "IRA": kept}
        if across in self.specificity:
            found["CRA"] = self.specificity[across].after
        wordings = flipped(self.generality["unseen wordings"].after)
        return found | {"reliability": unlearned, "generality": wordings, "locality": kept}

    def flat(self) -> dict[str, float]:
        """Return the means under flat names: `target_before`, `target_after`, `others_drop`, ..."""
        worst = max((p.drop for p in self.others.values()), default=math.nan)
        return {
            "target_before": self.efficacy.before.mean,
            "target_after": self.efficacy.after.mean,
            "replaced_before": self.redirection.before.mean,
            "replaced_after": self.redirection.after.mean,
            "unseen_after": self.generality["unseen wordings"].after.mean,
            "held_out_after": self.generality["held-out pairs"].after.mean,
            "others_drop": self.specificity[self.kind].drop,
            "others_drop_worst": worst,
            **{f"{k}s_drop": p.drop for k, p in self.specificity.items() if k != self.kind},
            "empty_drift": self.empty_drift,
        }


def flipped(share: Interval) -> Interval:
    """Return the share of the others: one less the share, its bounds changing places."""
    return Interval(1 - share.mean, 1 - share.high, 1 - share.low, share.n)


@dataclass(frozen=True)
class Comparison:
    """Several methods judged on the same prompts, seeds and pictures before.

    Attributes:
        scores: By method, in the order asked.
        baseline: How often the judge recognises the unedited model's pictures, by `"object"`, `"style"`, `"color"`,
            and the same with `" held out"` for pairs that training never showed.
        questions: Questions whose pictures were kept, Q of them.
        pictures: Their pictures by method and as `"before"`, uint8, shape (Q, 3, H, W).
    """

    scores: Mapping[str, Scores]
    baseline: Mapping[str, Interval]
    questions: tuple[Question, ...]
    pictures: Mapping[str, Tensor]

    def save(self, folder: str | Path) -> Path:
        """Write the comparison into `folder` and return it; each file is written beside, then renamed.

        Raises:
            OSError: The folder cannot be written.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        words = {
            "scores": {name: asdict(found) for name, found in self.scores.items()},
            "baseline": {name: asdict(found) for name, found in self.baseline.items()},
            "questions": [asdict(q) for q in self.questions],
        }
        save_json(out / "comparison.json", words)
        draft = out / "gallery.safetensors.part"
        save_file({name: rows.contiguous().clone() for name, rows in self.pictures.items()}, draft)
        os.replace(draft, out / "gallery.safetensors")
        return out

    @staticmethod
    def load(folder: str | Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            ValueError: The files are damaged, or hold something else.
            FileNotFoundError: There is no comparison in the folder.
        """
        source = Path(folder)
        try:
            words = json.loads((source / "comparison.json").read_text())
            return Comparison(
                {name: _scores(found) for name, found in words["scores"].items()},
                {name: interval(found) for name, found in words["baseline"].items()},
                tuple(Question(**q) for q in words["questions"]),
                load_file(source / "gallery.safetensors"),
            )
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"the comparison in {str(source)!r} is damaged ({type(error).__name__}: {error}). "
                "Make it again with `overpaint evaluate` or `overpaint demo`."
            ) from error


def _scores(words: Mapping[str, Any]) -> Scores:
    def group(key: str) -> dict[str, Paired]:
        return {name: _paired(found) for name, found in words[key].items()}

    return Scores(
        words["name"],
        words["kind"],
        words["erase"],
        words["replace"],
        efficacy=_paired(words["efficacy"]),
        redirection=_paired(words["redirection"]),
        generality=group("generality"),
        others=group("others"),
        specificity=group("specificity"),
        empty_drift=float(words["empty_drift"]),
        protocol=words["protocol"],
    )


def _paired(words: Mapping[str, Any]) -> Paired:
    return Paired(*(interval(words[part]) for part in ("before", "after", "change")))


def interval(words: Mapping[str, Any]) -> Interval:
    """Return the interval that `save_json` wrote."""
    bounds = (words[part] for part in ("mean", "low", "high"))
    return Interval(*(math.nan if b is None else float(b) for b in bounds), n=int(words["n"]))


def save_json(path: Path, words: Any) -> Path:
    """Write results as JSON, a missing number as null, beside their place and then there; the folder is made.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(_without_nan(words), indent=1, allow_nan=False))
    os.replace(draft, path)
    return path


def _without_nan(words: Any) -> Any:
    """Return `words` with null for a missing number: JSON knows no NaN."""
    if isinstance(words, dict):
        return {key: _without_nan(value) for key, value in words.items()}
    if isinstance(words, list | tuple):
        return [_without_nan(value) for value in words]
    return None if isinstance(words, float) and math.isnan(words) else words
