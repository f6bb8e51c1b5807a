r"""Fine-tuning, the slow reference: cross-attention trained until an old concept is denoised as a new one.

Concept Ablation in its model-based form: at a noised picture :math:`x_t` of the new concept, what the tuned UNet
predicts for the old one's caption should be what the frozen UNet predicts for the new one's,

.. math:: \min_{W'} \mathbb{E}_{x, t, \epsilon}
    \big\| \epsilon_{W'}(x_t, c_{old}, t) - \epsilon_W(x_t, c_{new}, t) \big\|_2^2 .

Source: Kumari et al., 2023, https://arxiv.org/abs/2303.13516, equation 5.
Deviations: the frozen model draws the pictures, a few steps each, so that no data are needed; preserved prompts, where
given, take turns with the pairs and should be denoised as before. Meant to compare with: a closed form does the same
thousands of times faster.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from overpaint.edit.captions import caption, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import Layer, Projection, projections
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weights, fingerprint
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.sampling import denoise
from overpaint.optim import DiffGrad

__all__ = ["finetune"]

Optimiser = Literal["adam", "diffgrad"]


@dataclass(frozen=True, eq=False)
class _Lesson:
    """Text features of what is read and of what it should be denoised as, shape (1, L, D), and pictures to do it on."""

    read: Tensor
    meant: Tensor
    pictures: Tensor


class _Predictor(nn.Module):
    """The model's noise prediction, whose UNet can be called with other weights."""

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.unet = model.unet
        self._predict = model.noise_pred

    def forward(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self._predict(latents, t, prompt_embeds)


def finetune(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    steps: int = 100,
    lr: float = 1e-4,
    optimizer: Optimiser = "adam",
    batch_size: int = 4,
    preserve: Sequence[str] = (),
    frames: Sequence[str] = FRAMES,
    layers: Sequence[Layer] | None = None,
    matrices: Sequence[Projection] = ("k", "v"),
    pictures: int = 4,
    picture_steps: int = 10,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Change:
    """Change trained by gradient descent so that each old concept is denoised as its new one; the model stays as it is.

    Args:
        model: The model to edit.
        pairs: Old concept to new.
        steps: Updates; each takes one caption.
        lr: Learning rate.
        optimizer: `"adam"` or `"diffgrad"`.
        batch_size: Noised pictures in an update.
        preserve: Prompts that should be denoised as before; an update on one of them follows each on a pair.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.
        layers: Cross-attention layers, all if `None`.
        matrices: Which of their projections.
        pictures: How many are drawn of each caption to be noised.
        picture_steps: Denoising steps of each.
        seed: Of pictures, noise and the order of captions.
        on_progress: Called after each update with the updates done and all of them.

    Returns:
        The change of all these projections. It was not solved, so it can be applied and scaled but not added. Its
        report holds the loss of the first and the last tenth of the updates, and the seconds.

    Raises:
        ValueError: A concept is empty or equals its target, a number is out of range, or the training diverged.
        UnsupportedModel: The UNet is offloaded.
        TypeError: A list of texts is one text.
    """
    check_pairs(pairs)
    _check(steps, lr, optimizer, batch_size, pictures, picture_steps)
    if isinstance(preserve, str) or isinstance(frames, str) or not frames:
        raise TypeError(
            "`preserve` and `frames` are lists of texts, and `frames` is not empty: write ['...'] around a single one."
        )
    started = time.perf_counter()
    sites = projections(model, layers, matrices)
    parameters = [weight.parameter for weight in find_weights(model, sites)]
    lessons = _lessons(model, pairs, preserve, frames, pictures, picture_steps, seed)
    drawn = time.perf_counter()
    tuned = [nn.Parameter(p.detach().float().clone()) for p in parameters]
    losses = _train(
        model, parameters, tuned, lessons,
        steps=steps, lr=lr, optimizer=optimizer, batch_size=batch_size, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    movements = tuple(_movement(*row) for row in zip(sites, parameters, tuned, strict=True))
    tenth = max(1, steps // 10)
    report = {
        "weights": len(sites),
        "loss_before": sum(losses[:tenth]) / tenth,
        "loss_after": sum(losses[-tenth:]) / tenth,
        "delta_norm": math.sqrt(sum(float(m.delta.square().sum()) for m in movements)),
        "seconds": {
            "pictures": round(drawn - started, 6),
            "train": round(time.perf_counter() - drawn, 6),
        },
    }
    protocol = {
        "method": "finetune", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve),
        "steps": steps, "lr": lr, "optimizer": optimizer, "batch_size": batch_size, "frames": list(frames),
        "matrices": list(matrices), "sites": sites, "pictures": pictures, "picture_steps": picture_steps, "seed": seed,
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
    }  # fmt: skip
    return Change(movements, protocol, report)


def _lessons(
    model: TextToImage,
    pairs: Mapping[str, str],
    preserve: Sequence[str],
    frames: Sequence[str],
    pictures: int,
    picture_steps: int,
    seed: int,
) -> tuple[list[_Lesson], list[_Lesson]]:
    """Return what to learn of the pairs, and of the preserved prompts."""
    asked = [(old, new, frame) for old, new in pairs.items() for frame in frames]
    olds = [caption(model, old, frame).text for old, _, frame in asked]
    news = [caption(model, new, frame).text for _, new, frame in asked]
    empty = model.encode([""])
    drawn: dict[str, _Lesson] = {}
    for text in dict.fromkeys([*news, *preserve]):
        meant = model.encode([text])
        seeds = range(seed + 1000 * len(drawn), seed + 1000 * len(drawn) + pictures)
        latents = denoise(
            model,
            model.initial_latents(list(seeds), steps=picture_steps),
            meant.expand(pictures, -1, -1),
            empty,
            steps=picture_steps,
            guidance_scale=model.guidance_scale,
            generators=[Generator().manual_seed(s + 1) for s in seeds],
        )
        drawn[text] = _Lesson(meant, meant, latents)
    taught = [
        _Lesson(model.encode([old]), drawn[new].meant, drawn[new].pictures)
        for old, new in zip(olds, news, strict=True)
    ]
    return taught, [drawn[text] for text in preserve]


def _train(
    model: TextToImage,
    parameters: Sequence[nn.Parameter],
    tuned: Sequence[nn.Parameter],
    lessons: tuple[list[_Lesson], list[_Lesson]],
    *,
    steps: int,
    lr: float,
    optimizer: Optimiser,
    batch_size: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[float]:
    """Train `tuned`, and return the loss of each update on a pair."""
    predictor = _Predictor(model)
    names = {id(p): name for name, p in predictor.named_parameters()}
    if any(id(p) not in names for p in parameters):
        raise UnsupportedModel(
            "the UNet's weights are offloaded, and training needs them in memory: load the model without offloading."
        )
    given = {names[id(p)]: t for p, t in zip(parameters, tuned, strict=True)}
    generator = Generator().manual_seed(seed)
    kind = {"adam": torch.optim.Adam, "diffgrad": DiffGrad}[optimizer]
    updates: Any = kind(list(tuned), lr=lr)
    losses: list[float] = []
    for done in range(1, steps + 1):
        for some in (part for part in lessons if part):
            lesson = some[int(torch.randint(len(some), (1,), generator=generator))]
            loss = _loss(predictor, model, given, lesson, batch_size, generator)
            gradients = torch.autograd.grad(loss, list(tuned))
            for parameter, gradient in zip(tuned, gradients, strict=True):
                parameter.grad = gradient
            updates.step()
            if some is lessons[0]:
                losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the training diverged at update {done}: lower `lr`, {lr!r}, or load the model in float32."
            )
        if on_progress is not None:
            on_progress(done, steps)
    return losses


def _loss(
    predictor: _Predictor,
    model: TextToImage,
    tuned: Mapping[str, Tensor],
    lesson: _Lesson,
    batch_size: int,
    generator: Generator,
) -> Tensor:
    """Return the mean squared difference between tuned and frozen prediction at pictures noised to random degrees."""
    alphas = model.scheduler.alphas_cumprod
    rows = torch.randint(len(lesson.pictures), (batch_size,), generator=generator)
    t = torch.randint(len(alphas), (batch_size,), generator=generator)
    noise = torch.randn((batch_size, *lesson.pictures.shape[1:]), generator=generator)
    clean = lesson.pictures[rows.to(model.device)]
    share = alphas[t].view(-1, 1, 1, 1).to(clean)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise.to(clean)
    t = t.to(model.device)
    with torch.no_grad():
        wanted = predictor(noisy, t, lesson.meant.expand(batch_size, -1, -1))
    cast = {name: value.to(model.dtype) for name, value in tuned.items()}
    found = torch.func.functional_call(
        predictor, cast, (noisy, t, lesson.read.expand(batch_size, -1, -1))
    )
    return (found.float() - wanted.float()).square().mean()


def _movement(site: str, parameter: nn.Parameter, tuned: Tensor) -> Movement:
    """Return the whole difference as factors of which the smaller is the identity."""
    weight = parameter.detach().cpu()
    delta = (tuned.detach().cpu().double() - weight.double()).float()
    out, width = delta.shape
    left, right = (torch.eye(out), delta) if out <= width else (delta, torch.eye(width))
    none = torch.zeros(0, width), torch.zeros(0, out)
    return Movement(site, fingerprint(parameter), left, right, *none, (), None)


def _check(
    steps: int, lr: float, optimizer: str, batch_size: int, pictures: int, picture_steps: int
) -> None:
    numbers = {
        "steps": steps, "batch_size": batch_size, "pictures": pictures, "picture_steps": picture_steps, "lr": lr,
    }  # fmt: skip
    wrong = [name for name, value in numbers.items() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ValueError(
            f"`{wrong[0]}` must be positive, got {numbers[wrong[0]]!r}. Leave it out for the default."
        )
    if optimizer not in ("adam", "diffgrad"):
        raise ValueError(
            f"`optimizer` must be 'adam' or 'diffgrad', got {optimizer!r}. Leave it out for Adam."
        )
