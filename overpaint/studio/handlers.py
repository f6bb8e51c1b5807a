"""What each control of the page does: values in, and updates out by the name of the part of the page they belong to.

No handler raises: what went wrong is said in the page, in the status line. Updates are plain values, HTML or choices.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from overpaint.studio import html
from overpaint.studio.app import Studio, Told
from overpaint.studio.scheduler import Done, Part, Progress, Stopped
from overpaint.studio.session import Session
from overpaint.studio.side_effects import Collateral
from overpaint.studio.tasks import Drawn, Map, Question
from overpaint.studio.uploads import Origin, model_name

__all__ = [
    "LONGEST_CONCEPT", "LONGEST_LIST", "LONGEST_PROMPT", "Choices", "Setting", "Update",
    "Value", "add", "bench", "choose", "compare", "dial", "draw", "paint", "question",
    "restore", "stop", "trace", "undo",
]  # fmt: skip

Update = dict[str, Any]
# Characters. The page's boxes end there too, but whoever speaks to the server without the page is not bound by them.
LONGEST_PROMPT, LONGEST_CONCEPT, LONGEST_LIST = 2000, 400, 8000


@dataclass(frozen=True)
class Choices:
    """New choices of a control, and which of them is chosen."""

    names: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Value:
    """A control's value, and whether it can be used."""

    value: Any
    usable: bool = True


@dataclass(frozen=True)
class Setting:
    """What the controls of the question hold; `pictures` seeds from `seed` on."""

    prompt: str
    concept: str
    seed: float
    pictures: float
    steps: float


def question(setting: Setting) -> Question:
    """Return the question of the controls.

    Raises:
        ValueError: A number is none, or out of range; or a text is too long.
    """
    try:
        seed, count, steps = int(setting.seed), int(setting.pictures), int(setting.steps)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            "seed, pictures and steps must be whole numbers: fill in what is empty."
        ) from error
    _short("prompt", setting.prompt, LONGEST_PROMPT)
    _short("words", setting.concept, LONGEST_CONCEPT)
    seeds = tuple(seed + i for i in range(min(count, 9)))
    return Question(setting.prompt or "", setting.concept or "", seeds, steps)


def bench(studio: Studio, key: str) -> Update:
    """Return all that shows what lies on the model."""
    session = studio.session(key)
    names = tuple(session.versions())
    path = studio.download(key)
    return {
        "coats": html.coats(session.bench),
        "strength": Value(session.bench.strength, bool(session.bench.coats)),
        "undo": Value(None, session.can_undo),
        "download": Value(path, path is not None),
        "first": Choices(names, names[0]),
        "second": Choices(names, names[-1]),
    }


def trace(studio: Studio, key: str, setting: Setting, pictures: bool) -> Iterator[Update]:
    """Draw the map; the pictures of an older one go."""

    def show(found: Map) -> Update:
        return {"map": html.heat_map(found), "restored": ""}

    yield from _shown(lambda: studio.trace(key, question(setting), pictures=pictures), show)


def restore(studio: Studio, key: str, cell: str) -> Iterator[Update]:
    """Draw what a cell of the map stands for; `cell` is `"row,column"`, as the page sends it."""

    def begin() -> Told:
        row, column = _cell(cell)
        return studio.restore(key, row, column)

    def show(found: Any) -> Update:
        session = studio.session(key)
        assert session.found is not None
        return {
            "restored": html.restored(found),
            "map": html.heat_map(session.found, _cell(cell)),
        }

    yield from _shown(begin, show)


def paint(
    studio: Studio, key: str, setting: Setting, new: str, method: str, preserve: str
) -> Iterator[Update]:
    """Lay a coat: the forecast at once, then pictures as they finish."""

    def begin() -> Told:
        _short("words to paint with", new, LONGEST_CONCEPT)
        _short("prompts to leave alone", preserve, LONGEST_LIST)
        kept = [line.strip() for line in (preserve or "").splitlines() if line.strip()]
        return studio.paint(key, question(setting), new or "", method=method, preserve=kept)

    def show(found: Collateral | Drawn | None) -> Update:
        if isinstance(found, Drawn):
            return _drawn(studio, key, found)
        return {"forecast": html.forecast(found), "drawn": "", **bench(studio, key)}

    yield from _shown(begin, show)


def draw(studio: Studio, key: str, setting: Setting) -> Iterator[Update]:
    """Draw before and after anew."""
    yield from _shown(
        lambda: studio.draw(key, question(setting)), lambda found: _drawn(studio, key, found)
    )


def dial(studio: Studio, key: str, setting: Setting, strength: float) -> Iterator[Update]:
    """Go further or less far, and draw."""
    yield from _moved(studio, key, setting, lambda session: session.dial(float(strength)))


def undo(studio: Studio, key: str, setting: Setting) -> Iterator[Update]:
    """Go one step back, and draw."""
    yield from _moved(studio, key, setting, lambda session: session.undo())


