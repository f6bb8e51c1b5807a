"""Work for many users on one machine: one computes at a time, and each gives way after every step.

Torch already uses all cores for one picture, so that two at once are no faster, need twice the memory, and round
differently when they share its threads. Taking turns keeps every picture what it is when drawn alone, bit for bit, and
a user who asks for a small thing waits for one step of the others and not for the whole of a long trace.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Done", "Part", "Progress", "Stopped", "Tell", "Turn", "Turns", "watch"]

_PATIENCE = 0.1  # seconds between two looks at whether a waiting piece of work was stopped


class Stopped(Exception):
    """The user asked to stop; what was under way is dropped and nothing else is touched."""


@dataclass(frozen=True)
class Progress:
    """How far the work is: `share` in [0, 1], what it does, and the seconds left if they can be told."""

    share: float
    what: str
    left: float | None = None


@dataclass(frozen=True)
class Part:
    """Something finished on the way, as the first picture of several."""

    value: Any


@dataclass(frozen=True)
class Done:
    """The result."""

    value: Any


class Turns:
    """First come, first served; who gives way goes to the end of the queue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = False
        self._waiting: deque[threading.Lock] = deque()

    @property
    def busy(self) -> bool:
        """Whether somebody computes."""
        return self._busy

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @contextmanager
    def turn(self, stop: threading.Event) -> Iterator["Turn"]:
        """Compute inside the block.

        Raises:
            Stopped: `stop` was set while waiting.
        """
        turn = Turn(self, stop)
        turn.take()
        try:
            yield turn
        finally:
            turn.hand_over()

    def take(self, stop: threading.Event) -> None:
        """Wait until nobody else computes.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        mine = threading.Lock()
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            mine.acquire()
            self._waiting.append(mine)
        while not mine.acquire(timeout=_PATIENCE):
            if not stop.is_set():
                continue
            with self._lock:
                if mine in self._waiting:  # else it was handed over a moment ago
                    self._waiting.remove(mine)
                    raise Stopped

    def hand_over(self) -> None:
        """Let the next one compute."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._busy = False


class Turn:
    """One user's right to compute."""

    def __init__(self, turns: Turns, stop: threading.Event) -> None:
        self._turns, self._stop = turns, stop
        self._held = False

    def take(self) -> None:
        """Wait for it; raises `Stopped`."""
        self._turns.take(self._stop)
        self._held = True

    def hand_over(self) -> None:
        """Give it up, if it is held."""
        if self._held:
            self._held = False
            self._turns.hand_over()

    def give_way(self) -> None:
        """Let all who wait go first; raises `Stopped`, and then the turn is gone."""
        if self._turns.waiting and not self._stop.is_set():
            self.hand_over()
            self.take()


class Tell:
    """What work calls between steps: reports, gives way, and ends it if the user asked to."""

    def __init__(self, turn: Turn, stop: threading.Event, into: "queue.Queue[Any]") -> None:
        self._turn, self._stop, self._into = turn, stop, into
        self._began, self._stage = time.monotonic(), ""

    def __call__(self, done: float, total: float, what: str) -> None:
        """Say that `done` of `total` is over.

        Raises:
            Stopped: The user asked to.
        """
        share = min(1.0, done / total) if total else 0.0
        stage = what.split()[0]
        if stage != self._stage:
            self._stage, self._began = stage, time.monotonic()
        spent = time.monotonic() - self._began
        left = spent * (1 - share) / share if share > 0.05 and spent > 1 else None
        self._into.put(Progress(share, what, left))
        self._turn.give_way()
        if self._stop.is_set():
            raise Stopped

    def show(self, value: Any) -> None:
        """Hand over something finished on the way."""
        self._into.put(Part(value))


def watch(
    turns: Turns, stop: threading.Event, work: Callable[[Tell], Any], *, every: float = 0.15
) -> Iterator[Progress | Part | Done]:
    """Run `work` on a thread of its own and yield what it tells; progress at most each `every` seconds.

    When the caller stops listening (a closed page) the work is stopped too.

    Raises:
        Stopped: `stop` was set.
        Exception: What `work` raised.
    """
    told: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            with turns.turn(stop) as turn:
                value = work(Tell(turn, stop, told))
            told.put(Done(value))
        except BaseException as error:
            told.put(error)

    if turns.busy:
        yield Progress(0.0, "waiting for others")
    thread = threading.Thread(target=run, name="overpaint studio", daemon=True)
    thread.start()
    try:
        yield from _told(told, every)
    finally:
        stop.set()
        thread.join()


def _told(told: "queue.Queue[Any]", every: float) -> Iterator[Progress | Part | Done]:
    last = 0.0
    while True:
        item = told.get()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, Progress):
            if time.monotonic() - last < every:
                continue
            last = time.monotonic()
        yield item
        if isinstance(item, Done):
            return
