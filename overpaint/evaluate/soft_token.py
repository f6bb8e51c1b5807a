"""Soft tokens: embedding rows in the place of a concept in a prompt, fitted by gradient descent to undo an edit.

The rows are moved until the edited UNet predicts the noise that the unedited UNet predicted for the unchanged prompt.
They start from the mean row of the token embedding, so that the start contains nothing of the concept, and there are as
many as the concept has tokens, so that the concept's own unedited rows are a possible solution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from overpaint.errors import later_seed
from overpaint.model import TextToImage, hooks, text_features
from overpaint.model.sampling import denoise
from overpaint.model.token_spans import Span, find_span

__all__ = ["NoiseTarget", "concept_rows", "encode_with", "fit", "neutral_rows", "noise_targets"]


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


def concept_rows(model: TextToImage, concept: str) -> list[Tensor]:
    """Return the present embedding rows of the concept's K tokens, (K, D) float32, for each text encoder."""
    return [table[ids].float() for table, ids in _tables(model, concept)]


def neutral_rows(model: TextToImage, concept: str) -> list[Tensor]:
    """Return the mean row of the token embedding, once for each of the concept's K tokens, (K, D) float32."""
    return [table.float().mean(0).repeat(len(ids), 1) for table, ids in _tables(model, concept)]


def fit(
    model: TextToImage,
    prompts: Sequence[str],
    concept: str,
    targets: Sequence[NoiseTarget],
    *,
    gradient_steps: int,
    rate: float,
) -> tuple[list[Tensor], list[float]]:
    """Return the soft tokens, (K, D) for each text encoder, and the mean squared noise error of each step.

    The start is `neutral_rows`.

    Args:
        model: The edited model.
        prompts: The prompts of `targets`; each step uses one of them, in turn.
        concept: The words that the soft tokens replace; each prompt contains them once.
        targets: From `noise_targets`.
        gradient_steps: Steps of Adam.
        rate: Learning rate, relative to the standard deviation of the numbers in the token embedding.
    """
    soft = [rows.requires_grad_() for rows in neutral_rows(model, concept)]
    rates = [rate * float(table.float().std()) for table, _ in _tables(model, concept)]
    adam = torch.optim.Adam([{"params": [s], "lr": lr} for s, lr in zip(soft, rates, strict=True)])
    losses: list[float] = []
    for step in range(gradient_steps):
        chosen = step % len(prompts)
        rows = [target for target in targets if target.prompt == chosen]
        with torch.enable_grad():
            embeds = encode_with(model, [prompts[chosen]], concept, soft)
            noise = model.noise_pred(
                torch.stack([t.latents for t in rows]),
                torch.stack([t.timestep for t in rows]),
                embeds.expand(len(rows), -1, -1),
            )
            loss = (noise - torch.stack([t.noise for t in rows])).pow(2).mean()
            gradients = torch.autograd.grad(loss, soft)
        for tensor, gradient in zip(soft, gradients, strict=True):
            tensor.grad = gradient
        adam.step()
        losses.append(float(loss.detach()))
    return [s.detach() for s in soft], losses


def encode_with(
    model: TextToImage, prompts: Sequence[str], concept: str, soft: Sequence[Tensor]
) -> Tensor:
    """Return the text features of `prompts` with `soft` in the place of the concept's tokens, shape (N, L, D).

    Args:
        model: The model.
        prompts: Each contains the concept once.
        concept: The words that are replaced.
        soft: Embedding rows, (K, D) for each text encoder.

    Raises:
        ValueError: A prompt does not contain the concept exactly once.
    """
    ids: list[Tensor] = []
    patches: dict[Any, Callable[[Tensor], Tensor]] = {}
    for i, encoder in enumerate(model.text_encoders):
        tokenizer = model.tokenizers[i]
        spans = [find_span(tokenizer, prompt, concept) for prompt in prompts]
        tokens = model.tokenize(prompts, encoder=i)
        rows = [
            _with_length(tokenizer, row, span, len(soft[i]))
            for row, span in zip(tokens, spans, strict=True)
        ]
        ids.append(torch.stack(rows).to(model.device))
        patches[encoder.get_input_embeddings()] = _writer(soft[i], [span.start for span in spans])
    with hooks.patch(patches):
        return text_features(model.text_encoders, ids, clip_skip=model.clip_skip)


def _tables(model: TextToImage, concept: str) -> list[tuple[Tensor, list[int]]]:
    """Return for each text encoder its token embedding, (V, D), and the tokens of the concept."""
    tables = [e.get_input_embeddings().weight.detach() for e in model.text_encoders]
    ids = [t(concept, add_special_tokens=False).input_ids for t in model.tokenizers]
    return list(zip(tables, ids, strict=True))


def _scaled(scheduler: Any, latents: Tensor, done: int) -> Tensor:
    """Return the latents as the UNet reads them at a step; the step counter of the scheduler is set, not advanced."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler._step_index = None
        scheduler.set_begin_index(done)
    return scheduler.scale_model_input(latents, scheduler.timesteps[done])


def _with_length(tokenizer: Any, row: Tensor, span: Span, count: int) -> Tensor:
    """Return the tokens of a prompt, (L,), with `count` copies of a token in the place of a span."""
    soft = row[span.start].repeat(count)
    padding = row.new_full((max(len(span) - count, 0),), tokenizer.pad_token_id)
    longer = torch.cat([row[: span.start], soft, row[span.end :], padding])[: len(row)]
    if tokenizer.eos_token_id not in longer:  # the token limit removed the end of text
        longer[-1] = tokenizer.eos_token_id
    return longer


def _writer(soft: Tensor, starts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def write(embeddings: Tensor) -> Tensor:
        copy = embeddings.clone()
        for row, start in enumerate(starts):
            length = min(len(soft), copy.shape[1] - 1 - start)
            copy[row, start : start + length] = soft[:length].to(embeddings)
        return copy

    return write
