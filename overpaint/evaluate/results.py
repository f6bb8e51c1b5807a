"""Scores of one or several changes, by recognised labels.

A `Comparison` is saved as a folder: `comparison.json`, and `gallery.safetensors` with the pictures of a few scenes
under every method, uint8. A missing number is null in JSON.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.errors import listed
from overpaint.files import atomic, from_json, user_path, write_json
from overpaint.metrics import Interval
from overpaint.probes.questions import Question

__all__ = ["Comparison", "Paired", "Scores", "complement", "parse_interval"]


@dataclass(frozen=True)
class Paired:
    """A share before and after an edit, and the mean change per picture."""

    before: Interval
    after: Interval
    change: Interval

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"

    @property
    def drop(self) -> float:
        """The loss: positive when `after` is lower."""
        return 0.0 - self.change.mean


@dataclass(frozen=True)
class Scores:
    """Scores of one change.

    Attributes:
        name: Name of the method.
        kind: Kind of the concept: `"style"`, `"object"` or `"color"`.
        erase: The scorer's label of the concept to erase.
        replace: The scorer's label of the replacement; `""` if it has none.
        efficacy: Target pictures recognised as `erase`.
        redirection: Target pictures recognised as `replace`.
        generality: As `efficacy`, on `"unseen wordings"` and `"held-out pairs"`.
        others: Pictures of each other concept of the kind, recognised as that concept.
        specificity: Pictures without the target concept, by kind of label: recognised as the label in their prompt.
        empty_drift: Relative movement of the text features of the empty prompt.
        protocol: Settings of the measurement.
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

    def __repr__(self) -> str:
        moved = f"; now {self.replace}: {self.redirection.after}" if self.replace else ""
        others = self.specificity.get(self.kind)
        lost = f"; other {self.kind}s: {others}" if others is not None else ""
        return f"<Scores of {self.name}: still {self.erase}: {self.efficacy}{moved}{lost}>"

    def aliases(self) -> dict[str, Interval]:
        """Return the shares under the names of UnlearnCanvas and EasyEdit, with their intervals.

        `UA` (unlearning accuracy): target pictures not recognised as the concept. `IRA` and `CRA` (in-domain and
        cross-domain retain accuracy): other pictures recognised as the label in their prompt, of the same kind as the
        concept and of another kind (objects for a style, styles for all other kinds). `reliability` is UA,
        `generality` is UA on unseen wordings, `locality` is IRA.

        Source: Zhang et al., 2024 (UnlearnCanvas), https://arxiv.org/abs/2402.11846; Wang et al., 2023 (EasyEdit),
        https://arxiv.org/abs/2308.07269. Deviations: the locality of EasyEdit counts answers that equal those
        before the edit; this one counts correct answers.
        """
        across = "object" if self.kind == "style" else "style"
        unlearned, retained = complement(self.efficacy.after), self.specificity[self.kind].after
        shares = {"UA": unlearned, "IRA": retained}
        if across in self.specificity:
            shares["CRA"] = self.specificity[across].after
        wordings = complement(self.generality["unseen wordings"].after)
        return shares | {"reliability": unlearned, "generality": wordings, "locality": retained}

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

    def intervals(self) -> dict[str, Interval]:
        """Return the shares and losses of `flat` and `aliases` with their intervals, under the same names."""
        pairs = {
            "target": self.efficacy, "replaced": self.redirection, "unseen": self.generality["unseen wordings"],
            "held_out": self.generality["held-out pairs"],
        }  # fmt: skip
        shares = {f"{name}_after": pair.after for name, pair in pairs.items()}
        before = {f"{name}_before": pairs[name].before for name in ("target", "replaced")}
        losses = {"others_drop": self.specificity[self.kind].change} | {
            f"{k}s_drop": p.change for k, p in self.specificity.items() if k != self.kind
        }
        drops = {
            name: Interval(0.0 - c.mean, 0.0 - c.high, 0.0 - c.low, c.n)
            for name, c in losses.items()
        }
        return before | shares | drops | self.aliases()


def complement(share: Interval) -> Interval:
    """Return one minus the share, with its bounds exchanged."""
    return Interval(1 - share.mean, 1 - share.high, 1 - share.low, share.n)


