"""`matcher`: a small DiffMatch, trained on photographs that are warped here.

Two stages, each resumable. "coarse" learns flows of 32x32 from the cost volume of frozen XFeat features; "fine" then
learns flows of 64x64 from the local cost around what the frozen coarse stage draws. Conditions of a few thousand pairs
are kept in half precision; every step makes a few new pairs, lets the oldest go, and trains on a batch drawn from all,
mirrored and transposed with their costs, since a pair takes longer to make than to learn from.

    overpaint train matcher --minutes 100                   # one CPU core, resumable
    overpaint train matcher --no-diffusion --work runs/matcher-control --steps 5000 --steps 1500
    overpaint train matcher --minutes 25 --device cuda      # larger pictures, grids and networks

The second is the control, whose network answers once; the steps have to be those on the card of what it is a control
to.

What 122 minutes on one busy CPU core gave, and in how many steps, is in `overpaint/zoo/weights/matcher/card.json`.
A run that was killed and resumed fills the store anew, so that it is not the uninterrupted run bit for bit.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094; the fine stage's jitter is the conditioning
augmentation of Ho et al., 2022, https://arxiv.org/abs/2106.15282.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint.match import backbone as backbones
from overpaint.match import flow as flows
from overpaint.match.config import Matcher
from overpaint.match.denoiser import (
    Conditions,
    Config,
    Denoiser,
    Features,
    coarse_of,
    describe,
    fine_of,
    sample,
    training_loss,
)
from overpaint.train import card, photographs, warps
from overpaint.train.loop import Progress, fit

__all__ = ["CPU", "CUDA", "Recipe", "Store", "train", "turned"]

STAGES = ("coarse", "fine")


@dataclass(frozen=True)
class Recipe:
    """All sizes and rates of one training."""

    config: Config = Config.tiny()
    shares: tuple[float, float] = (0.75, 0.25)  # of the minutes: coarse, fine

    batch: int = 8  # twice as many steps of half the size learn faster in the minutes there are
    fresh: int = 1  # new pairs a step
    kept: int = 4000  # pairs in the store; 0.8 GB
    first: int = 64  # of them made before the first step
    lr: float = 1.5e-3

    fine_batch: int = 8
    fine_fresh: int = 1
    fine_kept: int = 1000  # four times as large each
    fine_first: int = 32
    fine_lr: float = 1e-3
    jitter: float = (
        2.0  # deviation of the noise on the coarse flow, at most, in cells of the fine one
    )

    ema_decay: float = 0.999
    checks: int = 24  # pairs that the training is followed by
    check_minutes: float = 8.0  # at least, from one look at them to the next


CPU = Recipe()
CUDA = replace(CPU, config=Config.base(), batch=64, fresh=8, fine_batch=32, fine_fresh=4)


class Store:
    """Conditions and truth of the pairs made last, in half precision; a ring.

    Rows are tensors by name, the pairs along the first axis.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.made = 0
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.made, self.capacity)

    def add(self, rows: dict[str, Tensor]) -> None:
        """Keep the pairs of `rows`, in place of the oldest where it is full."""
        for name, values in rows.items():
            if name not in self._rows:
                self._rows[name] = torch.empty(self.capacity, *values.shape[1:], dtype=torch.half)
            for i, value in enumerate(values):
                self._rows[name][(self.made + i) % self.capacity] = value
        self.made += len(next(iter(rows.values())))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `count` pairs, float32, each as likely as any."""
        pick = torch.randint(len(self), (count,), generator=generator)
        return {name: values[pick].float() for name, values in self._rows.items()}


def train(
    *,
    out: Path,
    minutes: float = 100.0,
    steps: Sequence[int] = (),
    device: str = "cpu",
    resume: bool = True,
    threads: int = 1,
    seed: int = 0,
    diffusion: bool = True,
    recipe: Recipe | None = None,
    work: Path = Path("runs/matcher"),
    photos: Path = Path("runs/photographs"),
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train `matcher` and write it to `out`, with its card.

    At every checkpoint the matcher as it stands is written to `<work>/zoo`, and now and then a line of errors on
    photographs that are not trained on to `<work>/checks.jsonl`: mean end-point error in pixels of the recipe's
    pictures.

    Args:
        out: The matcher's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of both stages together, earlier runs in `work` counted in.
        steps: Of the coarse and the fine stage, in place of minutes: a control needs those that the card names.
        device: `"cpu"` or `"cuda"`; the latter takes the larger recipe.
        resume: Continue from the checkpoints in `work`; `False` starts over.
        threads: CPU threads, fixed for the run.
        seed: Of the weights' initialisation and of everything drawn.
        diffusion: `False` trains the control, which sees no noise and answers once.
        recipe: In place of the device's own.
        work: Checkpoints; safe to delete when the folder is written. One for each seed and control.
        photos: Where the photographs are fetched to.
        on_progress: Told about progress every few seconds.

    Raises:
        ValueError: `out` is a folder of something else, `steps` is not one number a stage, or a photograph's package
            is not the pinned one.
        OSError: The photographs cannot be fetched.
    """
    card.check_target(out)
    if steps and (len(steps) != len(STAGES) or min(steps) < 1):
        raise ValueError(
            f"`steps` must be one positive number for each of {' and '.join(STAGES)}, got {list(steps)}: give both."
        )
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = recipe or (CUDA if device.startswith("cuda") else CPU)
    recipe = replace(recipe, config=replace(recipe.config, diffusion=diffusion))
    work.mkdir(parents=True, exist_ok=True)
    photographs.fetch(photos)
    run = _Run(recipe, work, photos, seed, device)
    figures: dict[str, float] = {}
    for stage, share, count in zip(STAGES, recipe.shares, steps or (None, None), strict=True):
        fit(
            run.networks[stage], run.loss(stage), stage=stage, folder=work, minutes=minutes * share,
            steps=count, lr=recipe.lr if stage == "coarse" else recipe.fine_lr, ema_decay=recipe.ema_decay,
            resume=resume, on_progress=on_progress, on_save=partial(run.check, stage),
        )  # fmt: skip
        figures |= run.errors(stage)
    with card.replacing(out) as beside:
        run.matcher("fine").save(beside)
    return card.write_card(
        out,
        recipe=asdict(recipe),
        seed=seed,
        device=device,
        trained=card.stages(work, STAGES),
        figures={name: round(value, 4) for name, value in figures.items()},
        sources=_sources(),
    ).parent


