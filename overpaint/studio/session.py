"""The state of one user: the changes that are applied to the model, undo, and what can be compared.

Values are immutable: an edit replaces the `EditState` by a new one and undo restores the old one, so an edit that is
stopped or fails changes nothing.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from overpaint.edit import Change
from overpaint.studio.tasks import TraceMap

__all__ = ["ORIGINAL", "AppliedChange", "EditState", "Session", "StopEvent", "common_strength"]

ORIGINAL = "original model"  # name of the unedited model among the versions
_UNDO_STEPS = 40
_CACHED_PICTURES = 32  # so that undo shows its pictures at once
_PATIENCE = 120.0  # seconds; a task to be replaced ends after its present step
_FILES = 8  # change files to compare; each may be as large as an upload


@dataclass(frozen=True, eq=False)
class AppliedChange:
    """One change that is applied to the model, and the name to show for it."""

    name: str
    change: Change


@dataclass(frozen=True, eq=False)
class EditState:
    """The changes that are applied to the model.

    Attributes:
        changes: In the order in which they were made.
        joint: One change of all of them; `None` if there are none.
        strength: Strength at which they are applied, -1 to 2.
        joint_strength: Strength at which `joint` was made; not 1 for a file that was saved at another strength.
    """

    changes: tuple[AppliedChange, ...] = ()
    joint: Change | None = None
    strength: float = 1.0
    joint_strength: float = 1.0

    @property
    def change(self) -> Change | None:
        """The change to apply, `joint` at `strength`; `None` for the original model."""
        if self.joint is None or self.strength == 0:
            return None
        if self.strength == self.joint_strength:
            return self.joint
        scaled = (self.strength / self.joint_strength) * self.joint
        if self.joint_strength == 1:
            return scaled
        protocol = {k: v for k, v in scaled.protocol.items() if k != "strength"}
        if self.strength != 1:  # exactly, without the rounding of the factor
            protocol["strength"] = dict.fromkeys(scaled.pairs, self.strength)
        return replace(scaled, protocol=protocol)


def common_strength(change: Change) -> float | None:
    """Return the strength at which a change was saved, or `None` if its concepts have different ones."""
    strengths = change.protocol.get("strength", {})
    values = {float(strengths.get(old, 1.0)) for old in change.pairs} or {1.0}
    return values.pop() if len(values) == 1 else None


class StopEvent(threading.Event):
    """Stops a task when it is set.

    Attributes:
        is_replaceable: True if the next task of the session may stop this one.
        is_replaced: True if it did.
    """

    def __init__(self, is_replaceable: bool) -> None:
        super().__init__()
        self.is_replaceable, self.is_replaced = is_replaceable, False


class Session:
    """One user's state; it runs one task at a time.

    Attributes:
        model: Name of the chosen model.
        visitor: Key of the browser that opened the session; empty if it has none.
        state: The changes that are applied to it.
        trace_map: The last map; `None` before the first trace.
        picture_cache: Pictures drawn before, by everything that determines their pixels.
        files: Changes that were opened from files, by file name, to compare.
        redraw_due: True if the strength changed since the pictures were drawn.
    """

    def __init__(self, model: str, visitor: str = "") -> None:
        self.model, self.visitor = model, visitor
        self.state = EditState()
        self.trace_map: TraceMap | None = None
        self.picture_cache: dict[Any, Image.Image] = {}
        self.files: dict[str, Change] = {}
        self._history: list[EditState] = []
        self.redraw_due = False
        self._stop: StopEvent | None = None
        self._ended = threading.Condition()

    @property
    def changes(self) -> tuple[AppliedChange, ...]:
        """The changes that are applied to the model, in the order in which they were made."""
        return self.state.changes

    @property
    def can_undo(self) -> bool:
        """True if there is a step to undo."""
        return bool(self._history)

    @property
    def busy(self) -> bool:
        """True while a task runs."""
        return self._stop is not None

    def set_state(self, state: EditState) -> None:
        """Replace the state; `undo` restores the old one."""
        self._history = [*self._history[-_UNDO_STEPS + 1 :], self.state]
        self.state = state

    def undo(self) -> None:
        """Restore the state before the last edit.

        Raises:
            ValueError: There is nothing to undo.
        """
        if not self._history:
            raise ValueError("nothing to undo: make an edit first.")
        self.state = self._history.pop()

    def set_strength(self, strength: float) -> None:
        """Set the strength of all applied changes; several calls in a row are one step for `undo`.

        Raises:
            ValueError: The strength is not in -1 to 2, or no change is applied.
        """
        if not -1 <= strength <= 2:
            raise ValueError(
                f"the strength must be -1 to 2, got {strength}: 1 is the edit as it was made."
            )
        if not self.changes:
            raise ValueError(
                "no change is applied yet, so there is no strength: make an edit first."
            )
        previous = self._history[-1] if self._history else None
        state = replace(self.state, strength=strength)
        if previous is not None and previous.joint is self.state.joint:
            self.state = state
        else:
            self.set_state(state)

    def add_file(self, name: str, change: Change) -> None:
        """Keep a change under its file's name, to compare; only the files opened last are kept."""
        others = {n: c for n, c in self.files.items() if n != name}
        self.files = dict([*others.items(), (name, change)][-_FILES:])

    def versions(self) -> dict[str, Change | None]:
        """Return the versions of the model that can be compared, by name."""
        versions: dict[str, Change | None] = {ORIGINAL: None}
        versions |= {f"edit {i}: {c.name}": c.change for i, c in enumerate(self.changes, 1)}
        versions |= {f"file {name}": change for name, change in self.files.items()}
        if self.state.change is not None:
            versions["all edits"] = self.state.change
        return versions

    @contextmanager
    def reserved(self, *, replaceable: bool = False) -> Iterator["StopEvent"]:
        """Reserve the session for one task inside the block; the value is the event that stops the task.

        Args:
            replaceable: Stop this task, instead of refusing the next one, when the next one begins.

        Raises:
            ValueError: Another task runs, or one to be replaced does not end.
        """
        end = time.monotonic() + _PATIENCE
        with self._ended:
            while self._stop is not None and self._stop.is_replaceable and time.monotonic() < end:
                self._stop.is_replaced = True
                self._stop.set()
                self._ended.wait(0.1)
            if self._stop is not None:
                raise ValueError(
                    "another task of this page is still running: wait until it ends, or press Stop."
                )
            stop = self._stop = StopEvent(replaceable)
        try:
            yield stop
        finally:
            with self._ended:
                self._stop = None
                self._ended.notify_all()
            for key in list(self.picture_cache)[:-_CACHED_PICTURES]:
                del self.picture_cache[key]

    def stop(self) -> bool:
        """Stop the running task after its present step; return False if none runs."""
        stop = self._stop
        if stop is None:
            return False
        stop.set()
        return True
