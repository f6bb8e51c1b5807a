"""`overpaint image`: move, drag or paste objects of a picture, or change their look."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import (
    Device,
    Dtype,
    Force,
    Json,
    Seed,
    as_path,
    box_text,
    not_empty,
    read_numbers,
    with_options,
    within,
)
from overpaint.cli.terminal import (
    check_absent,
    check_writable,
    load_model,
    print_facts,
    progress,
)

if TYPE_CHECKING:
    from overpaint.image_edit import Edited

__all__ = ["image"]

_FILES = ("picture.png", "raw.png", "pasted.png", "mask.png", "edit.json")
_OPTIONS = {
    "move": ("mask", "box", "offset", "scale"),
    "drag": ("mask", "box", "points"),
    "landmarks": ("points",),
    "paste": ("reference", "reference_mask", "reference_box", "position", "scale"),
    "appearance": ("mask", "box", "reference", "reference_mask", "reference_box"),
}
"""Options of each task; those of `_OPTIONAL` may be left out."""
_OPTIONAL = ("scale",)


def _pair(text: str) -> str:
    read_numbers(text, 2, "x,y")
    return text


def _points(text: str) -> str:
    count = len([read_numbers(point, 2, "x,y") for point in text.split()])
    if count < 2 or count % 2:
        raise typer.BadParameter(
            f"{text!r} holds {count} points: give a start and an end for each drag, as '40,60 52,60'."
        )
    return text


@dataclass(frozen=True)
class TaskOptions:
    """Options of `image` that say what is edited."""

    mask: Annotated[
        Path | None,
        typer.Option(help="A picture, white on the object; drag: what may change.", parser=as_path),
    ] = None
    box: Annotated[
        str | None,
        typer.Option(help="Instead of a mask.", metavar="X,Y,WIDTH,HEIGHT", parser=box_text),
    ] = None
    offset: Annotated[
        str | None,
        typer.Option(help="move: pixels right and down.", metavar="X,Y", parser=_pair),
    ] = None
    scale: Annotated[
        float | None,
        typer.Option(help="move, paste: factor of the size.", callback=within(0.1, 10)),
    ] = None
    points: Annotated[
        str | None,
        typer.Option(
            help="drag, landmarks: starts and ends.", metavar="'X,Y X,Y ...'", parser=_points
        ),
    ] = None
    reference: Annotated[
        Path | None,
        typer.Option("--from", help="paste, appearance: other picture.", parser=as_path),
    ] = None
    reference_mask: Annotated[
        Path | None, typer.Option("--from-mask", help="White on its object.", parser=as_path)
    ] = None
    reference_box: Annotated[
        str | None,
        typer.Option(
            "--from-box", help="Instead of that mask.", metavar="X,Y,WIDTH,HEIGHT", parser=box_text
        ),
    ] = None
    position: Annotated[
        str | None,
        typer.Option(help="paste: where the centre goes.", metavar="X,Y", parser=_pair),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """Options of `image` that name model, settings and output."""

    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", parser=as_path)
    ] = Path("runs/image")
    force: Force = False
    model: Annotated[
        str, typer.Option(help="A zoo name, a folder, or a hub id.", callback=not_empty)
    ] = "icons"
    preset: Annotated[str, typer.Option(help="overpaint, or published (DiffEditor).")] = "overpaint"
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of inversion, and of denoising.",
            show_default="the preset's",
            callback=within(2, 1000),
        ),
    ] = None
    size: Annotated[
        int | None,
        typer.Option(
            help="Longer side of the inverted crop.",
            show_default="the model's",
            callback=within(16, 4096),
        ),
    ] = None
    prompt: Annotated[str, typer.Option(help="A short caption; has little effect.")] = ""
    seed: Seed = 0
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the crop and the changed share; write nothing."),
    ] = False


@with_options
def image(
    task: Annotated[str, typer.Argument(help="move, drag, paste, appearance or landmarks.")],
    picture: Annotated[Path, typer.Argument(help="The picture to edit.", parser=as_path)],
    options: TaskOptions,
    run: RunOptions,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Move or change an object of a picture.

    Pixels outside of the edit stay as they are.

    \b
    overpaint image move a.png --box 20,30,40,40 --offset 25,0
    overpaint image move a.png --mask m.png --offset 0,0 --scale 1.4 --json
    overpaint image drag a.png --points '40,60 52,60' --dry-run
    overpaint image paste a.png --from b.png --from-box 9,9,50,50 --position 80,60
    overpaint image appearance a.png --mask m.png --from b.png --from-mask n.png
    """  # noqa: D301
    from overpaint import image_edit

    _check_options(task, options)
    presets: dict[str, Callable[..., Any]] = {
        "overpaint": image_edit.overpaint,
        "published": image_edit.published,
    }
    if run.preset not in presets:
        raise ValueError(f"unknown preset {run.preset!r}: choose overpaint or published.")
    changes = {"steps": run.steps, "size": run.size, "diffusion": False if run.dry_run else None}
    settings = presets[run.preset](**{k: v for k, v in changes.items() if v is not None})
    if not run.dry_run:
        check_absent(*(run.out / name for name in _FILES), force=run.force)
        check_writable(run.out)
    model = load_model(run.model, device, dtype)
    with progress(as_json) as on_progress:
        result = _edit(
            task, model, picture, options, prompt=run.prompt, settings=settings, seed=run.seed, on_progress=on_progress,
        )  # fmt: skip
    paths = {} if run.dry_run else result.save(run.out)
    print_facts(_facts(result) | {name: str(path) for name, path in paths.items()}, as_json=as_json)


