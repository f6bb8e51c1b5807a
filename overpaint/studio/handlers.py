"""The handler of each control: it takes the values of the controls and yields updates of the page.

An update maps names of parts of the page to their new content: HTML, a plain value, `Choices` or `Value`. A handler
does not raise: an error is shown in the page, in the status line.
"""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from overpaint.studio import html
from overpaint.studio.app import Events, Studio
from overpaint.studio.scheduler import PartialResult, ProgressUpdate, Replaced, Result, Stopped
from overpaint.studio.side_effects import SideEffects
from overpaint.studio.tasks import PictureGrid, PromptSettings, TraceMap
from overpaint.studio.uploads import PictureOrigin, model_name

__all__ = [
    "MAX_CONCEPT", "MAX_LIST", "MAX_PROMPT", "Choices", "Controls", "Update", "Value", "applied_changes",
    "choose_model", "compare", "draw", "edit", "leave_strength", "open_file", "open_upload", "prompt_settings",
    "redraw", "restore", "set_strength", "stop", "trace", "undo",
]  # fmt: skip

Update = dict[str, Any]
# Characters. The page's boxes have the same limits, but a client that does not use the page can send more.
MAX_PROMPT, MAX_CONCEPT, MAX_LIST = 2000, 400, 8000


@dataclass(frozen=True)
class Choices:
    """New choices of a control, and the chosen one."""

    names: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Value:
    """A control's value, and whether the control is enabled."""

    value: Any
    enabled: bool = True


@dataclass(frozen=True)
class Controls:
    """Values of the controls at the left, unchecked; `pictures` seeds from `seed` on are drawn."""

    prompt: str
    concept: str
    seed: float
    pictures: float
    steps: float


def prompt_settings(controls: Controls) -> PromptSettings:
    """Return the checked settings.

    Raises:
        ValueError: A number is missing or out of range, or a text is too long.
    """
    try:
        numbers = (controls.seed, controls.pictures, controls.steps)
        seed, count, steps = (int(_number("setting", number)) for number in numbers)
    except ValueError as error:
        raise ValueError(
            "seed, pictures and steps must be whole numbers: fill in the empty fields."
        ) from error
    _check_length("prompt", controls.prompt, MAX_PROMPT)
    _check_length("concept", controls.concept, MAX_CONCEPT)
    seeds = tuple(seed + i for i in range(min(count, 9)))
    return PromptSettings(controls.prompt or "", controls.concept or "", seeds, steps)


def applied_changes(studio: Studio, key: str) -> Update:
    """Return an update of every part that shows the applied changes."""
    session = studio.session(key)
    names = tuple(session.versions())
    path = studio.save_change(key)
    strength = session.state.strength
    return {
        "changes": html.changes(session.state),
        "strength": Value(strength, bool(session.changes)),
        "saved_strength": None if path is None else strength,
        "undo": Value(None, session.can_undo),
        "download": Value(path, path is not None),
        "first": Choices(names, names[0]),
        "second": Choices(names, names[-1]),
    }


def trace(studio: Studio, key: str, controls: Controls, pictures: bool) -> Iterator[Update]:
    """Draw the trace map, and remove the restored pictures of an older map."""

    def show(trace_map: TraceMap) -> Update:
        return {"map": html.heat_map(trace_map), "restored": ""}

    yield from _updates(
        lambda: studio.trace(key, prompt_settings(controls), pictures=pictures), show
    )


def restore(studio: Studio, key: str, cell: str) -> Iterator[Update]:
    """Draw the pictures of a cell of the map; `cell` is `"row,column"`, as the page sends it."""

    def begin() -> Events:
        row, column = _parse_cell(cell)
        return studio.restore(key, row, column)

    def show(pictures: Any) -> Update:
        trace_map = studio.session(key).trace_map
        assert trace_map is not None
        return {
            "restored": html.restored_pictures(pictures),
            "map": html.heat_map(trace_map, _parse_cell(cell)),
        }

    yield from _updates(begin, show)


def edit(
    studio: Studio, key: str, controls: Controls, new: str, method: str, preserve: str
) -> Iterator[Update]:
    """Edit the concept: first the side effects, then pictures as they are drawn."""

    def begin() -> Events:
        _check_length("new concept", new, MAX_CONCEPT)
        _check_length("list of prompts to preserve", preserve, MAX_LIST)
        prompts = [line.strip() for line in (preserve or "").splitlines() if line.strip()]
        settings = prompt_settings(controls)
        return studio.edit(key, settings, new or "", method=method, preserve=prompts)

    def show(value: SideEffects | PictureGrid | None) -> Update:
        if isinstance(value, PictureGrid):
            return _pictures(studio, key, value)
        return {
            "side_effects": html.side_effects(value),
            "drawn": "",
            **applied_changes(studio, key),
        }

    yield from _updates(begin, show)


