"""`lettering`: a small DiffSTE that writes words on lines, trained on lettering that is drawn here.

Four stages, each resumable: grey letters of one font; one font in color on photographs; all training fonts with second
words of the same style; and free placement with effects. Sample i of a stage is a function of the seed and i, and the
draws of a step are seeded by its number, so that a resumed run equals the uninterrupted one.

The loss hides whether a model spells. Every few minutes, and at the end of each stage, held-out words of 2 to 8 letters
are therefore written and read by PP-OCR (extra `ocr`). Each check adds a line to `<work>/checks.jsonl`: the share of
words read, that of the true pictures (the ceiling), whether the stage's gate is passed, and the samples seen; it draws
`<work>/sheet-<stage>.png`, and writes the present model with its card to `<work>/zoo`. A stage ends when its part of
the minutes is over, whether its gate is passed or not.

    overpaint train lettering --minutes 900 --threads 1         # one CPU core, resumable
    overpaint train lettering --minutes 2 --stage grey          # a first look

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from overpaint import files
from overpaint.model.sampling import Progress
from overpaint.scene_text.config import Config
from overpaint.scene_text.diffusion import scheduler, training_loss
from overpaint.scene_text.instructions import pieces_of_names
from overpaint.scene_text.lettering import Lettering
from overpaint.scorers.text_reader import TextReader
from overpaint.train import card, lettering_fonts, photographs
from overpaint.train import lettering_words as words
from overpaint.train.lettering_batches import batch, boxes, images, read_words, reading
from overpaint.train.lettering_colors import palette
from overpaint.train.lettering_scenes import STAGES, Sample, World, draw, world
from overpaint.train.loop import Schedule, fit, remove_checkpoints

__all__ = ["CPU", "CUDA", "GATES", "Recipe", "styles", "train"]

# Share of the ceiling, ignoring case, that a stage should reach on held-out words.
GATES = {"grey": 0.95, "single": 0.9, "fonts": 0.75, "photographs": 0.75}
_CHECK_SEED = 7_777  # of the lines that are checked; training never uses it
_WORDS = "write the word in with font fonts color colored is letters and a"


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of a training."""

    config: Config = field(default_factory=Config)  # sizes of the network
    # Parts of the minutes for the stages; only those that are run count.
    shares: tuple[float, ...] = (0.03, 0.15, 0.32, 0.5)
    batch: int = 32  # samples in a step
    # Peak learning rate of a stage, with Muon for the inner matrices: the settings that trained the UNet of `icons`. An
    # update has about the size of one of AdamW at 6e-4, with which a prototype learned to spell.
    lr: float = 1.5e-3
    muon: bool = True  # False: AdamW for all
    weight_decay: float = 0.01  # decoupled
    ema_decay: float = 0.998  # of the average of the weights, per step
    half: bool = True  # compute in bfloat16 where the processor has it
    # Part of the minutes for the autoencoder, if the configuration has one.
    autoencoder_share: float = 0.05
    autoencoder_lr: float = 2e-3  # its peak learning rate
    checks: int = 98  # held-out words that are written and read: as many of each length from 2 to 8
    check_steps: int = 20  # denoising steps of a check
    check_minutes: float = 10.0  # least time between two checks


CPU = Recipe()
CUDA = replace(CPU, batch=256)


def styles(config: Config, fonts: Sequence[str]) -> Config:
    """Return `config` with the names of fonts and colors, and with the pieces of the instruction's tokenizer.

    Args:
        config: Sizes.
        fonts: Names of the faces that may be named.
    """
    colors = palette().names
    pieces = {p for p in pieces_of_names([*fonts, *colors, _WORDS, "bold italic"]) if len(p) > 1}
    return replace(config, fonts=tuple(fonts), colors=colors, pieces=tuple(sorted(pieces)))


