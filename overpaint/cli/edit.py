"""`overpaint edit` and `overpaint apply`: make a change file, and use it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.terminal import (
    Device,
    Json,
    Model,
    check_writable,
    load_model,
    print_facts,
    progress,
)

if TYPE_CHECKING:
    from overpaint.edit import Change

__all__ = ["apply", "edit"]

_KEPT = ("ridge", "positions", "frames", "subtract_bias", "layer", "projection", "encoder")


def edit(
    model: Model,
    erase: Annotated[
        list[str] | None, typer.Option(help="What to paint over; may be given again.")
    ] = None,
    replace: Annotated[
        list[str] | None, typer.Option(help="What to put in its place, as often.")
    ] = None,
    preserve: Annotated[
        list[str] | None, typer.Option(help="A prompt to leave alone; may be given again.")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose what to preserve, and how heavily, from text.")
    ] = False,
    repair: Annotated[
        bool, typer.Option(help="With --auto: let the MLP take up what the projection leaves.")
    ] = True,
    tokens: Annotated[
        bool, typer.Option(help="With --auto: move token rows where no other prompt has them.")
    ] = True,
    neighbours: Annotated[
        bool, typer.Option(help="Preserve what the judge knows besides.")
    ] = False,
    preserve_weight: Annotated[
        float | None,
        typer.Option(help="Weight of a preserved prompt.", show_default="0.1, or as updated"),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(help="Pull towards the old weight.", show_default="0.01, or as updated"),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Which tokens: from_subject_to_end, last_subject, last_subject+eos, subject, subject_to_end.",
            show_default="from_subject_to_end, or as updated",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="text, or text2 for SDXL's second.", show_default="text, or as updated"),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="A change file to add to; all its concepts stay.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="A concept to take out of --update; may be given again."),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="How far to go: of what --erase names, else of all of --update.")
    ] = 1.0,
    rank: Annotated[
        int | None, typer.Option(help="Cut to this rank, for a small file; about 16 a concept.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The change file.")] = Path("change.safetensors"),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make a change file; the model is not touched.

    \b
    overpaint edit icons --erase "openmoji style" --replace "noto style" --auto --rank 16
    overpaint edit icons --erase "openmoji style" --replace "noto style" --neighbours --out a.safetensors
    overpaint edit icons --update a.safetensors --erase "a cat" --replace "a dog" --out b.safetensors
    overpaint edit icons --update b.safetensors --without "a cat" --strength 0.5 --out c.safetensors
    """  # noqa: D301
    from overpaint.edit import Change, words

    erase, replace = list(erase or []), list(replace or [])
    _check(erase, replace, update, without)
    check_writable(out.parent)
    old = None if update is None else Change.load(update)
    loaded = load_model(model, device)
    told: dict[str, Any] = {}
    if old is not None:
        told = {name: old.protocol[name] for name in _KEPT if name in old.protocol}
        told |= {"preserve_weight": old.protocol.get("preserve_weight") or 0.1}
        old = _less(old, without or [], loaded)
    given = {"preserve_weight": preserve_weight, "ridge": ridge, "positions": positions}
    given["encoder"] = encoder
    told |= {name: value for name, value in given.items() if value is not None}
    made: Change | None = None
    if erase and auto:
        given |= {"repair": repair, "tokens": tokens}
        made = _automatic(loaded, erase, replace, list(preserve or []), given, as_json)
    elif erase:
        made = _made(loaded, erase, replace, list(preserve or []), neighbours, told)
    change = _together(loaded, old, made, strength)
    looked = {name: change.report.get(name, []) for name in ("endangered", "not_kept")}
    if rank is not None:
        change = change.complete(loaded).compact(rank=rank)
    change.save(out)
    facts = {key: value for key, value in change.report.items() if isinstance(value, int | float)}
    if moved := words.moved(change.report):
        facts |= {"tokens": moved}
    for name, rows in looked.items():
        facts |= {name: [row["concept"] if isinstance(row, dict) else row for row in rows]}
    concepts = [f"{old} → {new}" for old, new in change.pairs.items()]
    site = change.site if len(change.movements) == 1 else f"{len(change.movements)} weights"
    print_facts({"change": str(out), "site": site, "concepts": concepts, **facts}, as_json=as_json)