def draw(
    studio: Studio, key: str, controls: Controls, *, replaceable: bool = False
) -> Iterator[Update]:
    """Draw with the original and the edited model; the next task stops this one if it is `replaceable`."""
    yield from _updates(
        lambda: studio.draw(key, prompt_settings(controls), replaceable=replaceable),
        lambda grid: _pictures(studio, key, grid),
    )


def set_strength(studio: Studio, key: str, strength: float | None) -> Iterator[Update]:
    """Set the strength of all edits and write the file to download; `redraw` draws afterwards.

    The control itself is updated only after an error, to the strength that is applied: the user may be typing.
    """
    try:
        session = studio.session(key)
        if strength is None:  # an empty box, for example before the digits after a minus sign
            return
        value = _number("strength", strength)
        if value == session.state.strength and session.changes:
            yield _strength_update(studio, key)
            return
        session.check_strength(value)  # before a drawing is replaced
        with session.reserved(brief=True):  # typing and leaving the box set it at the same time
            session.set_strength(value)
            session.redraw_due = True
            update = _strength_update(studio, key)
        yield {**update, "status": ""}
    except (ValueError, OSError) as error:
        alert = html.alert(str(error))
        update = applied_changes(studio, key) if studio.has_session(key) else {"changes": ""}
        # also beside the control: the status may be that of a drawing
        yield {**update, "changes": update["changes"] + alert, "status": alert}


def _strength_update(studio: Studio, key: str) -> Update:
    """Return `applied_changes` without the control of the strength; the page enables Download if it shows the same."""
    update = applied_changes(studio, key)
    del update["strength"]
    return {**update, "download": Value(update["download"].value, enabled=False)}


def leave_strength(studio: Studio, key: str, strength: float | None) -> Iterator[Update]:
    """Set the strength when the control is left; after an empty box, show the strength that is applied."""
    if strength is None and studio.has_session(key):
        yield applied_changes(studio, key)
    else:
        yield from set_strength(studio, key, strength)


def redraw(studio: Studio, key: str, controls: Controls) -> Iterator[Update]:
    """Predict side effects and draw, if the strength changed; the next task stops this one."""
    if studio.has_session(key) and studio.session(key).redraw_due:
        yield from _redraw(studio, key, controls)


def undo(studio: Studio, key: str, controls: Controls) -> Iterator[Update]:
    """Undo the last edit, and draw."""
    try:
        session = studio.session(key)
        with session.reserved(brief=True):
            session.undo()
            update = applied_changes(studio, key)
    except (ValueError, OSError) as error:
        yield {"status": html.alert(str(error))}
        return
    yield update
    yield from _redraw(studio, key, controls)


def choose_model(studio: Studio, key: str, model: str) -> Iterator[Update]:
    """Start a new session with another model."""
    try:
        studio.choose_model(key, model)
        cleared = dict.fromkeys(
            ("map", "restored", "drawn", "side_effects", "compared", "facts"), ""
        )
        status = html.note(f"The model is now {model}.")
        yield {**cleared, **applied_changes(studio, key), "status": status}
    except ValueError as error:
        yield {"status": html.alert(str(error))}


def open_upload(
    studio: Studio, key: str, controls: Controls, upload: str | None
) -> Iterator[Update]:
    """Open an uploaded file by its key; it is deleted afterwards."""
    if not upload:
        return
    try:
        with studio.uploaded(key, upload) as path:
            yield from open_file(studio, key, str(path), controls)
    except (ValueError, OSError) as error:
        yield {"status": html.alert(str(error))}


