"""Shares of pictures that are recognised as expected, from the labels that a classifier returned."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overpaint import metrics
from overpaint.evaluate.results import Paired, Scores
from overpaint.metrics import Interval
from overpaint.probes.questions import Question

__all__ = ["Labels", "Tally"]

Labels = Mapping[str, Sequence[str]]
"""The recognised label of each question's picture, by kind."""


@dataclass(frozen=True)
class Tally:
    """Computes shares from the labels before and after an edit.

    Attributes:
        questions: The questions, in the order of the labels.
        before: Labels of the unedited model's pictures.
        kind: Kind of the concept that was edited.
        erase: Its label.
        replace: Label of the replacement; `""` if there is none.
    """

    questions: Sequence[Question]
    before: Labels
    kind: str
    erase: str
    replace: str

    def scores(
        self, name: str, after: Labels, *, drift: float, protocol: Mapping[str, Any]
    ) -> Scores:
        """Return the scores of the method `name`, whose pictures have the labels `after`."""
        kind, unrelated = self.kind, ("other", "other held out")
        others = dict.fromkeys(q.label(kind) for q in self.questions if q.role == "other")
        return Scores(
            name, kind, self.erase, self.replace,
            efficacy=self._recognised_as(after, self.erase, "target"),
            redirection=self._recognised_as(after, self.replace, "target"),
            generality={
                "unseen wordings": self._recognised_as(after, self.erase, "unseen"),
                "held-out pairs": self._recognised_as(after, self.erase, "held out"),
            },
            others={o: self._correct(after, kind, unrelated, only=o) for o in others},
            specificity={
                k: self._correct(after, k, unrelated if k == kind else (*unrelated, "plain"))
                for k in self.before
            },
            empty_drift=drift,
            protocol=protocol,
        )  # fmt: skip

    def baseline(self) -> dict[str, Interval]:
        """Return the share of the unedited pictures that is recognised, for trained and for held-out pairs."""
        trained, composed = ("target", "other", "plain"), ("held out", "other held out")
        shares = {k: self._correct(self.before, k, trained).before for k in self.before}
        return shares | {
            f"{k} held out": self._correct(self.before, k, composed).before for k in self.before
        }

    def _recognised_as(self, after: Labels, label: str, role: str) -> Paired:
        """Return the share of the pictures with `role` that have the label; without pictures if `label` is empty."""
        rows = [i for i, q in enumerate(self.questions) if q.role == role and label]
        return self._paired(
            rows,
            [self.before[self.kind][i] == label for i in rows],
            [after[self.kind][i] == label for i in rows],
        )

    def _correct(
        self, after: Labels, kind: str, roles: Collection[str], *, only: str = ""
    ) -> Paired:
        """Return the share of the pictures with `roles` that have the label of `kind` in their prompt.

        Prompts without a label of `kind`, or with another label than `only`, are not counted.
        """
        expected = [q.label(kind) for q in self.questions]
        rows = [i for i, q in enumerate(self.questions) if q.role in roles and expected[i]]
        rows = [i for i in rows if not only or expected[i] == only]
        return self._paired(
            rows,
            [self.before[kind][i] == expected[i] for i in rows],
            [after[kind][i] == expected[i] for i in rows],
        )

    def _paired(self, rows: Sequence[int], before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Return shares with intervals over scenes: the pictures of a scene in several styles are one unit."""
        scenes = [self.questions[i].seed for i in rows]
        return Paired(
            metrics.share(before, groups=scenes),
            metrics.share(after, groups=scenes),
            metrics.paired_share(before, after, groups=scenes),
        )
