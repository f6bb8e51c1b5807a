"""The studio without its page: models, sessions, and the task behind each button.

A method that takes long returns an iterator over events: `ProgressUpdate`s, a `PartialResult` for each result that is
finished early, and the `Result` at the end. The iterator can be closed at any time. An edit is then applied wholly or
not at all.
"""

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from overpaint.edit import Change
from overpaint.model import TextToImage, load
from overpaint.scorers import judge
from overpaint.scorers.judge import Judge
from overpaint.scorers.protocols import check_size
from overpaint.studio import side_effects, tasks, uploads
from overpaint.studio.scheduler import Event, Replaced, Scheduler, Stopped, Task, run_task
from overpaint.studio.session import AppliedChange, EditState, Session, common_strength
from overpaint.studio.side_effects import SideEffects
from overpaint.studio.tasks import LabelledPicture, PictureGrid, PromptSettings, TraceMap
from overpaint.studio.upload_store import MAX_BYTES_OF_ALL, UploadStore

__all__ = ["MAX_BYTES_OPEN", "MAX_SESSIONS", "Events", "Studio"]

Events = Iterator[Event]
MAX_SESSIONS = 200  # open at once
MAX_BYTES_OPEN = MAX_BYTES_OF_ALL  # of the changes of all sessions together, in memory
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


