"""`matcher`: a small DiffMatch, trained on photographs that are warped here.

Two stages, each resumable. "coarse" learns flows of 32x32 from the cost volume of frozen XFeat features; "fine" then
learns flows of 64x64 from the local cost around the flow of the frozen coarse stage. Conditions of a few thousand pairs
are stored in half precision. Every step adds a few new pairs, which replace the oldest, and trains on a random batch of
all, mirrored and transposed together with their costs, since computing a pair takes longer than a step on it.

    overpaint train matcher --minutes 100                   # one CPU core, resumable
    overpaint train matcher --no-diffusion --work runs/matcher-control --steps 5000 --steps 1500
    overpaint train matcher --minutes 25 --device cuda      # larger pictures, grids and networks

The second command trains the control, whose network predicts once; its steps must be those on the card of the matcher
that it is compared with.

The steps and figures of 122 minutes on one busy CPU core are in `overpaint/zoo/weights/matcher/card.json`. A resumed
run refills the store, so that it does not equal the uninterrupted run bit for bit.

Source: Nam et al., 2024 (DiffMatch), https://arxiv.org/abs/2305.19094; the fine stage's jitter is the conditioning
augmentation of Ho et al., 2022, https://arxiv.org/abs/2106.15282.
"""

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

from overpaint import files
from overpaint.match import backbone as backbones
from overpaint.match import flow as flows
from overpaint.match.conditioning import (
    Conditions,
    Features,
    coarse_conditions,
    extract_features,
    fine_conditions,
)
from overpaint.match.config import Config
from overpaint.match.denoiser import Denoiser, sample, training_loss
from overpaint.match.matcher import Matcher
from overpaint.model.sampling import Progress
from overpaint.train import card, photographs, warps
from overpaint.train.loop import Schedule, fit, remove_checkpoints

__all__ = ["CPU", "CUDA", "Recipe", "Store", "augment", "train"]

