"""The studio without its page: models, sessions, and what each button does, as iterators over progress and results.

Each method that takes long yields `Progress`, then a `Part` for all that is finished on the way, and `Done` at the end.
It can be closed at any time; a session is never left half changed.
"""

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from overpaint.edit import Change
from overpaint.model import TextToImage, load
from overpaint.scorers import judge as features
from overpaint.scorers.judge import Judge
from overpaint.studio import tasks, uploads
from overpaint.studio.scheduler import (
    Done,
    Part,
    Progress,
    Tell,
    Turns,
    watch,
)
from overpaint.studio.session import Bench, Coat, Session
from overpaint.studio.side_effects import Collateral, collateral
from overpaint.studio.tasks import Drawn, Map, Question

__all__ = ["AFTER", "BEFORE", "SESSIONS", "Studio", "Told"]

Told = Iterator[Progress | Part | Done]
BEFORE, AFTER = "before", "after"
SESSIONS = 200  # open at once


class Studio:
    """Models that all share and nobody writes to, and a session for each user.

    Attributes:
        models: The names that can be chosen, the first by default.
        folder: Holds a folder for each session's downloads; emptied by `close`.
        turns: Who computes.
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
        self.turns = Turns()
        self._device, self._load = device, loader
        self._loaded: dict[str, TextToImage] = {}
        self._judges: dict[str, Judge | str] = {}
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    # --- sessions -----------------------------------------------------------------------------------------------------

    def open(self) -> str:
        """Begin a session and return its key, which cannot be guessed; of too many that longest unused goes.

        Raises:
            ValueError: All of too many are at work.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            idle = [old for old, session in self._sessions.items() if not session.busy]
            full = len(self._sessions) >= SESSIONS
            if full and not idle:
                raise ValueError(
                    f"the studio is full: all of its {SESSIONS} sessions are at work. Load the page again in a while."
                )
            if full:
                self._end(idle[0])
            self._sessions[key] = Session(self.models[0])
        return key

    def holds(self, key: str) -> bool:
        """Whether a session of this key is open."""
        return key in self._sessions

    def session(self, key: str | None) -> Session:
        """Return a session; it counts as used now.

        Raises:
            ValueError: It ended.
        """
        with self._lock:
            found = self._sessions.pop(key or "", None)
            if found is None or key is None:
                raise ValueError("this session has ended: load the page again. Downloads are yours.")  # fmt: skip
            self._sessions[key] = found  # the last of them
        return found

    def close(self, key: str | None) -> None:
        """End a session: its work stops, its files go. One that has ended already is fine."""
        with self._lock:
            self._end(key or "")

    def _end(self, key: str) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.stop()
            shutil.rmtree(self.folder / key, ignore_errors=True)

    def close_all(self) -> None:
        """End every session."""
        for key in list(self._sessions):
            self.close(key)

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def choose(self, key: str, model: str) -> None:
        """Start anew on another model.

        Raises:
            ValueError: It is not one of those that the studio was opened with.
        """
        if model not in self.models:
            raise ValueError(
                f"unknown model {model!r}: choose one of {', '.join(self.models)}, or open the studio with it."
            )
        session = self.session(key)
        with session.working():
            if model != session.model:
                with self._lock:
                    if key in self._sessions:  # else the page was closed meanwhile
                        self._sessions[key] = Session(model)

    # --- where is it? -------------------------------------------------------------------------------------------------

    def trace(self, key: str, question: Question, *, pictures: bool = False) -> Told:
        """Trace the text encoder; `Done` holds a `Map`.

        With `pictures` a judge looks at the picture of each state. Where it cannot read the model's pictures the map is
        by text features, and its `instead` says why.
        """
        session = self.session(key)

        def run(tell: Tell) -> Map:
            model = self._model(session, tell)
            judge = self._judge(model) if pictures else None
            if isinstance(judge, str):
                found = tasks.trace_text(model, question, tell)
                session.found = replace(found, instead=judge)
            else:
                session.found = tasks.trace_text(model, question, tell, judge=judge)
            return session.found

        return self._watch(session, run)

    def restore(self, key: str, row: int, column: int) -> Told:
        """Draw what one cell of the last map stands for; `Done` holds three `Picture`s."""
        session = self.session(key)
        found = session.found
        if found is None:
            raise ValueError("there is no map yet: press Trace first, then click one of its cells.")

        def run(tell: Tell) -> tuple[tasks.Picture, ...]:
            return tasks.restore(self._model(session, tell), found, row, column, tell)

        return self._watch(session, run)

    # --- paint over it ------------------------------------------------------------------------------------------------

    def paint(
        self, key: str, question: Question, new: str, *, method: str = "auto", preserve: Sequence[str] = ()
    ) -> Told:  # fmt: skip
        """Lay a coat over the question's concept; `Part`s are the `Collateral` and pictures as they finish."""
        session = self.session(key)

        def run(tell: Tell) -> Drawn:
            model = self._model(session, tell)
            old = question.concept
            change = tasks.make(model, old, new, tell, method=method, preserve=preserve)
            bench = _with_coat(model, session.bench, Coat(f"{old} → {new}", change), tell)
            predicted = _forecast(model, bench, tell)
            session.put(bench)
            tell.show(predicted)
            return self._drawn(session, model, question, tell)

        return self._watch(session, run)

    def add(self, key: str, path: str | Path) -> Told:
        """Open a change file or a picture of the studio; `Done` holds a `Collateral`, a `files.Origin`, or a text.

        A change that cannot be solved together with the coats is put on the shelf, to compare; the text says why.
        """
        session, name = self.session(key), uploads.shown_name(path)

        def run(tell: Tell) -> Collateral | uploads.Origin | str | None:
            if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif")):
                return uploads.read_picture(path)
            model = self._model(session, tell)
            change = uploads.read_change(path, model)
            try:
                pairs = ", ".join(f"{old} → {new}" for old, new in change.pairs.items())
                bench = _with_coat(model, session.bench, Coat(pairs or name, change), tell)
            except ValueError as error:
                session.shelve(name, change)
                return f"{name} can be compared, but not laid over the other coats: {error}"
            predicted = _forecast(model, bench, tell)
            session.shelve(name, change)
            session.put(bench)
            return predicted

        return self._watch(session, run)

    def draw(self, key: str, question: Question) -> Told:
        """Draw before and after with what lies on the model; `Part`s and `Done` hold a `Drawn`."""
        session = self.session(key)

        def run(tell: Tell) -> Drawn:
            return self._drawn(session, self._model(session, tell), question, tell)

        return self._watch(session, run)

    def predict(self, key: str) -> Told:
        """Predict what the coats, as dialled, do to other concepts; `Done` holds a `Collateral`, or `None` of none."""
        session = self.session(key)

        def run(tell: Tell) -> Collateral | None:
            return _forecast(self._model(session, tell), session.bench, tell)

        return self._watch(session, run)

    def compare(self, key: str, question: Question, first: str, second: str) -> Told:
        """Draw two of `Session.versions` at equal seeds; `Part`s and `Done` hold a `Drawn`."""
        session = self.session(key)
        versions = session.versions()
        for name in (first, second):
            if name not in versions:
                raise ValueError(f"there is no {name!r} any more: choose again what to compare.")

        def run(tell: Tell) -> Drawn:
            model = self._model(session, tell)
            chosen = [(name, versions[name]) for name in (first, second)]
            return tasks.draw(model, question, chosen, tell, show=tell.show, known=session.pictures)

        return self._watch(session, run)

    def download(self, key: str) -> Path | None:
        """Write the change that is applied, as dialled, and return its path; `None` if there is none."""
        session = self.session(key)
        change = session.bench.change
        if change is None:
            return None
        name = " and ".join(f"no {old}" for old in change.pairs) or "change"
        return uploads.write_change(change, self.folder / str(key), name)

    def keep(self, key: str, drawn: Drawn) -> Path:
        """Write a sheet of the pictures, which says how they were drawn, and return its path.

        Raises:
            ValueError: The session ended.
        """
        model = self.session(key).model
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uploads.safe_name(drawn.question.prompt, otherwise='pictures')}.png"
        return uploads.write_picture(drawn.sheet(), drawn.question, model, path)

    # --- what they share ----------------------------------------------------------------------------------------------

    def _watch(self, session: Session, run: Any) -> Told:
        with session.working() as stop:
            yield from watch(self.turns, stop, run)

    def _drawn(self, session: Session, model: TextToImage, question: Question, tell: Tell) -> Drawn:
        session.question = question
        versions: list[tuple[str, Change | None]] = [(BEFORE, None)]
        if session.bench.change is not None:
            versions.append((AFTER, session.bench.change))
        return tasks.draw(model, question, versions, tell, show=tell.show, known=session.pictures)

    def _model(self, session: Session, tell: Tell) -> TextToImage:
        """Return the session's model; loaded once, inside a turn."""
        name = session.model
        if name not in self._loaded:
            tell(0, 1, f"loading {name}")
            if name not in self._loaded:  # others may have loaded it while this one gave way
                self._loaded[name] = self._load(name, device=self._device)
        return self._loaded[name]

    def _judge(self, model: TextToImage) -> Judge | str:
        """Return the shipped judge, or why it cannot read the model's pictures."""
        if model.name not in self._judges:
            judge = features.load(device=self._device)
            (height, width), side = model.size, judge.size
            refusal = f"the shipped judge reads {side} × {side} pixels, and this model draws {width} × {height}"
            self._judges[model.name] = judge if height == width == side else refusal
        return self._judges[model.name]


def _with_coat(model: TextToImage, bench: Bench, coat: Coat, tell: Tell) -> Bench:
    coats = (*bench.coats, coat)
    joint = tasks.combine(model, [c.change for c in coats], tell)
    return Bench(coats, joint, bench.strength)


def _forecast(model: TextToImage, bench: Bench, tell: Tell) -> Collateral | None:
    change = bench.change
    return None if change is None else collateral(model, change, step=tell)
