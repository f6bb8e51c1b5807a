"""`overpaint letter`: write a word into a region of a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import (
    Device,
    Force,
    Json,
    Seed,
    Steps,
    as_path,
    box_text,
    not_empty,
    read_numbers,
    with_options,
    within,
)
from overpaint.cli.terminal import check_absent, check_writable, print_facts, progress

if TYPE_CHECKING:
    from overpaint.scene_text.finding import FoundText
    from overpaint.scene_text.planning import Plan
    from overpaint.scene_text.rewriting import Rewriting

__all__ = ["letter"]


def _rotated_box(text: str) -> str:
    angle = read_numbers(text, 5, "x,y,width,height,degrees")[4]
    if not -45 <= angle <= 45:
        raise typer.BadParameter(f"{angle:g} degrees are out of range: give -45 to 45.")
    return text


def _polygon(text: str) -> str:
    points = [read_numbers(point, 2, "x,y") for point in text.split()]
    if len(points) < 3:
        raise typer.BadParameter(
            f"{text!r} is no polygon: give at least 3 points, as '10,20 90,25 88,50 9,44'."
        )
    return text


@dataclass(frozen=True)
class RegionOptions:
    """Options of `letter` that name the region; exactly one of the first five."""

    box: Annotated[
        str | None,
        typer.Option(help="In pixels.", metavar="X,Y,WIDTH,HEIGHT", parser=box_text),
    ] = None
    rotated_box: Annotated[
        str | None,
        typer.Option(
            help="A box by its centre, turned clockwise.",
            metavar="X,Y,WIDTH,HEIGHT,DEGREES",
            parser=_rotated_box,
        ),
    ] = None
    polygon: Annotated[
        str | None,
        typer.Option(help="Three corners or more.", metavar="'X,Y X,Y X,Y ...'", parser=_polygon),
    ] = None
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture of equal size, white in the region.", parser=as_path),
    ] = None
    find: Annotated[
        str | None, typer.Option(help="Text in the picture that an OCR finds; needs rapidocr.")
    ] = None
    which: Annotated[
        int | None,
        typer.Option(
            help="With --find: which match, from 1.",
            show_default="the best",
            callback=within(1, 1000),
        ),
    ] = None


@dataclass(frozen=True)
class StyleOptions:
    """Options of `letter` that name the style."""

    font: Annotated[
        str | None, typer.Option(help="Such as courgette or Lato-Bold; or two, 'A and B'.")
    ] = None
    color: Annotated[str | None, typer.Option(help="Such as red.")] = None
    instruction: Annotated[
        str | None, typer.Option(help="In free words, instead of --font and --color.")
    ] = None


@dataclass(frozen=True)
class DrawingOptions:
    """Options of `letter` that name model, samples and output."""

    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.", parser=as_path)] = (
        Path("out.png")
    )
    force: Force = False
    samples: Annotated[
        int,
        typer.Option(help="Drawn from seed on; the best by OCR is kept.", callback=within(1, 64)),
    ] = 1
    seed: Seed = 0
    steps: Steps = 20
    model: Annotated[
        str,
        typer.Option(help="A lettering model's folder, or the shipped one.", callback=not_empty),
    ] = "lettering"
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print region, letters and style; write nothing.")
    ] = False


@with_options
def letter(
    image: Annotated[Path, typer.Argument(help="The picture.", parser=as_path)],
    text: Annotated[str, typer.Option(help="The word or short line to write.")],
    region: RegionOptions,
    style: StyleOptions,
    drawing: DrawingOptions,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write a word into a region of a picture.

    All other pixels stay as they are. Without --font, --color and --instruction the style of the letters beside the
    region is taken.

    \b
    overpaint letter sign.jpg --box 120,40,200,60 --text wizards -o out.png
    overpaint letter sign.jpg --find OPEN --text closed --color red --samples 4
    overpaint letter a.png --polygon '9,8 90,12 88,40 7,36' --text Hi --dry-run
    """  # noqa: D301
    from overpaint.images.read import load_picture
    from overpaint.model.loading import check_device
    from overpaint.scene_text import Lettering
    from overpaint.scene_text.planning import make_plan
    from overpaint.scene_text.rewriting import rewrite_samples

    check_device(device)
    _check_region(region)
    sheet = drawing.out.with_name(f"{drawing.out.stem}-samples.png")
    if not drawing.dry_run:
        _check_out(drawing, sheet)
    picture = load_picture(image, "image")[0]
    size = (picture.shape[1], picture.shape[2])
    model = Lettering.load(drawing.model)
    model.network.to(device)
    chosen, matches = _region(region, picture, size)
    names: dict[str, Any] = {
        "font": style.font, "color": style.color, "instruction": style.instruction,
    }  # fmt: skip
    plan = make_plan(size, chosen, text, model, **names)
    facts = _located_facts(matches, region) | _plan_facts(plan)
    if drawing.dry_run:
        print_facts(facts | {"written": "nothing: --dry-run"}, as_json=as_json)
        return
    check_writable(drawing.out.parent)
    with progress(as_json) as on_progress:
        result = rewrite_samples(
            picture, plan.area, text, **names, model=model, steps=drawing.steps, seed=drawing.seed,
            samples=drawing.samples, on_progress=on_progress,
        )  # fmt: skip
    _save(image, result, drawing, sheet)
    facts |= _result_facts(result)
    files = {"picture": str(drawing.out)} | ({"sheet": str(sheet)} if drawing.samples > 1 else {})
    print_facts(facts | files, as_json=as_json)


