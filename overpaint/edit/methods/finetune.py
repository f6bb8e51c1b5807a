r"""Fine-tuning, the slow reference: cross-attention is trained until the old concept is denoised like the new one.

Concept Ablation in its model-based form: at a noised picture :math:`x_t` of the new concept, the prediction of the
tuned UNet for the old concept's caption should equal the prediction of the frozen UNet for the new one's,

.. math:: \min_{W'} \mathbb{E}_{x, t, \epsilon}
    \big\| \epsilon_{W'}(x_t, c_{old}, t) - \epsilon_W(x_t, c_{new}, t) \big\|_2^2 .

Source: Kumari et al., 2023, https://arxiv.org/abs/2303.13516, equation 5.
Deviations: the frozen model draws the pictures, with few steps each, so no data are needed; preserved prompts, where
given, alternate with the pairs and are trained to be denoised as before. It is a baseline: a closed-form edit is
thousands of times faster.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Generator, Tensor, nn

from overpaint.edit.captions import caption, check_frames, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.concept_words import check_special
from overpaint.edit.methods.cross_attention import (
    Layer,
    Projection,
    pooled_remark,
    projection_sites,
    trained_movement,
)
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.edit.methods.text_keys import feature_edit
from overpaint.edit.movement import Movement
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.weights import find_weights
from overpaint.errors import UnsupportedModel, check_seed, check_texts, later_seed
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress, denoise
from overpaint.optim import DiffGrad

__all__ = ["Training", "TrainingSettings", "finetune"]

Optimiser = Literal["adam", "diffgrad"]


class TrainingSettings(TypedDict, total=False):
    """Keyword arguments of `finetune` that set the training; `Training` describes them and has the defaults."""

    steps: int
    lr: float
    optimizer: Optimiser
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Training:
    """Settings of the training in `finetune`.

    Attributes:
        steps: Number of updates; each reads one caption.
        lr: Learning rate.
        optimizer: `"adam"` or `"diffgrad"`.
        batch_size: Number of noised pictures of an update.
        seed: Seed of pictures, noise and the order of captions.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 100
    lr: float = 1e-4
    optimizer: Optimiser = "adam"
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive({"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr})
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.optimizer not in ("adam", "diffgrad"):
            raise ValueError(
                f"`optimizer` must be 'adam' or 'diffgrad', got {self.optimizer!r}. Leave it out for Adam."
            )


@dataclass(frozen=True, eq=False)
class _Example:
    """Training data of one caption.

    Attributes:
        old: Text features that the tuned UNet reads, shape (1, L, D).
        new: Text features that the frozen UNet reads, shape (1, L, D).
        latents: Pictures to add noise to, shape (P, C, h, w).
    """

    old: Tensor
    new: Tensor
    latents: Tensor


class _Predictor(nn.Module):
    """The model's noise prediction as a module, so that `functional_call` can replace weights of the UNet."""

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
    preserve: Sequence[str] = (),
    frames: Sequence[str] = FRAMES,
    layers: Sequence[Layer] | None = None,
    matrices: Sequence[Projection] = ("k", "v"),
    pictures: int = 4,
    picture_steps: int = 10,
    on_progress: Progress | None = None,
    **training: Unpack[TrainingSettings],
) -> Change:
    """Return a change, trained by gradient descent, that makes the UNet denoise each old concept like its new one.

    Args:
        model: The model to edit; it is not modified.
        pairs: Old concept to new; `""` erases a concept: its captions are denoised like the frames alone.
        preserve: Prompts that should be denoised as before; each update on a pair is followed by one on such a prompt.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        layers: Cross-attention layers, all if `None`.
        matrices: Which of their projections are trained.
        pictures: Number of pictures drawn for each caption.
        picture_steps: Denoising steps of each picture.
        on_progress: Called with (updates done, all updates, label).
        **training: `steps`, `lr`, `optimizer`, `batch_size` and `seed`, as in `Training`.

    Returns:
        The change of all these projections. It was not solved, so it can be applied and scaled but not added. Its
        report holds the loss of the first and the last tenth of the updates, and the seconds.

    Raises:
        ValueError: A concept is empty or equals its target, a number is out of range, or the training diverged.
        UnsupportedModel: The UNet is offloaded.
        TypeError: A list of texts is one text, or a keyword is unknown.
    """
    check_pairs(pairs)
    settings = Training(**training)
    _check_positive({"pictures": pictures, "picture_steps": picture_steps})
    check_texts(preserve, "preserve")
    check_frames(frames)
    check_special(model.tokenizer, preserve)
    started = time.perf_counter()
    sites = projection_sites(model, layers, matrices)
    parameters = [weight.parameter for weight in find_weights(model, sites)]
    examples = _examples(
        model, pairs, preserve, frames, pictures=pictures, steps=picture_steps, seed=settings.seed
    )
    drawn = time.perf_counter()
    tuned = [nn.Parameter(p.detach().float().clone()) for p in parameters]
    losses = _train(model, parameters, tuned, examples, settings, on_progress)
    rows = zip(sites, parameters, tuned, strict=True)
    movements = tuple(Movement.to_weight(*row) for row in rows)
    tenth = max(1, settings.steps // 10)
    edit = feature_edit(model, pairs, (), frames=frames)
    report = {
        "weights": len(sites),
        "loss_before": sum(losses[:tenth]) / tenth,
        "loss_after": sum(losses[-tenth:]) / tenth,
        "delta_norm": math.sqrt(sum(float(m.delta.square().sum()) for m in movements)),
        "concept_movement": trained_movement(edit, movements, parameters, list(pairs)),
        "seconds": {
            "pictures": round(drawn - started, 6),
            "train": round(time.perf_counter() - drawn, 6),
        },
    }
    report |= notes(model, [*pairs, *pairs.values()], pooled_remark(model))
    head = protocol("finetune", model, pairs, unet=True) | {
        "preserve": list(preserve), **dataclasses.asdict(settings), "frames": list(frames), "matrices": list(matrices),
        "sites": sites, "pictures": pictures, "picture_steps": picture_steps,
    }  # fmt: skip
    return Change(movements, head, report)


def _examples(
    model: TextToImage,
    pairs: Mapping[str, str],
    preserve: Sequence[str],
    frames: Sequence[str],
    *,
    pictures: int,
    steps: int,
    seed: int,
) -> tuple[list[_Example], list[_Example]]:
    """Return the examples of the pairs and those of the preserved prompts."""
    framed = [(old, new, frame) for old, new in pairs.items() for frame in frames]
    olds = [caption(model, old, frame).text for old, _, frame in framed]
    news = [caption(model, new, frame).text for _, new, frame in framed]
    empty = model.encode([""])
    drawn: dict[str, _Example] = {}
    for text in dict.fromkeys([*news, *preserve]):
        embeds = model.encode([text])
        seeds = [later_seed(seed, 1000 * len(drawn) + i) for i in range(pictures)]
        latents = denoise(
            model,
            model.initial_latents(seeds, steps=steps),
            embeds.expand(pictures, -1, -1),
            empty,
            steps=steps,
            guidance_scale=model.guidance_scale,
            generators=[Generator().manual_seed(s + 1) for s in seeds],
        )
        drawn[text] = _Example(embeds, embeds, latents)
    edited = [
        _Example(model.encode([old]), drawn[new].new, drawn[new].latents)
        for old, new in zip(olds, news, strict=True)
    ]
    return edited, [drawn[text] for text in preserve]


def _train(
    model: TextToImage,
    parameters: Sequence[nn.Parameter],
    tuned: Sequence[nn.Parameter],
    examples: tuple[list[_Example], list[_Example]],
    settings: Training,
    on_progress: Progress | None,
) -> list[float]:
    """Train `tuned` in place of `parameters`, and return the loss of each update on a pair."""
    predictor = _Predictor(model)
    names = {id(p): name for name, p in predictor.named_parameters()}
    if any(id(p) not in names for p in parameters):
        raise UnsupportedModel(
            "the UNet's weights are offloaded, and training needs them in memory: load the model without offloading."
        )
    replaced = {names[id(p)]: t for p, t in zip(parameters, tuned, strict=True)}
    generator = Generator().manual_seed(settings.seed)
    kind = {"adam": torch.optim.Adam, "diffgrad": DiffGrad}[settings.optimizer]
    optimizer: Any = kind(list(tuned), lr=settings.lr)
    losses: list[float] = []
    for done in range(1, settings.steps + 1):
        for group in (part for part in examples if part):
            example = group[int(torch.randint(len(group), (1,), generator=generator))]
            loss = _loss(predictor, model, replaced, example, settings.batch_size, generator)
            gradients = torch.autograd.grad(loss, list(tuned))
            for parameter, gradient in zip(tuned, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if group is examples[0]:
                losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the training diverged at update {done}: lower `lr`, {settings.lr!r}, or load the model in float32."
            )
        if on_progress is not None:
            on_progress(done, settings.steps, "fine-tuning")
    return losses


def _loss(
    predictor: _Predictor,
    model: TextToImage,
    tuned: Mapping[str, Tensor],
    example: _Example,
    batch_size: int,
    generator: Generator,
) -> Tensor:
    """Return the mean squared difference of tuned and frozen prediction at pictures with random amounts of noise."""
    alphas = model.scheduler.alphas_cumprod
    rows = torch.randint(len(example.latents), (batch_size,), generator=generator)
    t = torch.randint(len(alphas), (batch_size,), generator=generator)
    noise = torch.randn((batch_size, *example.latents.shape[1:]), generator=generator)
    clean = example.latents[rows.to(model.device)]
    share = alphas[t].view(-1, 1, 1, 1).to(clean)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise.to(clean)
    t = t.to(model.device)
    with torch.no_grad():
        target = predictor(noisy, t, example.new.expand(batch_size, -1, -1))
    cast = {name: value.to(model.dtype) for name, value in tuned.items()}
    prediction = torch.func.functional_call(
        predictor, cast, (noisy, t, example.old.expand(batch_size, -1, -1))
    )
    return (prediction.float() - target.float()).square().mean()


def _check_positive(numbers: Mapping[str, float]) -> None:
    wrong = [name for name, value in numbers.items() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ValueError(
            f"`{wrong[0]}` must be positive, got {numbers[wrong[0]]!r}. Leave it out for the default."
        )
