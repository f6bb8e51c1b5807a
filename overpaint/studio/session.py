"""One user's work: coats of paint on a model, each a change; undone by going back to what was before.

A bench of the studio keeps values only. What it looks like after an edit is a new tuple of coats, so that undo is the
old tuple, and a cancelled or failed edit leaves no trace.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from overpaint.edit import Change
from overpaint.studio.tasks import Map, Question

__all__ = ["Bench", "Coat", "Session"]

_UNDO = 40  # steps back
_PICTURES = 32  # kept, so that undo shows at once
_SHELF = 8  # files kept to compare; each may be as large as an upload


@dataclass(frozen=True, eq=False)
class Coat:
    """One change on the model, under a name to show."""

    name: str
    change: Change


@dataclass(frozen=True, eq=False)
class Bench:
    """What lies on the model: coats in the order they came, their joint change, and how far to go.

    `joint` is the coats' change at strength 1; `None` if there is no coat.
    """

    coats: tuple[Coat, ...] = ()
    joint: Change | None = None
    strength: float = 1.0

    @property
    def change(self) -> Change | None:
        """What is applied; `None` for the model as it is."""
        if self.joint is None or self.strength == 0:
            return None
        return self.joint if self.strength == 1 else self.strength * self.joint


class Session:
    """A user's bench, and the steps back; one piece of work at a time.

    Attributes:
        model: The name of the model chosen.
        bench: What lies on it.
        question: What was last drawn.
        found: The last map.
        pictures: Drawn before, by all that decides them.
        shelf: Changes opened from files, by name, to compare.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.bench = Bench()
        self.question: Question | None = None
        self.found: Map | None = None
        self.pictures: dict[Any, Image.Image] = {}
        self.shelf: dict[str, Change] = {}
        self._past: list[Bench] = []
        self._stop: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def can_undo(self) -> bool:
        """Whether there is a step back."""
        return bool(self._past)

    @property
    def busy(self) -> bool:
        """Whether a piece of work is under way."""
        return self._stop is not None

    def put(self, bench: Bench) -> None:
        """Replace the bench; `undo` brings the old one back."""
        self._past = [*self._past[-_UNDO + 1 :], self.bench]
        self.bench = bench

    def undo(self) -> None:
        """Go one step back.

        Raises:
            ValueError: There is none.
        """
        if not self._past:
            raise ValueError("nothing to undo: paint over something first.")
        self.bench = self._past.pop()

    def dial(self, strength: float) -> None:
        """Go so far with all that lies on the model, -1 to 2; turning further replaces the last turn.

        Raises:
            ValueError: Out of range, or there is no coat.
        """
        if not -1 <= strength <= 2:
            raise ValueError(
                f"the strength must be -1 to 2, got {strength}: 1 is the edit as made."
            )
        if not self.bench.coats:
            raise ValueError("there is no coat to dial yet: paint over something first.")
        before = self._past[-1] if self._past else None
        turned = replace(self.bench, strength=strength)
        if before is not None and before.joint is self.bench.joint:
            self.bench = turned
        else:
            self.put(turned)

    def shelve(self, name: str, change: Change) -> None:
        """Keep a change to compare, under its file's name; of too many the one opened first goes."""
        rest = {n: c for n, c in self.shelf.items() if n != name}
        self.shelf = dict([*rest.items(), (name, change)][-_SHELF:])

    def versions(self) -> dict[str, Change | None]:
        """Return what can be compared, by name: the model as it is, each coat and file, and all coats."""
        found: dict[str, Change | None] = {"the model as it is": None}
        found |= {f"coat {i}: {c.name}": c.change for i, c in enumerate(self.bench.coats, 1)}
        found |= {f"file {name}": change for name, change in self.shelf.items()}
        if self.bench.change is not None:
            found["all coats, as dialled"] = self.bench.change
        return found

    @contextmanager
    def working(self) -> Iterator[threading.Event]:
        """Reserve the session for one piece of work; the value is the event that stops it.

        Raises:
            ValueError: Something is under way.
        """
        with self._lock:
            if self._stop is not None:
                raise ValueError(
                    "something is still under way: wait until it is done, or press Stop first."
                )
            self._stop = threading.Event()
        try:
            yield self._stop
        finally:
            self._stop = None
            for key in list(self.pictures)[:-_PICTURES]:
                del self.pictures[key]

    def stop(self) -> bool:
        """Ask the work under way to stop; say whether there was any."""
        stop = self._stop
        if stop is None:
            return False
        stop.set()
        return True
