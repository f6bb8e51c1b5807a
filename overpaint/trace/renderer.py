"""What the two tracers share: how pictures are drawn and scored, batches of one shape, distances."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import sites
from overpaint.model.sampling import denoise, make_scheduler
from overpaint.model.sites import Site
from overpaint.scorers import judge as features
from overpaint.scorers.protocols import Scorer, check_size, scorer_name
from overpaint.trace import hook_check, provenance
from overpaint.trace import memory as memory_of
from overpaint.trace.effects import recovery

__all__ = [
    "DIRECTIONS",
    "Direction",
    "Renderer",
    "Scorer",
    "about",
    "check_seeds",
    "check_source",
    "equal_chunks",
    "finite",
    "head_columns",
    "head_numbers",
    "named_sites",
    "on_first",
    "recovered",
    "seeds_of",
    "selected",
]

Direction = Literal["restore", "corrupt"]
DIRECTIONS: tuple[Direction, ...] = ("restore", "corrupt")


@dataclass(frozen=True)
class Renderer:
    """How rows become pictures and scores; checked once, by `of`.

    Attributes:
        model: A `TextToImage`.
        scorer: From pictures and probes to scores; `None` where no pictures are wanted.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt.
        scheduler: The diffusers scheduler whose settings each run copies.
        solver: Its name in `sample.SOLVERS`.
        direction: `"restore"` puts clean states into the corrupted run, `"corrupt"` corrupted ones into the clean run.
        minimum_gap: Runs whose clean score is not this much above the corrupted one have no `recovery`.
        rows: Rows of a denoising batch, at most.
        decoded: Pictures decoded at a time, at most.
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
        *,
        score: Scorer | None,
        steps: int,
        guidance_scale: float | None,
        solver_name: str,
        direction: Direction,
        minimum_gap: float,
        batch_size: int,
        memory: float | None,
        draw: bool = True,
    ) -> "Renderer":
        """Check the settings and choose the batch.

        Raises:
            ValueError: A setting is out of range, `memory` holds no batch, or the judge reads pictures of another size.
            UnsupportedModel: A hook would miss one of the model's sites.
        """
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}.")
        if batch_size < 4:
            raise ValueError(
                f"`batch_size` must be at least 4 (clean, corrupted, two restored), got {batch_size}."
            )
        if direction not in DIRECTIONS:
            raise ValueError(f"`direction` must be 'restore' or 'corrupt', got {direction!r}.")
        hook_check.probe(model)
        scheduler = make_scheduler(model, solver_name)
        strength = model.guidance_scale if guidance_scale is None else guidance_scale
        scorer = (score or features.load().score) if draw else None
        check_size(scorer, model)
        rows, decoded = batch_size, batch_size
        if memory is not None and draw:
            rows, decoded = (min(n, batch_size) for n in _fitting(model, memory, strength))
        return cls(
            model, scorer, steps, strength, scheduler, solver_name, direction, minimum_gap, rows, decoded
        )  # fmt: skip

    def denoise(
        self, seed: int, rows: int, prompt_embeds: Tensor, negative: Tensor, **options: Any
    ) -> Tensor:
        """Return the final latents of `rows` rows from one seed, shape (rows, C, h, w).

        Raises:
            UnsupportedModel: They are not finite.
        """
        latents = denoise(
            self.model,
            self.model.initial_latents([seed], steps=self.steps, scheduler=self.scheduler).repeat(
                rows, 1, 1, 1
            ),
            prompt_embeds,
            negative,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            generators=[Generator().manual_seed(seed + 1) for _ in range(rows)],
            scheduler=self.scheduler,
            **options,
        )
        cure = "load it in float32, or lower `guidance_scale`"
        return finite(latents, "latents", cure, f" from seed {seed}")

    def scores(self, latents: Tensor, probe: Any) -> list[float]:
        """Return the score of each row's picture.

        Raises:
            UnsupportedModel: A score is not finite.
        """
        assert self.scorer is not None
        numbers: list[float] = []
        for part in latents.split(self.decoded):
            found = self.scorer(self.model.decode(part).cpu(), [probe] * len(part))
            numbers += [float(n) for n in found]
        finite(
            torch.tensor(numbers), "scores", "look at what `score` makes of the model's pictures"
        )
        return numbers

    def measured(self, scores: Sequence[float], latents: Tensor) -> list[dict[str, Any]]:
        """Return the columns of each row from the third on; rows 0 and 1 are clean and corrupted."""
        clean, corrupted, *others = scores
        shares = recovered(latents, direction=self.direction)
        return [
            {
                "score_clean": clean,
                "score_corrupted": corrupted,
                "score_restored": number,
                "indirect_effect": effect,
                "recovery": recovery(clean, corrupted, corrupted + effect, gap=self.minimum_gap),
                "latent_recovery": share,
            }
            for number, share in zip(others, shares, strict=True)
            for effect in [number - corrupted if self.direction == "restore" else clean - number]
        ]

    def protocol(
        self, trace: str, probes: Sequence[Any], *, folder: Any = None, **more: Any
    ) -> dict[str, Any]:
        """Return what made the numbers, ready for JSON.

        Every weight is read for the sake of a folder alone, which must know whether it goes on with the same model.
        """
        marks = (
            {
                "weights": provenance.fingerprint(self.model),
                "scorer_weights": provenance.scorer_mark(self.scorer),
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
            "asked": provenance.asked(probes),
            **marks,
            **more,
        }


def _fitting(model: Any, memory: float, guidance_scale: float) -> tuple[int, int]:
    """Return how many rows of the UNet (with guidance, twice) and of the decoder fit."""
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
        memory_of.rows_that_fit(predict, memory, least=4, what="the UNet"),
        memory_of.rows_that_fit(decode, memory, least=1, what="the decoder"),
    )