def _check_region(options: RegionOptions) -> None:
    """Raise unless exactly one option names the region.

    Raises:
        ValueError: None does, or several do, or `--which` is without `--find`.
    """
    names = ("box", "rotated_box", "polygon", "mask", "find")
    named = [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) is not None]
    if len(named) != 1:
        raise ValueError(
            f"one option must name the region, got {' and '.join(named) or 'none'}: give one of --box, --rotated-box, "
            "--polygon, --mask and --find."
        )
    if options.which is not None and options.find is None:
        raise ValueError("--which chooses among the matches of --find: leave it out.")


def _check_out(drawing: DrawingOptions, sheet: Path) -> None:
    if drawing.out.suffix.lower() != ".png":
        raise ValueError(
            f"the picture is saved as PNG, which keeps every pixel, not as {drawing.out.name!r}: end the name in "
            "'.png'."
        )
    check_absent(drawing.out, *([sheet] if drawing.samples > 1 else []), force=drawing.force)


def _region(
    options: RegionOptions, picture: Any, size: tuple[int, int]
) -> tuple[Any, "tuple[FoundText, ...]"]:
    """Return the region, and the matches of `--find`."""
    from overpaint.scene_text.finding import find_text

    if options.find is not None:
        matches = find_text(picture, options.find)
        number = options.which or 1
        if number > len(matches):
            raise ValueError(
                f"--which must be 1 to {len(matches)}, the number of matches, got {number}: {_listed(matches)}."
            )
        return matches[number - 1].corners, matches
    readers: dict[str, Callable[[Any], Any]] = {
        "box": lambda text: read_numbers(text, 4, ""),
        "rotated_box": lambda text: _turned(read_numbers(text, 5, "")),
        "polygon": lambda text: [read_numbers(point, 2, "") for point in text.split()],
        "mask": lambda path: _mask(path, size),
    }
    name = next(name for name in readers if getattr(options, name) is not None)
    return readers[name](getattr(options, name)), ()


def _turned(values: tuple[float, ...]) -> Any:
    """Return the corners of a box by its centre, turned clockwise, (4, 2)."""
    import numpy as np

    x, y, width, height, degrees = values
    if width <= 0 or height <= 0:
        raise ValueError(
            f"the box of --rotated-box must have a positive size, got {width:g}x{height:g}: give x, y, width, height."
        )
    turn = np.deg2rad(degrees)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    half = np.array([width, height]) / 2
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half @ axes + np.array([x, y])


def _mask(path: Path, size: tuple[int, int]) -> Any:
    """Return a mask, true where the picture of it is lighter than middle grey, bool (H, W)."""
    from overpaint.images.read import load_picture

    mask = load_picture(path, "mask")[0].mean(0) >= 0.5
    if tuple(mask.shape) != size:
        raise ValueError(
            f"the picture of --mask must have the size {size[1]}x{size[0]} of the picture, got "
            f"{mask.shape[1]}x{mask.shape[0]}: draw it again over the picture."
        )
    return mask


def _listed(matches: "tuple[FoundText, ...]") -> str:
    return ", ".join(f"{number} {_match(one)}" for number, one in enumerate(matches, 1))


def _match(one: "FoundText") -> str:
    x, y, width, height = one.box
    return f"{one.text!r} at {x},{y},{width},{height}"


def _located_facts(matches: "tuple[FoundText, ...]", options: RegionOptions) -> dict[str, Any]:
    if not matches:
        return {}
    number = options.which or 1
    rows = [
        f"{i} {_match(one)}, {one.similarity:.0%} alike{', taken' if i == number else ''}"
        for i, one in enumerate(matches, 1)
    ]
    if len(matches) > 1 and options.which is None:
        rows.append("the first is the best; choose another with --which")
    return {"found": rows}


def _plan_facts(plan: "Plan") -> dict[str, Any]:
    low, high = plan.area.corners.min(0), plan.area.corners.max(0)
    width, height = plan.area.size
    facts = {
        "region": f"{low[0]:g},{low[1]:g},{high[0] - low[0]:g},{high[1] - low[1]:g}",
        "upright": f"{width:.0f}x{height:.0f} pixels, {plan.relative_width:.1f} times as wide as the word",
        "line": f"columns {plan.box[0]:.1f} to {plan.box[1]:.1f}, letters {plan.start:.1f} to {plan.end:.1f}",
        "letters": f"{plan.stretch:.0%} of their natural width",
        "instruction": plan.instruction,
    }
    if plan.is_divided:
        wide = plan.window.size[0]
        facts["filled"] = (
            f"all but the middle {wide:.0f} pixels: the region is far wider than the word"
        )
    return facts


def _result_facts(result: "Rewriting") -> dict[str, Any]:
    facts: dict[str, Any] = {"seed": result.seeds[result.chosen]}
    if len(result.seeds) == 1:
        return facts
    if not result.readings:
        return facts | {
            "ranked": "no, the first is kept: install rapidocr, onnxruntime and rapidfuzz to rank"
        }
    rows = [
        f"seed {seed}: {reading or 'nothing'}{', kept' if index == result.chosen else ''}"
        for index, (seed, reading) in enumerate(zip(result.seeds, result.readings, strict=True))
    ]
    return facts | {"ranked": f"by {result.reader}", "readings": rows}


def _save(image: Path, result: "Rewriting", drawing: DrawingOptions, sheet: Path) -> None:
    from PIL import Image

    from overpaint.scene_text.pasting import paste, save_png
    from overpaint.scene_text.sheet import draw_sheet

    with Image.open(image) as original:
        save_png(paste(original, result), drawing.out)
    if drawing.samples > 1:
        save_png(draw_sheet(result), sheet)
