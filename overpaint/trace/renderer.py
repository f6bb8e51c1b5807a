"""Renderer: draws and scores the pictures of a trace, and measures how far rows return to the clean run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from overpaint.errors import UnsupportedModel, check_seed
from overpaint.model.sampling import Drawing, denoise, make_scheduler
from overpaint.scorers import judge
from overpaint.scorers.protocols import Scorer, check_size, scorer_name
from overpaint.trace import hook_check, provenance
from overpaint.trace.memory import rows_that_fit

__all__ = [
    "DIRECTIONS",
    "Direction",
    "Renderer",
    "distance_recovery",
    "finite",
    "score_recovery",
    "seeds_of",
]

Direction = Literal["restore", "corrupt"]
DIRECTIONS: tuple[Direction, ...] = ("restore", "corrupt")


@dataclass(frozen=True)
class Renderer:
    """Checked settings for drawing and scoring the rows of a trace; `of` creates one.

    Attributes:
        model: A `TextToImage`.
        scorer: Returns scores from pictures and probes; `None` where no pictures are drawn.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt.
        scheduler: The diffusers scheduler whose settings each run copies.
        solver: Name of the scheduler in `sampling.SOLVERS`.
        direction: `"restore"` puts clean states into the corrupted run, `"corrupt"` corrupted ones into the clean run.
        minimum_gap: Smallest gap between clean and corrupted score; runs with a smaller one have no `recovery`.
        rows: Largest number of rows of a denoising batch.
        decoded: Largest number of pictures decoded at a time.
    """

    model: Any
    scorer: Scorer | None
    steps: int
    guidance_scale: float
    scheduler: Any
    solver: str
    direction: Direction
    minimum_gap: float
    rows: int
    decoded: int

    @classmethod
    def of(
        cls,
        model: Any,
        drawing: Drawing,
        *,
        scorer: Scorer | None = None,
        direction: Direction = "restore",
        minimum_gap: float = 0.0,
        draw: bool = True,
    ) -> "Renderer":
        """Check the settings and choose the batch.

        Args:
            model: A `TextToImage`.
            drawing: Steps, guidance, solver and batch; its seeds are not read.
            scorer: Returns scores from pictures and probes; the shipped judge if `None`.
            direction: `"restore"` or `"corrupt"`.
            minimum_gap: Smallest gap between clean and corrupted score of a run with a `recovery`.
            draw: Pictures are drawn and scored; otherwise there is no scorer.

        Raises:
            ValueError: A setting is out of range, `drawing.memory` holds no batch, or the scorer reads pictures of
                another size.
            UnsupportedModel: A hook would miss one of the model's sites.
            TypeError: The scorer cannot be called.
        """
        if drawing.batch_size < 4:
            raise ValueError(
                f"`batch_size` must be at least 4 (clean, corrupted, two restored), got {drawing.batch_size}."
            )
        if direction not in DIRECTIONS:
            raise ValueError(f"`direction` must be 'restore' or 'corrupt', got {direction!r}.")
        hook_check.verified_sites(model)
        guidance = drawing.guidance_scale
        guidance = model.guidance_scale if guidance is None else guidance
        if scorer is not None and not callable(scorer):
            raise TypeError(
                f"`scorer` must be a function of pictures and probes, got {scorer!r}: pass the method `score` of a "
                "loaded scorer, such as `scorers.load().score`."
            )
        scorer = (scorer or judge.load().score) if draw else None
        check_size(scorer, model)
        rows = decoded = drawing.batch_size
        if drawing.memory is not None and draw:
            sizes = _fitting(model, drawing.memory, guidance)
            rows, decoded = (min(n, drawing.batch_size) for n in sizes)
        return cls(
            model, scorer, drawing.steps, guidance, make_scheduler(model, drawing.solver), drawing.solver, direction,
            minimum_gap, rows, decoded,
        )  # fmt: skip

    def denoise(
        self, seed: int, rows: int, prompt_embeds: Tensor, negative: Tensor, **options: Any
    ) -> Tensor:
        """Return the final latents of `rows` rows from one seed, shape (rows, C, h, w).

        Raises:
            UnsupportedModel: They are not finite.
        """
        start = self.model.initial_latents([seed], steps=self.steps, scheduler=self.scheduler)
        latents = denoise(
            self.model,
            start.repeat(rows, 1, 1, 1),
            prompt_embeds,
            negative,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            generators=[Generator().manual_seed(seed + 1) for _ in range(rows)],
            scheduler=self.scheduler,
            **options,
        )
        remedy = "load it in float32, or lower `guidance_scale`"
        return finite(latents, "latents", remedy, f" from seed {seed}")

    def scores(self, latents: Tensor, probe: Any) -> list[float]:
        """Return the score of each row's picture.

        Raises:
            UnsupportedModel: A score is not finite.
        """
        assert self.scorer is not None
        numbers: list[float] = []
        for part in latents.split(self.decoded):
            numbers += map(float, self.scorer(self.model.decode(part).cpu(), [probe] * len(part)))
        remedy = "check the output of `scorer` for the model's pictures"
        finite(torch.tensor(numbers), "scores", remedy)
        return numbers

    def measured(self, scores: Sequence[float], latents: Tensor) -> list[dict[str, Any]]:
        """Return the columns of each row from the third on; rows 0 and 1 are clean and corrupted."""
        clean, corrupted, *others = scores
        shares = distance_recovery(latents, direction=self.direction)
        return [
            {
                "score_clean": clean,
                "score_corrupted": corrupted,
                "score_restored": number,
                "indirect_effect": effect,
                "recovery": score_recovery(
                    clean, corrupted, corrupted + effect, gap=self.minimum_gap
                ),
                "latent_recovery": share,
            }
            for number, share in zip(others, shares, strict=True)
            for effect in [number - corrupted if self.direction == "restore" else clean - number]
        ]

    def protocol(
        self, trace: str, probes: Sequence[Any], *, folder: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return the settings that make the numbers, ready for JSON.

        Digests of the weights, which take a pass over every weight, are included only if there is a folder, where they
        detect that a trace is continued with another model.
        """
        digests = (
            {
                "weights": provenance.fingerprint(self.model),
                "scorer_weights": provenance.scorer_digest(self.scorer),
            }
            if folder is not None
            else {}
        )
        return {
            **self.model.protocol(steps=self.steps, guidance_scale=self.guidance_scale),
            "scheduler": type(self.scheduler).__name__,
            "trace": trace,
            "direction": self.direction,
            "solver": self.solver,
            "scorer": scorer_name(self.scorer),
            "minimum_gap": self.minimum_gap,
            "batch_size": self.rows,
            "probes": len(probes),
            "prompts": [probe.prompt for probe in probes],
            "asked": provenance.probe_fields(probes),
            **digests,
            **more,
        }


