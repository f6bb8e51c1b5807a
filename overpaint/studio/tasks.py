"""The computations of the studio: trace maps, restored pictures, edits, and pictures of several versions of a model.

Each function takes the shared model and does not write to it. `on_progress` is called between steps and may raise
`Stopped`, which ends the computation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from overpaint import edit, trace
from overpaint.edit import Change
from overpaint.edit.concept_words import check_special
from overpaint.errors import check_seed
from overpaint.images.pictures import Pictures
from overpaint.model import TextToImage, sites
from overpaint.model.sampling import Drawing, Progress
from overpaint.probes import Probe, questions
from overpaint.probes.text import cut_words
from overpaint.scorers.judge import Judge
from overpaint.studio.model_copy import copy_model
from overpaint.trace.corruption import Noise, corruptions, role_positions
from overpaint.trace.renderer import Renderer
from overpaint.trace.states import ROLES
from overpaint.trace.text_encoder_trace import encode_restored

__all__ = [
    "LabelledPicture", "PictureGrid", "PromptSettings", "TraceMap", "draw_restored", "draw_versions", "solve_edit",
    "stack_changes", "sublayer_label", "trace_text_encoder",
]  # fmt: skip

_SEED_BITS = 53  # a browser holds larger integers as rounded numbers
_BATCH_SIZE = 16  # states drawn at once; few, so that steps are short and other tasks wait little


@dataclass(frozen=True)
class PromptSettings:
    """The settings at the left of the page: a prompt, the concept in it, and how to draw.

    Attributes:
        prompt: The caption.
        concept: Words that occur once in `prompt`.
        seeds: One picture each.
        steps: Denoising steps, 1 to 100.

    Raises:
        ValueError: The prompt is empty, or a number is out of range.
    """

    prompt: str
    concept: str = ""
    seeds: tuple[int, ...] = (0,)
    steps: int = 8

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(
                "the prompt is empty: write what to draw, for example 'an apple in noto style'."
            )
        if not 1 <= self.steps <= 100:
            raise ValueError(
                f"the steps must be 1 to 100, got {self.steps}: 8 are fast, 20 give good pictures."
            )
        if not 1 <= len(self.seeds) <= 8:
            raise ValueError(
                f"the number of pictures must be 1 to 8, got {len(self.seeds)}: draw again for more."
            )
        for seed in self.seeds:
            check_seed(seed, bits=_SEED_BITS)


@dataclass(frozen=True)
class TraceMap:
    """The effect of restoring each state of the text encoder.

    Attributes:
        settings: The prompt and concept that were traced.
        sites: Site names of the rows, from the input to the output.
        columns: Role, position and token text of each column.
        values: One row for each site; `None` where nothing was measured.
        measure: `"pictures"` (score of the restored picture minus that of the corrupted one) or `"text"` (share of
            the distance between corrupted and clean text features that is recovered).
        fallback_reason: Why text features were measured although pictures were requested, else empty.
    """

    settings: PromptSettings
    sites: tuple[str, ...]
    columns: tuple[tuple[str, int, str], ...]
    values: tuple[tuple[float | None, ...], ...]
    measure: str
    fallback_reason: str = ""

    @property
    def best(self) -> tuple[int, int]:
        """Row and column of the largest value."""
        cells = {
            (i, j): value
            for i, row in enumerate(self.values)
            for j, value in enumerate(row)
            if value is not None
        }
        row, column = max(cells, key=lambda cell: cells[cell])
        return row, column


@dataclass(frozen=True)
class LabelledPicture:
    """A picture with a short title and a description, which is shown below it and read by screen readers."""

    image: Image.Image
    title: str
    description: str


@dataclass(frozen=True)
class PictureGrid:
    """Pictures of several versions of a model.

    Attributes:
        settings: The prompt, seeds and steps.
        names: Names of the versions, one for each row.
        rows: `rows[i][j]` is version i at seed j; `None` if it is not drawn yet.
        cut: Words of the prompt that the token limit cuts off.
    """

    settings: PromptSettings
    names: tuple[str, ...]
    rows: tuple[tuple[Image.Image | None, ...], ...]
    cut: str = ""

    @property
    def is_complete(self) -> bool:
        """True if every picture is drawn."""
        return all(image is not None for row in self.rows for image in row)

    def sheet(self) -> Image.Image:
        """Return one image of all pictures, versions as rows, on white, two pixels apart."""
        first = next(image for row in self.rows for image in row if image is not None)
        width, height = (side + 2 for side in first.size)
        sheet = Image.new(
            "RGB", (width * len(self.rows[0]) - 2, height * len(self.rows) - 2), "white"
        )
        for i, row in enumerate(self.rows):
            for j, image in enumerate(row):
                if image is not None:
                    sheet.paste(image, (j * width, i * height))
        return sheet


# --- trace ------------------------------------------------------------------------------------------------------------


def trace_text_encoder(
    model: TextToImage,
    settings: PromptSettings,
    on_progress: Progress,
    *,
    scorer: Judge | None = None,
) -> TraceMap:
    """Trace the text encoder for one prompt.

    Args:
        model: The original model.
        settings: Prompt, concept, steps; of the seeds the first is used.
        on_progress: Called with (done, total, label).
        scorer: Scores a picture of each state; text features are measured if `None`.

    Raises:
        ValueError: The concept does not occur exactly once in the prompt, or is cut off by the token limit, or the
            prompt holds a special token.
        UnsupportedModel: The model cannot be traced, or a value became NaN.
    """
    check_special(model.tokenizer, [settings.prompt])
    model_copy = copy_model(model, all_parts=True)
    probe = _probe(settings, scorer)
    pictures = scorer is not None
    effects = trace.text_encoder(
        model_copy,
        [probe],
        generate=pictures,
        controls="none",
        drawing=_drawing(settings),
        scorer=None if scorer is None else scorer.score,
        on_progress=lambda done, total, _: on_progress(done, total, "restoring each state"),
    )
    value = "indirect_effect" if pictures else "embed_recovery"
    table = {(r["site"], r["position"]): r[value] for r in effects.table.to_pylist()}
    names = tuple(dict.fromkeys(site for site, _ in table))
    columns = _columns(model_copy, probe)
    return TraceMap(
        settings, names, columns,
        tuple(tuple(table.get((name, position)) for _, position, _ in columns) for name in names),
        "pictures" if pictures else "text",
    )  # fmt: skip


def draw_restored(
    model: TextToImage, trace_map: TraceMap, row: int, column: int, on_progress: Progress
) -> tuple[LabelledPicture, ...]:
    """Return three pictures from the same noise: clean, concept corrupted, and one state of the map restored.

    Raises:
        ValueError: The map has no such cell.
        UnsupportedModel: A picture became NaN.
    """
    if not (0 <= row < len(trace_map.sites) and 0 <= column < len(trace_map.columns)):
        raise ValueError(
            f"the map has no cell ({row}, {column}): it has {len(trace_map.sites)} rows and "
            f"{len(trace_map.columns)} columns. Click one of them."
        )
    settings = trace_map.settings
    model_copy = copy_model(model, all_parts=True)
    (corruption,), _ = corruptions(model_copy, [_probe(settings, None)], Noise())
    name, (_, position, token) = trace_map.sites[row], trace_map.columns[column]
    site = next(s for s in sites.find_texts(model_copy.text_encoders) if s.name == name)
    embeds = encode_restored(
        model_copy.text_encoders, corruption, [[(site.module(model_copy), [position])]],
        clip_skip=model_copy.clip_skip,
    )  # fmt: skip
    renderer = Renderer.of(model_copy, _drawing(settings), draw=False)
    latents = renderer.denoise(
        settings.seeds[0], 3, embeds, model_copy.encode([""]),
        on_step=lambda done, _: on_progress(done, settings.steps, "drawing the restored picture"),
    )  # fmt: skip
    label = sublayer_label(name, has_two=len(model.text_encoders) > 1)
    captions = (
        ("clean", f"{settings.prompt}, drawn by the original model"),
        ("corrupted", f"the same, with noise on “{settings.concept}”"),
        ("restored", f"the same, with {label} at “{token}” restored"),
    )
    pictures = Pictures(
        model_copy.decode(latents).cpu(), (settings.prompt,) * 3, settings.seeds[:1] * 3
    )
    return tuple(
        LabelledPicture(image, *caption)
        for image, caption in zip(pictures.pil(), captions, strict=True)
    )


def _drawing(settings: PromptSettings) -> Drawing:
    return Drawing(steps=settings.steps, seeds=settings.seeds[:1], batch_size=_BATCH_SIZE)


def _probe(settings: PromptSettings, scorer: Judge | None) -> Probe:
    """Return the probe of a prompt. The noise of the corruption depends on its words alone."""
    kind, label = "concept", settings.concept
    if scorer is not None:
        try:
            kind, label = questions.parse_concept(settings.concept, scorer.labels)
        except (
            ValueError
        ):  # no head for these words: the scorer compares picture and prompt by CLIP features
            kind = "concept"
    if not settings.concept.strip():
        raise ValueError(
            "the concept is empty: write words of the prompt, for example 'noto style'."
        )
    return Probe("studio", kind, settings.prompt, settings.concept, label)


def _columns(model: TextToImage, probe: Probe) -> tuple[tuple[str, int, str], ...]:
    (corruption,), _ = corruptions(model, [probe], Noise())
    tokens: Any = model.tokenizer.convert_ids_to_tokens(corruption.ids.tolist())
    names = {"eos": "end of text", "pad": "padding"}
    return tuple(
        (role, position, names.get(role, str(tokens[position]).removesuffix("</w>")))
        for role, position in role_positions(corruption, ROLES)
    )


# --- edit -------------------------------------------------------------------------------------------------------------


def solve_edit(
    model: TextToImage,
    old: str,
    new: str,
    on_progress: Progress,
    *,
    method: str = "auto",
    preserve: Sequence[str] = (),
) -> Change:
    """Return the change that replaces concept `old` by `new`, by `edit.auto` or `edit.quickfix`.

    Raises:
        ValueError: A concept is empty, both are the same, or the method is unknown.
        UnsupportedModel: The model cannot be edited.
    """
    model_copy = copy_model(model)
    if method == "quickfix":
        on_progress(0, 1, "solving the edit")
        return edit.quickfix(model_copy, {old: new}, preserve=list(preserve))
    if method != "auto":
        raise ValueError(f"unknown method {method!r}: choose auto or quickfix.")
    return edit.auto(model_copy, {old: new}, preserve=list(preserve), on_progress=on_progress)


def stack_changes(model: TextToImage, changes: Sequence[Change], on_progress: Progress) -> Change:
    """Return one change that solves all of `changes` jointly; a single change is returned as it is.

    Raises:
        ValueError: There is none, or they cannot be solved jointly.
    """
    if len(changes) == 1:
        return changes[0]
    on_progress(0, 1, "solving all edits jointly")
    try:
        return edit.stack(copy_model(model), list(changes), on_progress=on_progress)
    except ValueError as error:
        raise ValueError(
            f"this edit cannot be solved jointly with the earlier ones: {error} Use one method for all, or undo first."
        ) from error


# --- draw -------------------------------------------------------------------------------------------------------------


def draw_versions(
    model: TextToImage,
    settings: PromptSettings,
    versions: Sequence[tuple[str, Change | None]],
    on_progress: Progress,
    *,
    publish: Callable[[PictureGrid], None] | None = None,
    cache: dict[Any, Image.Image] | None = None,
) -> PictureGrid:
    """Draw a prompt by several versions of a model at equal seeds, one picture at a time.

    Args:
        model: The original model.
        settings: Prompt, seeds, steps.
        versions: Names and changes; `None` is the original model.
        on_progress: Called after each denoising step.
        publish: Called with the pictures so far, after each picture.
        cache: Pictures drawn before; the key holds all settings that determine the pixels. New ones are added.

    Raises:
        ValueError: A change was made for another model.
    """
    cache = {} if cache is None else cache
    rows: list[list[Image.Image | None]] = [[None] * len(settings.seeds) for _ in versions]
    names = tuple(name for name, _ in versions)
    cut = cut_words(model.tokenizer, settings.prompt)
    models = [model if change is None else copy_model(model, change) for _, change in versions]
    order = [(i, j) for j in range(len(settings.seeds)) for i in range(len(versions))]
    for number, (i, j) in enumerate(order):

        def on_step(done: int, _total: int, _label: str, number: int = number) -> None:
            label = f"drawing picture {number + 1} of {len(order)}"
            on_progress(number * settings.steps + done, settings.steps * len(order), label)

        change, seed = versions[i][1], settings.seeds[j]
        digest = "" if change is None else change.digest
        key = (model.name, digest, settings.prompt, seed, settings.steps)
        if key not in cache:
            pictures = models[i].generate(
                settings.prompt, seed=seed, steps=settings.steps, on_progress=on_step
            )
            cache[key] = pictures.pil()[0]
        rows[i][j] = cache[key]
        if publish is not None:
            publish(PictureGrid(settings, names, tuple(map(tuple, rows)), cut))
    return PictureGrid(settings, names, tuple(map(tuple, rows)), cut)


def sublayer_label(site: str, has_two: bool = False) -> str:
    """Return a site name in words: `text.0.self_attn` is `layer 0 attention`.

    If the model `has_two` text encoders, the first is named too.
    """
    part, number, kind = (*site.split("."), "", "")[:3]
    names = {"self_attn": "attention", "mlp": "MLP"}
    encoder = " of encoder 2" if part == "text2" else " of encoder 1" if has_two else ""
    return f"layer {number} {names.get(kind, kind)}{encoder}" if number else site
