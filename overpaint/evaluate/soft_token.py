"""A soft token: one more embedding at the end of a prompt, fitted by gradient descent to undo an edit.

The embedding is moved until the edited UNet predicts the noise that the unedited UNet predicted for the same prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint.errors import later_seed
from overpaint.model import TextToImage, hooks, text_features
from overpaint.model.sampling import denoise
from overpaint.model.token_spans import end_of_text

__all__ = ["NoiseTarget", "encode_with", "fit", "initial", "noise_targets"]


@dataclass(frozen=True)
class NoiseTarget:
    """The noise that the unedited model predicts at one step of one prompt."""

    timestep: Tensor
    latents: Tensor  # (C, h, w), scaled as the UNet reads them
    noise: Tensor  # (C, h, w)
    prompt: int  # index of the prompt


@torch.no_grad()
def noise_targets(
    model: TextToImage, prompts: Sequence[str], *, steps: int, guidance_scale: float, seed: int
) -> list[NoiseTarget]:
    """Return the noise that the unedited model predicts for each prompt at each step, in the order of the steps.

    Args:
        model: The unedited model.
        prompts: The prompts.
        steps: Denoising steps.
        guidance_scale: Weight of the prompt along the denoising path.
        seed: Seed of the first prompt's latents; those of the others count up from it.
    """
    targets: list[NoiseTarget] = []
    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    embeds = model.encode(prompts)

    @torch.no_grad()
    def record(done: int, latents: Tensor) -> None:
        if done < len(times):
            scaled = _scaled(scheduler, latents, done)
            noise = model.noise_pred(scaled, times[done], embeds)
            rows = enumerate(zip(scaled, noise, strict=True))
            targets.extend(NoiseTarget(times[done], x, n, i) for i, (x, n) in rows)

    seeds = [later_seed(seed, i) for i in range(len(prompts))]
    latents = model.initial_latents(seeds, steps=steps)
    record(0, latents)
    denoise(
        model, latents, embeds, model.encode([""]), steps=steps, guidance_scale=guidance_scale,
        on_step=record, generators=[Generator().manual_seed(s + 1) for s in seeds],
    )  # fmt: skip
    return targets


def initial(model: TextToImage, encoder: int, concept: str) -> Tensor:
    """Return the mean embedding of the concept's tokens in one text encoder, shape (D,)."""
    ids = model.tokenizers[encoder](concept, add_special_tokens=False).input_ids
    table = model.text_encoders[encoder].get_input_embeddings().weight
    return table[ids].detach().float().mean(0)


def fit(
    model: TextToImage,
    prompts: Sequence[str],
    concept: str,
    targets: Sequence[NoiseTarget],
    *,
    gradient_steps: int,
    rate: float,
) -> tuple[list[Tensor], list[float]]:
    """Return the soft token, one embedding for each text encoder, and the mean squared noise error of each step.

    Args:
        model: The edited model.
        prompts: The prompts of `targets`; each step uses one of them, in turn.
        concept: The mean embedding of its tokens is the start.
        targets: From `noise_targets`.
        gradient_steps: Steps of Adam.
        rate: Learning rate, relative to the root mean square of the start embedding.
    """
    soft = [initial(model, i, concept).requires_grad_() for i in range(len(model.text_encoders))]
    rates = [rate * float(s.detach().norm()) / s.numel() ** 0.5 for s in soft]
    adam = torch.optim.Adam([{"params": [s], "lr": lr} for s, lr in zip(soft, rates, strict=True)])
    losses: list[float] = []
    for step in range(gradient_steps):
        rows = [target for target in targets if target.prompt == step % len(prompts)]
        with torch.enable_grad():
            embeds = encode_with(model, prompts, soft)
            errors = [
                model.noise_pred(t.latents[None], t.timestep, embeds[t.prompt : t.prompt + 1])[0]
                - t.noise
                for t in rows
            ]
            loss = torch.stack([error.pow(2).mean() for error in errors]).mean()
            gradients = torch.autograd.grad(loss, soft)
        for tensor, gradient in zip(soft, gradients, strict=True):
            tensor.grad = gradient
        adam.step()
        losses.append(float(loss.detach()))
    return [s.detach() for s in soft], losses


def encode_with(model: TextToImage, prompts: Sequence[str], soft: Sequence[Tensor]) -> Tensor:
    """Return the text features of `prompts` with the soft token before the end of text, shape (N, L, D)."""
    ids: list[Tensor] = []
    patches: dict[Any, Callable[[Tensor], Tensor]] = {}
    for i, encoder in enumerate(model.text_encoders):
        rows, ends = _with_placeholder(model.tokenizers[i], model.tokenize(prompts, encoder=i))
        ids.append(rows.to(model.device))
        patches[encoder.get_input_embeddings()] = _writer(soft[i], ends)
    with hooks.patch(patches):
        return text_features(model.text_encoders, ids, clip_skip=model.clip_skip)


def _scaled(scheduler: Any, latents: Tensor, done: int) -> Tensor:
    """Return the latents as the UNet reads them at a step; the step counter of the scheduler is set, not advanced."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler._step_index = None
        scheduler.set_begin_index(done)
    return scheduler.scale_model_input(latents, scheduler.timesteps[done])


def _with_placeholder(tokenizer: Any, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Return `ids` (N, L) with one more token before each end of text, and its position in each row."""
    ends = [min(end_of_text(tokenizer, row), ids.shape[1] - 2) for row in ids]
    rows = torch.stack(
        [
            torch.cat([row[:end], row[end - 1 : end], row[end:][:-1]])
            for row, end in zip(ids, ends, strict=True)
        ]
    )
    # also where the token limit removed the end of text
    rows[range(len(ends)), [end + 1 for end in ends]] = tokenizer.eos_token_id
    return rows, ends


def _writer(soft: Tensor, ends: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def write(embeddings: Tensor) -> Tensor:
        copy = embeddings.clone()
        copy[range(len(ends)), list(ends)] = soft.to(embeddings)
        return copy

    return write
