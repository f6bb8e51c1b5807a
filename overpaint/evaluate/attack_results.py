"""Results of a search for inputs that bring an erased concept back, and their file `attack.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overpaint.evaluate.results import parse_interval
from overpaint.evaluate.saved_json import load_json
from overpaint.files import user_path, write_json
from overpaint.metrics import Interval

__all__ = ["FILE", "TEXT_FREE", "Attack", "Attempt"]

FILE = "attack.json"
TEXT_FREE = "inversion"
"""The family without a prompt."""


@dataclass(frozen=True)
class Attempt:
    """One attempt to bring the concept back.

    Attributes:
        family: One of `attack.FAMILIES`.
        words: The words in the place of the concept, or a description of the embedding rows or of the noise.
        score: Score of the edited model's pictures in the search.
        confirmed: Score from other seeds, for the best attempt of each family; `None` for the rest.
    """

    family: str
    words: str
    score: Interval
    confirmed: Interval | None = None


@dataclass(frozen=True)
class Attack:
    """Results of a search.

    Attributes:
        erase: The concept.
        before: Score of the unedited model's pictures of the plain prompts, from the seeds of the confirmation.
        after: The same for the edited model.
        chance: Score of the edited model's pictures of the prompts without the concept.
        attempts: Every attempt, best first; the inversion last.
        protocol: Scorer, seeds, steps and settings of the search.
    """

    erase: str
    before: Interval
    after: Interval
    chance: Interval
    attempts: tuple[Attempt, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        result = "brought back" if self.brought_back else "not brought back"
        return (
            f"<Attack on {self.erase!r}: {result} by {len(self.attempts)} attempts; before the edit {self.before}, "
            f"after {self.after}>"
        )

    @property
    def best(self) -> Attempt:
        """The attempt by a prompt with the highest confirmed score; the inversion only if there is no other."""
        confirmed = [a for a in self.attempts if a.confirmed is not None]
        return max(
            [a for a in confirmed if a.family != TEXT_FREE] or confirmed,
            key=lambda a: a.confirmed.mean if a.confirmed is not None else -1.0,
        )

    @property
    def inversion(self) -> Attempt | None:
        """The attempt without a prompt; `None` if it was not made."""
        return next((a for a in self.attempts if a.family == TEXT_FREE), None)

    @property
    def brought_back(self) -> bool:
        """True if the best attempt's interval lies above the intervals of the plain prompts and of chance."""
        best = self.best.confirmed
        return best is not None and best.low > max(self.after.high, self.chance.high)

    @property
    def recovered(self) -> float:
        """Share of the edit's effect that the best attempt reverses: 0 none, 1 all; it can be outside [0, 1]."""
        removed = self.before.mean - self.after.mean
        best = self.best.confirmed
        if best is None or removed <= 0:
            return float("nan")
        return (best.mean - self.after.mean) / removed

    def flat(self) -> dict[str, Any]:
        """Return the figures under flat names."""
        families = {
            f"attack_{a.family.replace(' ', '_')}": a.confirmed.mean
            for a in self.attempts
            if a.confirmed is not None
        }
        return {
            "attack_before": self.before.mean,
            "attack_after": self.after.mean,
            "attack_chance": self.chance.mean,
            **families,
            "attack_recovered": self.recovered,
            "attack_brought_back": self.brought_back,
            "attack_best": f"{self.best.family}: {self.best.words}",
        }

    def save(self, folder: str | Path) -> Path:
        """Write `attack.json` into `folder`, which is created if necessary, and return its path.

        Raises:
            OSError: The folder cannot be written.
        """
        place = user_path(folder, "folder")
        place.mkdir(parents=True, exist_ok=True)
        attempts = [
            {"family": a.family, "words": a.words, "found": a.score, "confirmed": a.confirmed}
            for a in self.attempts
        ]
        content = asdict(self) | {
            "attempts": [
                {k: asdict(v) if isinstance(v, Interval) else v for k, v in row.items()}
                for row in attempts
            ]
        }
        return write_json(place / FILE, content)

    @staticmethod
    def load(folder: str | Path) -> "Attack":
        """Load a search that `save` wrote.

        Raises:
            ValueError: The file is damaged.
            FileNotFoundError: There is no such file.
        """
        remedy = "Make it again with `overpaint evaluate --attack`."
        return load_json(user_path(folder, "folder") / FILE, _parse, remedy=remedy)


def _parse(content: Mapping[str, Any]) -> Attack:
    before, after, chance = (
        parse_interval(content[name]) for name in ("before", "after", "chance")
    )
    attempts = tuple(_parse_attempt(row) for row in content["attempts"])
    return Attack(str(content["erase"]), before, after, chance, attempts, dict(content["protocol"]))


def _parse_attempt(content: Mapping[str, Any]) -> Attempt:
    return Attempt(
        str(content["family"]),
        str(content["words"]),
        parse_interval(content["found"]),
        parse_interval(content["confirmed"]) if content["confirmed"] else None,
    )