STAGES = ("coarse", "fine")


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of a training."""

    config: Config = Config.tiny()  # sizes of the networks
    shares: tuple[float, float] = (0.75, 0.25)  # parts of the minutes for coarse and fine

    batch: int = 8  # pairs in a step; at equal time, more steps of 8 learn faster than fewer of 16
    new_pairs: int = 1  # added to the store in each step
    capacity: int = 4000  # pairs in the store; 0.8 GB
    first_pairs: int = 64  # in the store before the first step
    lr: float = 1.5e-3  # peak learning rate

    fine_batch: int = 8  # the same settings for the fine stage
    fine_new_pairs: int = 1  # added to the store in each step
    fine_capacity: int = 1000  # pairs in the store, each four times as large
    fine_first_pairs: int = 32  # in the store before the first step
    fine_lr: float = 1e-3  # peak learning rate
    jitter: float = (
        2.0  # largest standard deviation of noise on the coarse flow, in cells of the fine flow
    )

    ema_decay: float = 0.999  # of the average of the weights
    checks: int = 24  # validation pairs
    check_minutes: float = 8.0  # least time between two validations


CPU = Recipe()
CUDA = replace(CPU, config=Config.base(), batch=64, new_pairs=8, fine_batch=32, fine_new_pairs=4)


class Store:
    """Ring buffer of conditions and ground truth of the latest pairs, in half precision.

    Rows are tensors by name, with the pairs along the first axis.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.added = 0
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, rows: dict[str, Tensor]) -> None:
        """Add the pairs of `rows`; in a full store they replace the oldest."""
        for name, values in rows.items():
            if name not in self._rows:
                self._rows[name] = torch.empty(self.capacity, *values.shape[1:], dtype=torch.half)
            for i, value in enumerate(values):
                self._rows[name][(self.added + i) % self.capacity] = value
        self.added += len(next(iter(rows.values())))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `count` random pairs, float32, with replacement."""
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
    on_progress: Progress | None = None,
) -> Path:
    """Train `matcher`, write it and its card to `out` and return that folder.

    At every checkpoint the present matcher is written to `<work>/zoo`. Every few minutes a line of validation errors is
    added to `<work>/checks.jsonl`: mean end-point errors in pixels of the recipe's pictures.

    Args:
        out: The matcher's folder: a new one, or one that a recipe wrote before.
        minutes: Wall time of both stages together, including that of earlier runs in `work`.
        steps: Steps of the coarse and the fine stage, instead of minutes; a control needs those on the card.
        device: `"cpu"` or `"cuda"`, which selects the larger recipe.
        resume: Continue from the checkpoints in `work`; `False` starts over.
        threads: Number of CPU threads.
        seed: Seed of the initial weights and of all random draws.
        diffusion: `False` trains the control, which gets no noise and predicts once.
        recipe: Instead of the recipe for the device.
        work: Folder of the checkpoints; may be deleted when the model is written. One for each seed and control.
        photos: Folder that the photographs are downloaded to.
        on_progress: Called with (done, total, label) every few seconds.

    Raises:
        ValueError: `out` is a folder of something else, `steps` does not have one number for each stage, or the package
            of a photograph does not have the pinned hash.
        OSError: The photographs cannot be downloaded.
    """
    out = card.prepare(out)
    if steps and (len(steps) != len(STAGES) or min(steps) < 1):
        raise ValueError(
            f"`steps` must be one positive number for each of {' and '.join(STAGES)}, got {list(steps)}: give both."
        )
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = recipe or (CUDA if device.startswith("cuda") else CPU)
    recipe = replace(recipe, config=replace(recipe.config, diffusion=diffusion))
    work.mkdir(parents=True, exist_ok=True)
    for folder in (work, work / "zoo"):
        files.remove_drafts_in(folder)
    photographs.fetch(photos)
    if not resume:
        remove_checkpoints(work, STAGES)
    run = _Run(recipe, work, photos, seed, device)
    figures: dict[str, float] = {}
    for stage, share, count in zip(STAGES, recipe.shares, steps or (None, None), strict=True):
        lr = recipe.lr if stage == "coarse" else recipe.fine_lr
        schedule = Schedule(minutes * share, lr, count, ema_decay=recipe.ema_decay)
        fit(
            run.networks[stage], run.loss(stage), schedule, stage=stage, folder=work,
            on_progress=on_progress, on_save=partial(run.check, stage),
        )  # fmt: skip
        figures |= run.errors(stage)
    with files.atomic_folder(out) as draft:
        run.matcher("fine").save(draft)
        card.save(
            draft, recipe=asdict(recipe), seed=seed, device=device, trained=card.stages(work, STAGES),
            figures={name: round(value, 4) for name, value in figures.items()}, sources=_sources(),
        )  # fmt: skip
    return out


class _Run:
    """One training: its photographs, networks and validation pairs."""

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
        validation = list(photographs.read_all(photographs.VALIDATION, photos).values())
        checks = [validation[i % len(validation)] for i in range(recipe.checks)]
        size = recipe.config.image
        self.checks = warps.pairs(checks, list(range(recipe.checks)), size=size)
        self.features = self._features(self.checks)
        self.checked = -math.inf

    def matcher(self, stage: str) -> Matcher:
        """Return the matcher in its current state; in the coarse stage it has no fine denoiser."""
        fine = self.networks["fine"] if stage == "fine" else None
        return Matcher(self.backbone, self.networks["coarse"], fine, self.recipe.config)

    def loss(self, stage: str) -> Callable[[int], Tensor]:
        """Return the loss of a stage as a function of the step; its first call fills the store with the first pairs."""
        recipe, coarse = self.recipe, stage == "coarse"
        store = Store(recipe.capacity if coarse else recipe.fine_capacity)
        first, new, batch = (
            (recipe.first_pairs, recipe.new_pairs, recipe.batch)
            if coarse
            else (recipe.fine_first_pairs, recipe.fine_new_pairs, recipe.fine_batch)
        )
        network = self.networks[stage]

        def loss(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            for _ in range(new if store.added else -(-first // new)):
                store.add(self.rows(stage, new, generator))
                if store.added > first:
                    break
            rows = augment(store.draw(batch, generator), generator, recipe.config)
            rows = {name: values.to(self.device) for name, values in rows.items()}
            conditions = Conditions(rows["initial"], rows["stack"])
            return training_loss(network, conditions, rows["truth"], rows["valid"], generator)

        return loss

    @torch.no_grad()
    def rows(self, stage: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return conditions, ground truth and valid masks of `count` new pairs for a stage."""
        config = self.recipe.config
        picks = torch.randint(len(self.photos), (count,), generator=generator).tolist()
        seeds = torch.randint(2**40, (count,), generator=generator).tolist()
        pairs = warps.pairs([self.photos[i] for i in picks], seeds, size=config.image)
        source, target = self._features(pairs)
        conditions = coarse_conditions(config, source, target)
        side = config.grid
        if stage == "fine":
            drawn = sample(self.networks["coarse"], conditions, samples=1, generator=generator)[0]
            cells = _jitter(drawn.shape, self.recipe.jitter, generator).to(drawn)
            side = config.sr_grid
            conditions = fine_conditions(config, source, target, drawn + cells / side)
        return {
            "initial": conditions.initial,
            "stack": conditions.stack,
            "truth": (flows.resize(pairs.flow, (side, side)) / side).clamp(-1, 1),
            "valid": (F.adaptive_avg_pool2d(pairs.valid.float(), side) > 0.5).float(),
        }

    @torch.no_grad()
    def errors(self, stage: str) -> dict[str, float]:
        """Return mean end-point errors on the validation pairs, in pixels: of the input, after one step, after all."""
        config, (source, target) = self.recipe.config, self.features
        conditions = coarse_conditions(config, source, target)
        if stage == "fine":
            flow = sample(self.networks["coarse"], conditions, samples=1)[0]
            conditions = fine_conditions(config, source, target, flow)
        errors = {f"{stage}_given": self._error(conditions.initial)}
        for steps in (1, config.steps):
            flow = sample(self.networks[stage], conditions, samples=1, steps=steps)[0]
            errors[f"{stage}_steps_{steps}"] = self._error(flow)
        return errors

    def check(self, stage: str, step: int) -> None:
        """Write the matcher in its current state, and its validation errors if the last ones are old enough."""
        self.matcher(stage).save(self.work / "zoo")
        if time.monotonic() - self.checked < 60 * self.recipe.check_minutes:
            return
        line = {"stage": stage, "step": step} | self.errors(stage)
        with (self.work / "checks.jsonl").open("a") as file:
            file.write(files.to_json(line) + "\n")
        self.checked = time.monotonic()

    def _features(self, pairs: warps.Pair) -> tuple[Features, Features]:
        source, target = (pictures.to(self.device) for pictures in (pairs.source, pairs.target))
        network, config = self.backbone, self.recipe.config
        return (
            extract_features(network, config, source),
            extract_features(network, config, target),
        )

    def _error(self, flow: Tensor) -> float:
        size = self.recipe.config.image
        pixels = flows.resize(flow.cpu() * flow.shape[-1], (size, size))
        errors = (pixels - self.checks.flow).norm(dim=1, keepdim=True)
        valid = self.checks.valid
        per_pair = [float(e[v].mean()) for e, v in zip(errors, valid, strict=True) if v.any()]
        return sum(per_pair) / len(per_pair)


