"""A first-in-first-out queue of tasks, of which one computes at a time, and the events that a running task sends.

A task yields its slot after every step, so a short task waits for one step of a long one and not for its end. Torch
uses all cores for one picture already: two tasks at once would not be faster, would need twice the memory, and would
round differently because they share torch's threads. One at a time, every picture has the same pixels, bit for bit, as
when it is drawn alone.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Event",
    "PartialResult",
    "ProgressUpdate",
    "Replaced",
    "Result",
    "Scheduler",
    "Stopped",
    "Task",
    "run_task",
]

_POLL = 0.1  # seconds after which a waiting task checks again whether it was stopped


class Stopped(Exception):
    """Raised inside a task that the user stopped; unfinished results are dropped and nothing else changes."""


class Replaced(Stopped):
    """Raised inside a task that the user's next action stopped."""


@dataclass(frozen=True)
class ProgressUpdate:
    """Progress of a task: the share that is done in [0, 1], a label, and the seconds left if they can be estimated."""

    share: float
    label: str
    seconds_left: float | None = None


@dataclass(frozen=True)
class PartialResult:
    """A result that is finished before the task is, for example the first of several pictures."""

    value: Any


@dataclass(frozen=True)
class Result:
    """The return value of a task."""

    value: Any


Event = ProgressUpdate | PartialResult | Result


class Scheduler:
    """FIFO queue of slots: the first one holds the processor; a holder that yields re-queues at the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = (
            deque()
        )  # a ticket for each slot; the first one is the holder's

    @property
    def busy(self) -> bool:
        """True while a task runs."""
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        """Number of tasks in the queue, without the one that runs."""
        return max(0, len(self._queue) - 1)

    @contextmanager
    def slot(self, stop: threading.Event) -> Iterator[Callable[[], None]]:
        """Run the block while no other slot's block runs.

        The `with` statement returns a function. A call of it lets all waiting slots run, and returns when it is this
        slot's turn again.

        Args:
            stop: Once it is set, waiting ends with `Stopped`, in the block or before it.

        Raises:
            Stopped: `stop` was set while waiting.
        """
        ticket = object()
        try:
            self._enqueue(ticket, stop)
            yield lambda: self._enqueue(ticket, stop)
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _enqueue(self, ticket: object, stop: threading.Event) -> None:
        """Move a ticket to the end of the queue and wait until it is the first."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._queue.append(ticket)
            self._changed.notify_all()
            while self._queue[0] is not ticket:
                if stop.is_set():
                    raise Stopped
                self._changed.wait(_POLL)


class Task:
    """Handle of a running task: reports progress and partial results, and yields its slot between steps."""

    def __init__(
        self, yield_slot: Callable[[], None], stop: threading.Event, events: "queue.Queue[Any]"
    ) -> None:
        self._yield_slot, self._stop, self._events = yield_slot, stop, events
        self._stage_start, self._stage = time.monotonic(), ""

    def on_progress(self, done: float, total: float, label: str) -> None:
        """Send a `ProgressUpdate`, then let waiting tasks run.

        The time left is estimated from the time since the first word of `label` changed.

        Raises:
            Stopped: The user stopped the task.
        """
        share = min(1.0, done / total) if total else 0.0
        stage = label.split()[0]
        if stage != self._stage:
            self._stage, self._stage_start = stage, time.monotonic()
        spent = time.monotonic() - self._stage_start
        left = spent * (1 - share) / share if share > 0.05 and spent > 1 else None
        self._events.put(ProgressUpdate(share, label, left))
        self._yield_slot()
        if self._stop.is_set():
            raise Stopped

    def publish(self, value: Any) -> None:
        """Send a `PartialResult`."""
        self._events.put(PartialResult(value))


def run_task(
    scheduler: Scheduler,
    stop: threading.Event,
    work: Callable[[Task], Any],
    *,
    interval: float = 0.15,
) -> Iterator[Event]:
    """Run `work` in a new thread and yield its events; the last one is its `Result`.

    When the caller closes the iterator, for example because the page was closed, the task is stopped too.

    Args:
        scheduler: The queue that the task waits in.
        stop: Stops the task when it is set.
        work: Called with a `Task`; its return value is the result.
        interval: Least seconds between two progress updates; updates in between are dropped.

    Raises:
        Stopped: `stop` was set.
        Exception: Any exception that `work` raised.
    """
    events: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            with scheduler.slot(stop) as yield_slot:
                value = work(Task(yield_slot, stop, events))
            events.put(Result(value))
        except BaseException as error:
            events.put(error)

    if scheduler.busy:
        yield ProgressUpdate(0.0, "waiting for other users")
    thread = threading.Thread(target=run, name="overpaint studio", daemon=True)
    thread.start()
    try:
        yield from _read_events(events, interval)
    finally:
        stop.set()
        thread.join()


def _read_events(events: "queue.Queue[Any]", interval: float) -> Iterator[Event]:
    last_update = 0.0
    while True:
        event = events.get()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, ProgressUpdate):
            if time.monotonic() - last_update < interval:
                continue
            last_update = time.monotonic()
        yield event
        if isinstance(event, Result):
            return
