"""What the studio computes: maps, restored pictures, edits, pictures before and after. Values in, values out.

Each function takes the shared model and never writes to it; `tell` is called between steps, and may end the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from overpaint import edit, trace
from overpaint.edit import Change
from overpaint.model import TextToImage, sites
from overpaint.probes import Probe, questions
from overpaint.scorers.judge import Judge
from overpaint.studio.model_copy import private
from overpaint.trace.corruption import ROLES, corruptions, places
from overpaint.trace.renderer import Renderer
from overpaint.trace.text_encoder_trace import encode_restored

__all__ = [
    "METHODS", "Drawn", "Map", "Picture", "Question", "combine", "draw", "make", "restore", "sublayer",
    "trace_text",
]  # fmt: skip

Step = Callable[[float, float, str], None]
METHODS = ("auto", "quickfix")
_ROWS = 16  # states drawn at once: short steps, so that others wait little


@dataclass(frozen=True)
class Question:
    """What is asked of a model: a prompt, the words in it to look for, and how to draw.

    Attributes:
        prompt: The caption.
        concept: Words of it, once.
        seeds: One picture each.
        steps: Denoising steps, 1 to 100.
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
            raise ValueError(f"the steps must be 1 to 100, got {self.steps}: 8 are quick, 20 good.")
        if not 1 <= len(self.seeds) <= 8:
            raise ValueError(
                f"the pictures must be 1 to 8 at a time, got {len(self.seeds)}: ask again for more."
            )
        if not all(0 <= seed < 2**31 for seed in self.seeds):
            raise ValueError(
                f"a seed must be 0 to 2147483647, got {min(self.seeds)} to {max(self.seeds)}: 0 is as good as any."
            )


@dataclass(frozen=True)
class Map:
    """What restoring each state of the text encoder brings back.

    Attributes:
        question: What was asked.
        sites: Names of the rows, from the input up.
        columns: Of each column (role, position, token as text).
        values: Rows by columns; `None` where nothing was measured.
        measured: `"pictures"` (the judge's score, restored minus corrupted) or `"text"` (share of the way that the
            text features go back).
        instead: Why it is not by pictures, where that was asked for.
    """

    question: Question
    sites: tuple[str, ...]
    columns: tuple[tuple[str, int, str], ...]
    values: tuple[tuple[float | None, ...], ...]
    measured: str
    instead: str = ""

    @property
    def best(self) -> tuple[int, int]:
        """Row and column of the largest value."""
        cells = {
            (i, j): v
            for i, row in enumerate(self.values)
            for j, v in enumerate(row)
            if v is not None
        }
        row, column = max(cells, key=lambda cell: cells[cell])
        return row, column


@dataclass(frozen=True)
class Picture:
    """One picture and what it is: shown below it, and told to who cannot see it."""

    image: Image.Image
    title: str
    about: str


@dataclass(frozen=True)
class Drawn:
    """Pictures of several versions of a model: `rows[i][j]` is version i at seed j, `None` if not there yet."""

    question: Question
    names: tuple[str, ...]
    rows: tuple[tuple[Image.Image | None, ...], ...]

    @property
    def complete(self) -> bool:
        """Whether every picture is there."""
        return all(image is not None for row in self.rows for image in row)

    def sheet(self) -> Image.Image:
        """Return one picture of all that are there, versions as rows, on white, two pixels apart."""
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


# --- where is it? -----------------------------------------------------------------------------------------------------


def trace_text(
    model: TextToImage, question: Question, step: Step, *, judge: Judge | None = None
) -> Map:
    """Trace the text encoder at one prompt; with a judge by pictures, else by text features.

    Raises:
        ValueError: The concept is not in the prompt once, or a token limit cuts it off.
        UnsupportedModel: The model cannot be traced, or became NaN.
    """
    mine = private(model, whole=True)
    probe = _probe(question, judge)
    pictures = judge is not None
    effects = trace.text_encoder(
        mine, [probe], control=False, generate=pictures, seeds=question.seeds[:1], steps=question.steps,
        score=None if judge is None else judge.score, batch_size=_ROWS,
        on_progress=lambda done, total: step(done, total, "restoring one state after another"),
    )  # fmt: skip
    value = "indirect_effect" if pictures else "embed_recovery"
    found = {(r["site"], r["position"]): r[value] for r in effects.table.to_pylist()}
    names = tuple(dict.fromkeys(site for site, _ in found))
    columns = _columns(mine, probe)
    return Map(
        question, names, columns,
        tuple(tuple(found.get((name, place)) for _, place, _ in columns) for name in names),
        "pictures" if pictures else "text",
    )  # fmt: skip


def restore(
    model: TextToImage, found: Map, row: int, column: int, step: Step
) -> tuple[Picture, ...]:
    """Return the picture of the prompt, with its concept corrupted, and with one state of the map restored.

    Raises:
        ValueError: The map has no such cell.
        UnsupportedModel: A picture became NaN.
    """
    if not (0 <= row < len(found.sites) and 0 <= column < len(found.columns)):
        raise ValueError(
            f"the map has no cell ({row}, {column}): it has {len(found.sites)} rows and {len(found.columns)} columns. "
            "Click one of them."
        )
    question = found.question
    mine = private(model, whole=True)
    (corruption,), _ = corruptions(mine, [_probe(question, None)], noise_samples=1, sigma="3std")
    name, (_, position, token) = found.sites[row], found.columns[column]
    site = next(s for s in sites.find_texts(mine.text_encoders) if s.name == name)
    embeds = encode_restored(mine.text_encoders, corruption, [[(site.module(mine), [position])]])
    renderer = Renderer.of(
        mine, score=None, steps=question.steps, guidance_scale=None, solver_name="dpm", direction="restore",
        minimum_gap=0.02, batch_size=_ROWS, memory=None, draw=False,
    )  # fmt: skip
    latents = renderer.denoise(
        question.seeds[0], 3, embeds, mine.encode([""]),
        on_step=lambda done, _: step(done, question.steps, "drawing the restored picture"),
    )  # fmt: skip
    titles = (
        ("clean", f"{question.prompt}, as the model draws it"),
        ("corrupted", f"the same with noise on “{question.concept}”"),
        ("restored", f"and with {sublayer(name)} put back at “{token}”"),
    )
    return tuple(
        Picture(image, *words)
        for image, words in zip(images(mine.decode(latents)), titles, strict=True)
    )