class Studio:
    """Models that all users share and no task writes to, and a session for each user.

    Attributes:
        models: The names that can be chosen; the first is the default.
        folder: Holds a folder of downloads for each session, which is deleted with the session.
        uploads: The uploaded files that are not read yet, in another folder next to `folder`.
        scheduler: The queue in which tasks wait.
    """

    def __init__(
        self,
        models: Sequence[str],
        folder: Path,
        *,
        device: str = "cpu",
        loader: Callable[..., TextToImage] = load,
    ) -> None:
        if not models:
            raise ValueError("no model to show: name at least one, for example icons.")
        self.models = tuple(dict.fromkeys(models))
        self.folder = folder
        self.uploads = UploadStore(folder.with_name("uploads"))
        self.scheduler = Scheduler()
        self._device, self._load = device, loader
        self._loaded: dict[str, TextToImage] = {}
        self._scorers: dict[str, Judge | str] = {}
        self._sessions: dict[str, Session] = {}  # the least recently used first
        self._opening: list[Change] = []  # changes of files that are being opened
        self._is_closed = False
        self._lock = threading.Lock()

    # --- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self, visitor: str = "") -> str:
        """Open a session and return its random key; above `MAX_SESSIONS` the least recently used idle one is closed.

        Args:
            visitor: Key of the browser that opens it; without one the session has no uploads.

        Raises:
            ValueError: There are `MAX_SESSIONS` sessions and all of them run a task, or the studio is closed.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            if self._is_closed:
                raise ValueError("the studio has ended: start it again.")
            idle = [name for name, session in self._sessions.items() if not session.busy]
            is_full = len(self._sessions) >= MAX_SESSIONS
            if is_full and not idle:
                raise ValueError(
                    f"the studio is full: all of its {MAX_SESSIONS} sessions are busy. Load the page again later."
                )
            if is_full:
                self._close(idle[0])
            self._sessions[key] = Session(self.models[0], visitor)
        return key

    def has_session(self, key: str) -> bool:
        """Return True if a session of this key is open."""
        return key in self._sessions

    def has_visitor(self, visitor: str) -> bool:
        """Return True if a browser has an open session."""
        with self._lock:
            return visitor != "" and any(s.visitor == visitor for s in self._sessions.values())

    def session(self, key: str | None) -> Session:
        """Return a session and mark it as the most recently used one.

        Raises:
            ValueError: The session was closed.
        """
        with self._lock:
            session = self._sessions.pop(key or "", None)
            if session is None or key is None:
                raise ValueError(
                    "this session has ended: load the page again. Files that you downloaded are not affected."
                )
            self._sessions[key] = session
        return session

    def close(self) -> None:
        """Close all sessions; no new one can be opened."""
        with self._lock:
            self._is_closed = True
            for key in list(self._sessions):
                self._close(key)

    def close_session(self, key: str | None) -> None:
        """Stop the session's task and delete its files; does nothing if the session is closed already."""
        with self._lock:
            self._close(key or "")

    def _close(self, key: str) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.stop()
            shutil.rmtree(self.folder / key, ignore_errors=True)
            if all(other.visitor != session.visitor for other in self._sessions.values()):
                self.uploads.remove_all(session.visitor)

    def __len__(self) -> int:
        """Return the number of open sessions."""
        return len(self._sessions)

    def choose_model(self, key: str, model: str) -> None:
        """Replace the session by a new one with another model.

        Raises:
            ValueError: The model is not one of `models`, or a task runs.
        """
        if model not in self.models:
            raise ValueError(
                f"unknown model {model!r}: choose one of {', '.join(self.models)}, or start the studio with it."
            )
        session = self.session(key)
        with session.reserved():
            if model != session.model:
                with self._lock:
                    if key in self._sessions:  # else the page was closed meanwhile
                        self._sessions[key] = Session(model, session.visitor)

    # --- trace --------------------------------------------------------------------------------------------------------

    def trace(self, key: str, settings: PromptSettings, *, pictures: bool = False) -> Events:
        """Trace the text encoder; the result is a `TraceMap`.

        With `pictures` the shipped judge scores a picture of each state. Where it cannot read the model's pictures,
        text features are measured instead and `TraceMap.fallback_reason` says why.
        """
        session = self.session(key)

        def work(task: Task) -> TraceMap:
            model = self._model(session, task)
            scorer = self._scorer(model) if pictures else None
            reason = scorer if isinstance(scorer, str) else ""
            trace_map = tasks.trace_text_encoder(
                model, settings, task.on_progress, scorer=None if isinstance(scorer, str) else scorer
            )  # fmt: skip
            session.trace_map = replace(trace_map, fallback_reason=reason)
            return session.trace_map

        return self._run(session, work)

    def restore(self, key: str, row: int, column: int) -> Events:
        """Draw the pictures of one cell of the last map; the result is three `LabelledPicture`s.

        Raises:
            ValueError: Nothing was traced yet.
        """
        session = self.session(key)
        trace_map = session.trace_map
        if trace_map is None:
            raise ValueError("there is no map yet: press Trace first, then click one of its cells.")

        def work(task: Task) -> tuple[LabelledPicture, ...]:
            model = self._model(session, task)
            return tasks.draw_restored(model, trace_map, row, column, task.on_progress)

        return self._run(session, work)

    # --- edit ---------------------------------------------------------------------------------------------------------

    def edit(
        self,
        key: str,
        settings: PromptSettings,
        new: str,
        *,
        method: str = "auto",
        preserve: Sequence[str] = (),
    ) -> Events:
        """Replace the concept by `new`; partial results are the `SideEffects` and the pictures as they are drawn."""
        session = self.session(key)

        def work(task: Task) -> PictureGrid:
            model = self._model(session, task)
            old = settings.concept
            change = tasks.solve_edit(
                model, old, new, task.on_progress, method=method, preserve=preserve
            )
            state = _add_change(model, session.state, AppliedChange(f"{old} → {new}", change), task)
            effects = _predict(model, state, task)
            session.set_state(state)
            task.publish(effects)
            return self._draw(session, model, settings, task)

        return self._run(session, work)

    @contextmanager
    def uploaded(self, key: str, upload: str | None) -> Iterator[Path]:
        """Yield the path of a file that the session's browser uploaded; the file is deleted at the end of the block.

        Raises:
            ValueError: The browser has no such upload, or the session was closed.
        """
        with self.uploads.opened(str(upload), self.session(key).visitor) as path:
            yield path

    def open_file(self, key: str, path: str | Path) -> Events:
        """Open a change file or a picture of the studio.

        The result is the `SideEffects` of a change, the `PictureOrigin` of a picture, or a text. A change that cannot
        be solved jointly with the applied ones is only kept to compare; the text says why.
        """
        session, name = self.session(key), uploads.shown_name(path)

        def work(task: Task) -> SideEffects | uploads.PictureOrigin | str | None:
            if name.lower().endswith(_PICTURE_SUFFIXES):
                return uploads.load_origin(path)
            model = self._model(session, task)
            change = uploads.load_change(path, model)
            with self._memory_for(change):
                try:
                    pairs = ", ".join(f"{old} → {new}" for old, new in change.pairs.items())
                    state = _add_change(
                        model, session.state, AppliedChange(pairs or name, change), task
                    )
                except ValueError as error:
                    session.add_file(name, change)
                    return f"{name} can be compared, but not applied with the other edits: {error}"
                effects = _predict(model, state, task)
                session.add_file(name, change)
                session.set_state(state)
            return effects

        return self._run(session, work)

    @contextmanager
    def _memory_for(self, change: Change) -> Iterator[None]:
        """Reserve memory for a change that is being opened, within the limit for all sessions together.

        Raises:
            ValueError: The limit is reached.
        """
        with self._lock:
            sessions = list(self._sessions.values())
            others = [c for session in sessions for c in session.stored_changes()]
            if uploads.bytes_of([change, *self._opening, *others]) > MAX_BYTES_OPEN:
                raise ValueError(
                    f"more than {MAX_BYTES_OPEN // 2**20} MiB of changes of all visitors are open: load the page again "
                    "to close yours, or open the file later."
                )
            self._opening = [*self._opening, change]
        try:
            yield
        finally:
            with self._lock:
                self._opening = [other for other in self._opening if other is not change]

    def draw(self, key: str, settings: PromptSettings, *, replaceable: bool = False) -> Events:
        """Draw with the original and the edited model; partial results and result are `PictureGrid`s.

        The session's next task stops this one if it is `replaceable`.
        """
        session = self.session(key)

        def work(task: Task) -> PictureGrid:
            return self._draw(session, self._model(session, task), settings, task)

        return self._run(session, work, replaceable=replaceable)

    def predict(self, key: str, *, replaceable: bool = False) -> Events:
        """Predict the side effects of the applied changes; the result is `SideEffects`, or `None` if there are none.

        The session's next task stops this one if it is `replaceable`.
        """
        session = self.session(key)

        def work(task: Task) -> SideEffects | None:
            return _predict(self._model(session, task), session.state, task)

        return self._run(session, work, replaceable=replaceable)

    # --- compare and save ---------------------------------------------------------------------------------------------

    def compare(self, key: str, settings: PromptSettings, first: str, second: str) -> Events:
        """Draw two of `Session.versions` at equal seeds; partial results and result are `PictureGrid`s.

        Raises:
            ValueError: A version does not exist.
        """
        session = self.session(key)
        versions = session.versions()
        for name in (first, second):
            if name not in versions:
                raise ValueError(f"the version {name!r} no longer exists: choose another one.")

        def work(task: Task) -> PictureGrid:
            chosen = [(name, versions[name]) for name in (first, second)]
            return tasks.draw_versions(
                self._model(session, task), settings, chosen, task.on_progress,
                publish=task.publish, cache=session.picture_cache,
            )  # fmt: skip

        return self._run(session, work)

    def save_change(self, key: str) -> Path | None:
        """Write the applied change at the chosen strength and return its path; `None` if there is none."""
        session = self.session(key)
        with session.saving:
            change = session.state.change
            if change is None:
                return None
            name = " and ".join(f"no {old}" for old in change.pairs) or "change"
            return uploads.save_change(change, self.folder / str(key), name)

    def save_pictures(self, key: str, grid: PictureGrid) -> Path:
        """Write one PNG of all pictures, which holds their settings, and return its path.

        Raises:
            ValueError: The session was closed.
        """
        model = self.session(key).model
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uploads.file_name(grid.settings.prompt, default='pictures')}.png"
        return uploads.save_picture(grid.sheet(), grid.settings, model, path)

    # --- shared by the tasks ------------------------------------------------------------------------------------------

    def _run(
        self, session: Session, work: Callable[[Task], Any], *, replaceable: bool = False
    ) -> Events:
        with session.reserved(replaceable=replaceable) as stop:
            try:
                yield from run_task(self.scheduler, stop, work)
            except Stopped:
                if stop.is_replaced:
                    raise Replaced from None
                raise

    def _draw(
        self, session: Session, model: TextToImage, settings: PromptSettings, task: Task
    ) -> PictureGrid:
        versions: list[tuple[str, Change | None]] = [("before", None)]
        if session.state.change is not None:
            versions.append(("after", session.state.change))
        return tasks.draw_versions(
            model, settings, versions, task.on_progress,
            publish=task.publish, cache=session.picture_cache,
        )  # fmt: skip

    def _model(self, session: Session, task: Task) -> TextToImage:
        """Return the session's model, which is loaded at its first use."""
        name = session.model
        if name not in self._loaded:
            task.on_progress(0, 1, f"loading {name}")
            if name not in self._loaded:  # else another task loaded it during `on_progress`
                self._loaded[name] = self._load(name, device=self._device)
        return self._loaded[name]

    def _scorer(self, model: TextToImage) -> Judge | str:
        """Return the shipped judge, or the reason why it cannot read the model's pictures."""
        if model.name not in self._scorers:
            scorer = judge.load(device=self._device)
            (height, width), side = model.size, scorer.size
            try:
                check_size(scorer, model)
                self._scorers[model.name] = scorer
            except ValueError:
                self._scorers[model.name] = (
                    f"the shipped judge reads {side} × {side} pixels, and this model draws {width} × {height}"
                )
        return self._scorers[model.name]