def open_file(studio: Studio, key: str, path: str | None, controls: Controls) -> Iterator[Update]:
    """Open a file: apply a change, or fill the controls with the settings of a picture."""
    if not path:
        return

    def show(value: SideEffects | PictureOrigin | str | None) -> Update:
        if isinstance(value, PictureOrigin):
            settings = value.settings
            return {
                "prompt": settings.prompt, "concept": settings.concept, "seed": settings.seeds[0],
                "pictures": len(settings.seeds), "steps": settings.steps,
                "status": _origin_status(studio, key, value),
            }  # fmt: skip
        if isinstance(value, str):
            return {**applied_changes(studio, key), "status": html.note(value)}
        return {
            **applied_changes(studio, key),
            "side_effects": html.side_effects(value),
            "status": html.note("The change is applied. Press Draw again to see its pictures."),
        }

    yield from _updates(lambda: studio.open_file(key, path), show)


def compare(
    studio: Studio, key: str, controls: Controls, first: str, second: str
) -> Iterator[Update]:
    """Draw two versions at equal seeds, and show their facts."""

    def begin() -> Events:
        return studio.compare(key, prompt_settings(controls), first, second)

    try:
        versions = studio.session(key).versions()
        chosen = {str(name): versions[str(name)] for name in (first, second)}
        yield {"facts": html.facts(chosen)}
    except KeyError as error:
        yield {"status": html.alert(f"there is no version {error}: choose another one.")}
        return
    except ValueError as error:
        yield {"status": html.alert(str(error))}
        return
    yield from _updates(begin, lambda grid: {"compared": html.grid(grid)})


def stop(studio: Studio, key: str) -> Update:
    """Stop the running task."""
    try:
        running = studio.session(key).stop()
    except ValueError as error:
        return {"status": html.alert(str(error))}
    return {"status": html.note("Stopping after this step." if running else "No task is running.")}


def _origin_status(studio: Studio, key: str, origin: PictureOrigin) -> str:
    """Return the status after a picture was opened; a warning if another model drew it."""
    current = model_name(studio.session(key).model)
    if origin.model in ("", current):
        return html.note("The settings of the picture are restored. Press Draw again to draw it.")
    is_offered = origin.model in map(model_name, studio.models)
    return html.alert(
        f"the settings of the picture are restored, but {origin.model} drew it and the model is now {current}: "
        + (
            f"choose {origin.model} above"
            if is_offered
            else f"start the studio with {origin.model}"
        )
        + " to draw the same picture."
    )


def _redraw(studio: Studio, key: str, controls: Controls) -> Iterator[Update]:
    """Predict side effects, and draw; ends early if stopped, replaced or failed."""
    studio.session(key).redraw_due = False
    is_finished = yield from _updates(
        lambda: studio.predict(key, replaceable=True),
        lambda value: {"side_effects": html.side_effects(value)},
    )
    if is_finished:
        yield from draw(studio, key, controls, replaceable=True)


def _pictures(studio: Studio, key: str, grid: PictureGrid) -> Update:
    """Return an update with the pictures, and with a file of them once all are drawn."""
    update = {"drawn": html.grid(grid)}
    return (
        update | {"saved": Value(studio.save_pictures(key, grid))} if grid.is_complete else update
    )


def _updates(
    begin: Callable[[], Events], show: Callable[[Any], Update]
) -> Generator[Update, None, bool]:
    """Yield the updates of a task: progress, results or an error message. Return True if there was no error."""
    try:
        with closing(begin()) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, ProgressUpdate):
                    yield {"status": html.progress(event)}
                elif isinstance(event, PartialResult):
                    yield show(event.value)
                elif isinstance(event, Result):
                    yield {"status": "", **show(event.value)}
        return True
    except Replaced:
        return False
    except Stopped:
        yield {"status": html.note("Stopped. Results that were finished before are kept.")}
    except (ValueError, OSError) as error:
        yield {"status": html.alert(str(error))}
    except Exception as error:  # a bug of overpaint: shown in the page, and the studio continues
        yield {"status": html.alert(f"a bug in overpaint: {type(error).__name__}: {error}")}
    return False


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"the {name} must be a number, got {repr(value)[:40]}: fill in the field.")
    return float(value)


def _check_length(name: str, text: str | None, limit: int) -> None:
    if not isinstance(text, str | None):
        raise ValueError(f"the {name} must be a text, got {text!r}: load the page again.")
    if len(text or "") > limit:
        raise ValueError(
            f"the {name} must be at most {limit} characters, got {len(text or '')}: shorten it."
        )


def _parse_cell(cell: str) -> tuple[int, int]:
    """Return row and column of `"3,5"`.

    Raises:
        ValueError: The text has another form.
    """
    parts = str(cell).split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError("this is not a cell of the map: click one of its numbers.")
    return int(parts[0][:6]), int(parts[1][:6])
