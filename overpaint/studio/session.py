"""The session of one user: the applied changes, undo, and the versions of the model to compare.

An `EditState` is immutable. An edit stores a new one and undo restores the old one, so an edit that is stopped or fails
leaves the session as it was.
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
_CACHED_PICTURES = 32  # after undo, the page shows pictures from this cache
_STOP_TIMEOUT = 120.0  # seconds to wait for a stopped task; it ends after its current step
_MAX_FILES = 8  # change files to compare; each may be as large as an upload


@dataclass(frozen=True, eq=False)
class AppliedChange:
    """A change that is applied to the model, and its name in the page."""

    name: str
    change: Change


@dataclass(frozen=True, eq=False)
class EditState:
    """The changes that are applied to the model.

    Attributes:
        changes: The single changes, oldest first.
        joint: One change that contains all of `changes`; `None` if there are none.
        strength: Strength at which `joint` is applied, -1 to 2.
        joint_strength: Strength that `joint` already contains: 1, or the strength at which a file was saved.
    """

    changes: tuple[AppliedChange, ...] = ()
    joint: Change | None = None
    strength: float = 1.0
    joint_strength: float = 1.0

    @property
    def change(self) -> Change | None:
        """`joint` at `strength`, to apply to the model; `None` for the original model."""
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
    """Event that stops a task when it is set.

    Attributes:
        is_replaceable: True if the next task of the session may stop this one.
        is_replaced: True if the next task has stopped this one.
        is_brief: True if the next task of the session waits for this one.
    """

    def __init__(self, is_replaceable: bool, is_brief: bool = False) -> None:
        super().__init__()
        self.is_replaceable, self.is_replaced = is_replaceable, False
        self.is_brief = is_brief


class Session:
    """State of one user, whose tasks run one at a time.

    Attributes:
        model: Name of the chosen model.
        visitor: Key of the browser that opened the session; empty if it has none.
        state: The changes that are applied to the model.
        trace_map: The last trace map; `None` before the first trace.
        picture_cache: The latest pictures. The key holds all settings that determine the pixels.
        files: Changes from opened files, by file name; the page compares them.
        saving: Held while the applied change is written, so that the file is that of the newest state.
        redraw_due: True if the strength changed since the pictures were drawn.
    """

    def __init__(self, model: str, visitor: str = "") -> None:
        self.model, self.visitor = model, visitor
        self.state = EditState()
        self.trace_map: TraceMap | None = None
        self.picture_cache: dict[Any, Image.Image] = {}
        self.files: dict[str, Change] = {}
        self._history: list[EditState] = []
        self.saving = threading.Lock()
        self.redraw_due = False
        self._stop: StopEvent | None = None
        self._task_ended = threading.Condition()

    @property
    def changes(self) -> tuple[AppliedChange, ...]:
        """The changes that are applied to the model, oldest first."""
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

    def check_strength(self, strength: float) -> None:
        """Raise if the strength cannot be set.

        Raises:
            ValueError: The strength is not in -1 to 2, or no change is applied.
        """
        if not -1 <= strength <= 2:
            raise ValueError(
                f"the strength must be -1 to 2, got {strength}: 1 applies the edit unchanged."
            )
        if not self.changes:
            raise ValueError(
                "no change is applied yet, so no strength can be set: make an edit first."
            )

    def set_strength(self, strength: float) -> None:
        """Set the strength of all applied changes; several calls in a row are one step for `undo`.

        Raises:
            ValueError: As `check_strength`.
        """
        self.check_strength(strength)
        previous = self._history[-1] if self._history else None
        state = replace(self.state, strength=strength)
        if previous is not None and previous.joint is self.state.joint:
            self.state = state
        else:
            self.set_state(state)

    def add_file(self, name: str, change: Change) -> None:
        """Store a change under its file name, to compare it; when there are too many, drop the oldest."""
        others = {n: c for n, c in self.files.items() if n != name}
        self.files = dict([*others.items(), (name, change)][-_MAX_FILES:])

    def stored_changes(self) -> Iterator[Change]:
        """Yield the changes that are in memory: of opened files, applied ones, and those that `undo` would restore."""
        yield from list(self.files.values())
        for state in (self.state, *self._history):
            yield from (applied.change for applied in state.changes)
            if state.joint is not None:
                yield state.joint

    def versions(self) -> dict[str, Change | None]:
        """Return the versions of the model that can be compared, by name."""
        versions: dict[str, Change | None] = {ORIGINAL: None}
        versions |= {f"edit {i}: {c.name}": c.change for i, c in enumerate(self.changes, 1)}
        versions |= {f"file {name}": change for name, change in self.files.items()}
        if self.state.change is not None:
            versions["all edits"] = self.state.change
        return versions

    @contextmanager
    def reserved(self, *, replaceable: bool = False, brief: bool = False) -> Iterator["StopEvent"]:
        """Reserve the session for one task during the `with` block, and return the event that stops the task.

        Args:
            replaceable: If true, the next task stops this one. If false, the next task raises while this one runs.
            brief: If true, the task takes no longer than writing a file, and the next task waits for it.

        Raises:
            ValueError: Another task runs and may not be stopped, or was stopped and has not ended in time.
        """
        end = time.monotonic() + _STOP_TIMEOUT
        with self._task_ended:
            while (running := self._stop) is not None and time.monotonic() < end:
                if running.is_replaceable:
                    running.is_replaced = True
                    running.set()
                elif not running.is_brief:
                    break
                self._task_ended.wait(0.1)
            if self._stop is not None:
                raise ValueError(
                    "another task of this page is still running: wait until it ends, or press Stop."
                )
            stop = self._stop = StopEvent(replaceable, brief)
        try:
            yield stop
        finally:
            with self._task_ended:
                self._stop = None
                self._task_ended.notify_all()
            for key in list(self.picture_cache)[:-_CACHED_PICTURES]:
                del self.picture_cache[key]

    def stop(self) -> bool:
        """Stop the running task after its current step, and return whether a task was running."""
        stop = self._stop
        if stop is None:
            return False
        stop.set()
        return True