def _add_change(
    model: TextToImage, state: EditState, applied: AppliedChange, task: Task
) -> EditState:
    """Return the state with one more change.

    If the change is the first one, its strength is the one at which its file was saved. If more changes follow, it is
    converted to strength 1, because from then on one strength applies to all changes.

    Raises:
        ValueError: The change moves nothing, or cannot be solved jointly with the others.
    """
    saved = common_strength(applied.change)
    if saved == 0:
        raise ValueError("it was saved at strength 0, so it moves nothing.")
    if not state.changes:
        strength = saved if saved is not None and -1 <= saved <= 2 else 1.0
        return EditState((applied,), applied.change, strength, strength)
    first = state.changes[0]
    if state.joint_strength != 1:
        first = replace(first, change=_at_full_strength(first.change, state.joint_strength))
    changes = (first, *state.changes[1:], applied)
    joint = tasks.stack_changes(model, [c.change for c in changes], task.on_progress)
    return EditState(changes, joint, state.strength)


def _at_full_strength(change: Change, strength: float) -> Change:
    """Return a change that was made at `strength`, converted to strength 1."""
    full = (1 / strength) * change
    return replace(full, protocol={k: v for k, v in full.protocol.items() if k != "strength"})


def _predict(model: TextToImage, state: EditState, task: Task) -> SideEffects | None:
    change = state.change
    if change is None:
        return None
    return side_effects.predict(model, change, on_progress=task.on_progress)