def _fitting(model: Any, memory: float, guidance_scale: float) -> tuple[int, int]:
    """Return the number of rows that fit in the UNet (with guidance, twice as many run) and in the decoder."""
    empty = model.encode([""])
    branches = 1 if guidance_scale == 1 else 2
    latents = model.initial_latents([0])

    @torch.no_grad()
    def predict(rows: int) -> None:
        batch = latents.repeat(branches * rows, 1, 1, 1)
        model.noise_pred(batch, torch.tensor(500), empty.expand(len(batch), -1, -1))

    def decode(rows: int) -> None:
        model.decode(latents.repeat(rows, 1, 1, 1))

    return (
        rows_that_fit(predict, memory, least=4, label="the UNet"),
        rows_that_fit(decode, memory, least=1, label="the decoder"),
    )


def finite(values: Tensor, label: str, remedy: str, where: str = "") -> Tensor:
    """Return `values`.

    Raises:
        UnsupportedModel: One of them is not finite.
    """
    if not torch.isfinite(values).all():
        raise UnsupportedModel(f"the model's {label} became NaN or infinite{where}: {remedy}.")
    return values


def seeds_of(probe: Any, seeds: Sequence[int]) -> list[int]:
    """Return the probe's own seed in a list, or `seeds` if it has none.

    Raises:
        ValueError: The probe's seed is out of range.
    """
    seed = getattr(probe, "seed", None)
    return list(seeds) if seed is None else [check_seed(seed)]


def score_recovery(clean: float, corrupted: float, restored: float, *, gap: float) -> float | None:
    """Return the share of the gap that was recovered: 0 as corrupted, 1 as clean.

    `None` where the clean score is not more than `gap` above the corrupted one.
    """
    if not clean - corrupted > gap:
        return None
    return (restored - corrupted) / (clean - corrupted)


def distance_recovery(values: Tensor, *, direction: Direction = "restore") -> list[float | None]:
    """Return for each row from the third on the share of the distance from its base run to its source run.

    Row 0 is clean, row 1 corrupted. With `"restore"` the base is row 1 and a share of 1 means equal to the clean row;
    with `"corrupt"` the base is row 0 and 1 means equal to the corrupted row. `None` where corruption changed nothing.
    """
    flat = values.flatten(1).double()
    goal, base = (flat[0], flat[1]) if direction == "restore" else (flat[1], flat[0])
    whole = float((base - goal).norm())
    distances = (flat[2:] - goal).norm(dim=1).tolist()
    return [1 - distance / whole if whole > 0 else None for distance in distances]