class _Run:
    """One training: its photographs, its networks, what it is followed by."""

    def __init__(self, recipe: Recipe, work: Path, photos: Path, seed: int, device: str) -> None:
        self.recipe, self.work, self.seed, self.device = recipe, work, seed, device
        if recipe.config.backbone != "xfeat":
            raise ValueError(
                f"the recipe trains on the features of xfeat, got {recipe.config.backbone!r}: choose another one."
            )
        self.backbone = backbones.load().to(device)
        self.networks = {
            "coarse": Denoiser(recipe.config, "coarse").to(device),
            "fine": Denoiser(recipe.config, "fine").to(device),
        }
        self.photos = list(photographs.read_all(photographs.TRAINING, photos).values())
        held = list(photographs.read_all(photographs.VALIDATION, photos).values())
        checks = [held[i % len(held)] for i in range(recipe.checks)]
        size = recipe.config.image
        self.checks = warps.pairs(checks, list(range(recipe.checks)), size=size)
        self.features = self._features(self.checks)
        self.checked = -math.inf

    def matcher(self, stage: str) -> Matcher:
        """Return the matcher as it is in that stage: before the fine one it has none."""
        fine = self.networks["fine"] if stage == "fine" else None
        return Matcher(self.backbone, self.networks["coarse"], fine, self.recipe.config)

    def loss(self, stage: str) -> Callable[[int], Tensor]:
        """Return the stage's loss of a step; it makes the first pairs when it is first called."""
        recipe, coarse = self.recipe, stage == "coarse"
        store = Store(recipe.kept if coarse else recipe.fine_kept)
        first, fresh, batch = (
            (recipe.first, recipe.fresh, recipe.batch)
            if coarse
            else (recipe.fine_first, recipe.fine_fresh, recipe.fine_batch)
        )
        network = self.networks[stage]

        def loss(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            for _ in range(fresh if store.made else -(-first // fresh)):
                store.add(self.rows(stage, fresh, generator))
                if store.made > first:
                    break
            rows = turned(store.draw(batch, generator), generator, recipe.config)
            rows = {name: values.to(self.device) for name, values in rows.items()}
            conditions = Conditions(rows["initial"], rows["stack"])
            return training_loss(network, conditions, rows["truth"], rows["valid"], generator)

        return loss

    @torch.no_grad()
    def rows(self, stage: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Make `count` new pairs and return what the stage learns from them."""
        config = self.recipe.config
        picks = torch.randint(len(self.photos), (count,), generator=generator).tolist()
        seeds = torch.randint(2**40, (count,), generator=generator).tolist()
        made = warps.pairs([self.photos[i] for i in picks], seeds, size=config.image)
        source, target = self._features(made)
        conditions = coarse_of(config, source, target)
        side = config.grid
        if stage == "fine":
            drawn = sample(self.networks["coarse"], conditions, samples=1, generator=generator)[0]
            cells = _jitter(drawn.shape, self.recipe.jitter, generator).to(drawn)
            side = config.sr_grid
            conditions = fine_of(config, source, target, drawn + cells / side)
        return {
            "initial": conditions.initial,
            "stack": conditions.stack,
            "truth": (flows.resize(made.flow, (side, side)) / side).clamp(-1, 1),
            "valid": (F.adaptive_avg_pool2d(made.valid.float(), side) > 0.5).float(),
        }

    @torch.no_grad()
    def errors(self, stage: str) -> dict[str, float]:
        """Return mean end-point errors on the checks, in pixels: of the stage's input, after one step, after all."""
        config, (source, target) = self.recipe.config, self.features
        given = coarse_of(config, source, target)
        if stage == "fine":
            flow = sample(self.networks["coarse"], given, samples=1)[0]
            given = fine_of(config, source, target, flow)
        found = {f"{stage}_given": self._error(given.initial)}
        for steps in (1, config.steps):
            flow = sample(self.networks[stage], given, samples=1, steps=steps)[0]
            found[f"{stage}_steps_{steps}"] = self._error(flow)
        return found

    def check(self, stage: str, step: int) -> None:
        """Write the matcher as it stands, and its errors, if it is time for them."""
        self.matcher(stage).save(self.work / "zoo")
        if time.monotonic() - self.checked < 60 * self.recipe.check_minutes:
            return
        line = {"stage": stage, "step": step} | self.errors(stage)
        with (self.work / "checks.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.checked = time.monotonic()

    def _features(self, pairs: warps.Pair) -> tuple[Features, Features]:
        source, target = (pictures.to(self.device) for pictures in (pairs.source, pairs.target))
        network, config = self.backbone, self.recipe.config
        return describe(network, config, source), describe(network, config, target)

    def _error(self, flow: Tensor) -> float:
        size = self.recipe.config.image
        pixels = flows.resize(flow.cpu() * flow.shape[-1], (size, size))
        errors = (pixels - self.checks.flow).norm(dim=1, keepdim=True)
        valid = self.checks.valid
        per_pair = [float(e[v].mean()) for e, v in zip(errors, valid, strict=True) if v.any()]
        return sum(per_pair) / len(per_pair)


def turned(
    rows: dict[str, Tensor], generator: torch.Generator, config: Config
) -> dict[str, Tensor]:
    """Return the pairs mirrored left to right, top to bottom, transposed, each by a coin thrown for all of them.

    Args:
        rows: `initial`, `stack`, `truth` and `valid` of B pairs, as `Store` keeps them.
        generator: Of the coins.
        config: The matcher's, for the layout of `stack`: its costs are mirrored too, its coordinates stay.
    """
    window = 2 * config.radius + 1
    costs = rows["stack"][:, : window**2].unflatten(1, (window, window))  # (B, dy, dx, H, W)
    hints = rows["stack"][:, window**2 :]
    seen, places = hints[:, :2], hints[:, 2:]
    fields = {name: rows[name] for name in ("initial", "truth")}
    valid = rows["valid"]
    left, up, across = (torch.rand(3, generator=generator) < 0.5).tolist()
    for flipped, axis in ((left, 0), (up, 1)):
        if flipped:
            sign = torch.tensor([-1.0, 1.0] if axis == 0 else [1.0, -1.0]).view(1, 2, 1, 1)
            costs = costs.flip((2 - axis, 4 - axis))
            seen, valid = (values.flip(3 - axis) for values in (seen, valid))
            fields = {name: values.flip(3 - axis) * sign for name, values in fields.items()}
    if across:
        costs = costs.transpose(1, 2).transpose(3, 4)
        seen, valid = (values.transpose(2, 3) for values in (seen, valid))
        fields = {name: values.transpose(2, 3).flip(1) for name, values in fields.items()}
    return {"stack": torch.cat([costs.flatten(1, 2), seen, places], 1), "valid": valid, **fields}


def _jitter(shape: torch.Size, most: float, generator: torch.Generator) -> Tensor:
    """Return noise for half of the pairs, smooth over a random length, its deviation up to `most`."""
    fields = []
    for _ in range(shape[0]):
        on, amount = torch.rand(2, generator=generator)
        side = 2 ** int(torch.randint(2, 6, (), generator=generator))
        noise = torch.randn(1, shape[1], side, side, generator=generator)
        noise = F.interpolate(noise, tuple(shape[2:]), mode="bilinear", align_corners=False)
        fields.append(noise * most * amount * (on < 0.5))
    return torch.cat(fields)


def _sources() -> list[dict[str, str]]:
    """Return what the weights were made from, for the card."""
    licences = {
        "opencv-doc": "Apache-2.0 AND BSD-3-Clause",
        "mate-backgrounds": "GPL-2+ AND CC-BY-SA-4.0",
        "lomiri-wallpapers-16.04": "CC-BY-4.0 AND CC-BY-SA-3.0 AND CC-BY-SA-4.0 AND CC0-1.0",
        "lomiri-wallpapers-20.04": "CC-BY-4.0 AND CC-BY-SA-4.0",
    }
    return [
        {"package": name, "version": release, "sha256": digest, "licence": licences[name]}
        for name, (release, digest) in photographs.PACKAGES.items()
    ] + [
        {"package": name, "version": version(name), "sha256": "", "licence": licence}
        for name, licence in (
            ("scikit-image", "BSD-3-Clause AND CC0-1.0"),
            ("scikit-learn", "CC-BY-2.0"),
        )
    ]