def _probe(question: Question, judge: Judge | None) -> Probe:
    """Return the question as tracing wants it; the noise follows from its words alone."""
    kind, label = "concept", question.concept
    if judge is not None:
        try:
            kind, label = questions.concept(question.concept, judge.labels)
        except ValueError:  # then its CLIP compares picture and prompt
            kind = "concept"
    if not question.concept.strip():
        raise ValueError(
            "no words to look for: name words of the prompt, for example 'noto style'."
        )
    return Probe("studio", kind, question.prompt, question.concept, label)


def _columns(model: TextToImage, probe: Probe) -> tuple[tuple[str, int, str], ...]:
    (corruption,), _ = corruptions(model, [probe], noise_samples=1, sigma=0.0)
    tokens: Any = model.tokenizer.convert_ids_to_tokens(corruption.ids.tolist())
    names = {"eos": "end of text", "pad": "padding"}
    return tuple(
        (role, place, names.get(role, str(tokens[place]).removesuffix("</w>")))
        for role, place in places(corruption, ROLES)
    )


# --- paint over it ----------------------------------------------------------------------------------------------------


def make(
    model: TextToImage, old: str, new: str, step: Step, *, method: str = "auto", preserve: Sequence[str] = ()
) -> Change:  # fmt: skip
    """Return the change of one concept by `edit.auto` or `edit.quickfix`.

    Raises:
        ValueError: A concept is empty or its own target, or the method is unknown.
        UnsupportedModel: The model cannot be edited.
    """
    mine = private(model)
    if method == "quickfix":
        step(0, 1, "solving")
        return edit.quickfix(mine, {old: new}, preserve=list(preserve))
    if method != "auto":
        raise ValueError(f"unknown method {method!r}: choose auto or quickfix.")
    return edit.auto(mine, {old: new}, preserve=list(preserve), on_progress=step)


def combine(model: TextToImage, changes: Sequence[Change], step: Step) -> Change:
    """Return one change of all, solved jointly; a single one is what it is.

    Raises:
        ValueError: There is none, or they cannot be solved together.
    """
    if len(changes) == 1:
        return changes[0]
    step(0, 1, "solving all coats together")
    try:
        return edit.stack(private(model), list(changes), on_progress=step)
    except ValueError as error:
        raise ValueError(
            f"this coat cannot be solved together with those below it: {error} Use one method for all, or undo first."
        ) from error


# --- what became of it? -----------------------------------------------------------------------------------------------


def draw(
    model: TextToImage,
    question: Question,
    versions: Sequence[tuple[str, Change | None]],
    step: Step,
    *,
    show: Callable[[Drawn], None] | None = None,
    known: dict[Any, Image.Image] | None = None,
) -> Drawn:
    """Draw a prompt by several versions of a model at equal seeds, each picture as if it were the only one.

    Args:
        model: The unedited one.
        question: Prompt, seeds, steps.
        versions: Names and changes; `None` is the model as it is.
        step: Told after every denoising step.
        show: Given what is finished, after every picture.
        known: Pictures drawn before, by all that decides them; new ones are added.

    Raises:
        ValueError: A change was made for another model.
    """
    known = {} if known is None else known
    rows: list[list[Image.Image | None]] = [[None] * len(question.seeds) for _ in versions]
    names = tuple(name for name, _ in versions)
    models = [model if change is None else private(model, change) for _, change in versions]
    total = question.steps * len(question.seeds) * len(versions)
    order = [(i, j) for j in range(len(question.seeds)) for i in range(len(versions))]
    for number, (i, j) in enumerate(order):

        def tick(done: int, _: int, number: int = number) -> None:
            what = f"drawing picture {number + 1} of {len(order)}"
            step(number * question.steps + done, total, what)

        change, seed = versions[i][1], question.seeds[j]
        key = (
            model.name,
            "" if change is None else change.digest,
            question.prompt,
            seed,
            question.steps,
        )
        if key not in known:
            known[key] = (
                models[i]
                .generate(question.prompt, seed=seed, steps=question.steps, on_progress=tick)
                .pil()[0]
            )
        rows[i][j] = known[key]
        if show is not None:
            show(Drawn(question, names, tuple(map(tuple, rows))))
    return Drawn(question, names, tuple(map(tuple, rows)))


def sublayer(site: str) -> str:
    """Return `text.0.self_attn` in words: `layer 0 attention."""
    part, number, kind = (*site.split("."), "", "")[:3]
    names = {"self_attn": "attention", "mlp": "MLP"}
    encoder = " of encoder 2" if part == "text2" else ""
    return f"layer {number} {names.get(kind, kind)}{encoder}" if number else site


def images(pixels: Any) -> list[Image.Image]:
    """Return tensors (N, 3, H, W) in [0, 1] as pictures."""
    rows = (pixels.cpu().permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(row) for row in rows]
