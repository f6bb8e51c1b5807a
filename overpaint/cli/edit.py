"""`overpaint edit`: make a change file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import (
    ClipSkip,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    as_path,
    change_file,
    with_options,
    within,
)
from overpaint.cli.terminal import check_absent, check_writable, load_model, print_facts, progress

if TYPE_CHECKING:
    from overpaint.edit import Change

__all__ = ["edit"]

_SETTINGS = (
    "preserve", "auto", "rename", "neighbours", "preserve_weight", "ridge", "positions", "encoder",
)  # fmt: skip
# settings that a change given by --update hands on to the edit that is added to it
_INHERITED = ("ridge", "positions", "frames", "subtract_bias", "layer", "projection", "encoder")


@dataclass(frozen=True)
class EditOptions:
    """Options of `overpaint edit`."""

    erase: Annotated[
        list[str] | None, typer.Option(help="A concept to erase; may be given again.")
    ] = None
    replace: Annotated[
        list[str] | None,
        typer.Option(help='Its replacement, one for each --erase; "" for nothing.'),
    ] = None
    concepts: Annotated[
        Path | None,
        typer.Option(
            help="A .csv (erase,replace) or text file (one concept a line) of concepts.",
            parser=as_path,
        ),
    ] = None
    preserve: Annotated[
        list[str] | None, typer.Option(help="A prompt to preserve; may be given again.")
    ] = None
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose the preserved prompts and their weight by text.")
    ] = False
    repair: Annotated[
        bool, typer.Option(help="With --auto: also fit the MLP to the projection's residual.")
    ] = True
    tokens: Annotated[
        bool, typer.Option("--tokens", help="With --auto: also move token rows of rare words.")
    ] = False
    rename: Annotated[
        bool, typer.Option("--rename", help="Move token rows of rare words and nothing else.")
    ] = False
    any_token: Annotated[
        bool, typer.Option("--any-token", help="With --rename: also rows of frequent words.")
    ] = False
    neighbours: Annotated[
        bool, typer.Option(help="Also preserve the other labels of icons-judge.")
    ] = False
    preserve_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of a preserved prompt.",
            show_default="0.1, or that of --update",
            callback=within(0, 1e6),
        ),
    ] = None
    ridge: Annotated[
        float | None,
        typer.Option(
            help="Pull to the old weight.",
            show_default="0.01, or that of --update",
            callback=within(1e-12, 1e6),
        ),
    ] = None
    positions: Annotated[
        str | None,
        typer.Option(
            help="Tokens to edit: from_subject_to_end, last_subject, last_subject+eos, subject, subject_to_end.",
            show_default="from_subject_to_end, or those of --update",
        ),
    ] = None
    encoder: Annotated[
        str | None,
        typer.Option(
            help="all, text, or text2 for SDXL's second.", show_default="all, or that of --update"
        ),
    ] = None
    update: Annotated[
        Path | None,
        typer.Option(help="A change file to add to; its concepts stay.", parser=as_path),
    ] = None
    without: Annotated[
        list[str] | None,
        typer.Option(help="A concept to take out of --update; may be given again."),
    ] = None
    strength: Annotated[
        float,
        typer.Option(
            help="Strength of the concepts of --erase; without --erase, of all concepts of --update.",
            callback=within(-100, 100),
        ),
    ] = 1.0
    rank: Annotated[
        int | None,
        typer.Option(
            help="Cut to this rank for a small file; about 16 a concept.",
            callback=within(1, 100_000),
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute and print the change; write no file.")
    ] = False
    out: Annotated[
        Path, typer.Option(help="The change file.", callback=change_file, parser=as_path)
    ] = Path("change.safetensors")
    force: Force = False


@with_options
def edit(
    model: Model,
    options: EditOptions,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    clip_skip: ClipSkip = None,
    as_json: Json = False,
) -> None:
    """Make a change file. The model stays as it is.

    \b
    overpaint edit icons --erase "blob style" --replace "noto style" --auto
    overpaint edit icons --erase cat --replace dog --neighbours --rank 16
    overpaint edit icons --update a.safetensors --erase fish --replace bird
    overpaint edit icons --update a.safetensors --without cat --strength 0.5
    overpaint edit icons --concepts artists.csv --auto --dry-run
    overpaint edit icons --erase "openmoji" --replace "noto" --rename
    """  # noqa: D301
    from overpaint.edit import Change, complete
    from overpaint.edit.everyday_drift import with_collateral

    pairs = _pairs(options)
    _check(options, pairs)
    if not options.dry_run:
        check_absent(options.out, force=options.force)
        check_writable(options.out.parent)
    base = None if options.update is None else Change.load(options.update)
    if base is not None and options.rename:
        raise ValueError(
            "--rename moves token rows alone, which cannot be solved together with --update: leave one out."
        )
    if base is not None and pairs and ("terms" in base.protocol) != options.auto:
        raise ValueError(
            f"{str(options.update)!r} was made {'without' if options.auto else 'with'} --auto, and only edits of one "
            f"method can be solved together: {'leave --auto out' if options.auto else 'give --auto too'}."
        )
    loaded = load_model(model, device, dtype, clip_skip)
    addition = _solve(loaded, pairs, options, base, as_json) if pairs else None
    change = _combine(loaded, base, addition, options)
    if options.rank is not None:
        change = complete(loaded, change).compact(rank=options.rank)
    if "collateral" not in change.report:  # also after a scaling, which leaves it out
        change = with_collateral(loaded, change)
    facts = _facts(change)
    if options.dry_run:
        facts |= {
            "change": None if as_json else "(no file is written)",
            "weights": list(change.sites),
            "subject_tokens": _subject_tokens(loaded, change),
        }
    else:
        change.save(options.out)
        facts["change"] = str(options.out)
    print_facts(facts, as_json=as_json)


def _pairs(options: EditOptions) -> dict[str, str]:
    """Return the concepts of --erase and --concepts, with their replacements."""
    from overpaint.edit.pairs_file import load_pairs

    erase, replace = options.erase or [], options.replace or []
    if len(erase) != len(replace):
        raise ValueError(
            f'{len(erase)} --erase for {len(replace)} --replace: give one replacement for each concept, "" for nothing.'
        )
    pairs = {} if options.concepts is None else load_pairs(options.concepts)
    for old, new in zip(erase, replace, strict=True):
        if pairs.setdefault(old, new) != new:
            raise ValueError(
                f"{old!r} has two replacements, {pairs[old]!r} and {new!r}: keep one of them."
            )
    return pairs


def _check(options: EditOptions, pairs: dict[str, str]) -> None:
    if not pairs and options.update is None:
        raise ValueError(
            "nothing to edit: name a concept with --erase and its replacement with --replace, or a file with "
            "--concepts."
        )
    chosen = {"positions": options.positions is not None, "neighbours": options.neighbours}
    for name in [name for name, present in chosen.items() if present and options.auto]:
        raise ValueError(
            f"--auto chooses the {name} itself: leave --{name} out, or leave --auto out."
        )
    settings = {
        "--no-repair": not options.repair and not options.auto,
        "--tokens": options.tokens and not options.auto,
    }
    for name in [name for name, astray in settings.items() if astray]:
        raise ValueError(f"{name} is a setting of --auto: leave it out, or give --auto too.")
    _check_rename(options)
    if not pairs:
        _check_no_edit(options)
    if options.without and options.update is None:
        raise ValueError(
            "--without takes concepts out of a change file: name the file with --update."
        )


def _check_no_edit(options: EditOptions) -> None:
    """Raise if a setting of a new edit is given without a concept to erase, where nothing reads it."""
    defaults = EditOptions()
    for name in _SETTINGS:
        if getattr(options, name) != getattr(defaults, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is a setting of a new edit: name a concept with --erase, or leave {option} out."
            )


def _check_rename(options: EditOptions) -> None:
    """Raise if an option has no effect with --rename, or needs it."""
    if options.any_token and not options.rename:
        raise ValueError(
            "--any-token is a setting of --rename: leave it out, or give --rename too."
        )
    if not options.rename:
        return
    solved = ("auto", "preserve", "neighbours", "preserve_weight", "ridge", "positions", "rank")
    for option in solved:
        if getattr(options, option) not in (None, False, []):
            name = option.replace("_", "-")
            raise ValueError(
                f"--rename copies token rows and solves nothing, so --{name} has no effect: leave one out."
            )


def _solve(
    loaded: Any, pairs: dict[str, str], options: EditOptions, base: "Change | None", quiet: bool
) -> "Change":
    """Return the change for `pairs`, with the settings of `base` where none are given."""
    from overpaint.edit import quickfix, rename

    preserve = list(options.preserve or [])
    if options.rename:
        chosen: dict[str, Any] = {} if options.encoder is None else {"encoder": options.encoder}
        return rename(loaded, pairs, any_token=options.any_token, **chosen)
    if options.auto:
        return _automatic(loaded, pairs, preserve, options, quiet)
    settings: dict[str, Any] = {}
    if base is not None:
        settings = {name: base.protocol[name] for name in _INHERITED if name in base.protocol}
        settings["preserve_weight"] = base.protocol.get("preserve_weight") or 0.1
    for name in ("preserve_weight", "ridge", "positions", "encoder"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    for concept in pairs if options.neighbours else ():
        preserve += [p for p in _neighbours(concept, loaded.held_out) if p not in preserve]
    return quickfix(loaded, pairs, preserve=preserve, **settings)


def _automatic(
    loaded: Any, pairs: dict[str, str], preserve: list[str], options: EditOptions, quiet: bool
) -> "Change":
    from overpaint.edit import auto

    settings: dict[str, Any] = {"repair": options.repair, "tokens": options.tokens}
    for name in ("ridge", "preserve_weight", "encoder"):
        if (value := getattr(options, name)) is not None:
            settings[name] = value
    with progress(quiet) as on_progress:
        return auto(loaded, pairs, preserve=preserve, on_progress=on_progress, **settings)


def _combine(
    loaded: Any, base: "Change | None", addition: "Change | None", options: EditOptions
) -> "Change":
    """Return the base without the concepts of --without, and the addition, scaled by --strength, in one change."""
    from overpaint.edit import stack

    if base is not None and options.without:
        base = stack(loaded, [base], without=options.without)
    if addition is None:
        assert base is not None
        return base if options.strength == 1 else base * options.strength
    if options.strength != 1:
        addition = addition * options.strength
    return addition if base is None else stack(loaded, [base, addition])


def _facts(change: "Change") -> dict[str, Any]:
    """Return the printed figures: verdict, file, site, concepts, figures, moved tokens, endangered concepts."""
    from overpaint.edit import verdict

    sites, report = change.sites, change.report
    return {
        "verdict": verdict.describe(change),
        "change": "",
        "site": sites[0] if len(sites) == 1 else f"{len(sites)} weights",
        "concepts": [f"{old} → {new or '(nothing)'}" for old, new in change.pairs.items()],
        **{name: value for name, value in report.items() if isinstance(value, int | float)},
        **moved_and_endangered(report),
    }


def _subject_tokens(loaded: Any, change: "Change") -> list[str]:
    """Return each erased concept with the tokens that the first tokenizer splits it into."""
    tokenizer = loaded.pipe.tokenizer
    return [
        f"{concept}: {' | '.join(t.removesuffix('</w>') for t in tokenizer.tokenize(concept))}"
        for concept in change.pairs
    ]


def moved_and_endangered(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the tokens that a change moves and the concepts that its report names as endangered or not kept."""
    from overpaint.edit.methods.token_rows import edited_words

    tokens = edited_words(report)
    lists: dict[str, list[str]] = {"tokens": tokens} if tokens else {}
    for name in ("endangered", "not_kept"):
        rows: Sequence[Any] = report.get(name) or []
        lists[name] = [row["concept"] if isinstance(row, dict) else row for row in rows]
    collateral = report.get("collateral")
    if isinstance(collateral, Mapping) and isinstance(collateral.get("worst"), list):
        rows = [row for row in collateral["worst"] if isinstance(row, Mapping)]
        lists["everyday_captions"] = [str(row.get("caption", "")) for row in rows]
    for name in ("aliases", "contained_kept", "unedited_encoders", "notes"):
        if entries := report.get(name):
            lists[name] = [str(entry) for entry in entries]
    return lists


def _neighbours(concept: str, held_out: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """Return prompts of the shipped judge's other labels."""
    from overpaint import scorers
    from overpaint.probes import questions

    labels = scorers.load().labels
    kind, label = questions.parse_concept(concept, labels)
    return questions.preserve_prompts(kind, label, labels=labels, held_out=held_out)