def augment(
    rows: dict[str, Tensor], generator: torch.Generator, config: Config
) -> dict[str, Tensor]:
    """Return the pairs after random mirroring and transposition, the same for all pairs.

    Args:
        rows: `initial`, `stack`, `truth` and `valid` of B pairs, as in `Store`.
        generator: Draws which of the three apply.
        config: The matcher's, for the layout of `stack`: its costs are mirrored too, its coordinates are not.
    """
    window = 2 * config.radius + 1
    costs = rows["stack"][:, : window**2].unflatten(1, (window, window))  # (B, dy, dx, H, W)
    hints = rows["stack"][:, window**2 :]
    maps, coordinates = hints[:, :2], hints[:, 2:]
    fields = {name: rows[name] for name in ("initial", "truth")}
    valid = rows["valid"]
    left, up, across = (torch.rand(3, generator=generator) < 0.5).tolist()
    for flipped, axis in ((left, 0), (up, 1)):
        if flipped:
            sign = torch.tensor([-1.0, 1.0] if axis == 0 else [1.0, -1.0]).view(1, 2, 1, 1)
            costs = costs.flip((2 - axis, 4 - axis))
            maps, valid = (values.flip(3 - axis) for values in (maps, valid))
            fields = {name: values.flip(3 - axis) * sign for name, values in fields.items()}
    if across:
        costs = costs.transpose(1, 2).transpose(3, 4)
        maps, valid = (values.transpose(2, 3) for values in (maps, valid))
        fields = {name: values.transpose(2, 3).flip(1) for name, values in fields.items()}
    return {
        "stack": torch.cat([costs.flatten(1, 2), maps, coordinates], 1),
        "valid": valid,
        **fields,
    }


def _jitter(shape: torch.Size, max_std: float, generator: torch.Generator) -> Tensor:
    """Return noise for half of the pairs, smooth over a random length, with a std of up to `max_std`."""
    fields = []
    for _ in range(shape[0]):
        on, amount = torch.rand(2, generator=generator)
        side = 2 ** int(torch.randint(2, 6, (), generator=generator))
        noise = torch.randn(1, shape[1], side, side, generator=generator)
        noise = F.interpolate(noise, tuple(shape[2:]), mode="bilinear", align_corners=False)
        fields.append(noise * max_std * amount * (on < 0.5))
    return torch.cat(fields)


def _sources() -> list[dict[str, str]]:
    """Return the sources of the photographs, for the card."""
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