def finite(values: Tensor, what: str, cure: str, where: str = "") -> Tensor:
    """Return `values`.

    Raises:
        UnsupportedModel: One of them is not finite.
    """
    if not torch.isfinite(values).all():
        raise UnsupportedModel(f"the model's {what} became NaN or infinite{where}: {cure}.")
    return values


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse a trace without any.

    Raises:
        ValueError: There are none.
    """
    if not seeds:
        raise ValueError("`seeds` is empty: give at least one.")


def check_source(source: str, branches: str) -> None:
    """Check where restored activations come from, and in which branches of the guidance they are put.

    Raises:
        ValueError: Unknown.
    """
    if source not in ("clean_trajectory", "same_latent"):
        raise ValueError(f"`source` must be 'clean_trajectory' or 'same_latent', got {source!r}.")
    if branches not in ("both", "cond"):
        raise ValueError(f"`branches` must be 'both' or 'cond', got {branches!r}.")


def named_sites(
    found: Sequence[Site], groups: Mapping[str, Sequence[Site]] | None
) -> list[tuple[str, tuple[Site, ...]]]:
    """Return each site under its own name or, if given, the groups.

    Args:
        found: The sites that are traced.
        groups: Several of them together, by a name.

    Raises:
        ValueError: A group is empty, or holds a site of another part of the model.
    """
    if groups is None:
        return [(site.name, (site,)) for site in found]
    parts = {site.part for site in found}
    for name, chosen in groups.items():
        if not chosen:
            raise ValueError(
                f"the group {name!r} is empty: name at least one site, for example with `overpaint.model.sites.find`."
            )
        for site in chosen:
            if site.part not in parts:
                raise ValueError(
                    f"the group {name!r} holds {site.name}, which is not a site of the part that is traced "
                    f"({', '.join(sorted(parts))}): trace it with `trace.unet` or `trace.text_encoder`, whichever it "
                    "belongs to."
                )
    return [(name, tuple(chosen)) for name, chosen in groups.items()]


def selected(
    states: Sequence[Any], only: Collection[Any] | None, key: Callable[[Any], Any]
) -> list[Any]:
    """Return the states whose key is in `only`, or all of them.

    Raises:
        ValueError: None is left.
    """
    chosen = [state for state in states if only is None or key(state) in only]
    if not chosen:
        raise ValueError(
            "no states are selected, so there is nothing to trace: name kinds, positions or sites that this model has; "
            "`overpaint sites` lists them."
        )
    return chosen


def about(name: str, chosen: Sequence[Site]) -> dict[str, Any]:
    """Return the columns that say where a state is: a site, or a group of sites under a name."""
    site, alone = chosen[0], len(chosen) == 1
    return {
        "site": name, "part": site.part, "kind": site.kind if alone else "group", "index": site.index,
        "path": site.path if alone else "",
    }  # fmt: skip


def seeds_of(probe: Any, seeds: Sequence[int]) -> list[int]:
    """Return the seed that came with the prompt, if any did, else `seeds`."""
    own = getattr(probe, "seed", None)
    return list(seeds) if own is None else [own]


def head_numbers(model: Any, chosen: Sequence[Site], wanted: bool) -> list[int | None]:
    """Return the whole of a site, then each of its heads; a group of sites has no heads of its own."""
    if not wanted or len(chosen) != 1:
        return [None]
    return [None, *range(sites.heads(model, chosen[0]))]


def head_columns(model: Any, site: Site, head: int) -> tuple[Module, slice]:
    """Return the output projection of an attention site, and where `head` stands in its input."""
    linear: Any = sites.head_input(model, site)
    width = linear.in_features // sites.heads(model, site)
    return linear, slice(head * width, (head + 1) * width)


def on_first(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a function of a module's arguments that changes the first of them alone."""
    return lambda args, kwargs: ((function(args[0]), *args[1:]), kwargs)


def equal_chunks(
    items: list[Any],
    limit: int,
    *,
    rows: Callable[[int], int] = lambda length: length,
    multiple: int = 1,
    fill: Any = None,
) -> Iterator[tuple[list[Any], int]]:
    """Yield parts of equal length, in batches of at most `limit` rows, and how many of each are items.

    Rounding may depend on a batch's shape and, where matrix kernels treat the last rows apart, on
    a row's place in it. So all parts have one length, and `rows(length)` is a multiple of
    `multiple`; what is missing at the end is filled up.

    Args:
        items: What to share out.
        limit: Rows of a batch, at most; but a part holds one item at least.
        rows: Rows of the batch that a part of some length makes.
        multiple: Of what the number of rows must be one.
        fill: Fills up a part; its own last item if `None`.
    """
    fitting = [n for n in range(1, limit + 1) if rows(n) <= limit and not rows(n) % multiple]
    size = max(fitting, default=1)
    length = -(-len(items) // max(1, -(-len(items) // size)))
    while rows(length) % multiple:
        length += 1
    for start in range(0, max(1, len(items)), max(1, length)):
        part = items[start : start + length]
        filler = part[-1:] if fill is None else [fill]
        yield part + filler * (length - len(part)), len(part)


def recovered(values: Tensor, *, direction: Direction = "restore") -> list[float | None]:
    """Return for each row from the third on the share of the way from its base run to its source run.

    Row 0 is clean, row 1 corrupted. Restoring starts at row 1 and 1 means as clean; corrupting starts at row 0 and 1
    means as corrupted. `None` where corruption changed nothing.
    """
    flat = values.flatten(1).double()
    goal, base = (flat[0], flat[1]) if direction == "restore" else (flat[1], flat[0])
    whole = float((base - goal).norm())
    distances = (flat[2:] - goal).norm(dim=1).tolist()
    return [1 - distance / whole if whole > 0 else None for distance in distances]