def train(
    *,
    out: Path,
    minutes: float = 900.0,
    device: str = "cpu",
    resume: bool = True,
    threads: int = 1,
    seed: int = 0,
    stages: Sequence[str] = (),
    recipe: Recipe | None = None,
    work: Path = Path("runs/lettering"),
    fonts: Path = Path("runs/fonts"),
    photos: Path = Path("runs/photographs"),
    on_progress: Progress | None = None,
) -> Path:
    """Train `lettering`, write it and its card to `out` and return that folder.

    At every check the present model and its card are written to `<work>/zoo`.

    Args:
        out: The model's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of all stages together, including that of earlier runs in `work`.
        device: `"cpu"` or `"cuda"`, which selects larger batches.
        resume: Continue from the last stage that has a checkpoint in `work`; `False` starts over.
        threads: Number of CPU threads.
        seed: Seed of the initial weights and of all random draws.
        stages: Stages to run, of `GATES`, in whose order they run; by default all. Each starts from the one before it.
        recipe: Instead of the recipe for the device.
        work: Folder of the checkpoints; may be deleted when the model is written.
        fonts: Folder that the fonts are downloaded to; 180 MB.
        photos: Folder that the photographs are downloaded to.
        on_progress: Called with (done, total, label) every few seconds.

    Raises:
        ValueError: There is no such stage, `out` is a folder of something else, or an archive does not have the pinned
            hash.
        MissingExtra: rapidocr or onnxruntime is not installed.
        OSError: Fonts or photographs cannot be downloaded.
    """
    if unknown := [stage for stage in stages if stage not in GATES]:
        raise ValueError(f"no stage {unknown[0]!r}: choose from {', '.join(GATES)}.")
    chosen = tuple(stage for stage in GATES if stage in stages or not stages)
    out = card.prepare(out)
    recipe = recipe or (CUDA if device.startswith("cuda") else CPU)
    reader = TextReader(threads=threads)
    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    work.mkdir(parents=True, exist_ok=True)
    for folder in (work, work / "zoo"):
        files.remove_drafts_in(folder)
    lettering_fonts.fetch(fonts)
    photographs.fetch(photos)
    if not resume:
        remove_checkpoints(work, ["autoencoder", *GATES])
        (work / "checks.jsonl").unlink(missing_ok=True)
    faces = lettering_fonts.load(fonts)
    run = Run(
        recipe, work, world(faces, photos), world(faces, photos, "held-out"), seed, device, reader
    )
    shares = dict(zip(GATES, recipe.shares, strict=True))
    total = sum(shares[stage] for stage in chosen)
    if recipe.config.codec == "autoencoder":
        run.train_autoencoder(minutes * recipe.autoencoder_share, on_progress)
    begun = [stage for stage in chosen if (work / f"{stage}.safetensors").exists()]
    for stage in chosen[chosen.index(begun[-1]) :] if begun else chosen:
        run.train_stage(stage, minutes * shares[stage] / total, on_progress)
    run.export(out)
    return out