@dataclass(frozen=True)
class Comparison:
    """Scores of several methods on the same prompts and seeds.

    Attributes:
        scores: Scores by method, in the order of the arguments.
        baseline: Share of the unedited model's pictures that the scorer recognises, by `"object"`, `"style"`,
            `"color"`, and the same with `" held out"` for pairs that were not in the training data.
        questions: The Q questions whose pictures are saved.
        pictures: Their pictures by method, and `"before"`, uint8, shape (Q, 3, H, W).
    """

    scores: Mapping[str, Scores]
    baseline: Mapping[str, Interval]
    questions: tuple[Question, ...]
    pictures: Mapping[str, Tensor]

    def __repr__(self) -> str:
        methods = [f"{name} {s.efficacy.after}" for name, s in self.scores.items()]
        erase = next((s.erase for s in self.scores.values()), "")
        return f"<Comparison of {len(methods)} methods, still {erase}: {listed(methods, limit=5)}>"

    def save(self, folder: str | Path) -> Path:
        """Write the comparison into `folder`, which is created if necessary, and return its path.

        Raises:
            OSError: The folder cannot be written.
        """
        out = user_path(folder, "folder")
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "scores": {name: asdict(scores) for name, scores in self.scores.items()},
            "baseline": {name: asdict(share) for name, share in self.baseline.items()},
            "questions": [asdict(q) for q in self.questions],
        }
        write_json(out / "comparison.json", content)
        with atomic(out / "gallery.safetensors") as draft:
            save_file(
                {name: rows.contiguous().clone() for name, rows in self.pictures.items()}, draft
            )
        return out

    @staticmethod
    def load(folder: str | Path) -> "Comparison":
        """Load a comparison that `save` wrote.

        Raises:
            ValueError: The files are damaged or of another format.
            FileNotFoundError: There is no comparison in the folder.
        """
        source = user_path(folder, "folder")
        try:
            content = from_json((source / "comparison.json").read_bytes())
            questions = tuple(_parse_question(q) for q in content["questions"])
            return Comparison(
                {name: _parse_scores(scores) for name, scores in content["scores"].items()},
                {name: parse_interval(share) for name, share in content["baseline"].items()},
                questions,
                _checked_pictures(load_file(source / "gallery.safetensors"), len(questions)),
            )
        except (
            KeyError, TypeError, AttributeError, ValueError, OverflowError, SafetensorError,
        ) as error:  # fmt: skip
            raise ValueError(
                f"the comparison in {str(source)!r} is damaged ({type(error).__name__}: {error}). "
                "Make it again with `overpaint evaluate` or `overpaint demo`."
            ) from error


def _parse_scores(content: Mapping[str, Any]) -> Scores:
    def group(key: str) -> dict[str, Paired]:
        return {name: _parse_paired(pair) for name, pair in content[key].items()}

    return Scores(
        content["name"],
        content["kind"],
        content["erase"],
        content["replace"],
        efficacy=_parse_paired(content["efficacy"]),
        redirection=_parse_paired(content["redirection"]),
        generality=group("generality"),
        others=group("others"),
        specificity=group("specificity"),
        empty_drift=float(content["empty_drift"]),
        protocol=content["protocol"],
    )


def _parse_question(content: Mapping[str, Any]) -> Question:
    """Return a question whose fields have the types of their defaults."""
    question = Question(**content)
    for name, value in asdict(question).items():
        if type(value) is not (int if name == "seed" else str):
            raise TypeError(f"`{name}` of a question is {value!r}")
    return question


def _checked_pictures(pictures: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the pictures if each method has `count` of them, uint8 and not empty."""
    for name, rows in pictures.items():
        if rows.dtype != torch.uint8 or rows.ndim != 4 or rows.shape[:2] != (count, 3):
            raise ValueError(f"the pictures of {name!r} are not {count} in RGB, 8 bits")
        if min(rows.shape[2:]) < 1 or rows.numel() < len(rows):
            raise ValueError(f"the pictures of {name!r} are empty")
    return pictures


def _parse_paired(content: Mapping[str, Any]) -> Paired:
    return Paired(*(parse_interval(content[part]) for part in ("before", "after", "change")))


def parse_interval(content: Mapping[str, Any]) -> Interval:
    """Return the interval of a JSON object with `mean`, `low`, `high` and `n`; null is NaN."""
    bounds = (content[part] for part in ("mean", "low", "high"))
    return Interval(*(math.nan if b is None else float(b) for b in bounds), n=int(content["n"]))