def apply(
    model: Model,
    change: Annotated[Path, typer.Argument(help="The change file.")],
    out: Annotated[Path, typer.Option(help="A new folder for the edited model.")],
    strength: Annotated[
        float, typer.Option(help="How far to move: 0 not at all, 1 all the way.")
    ] = 1.0,
    without: Annotated[
        list[str] | None, typer.Option(help="A concept to leave as it was; may be given again.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write an edited copy of a model, as a diffusers folder.

    \b
    overpaint apply icons change.safetensors --out edited
    overpaint apply icons change.safetensors --strength 0.5 --without "a cat" --out half
    """  # noqa: D301
    from overpaint.edit import Change, export

    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists already: name a new folder with --out.")
    check_writable(out.parent)
    found = Change.load(change)
    loaded = load_model(model, device)
    found = _less(found, without or [], loaded)
    path = export.folder(loaded, found if strength == 1 else found * strength, out)
    print_facts({"model": str(path)}, as_json=as_json)


def _check(
    erase: Sequence[str], replace: Sequence[str], update: Path | None, without: Sequence[str] | None
) -> None:
    if len(erase) != len(replace):
        raise ValueError(
            f"{len(erase)} --erase for {len(replace)} --replace: give one replacement for each concept."
        )
    if not erase and update is None:
        raise ValueError(
            "nothing to edit: name a concept with --erase and what to put in its place with --replace."
        )
    if without and update is None:
        raise ValueError(
            "--without takes concepts out of a change file: name the file with --update."
        )


def _made(
    loaded: Any,
    erase: Sequence[str],
    replace: Sequence[str],
    preserve: list[str],
    neighbours: bool,
    settings: dict[str, Any],
) -> "Change":
    from overpaint.edit import quickfix

    for text in erase if neighbours else ():
        preserve += [p for p in _neighbours(text, loaded.held_out) if p not in preserve]
    pairs = dict(zip(erase, replace, strict=True))
    return quickfix(loaded, pairs, preserve=preserve, **settings)


def _automatic(
    loaded: Any,
    erase: Sequence[str],
    replace: Sequence[str],
    preserve: list[str],
    given: dict[str, Any],
    as_json: bool,
) -> "Change":
    from overpaint.edit import auto

    unknown = [name for name in ("positions", "encoder") if given[name] is not None]
    if unknown:
        raise ValueError(
            f"--auto chooses the {unknown[0]} itself: leave --{unknown[0]} out, or leave --auto out."
        )
    settings = {
        name: given[name]
        for name in ("ridge", "preserve_weight", "repair", "tokens")
        if given[name] is not None
    }
    with progress(as_json) as stage:
        return auto(
            loaded, dict(zip(erase, replace, strict=True)), preserve=preserve, on_progress=stage, **settings
        )  # fmt: skip


def _less(change: "Change", concepts: Sequence[str], loaded: Any) -> "Change":
    """Return `change` without `concepts`, its preserve terms read again where that takes them."""
    from overpaint.edit import stack

    return stack(loaded, [change], without=concepts) if concepts else change


def _together(
    loaded: Any, old: "Change | None", made: "Change | None", strength: float
) -> "Change":
    from overpaint.edit import stack

    if made is not None:
        made = made if strength == 1 else made * strength
        return made if old is None else stack(loaded, [old, made])
    assert old is not None
    return old if strength == 1 else old * strength


def _neighbours(concept: str, held_out: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """Return what the shipped judge knows besides `concept`, as prompts."""
    from overpaint.probes import questions
    from overpaint.scorers import judge

    labels = judge.load().labels
    kind, label = questions.concept(concept, labels)
    return questions.neighbours(kind, label, labels=labels, held_out=held_out)