def _edit(
    task: str, model: Any, picture: Path, options: TaskOptions, *, prompt: str, **common: Any
) -> "Edited":
    """Return the result of a task."""
    from overpaint import image_edit
    from overpaint.images.read import load_picture

    image = load_picture(picture, "image")
    if task == "move":
        mask = _mask(image, options.mask, options.box, "mask")
        offset, scale = read_numbers(str(options.offset), 2, "x,y"), options.scale or 1.0
        return image_edit.move(
            model, image, mask, (offset[0], offset[1]), scale, prompt=prompt, **common
        )
    if task in ("drag", "landmarks"):
        pairs = [read_numbers(point, 2, "x,y") for point in str(options.points).split()]
        if task == "landmarks":
            return image_edit.landmarks(
                model, image, pairs[::2], pairs[1::2], prompt=prompt, **common
            )
        is_free = options.mask is None and options.box is None
        mask = None if is_free else _mask(image, options.mask, options.box, "mask")
        return image_edit.drag(model, image, pairs, mask=mask, prompt=prompt, **common)
    other = load_picture(options.reference, "reference")
    shown = _mask(other, options.reference_mask, options.reference_box, "reference_mask")
    if task == "paste":
        x, y = read_numbers(str(options.position), 2, "x,y")
        scale = options.scale or 1.0
        return image_edit.paste(
            model, image, other, shown, (x, y), scale, prompts=(prompt, ""), **common
        )
    mask = _mask(image, options.mask, options.box, "mask")
    return image_edit.appearance(model, image, mask, other, shown, prompts=(prompt, ""), **common)


def _mask(picture: Any, mask: Path | None, box: str | None, name: str) -> Any:
    """Return the mask of a file or a box, for a picture (1, 3, H, W)."""
    from overpaint.image_edit.geometry import box_mask

    if box is None:
        return mask
    return box_mask(
        read_numbers(box, 4, "x,y,width,height"),
        tuple(picture.shape[2:]),
        name.replace("mask", "box"),
    )


def _check_options(task: str, options: TaskOptions) -> None:
    """Raise unless the options are those of the task.

    Raises:
        ValueError: There is no such task, an option is missing, or one has no effect.
    """
    if task not in _OPTIONS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(_OPTIONS)}.")
    allowed = _OPTIONS[task]
    for name, value in vars(options).items():
        if value is not None and name not in allowed:
            raise ValueError(f"{_option(name)} has no effect on {task}: leave it out.")
    for one, other in (("mask", "box"), ("reference_mask", "reference_box")):
        if one not in allowed:
            continue
        count = sum(getattr(options, name) is not None for name in (one, other))
        first, second = _option(one), _option(other)
        if count == 2:
            raise ValueError(f"{first} and {second} name the same region: leave one out.")
        if count == 0 and task != "drag":
            raise ValueError(f"{task} needs the object: give {first} or {second}.")
    for name in allowed:
        if (
            "mask" not in name
            and "box" not in name
            and name not in _OPTIONAL
            and getattr(options, name) is None
        ):
            raise ValueError(f"{task} needs {_option(name)}: give it.")


def _option(field: str) -> str:
    """Return the option of a field of `TaskOptions`."""
    return "--" + field.replace("reference", "from").replace("_", "-")


def _facts(result: "Edited") -> dict[str, Any]:
    left, top, right, bottom = result.box
    height, width = result.protocol["working_size"]
    facts: dict[str, Any] = {
        "task": result.protocol["task"],
        "crop": f"{left},{top},{right - left},{bottom - top}",
        "working_size": f"{width}x{height}",
        "changed": result.masks["changed"].float().mean().item(),
    }
    if result.log:
        facts["bank_mib"] = result.protocol["bank_bytes"] / 2**20
    return facts