def choose(studio: Studio, key: str, model: str) -> Iterator[Update]:
    """Start anew on another model."""
    try:
        studio.choose(key, model)
        cleared = dict.fromkeys(("map", "restored", "drawn", "forecast", "compared", "facts"), "")
        yield {**cleared, **bench(studio, key), "status": html.note(f"{model} is on the easel.")}
    except ValueError as error:
        yield {"status": html.alert(str(error))}


def add(studio: Studio, key: str, path: str | None, setting: Setting) -> Iterator[Update]:
    """Open a file: a change becomes a coat, a picture of the studio gives its question back."""
    if not path:
        return

    def show(found: Collateral | Origin | str | None) -> Update:
        if isinstance(found, Origin):
            asked = found.question
            return {
                "prompt": asked.prompt, "concept": asked.concept, "seed": asked.seeds[0],
                "pictures": len(asked.seeds), "steps": asked.steps, "status": _whose(studio, key, found),
            }  # fmt: skip
        said = found if isinstance(found, str) else "The change lies on the model: draw to see it."
        forecast = {} if isinstance(found, str) else {"forecast": html.forecast(found)}
        return {**bench(studio, key), **forecast, "status": html.note(said)}

    yield from _shown(lambda: studio.add(key, path), show)


def compare(
    studio: Studio, key: str, setting: Setting, first: str, second: str
) -> Iterator[Update]:
    """Draw two versions at equal seeds, and say what they are."""

    def begin() -> Told:
        return studio.compare(key, question(setting), first, second)

    try:
        versions = studio.session(key).versions()
    except ValueError as error:
        yield {"status": html.alert(str(error))}
        return
    chosen = {name: versions[name] for name in (first, second) if name in versions}
    yield {"facts": html.facts(chosen)}
    yield from _shown(begin, lambda found: {"compared": html.grid(found)})


def stop(studio: Studio, key: str) -> Update:
    """Ask the work under way to stop."""
    try:
        running = studio.session(key).stop()
    except ValueError as error:
        return {"status": html.alert(str(error))}
    return {"status": html.note("Stopping after this step." if running else "Nothing runs.")}


def _whose(studio: Studio, key: str, found: Origin) -> str:
    """Say that a picture's question is back, and whether the model on the easel is the one that drew it."""
    mine = model_name(studio.session(key).model)
    if found.model in ("", mine):
        return html.note("The picture's prompt and settings are back: draw it again.")
    offered = found.model in map(model_name, studio.models)
    return html.alert(
        f"the picture's prompt and settings are back, but it was drawn by {found.model}, and {mine} is on the easel: "
        + (f"choose {found.model} above" if offered else f"open the studio with {found.model}")
        + " to draw it as it was."
    )


def _moved(
    studio: Studio, key: str, setting: Setting, move: Callable[[Session], None]
) -> Iterator[Update]:
    """Move the bench, show it, predict, and draw; what is stopped or fails is the end of it."""
    try:
        session = studio.session(key)
        with session.working():
            move(session)
    except ValueError as error:
        yield {"status": html.alert(str(error))}
        return
    yield bench(studio, key)
    told = yield from _shown(
        lambda: studio.predict(key), lambda found: {"forecast": html.forecast(found)}
    )
    if told:
        yield from draw(studio, key, setting)


def _drawn(studio: Studio, key: str, found: Drawn) -> Update:
    """Return the pictures, and once all are there a file of them."""
    page = {"drawn": html.grid(found)}
    return page | {"saved": Value(studio.keep(key, found))} if found.complete else page


def _shown(
    begin: Callable[[], Told], show: Callable[[Any], Update]
) -> Generator[Update, None, bool]:
    """Yield the updates of a piece of work, its progress and its end; says what went wrong, and returns if none did."""
    try:
        with closing(begin()) as told:  # type: ignore[type-var]
            for item in told:
                if isinstance(item, Progress):
                    yield {"status": html.progress(item)}
                elif isinstance(item, Part):
                    yield show(item.value)
                elif isinstance(item, Done):
                    yield {"status": "", **show(item.value)}
        return True
    except Stopped:
        yield {"status": html.note("Stopped. What was finished before is kept.")}
    except (ValueError, OSError) as error:
        yield {"status": html.alert(str(error))}
    except Exception as error:  # a fault of ours: said in the page, and the studio goes on
        yield {"status": html.alert(f"a fault of overpaint: {type(error).__name__}: {error}")}
    return False


def _short(name: str, text: str | None, most: int) -> None:
    if len(text or "") > most:
        raise ValueError(
            f"the {name} must be at most {most} characters, got {len(text or '')}: cut them short."
        )


def _cell(text: str) -> tuple[int, int]:
    """Return row and column of `"3,5"`.

    Raises:
        ValueError: It is something else.
    """
    parts: Sequence[str] = str(text).split(",")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError("that is no cell of the map: click one of its numbers.")
    return int(parts[0][:6]), int(parts[1][:6])