class Run:
    """One training: its worlds, its model and the held-out lines that are checked.

    Attributes:
        model: The model in its current state.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        seen: World,
        unseen: World,
        seed: int,
        device: str,
        reader: TextReader,
    ) -> None:
        self.recipe, self.work, self.seed, self.device = recipe, work, seed, device
        self.seen, self.unseen, self.reader = seen, unseen, reader
        config = styles(recipe.config, [face.name for face in seen.faces])
        self.model = Lettering.build(config, seed=seed)
        self.model.network.to(device)
        self.alphas = scheduler(config.prediction).alphas_cumprod
        self.checked, self.check_seconds = -math.inf, 0.0
        self.half = recipe.half and (device.startswith("cuda") or _has_bfloat16())

    def train_stage(self, stage: str, minutes: float, on_progress: Progress | None = None) -> None:
        """Train the network on one stage, from its present weights or the stage's checkpoint."""
        recipe = self.recipe
        schedule = Schedule(
            minutes, recipe.lr, weight_decay=recipe.weight_decay, ema_decay=recipe.ema_decay, muon=recipe.muon
        )  # fmt: skip
        fit(
            self.model.network, self.loss(stage), schedule, stage=stage, folder=self.work,
            on_progress=on_progress, on_save=partial(self._maybe_check, stage),
        )  # fmt: skip
        steps = card.stages(self.work, (stage,))[stage]["steps"]
        if self._checks().get(stage, {}).get("step") != steps:
            self._check_and_export(stage, int(steps))

    def export(self, folder: Path) -> None:
        """Write the present model and its card, with the last check of each stage, to `folder`."""
        names = [
            name for name in ("autoencoder", *GATES) if (self.work / f"{name}.safetensors").exists()
        ]
        figures = {
            f"{stage}_{name}": value
            for stage, line in self._checks().items()
            for name, value in line.items()
            if name != "stage"
        }
        with files.atomic_folder(folder) as draft:
            self.model.save(draft)
            card.save(
                draft, recipe=_facts(self.recipe), seed=self.seed, device=self.device,
                trained=card.stages(self.work, tuple(names)), figures=figures, sources=_sources(),
            )  # fmt: skip

    def samples(self, stage: str, step: int) -> list[Sample]:
        """Return the samples of a step of a stage."""
        count, number = self.recipe.batch, list(GATES).index(stage)
        first = step * count
        return [
            draw(self.seen, STAGES[stage], self.seed * 10 + number, first + i) for i in range(count)
        ]

    def loss(self, stage: str) -> Callable[[int], Tensor]:
        """Return the loss of a stage as a function of the step."""
        network = self.model.network

        def loss(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = batch(network, self.samples(stage, step), self.device)
            with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.half):
                return training_loss(network, rows, self.alphas, generator)

        return loss

    def train_autoencoder(self, minutes: float, on_progress: Progress | None = None) -> None:
        """Train the autoencoder of latents, and freeze it."""
        codec: Any = self.model.network.codec

        def loss(step: int) -> Tensor:
            pictures = (images(self.samples("photographs", step)) * 2 - 1).to(self.device)
            error = codec.decode(codec.encode(pictures)) - pictures
            slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
            return error.abs().mean() + slopes

        schedule = Schedule(
            minutes, self.recipe.autoencoder_lr, weight_decay=0.0, ema_decay=self.recipe.ema_decay
        )
        fit(codec, loss, schedule, stage="autoencoder", folder=self.work, on_progress=on_progress)
        codec.requires_grad_(False)
        codec.normalise((images(self.samples("photographs", 0)) * 2 - 1).to(self.device))

    def check(self, stage: str) -> dict[str, float]:
        """Return what is read in held-out words that the present model writes, and in the true pictures."""
        held_out = self.held_out(stage)
        network = self.model.network
        was_training = network.training
        network.eval()
        result, pictures = read_words(
            self.model, held_out, self.reader, steps=self.recipe.check_steps
        )
        network.train(was_training)
        truth = reading(
            self.reader.read_boxes(images(held_out), boxes(held_out), margin=2), [s.text for s in held_out]
        )  # fmt: skip
        _sheet(images(held_out), pictures, self.work / f"sheet-{stage}.png")
        return {**result, "ceiling": truth["words"], "ceiling_any_case": truth["words_any_case"]}

    def held_out(self, stage: str) -> list[Sample]:
        """Return the lines of a check: held-out English words of 2 to 8 letters, with font and color named."""
        lines = []
        for index in range(self.recipe.checks):
            rng = np.random.default_rng([_CHECK_SEED, index])
            text = words.draw_measured(rng, 2 + index % 7)
            text = text if STAGES[stage].is_plain else words.draw_case(rng, text)
            lines.append(
                draw(self.unseen, STAGES[stage], _CHECK_SEED, index, text=text, names_style=True)
            )
        return lines

    def round_trip(self, stage: str) -> dict[str, float]:
        """Return what is read in the true pictures after encoding and decoding: the limit that the latents set."""
        held_out = self.held_out(stage)
        codec = self.model.network.codec
        with torch.no_grad():
            decoded = codec.decode(codec.encode(images(held_out) * 2 - 1))
        texts = self.reader.read_boxes((decoded + 1) / 2, boxes(held_out), margin=2)
        return reading(texts, [s.text for s in held_out])

    def _maybe_check(self, stage: str, step: int) -> None:
        """Check and export the model if the last check is old enough; checks take a tenth of the time at most."""
        pause = max(60 * self.recipe.check_minutes, 9 * self.check_seconds)
        if time.monotonic() - self.checked >= pause:
            self._check_and_export(stage, step)

    def _check_and_export(self, stage: str, step: int) -> None:
        """Add a line of what is read to the checks, and write the model."""
        start = time.monotonic()
        result = self.check(stage)
        passed = result["words_any_case"] >= GATES[stage] * result["ceiling_any_case"]
        line = {
            "stage": stage,
            "step": step,
            "samples": step * self.recipe.batch,
            "gate_passed": passed,
        }
        path = self.work / "checks.jsonl"
        before = path.read_text() if path.exists() else ""
        with files.atomic(path) as draft:
            text = files.to_json(line | {k: round(v, 4) for k, v in result.items()})
            draft.write_text(f"{before}{text}\n")
        self.export(self.work / "zoo")
        self.checked = time.monotonic()
        self.check_seconds = self.checked - start

    def _checks(self) -> dict[str, dict[str, Any]]:
        """Return the last check of each stage."""
        path = self.work / "checks.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        checks = [files.from_json(line) for line in lines]
        return {check["stage"]: check for check in checks}


def _sheet(truth: Tensor, written: Tensor, path: Path, *, scale: int = 2, columns: int = 4) -> None:
    """Write a picture of pairs of lines: the true one above the written one."""
    pairs = torch.cat([truth, written.cpu()], 2)
    pairs = F.pad(pairs, (2, 2, 2, 2), value=1.0)
    pairs = pairs[: len(pairs) // columns * columns]
    rows = [torch.cat(list(part), 2) for part in pairs.split(columns)]
    pixels = (torch.cat(rows, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    size = (picture.width * scale, picture.height * scale)
    with files.atomic(path) as draft:
        picture.resize(size, Image.Resampling.BICUBIC).save(draft, format="PNG")


def _has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 numbers."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe without the configuration, which stands beside the card."""
    return {name: value for name, value in asdict(recipe).items() if name != "config"}


def _sources() -> list[dict[str, str]]:
    """Return the sources of fonts and photographs, for the card."""
    return [
        *lettering_fonts.sources(),
        *(
            {
                "package": name,
                "version": release,
                "sha256": digest,
                "licence": "see overpaint.train.photographs",
            }
            for name, (release, digest) in photographs.PACKAGES.items()
        ),
        *(
            {"package": name, "version": version(name), "sha256": "", "licence": licence}
            for name, licence in (
                ("scikit-image", "BSD-3-Clause AND CC0-1.0"),
                ("scikit-learn", "CC-BY-2.0"),
            )
        ),
    ]
