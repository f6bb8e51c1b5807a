"""Gradients of a picture's score at every state: what `screen` multiplies with the states' differences.

A batch of runs (prompt, noise, seed) is denoised without gradients up to its last K steps and with them from there.
Weights are frozen meanwhile, so that the graph holds activations alone, and gradients are returned, never accumulated.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.nn import Module

from overpaint.model import hooks, text_features
from overpaint.model.sampling import denoise
from overpaint.trace.corruption import Corruption, noisy
from overpaint.trace.renderer import Renderer, finite

__all__ = ["Attribution", "Objective", "Run", "choose"]

Objective = Literal["score", "latents"]
Run = tuple[Corruption, int]  # and the seed


@dataclass(frozen=True)
class Attribution:
    """First-order effects of states on an objective.

    Attributes:
        renderer: Model, scorer, steps and guidance.
        last: Through how many of the last steps gradients go.
        objective: `"score"` is the corrupted run's score; `"latents"` minus half the squared distance of its latents
            to the clean ones.
    """

    renderer: Renderer
    last: int
    objective: Objective

    def of_unet(
        self, modules: Sequence[Module], batch: Sequence[Run], *, source: str, branches: str
    ) -> Tensor:
        """Return the attribution of each module in each run, shape (S, B), float64.

        Raises:
            UnsupportedModel: One is not finite.
        """
        model, renderer = self.renderer.model, self.renderer
        states: list[list[Tensor]] = [[] for _ in modules]
        with _frozen(model), torch.enable_grad():
            with torch.no_grad():
                clean, corrupted = _encode(model, batch), _encode(model, batch, corrupt=True)
            seen: _Keep = (modules, states)
            aims: list[list[Tensor]] = [[] for _ in modules]
            same = source == "same_latent"
            goal = self._clean(clean, batch, None if same else (modules, aims))
            tail = _Tail(renderer, self.last, seen, twin=(clean, (modules, aims)) if same else None)
            latents = tail.run(corrupted, batch, leaf=True)
            grads = torch.autograd.grad(
                self._objective(latents, goal, batch), sum(states, []), allow_unused=True
            )
        found = [
            _products(*three) for three in zip(grads, sum(aims, []), sum(states, []), strict=True)
        ]
        numbers = _finite(torch.stack(found).unflatten(0, (len(modules), -1)).sum(1))
        if renderer.guidance_scale == 1:
            return numbers
        empty, full = numbers.chunk(2, dim=1)  # the guided batch holds the unconditional rows first
        return empty + full if branches == "both" else full

    def of_text(self, modules: Sequence[Module], batch: Sequence[Run]) -> Tensor:
        """Return the attribution of each module in each run at each position, shape (S, B, L), float64.

        Raises:
            UnsupportedModel: One is not finite.
        """
        model = self.renderer.model
        states: list[list[Tensor]] = [[] for _ in modules]
        with _frozen(model), torch.enable_grad():
            with torch.no_grad(), hooks.record(modules) as aims:
                clean = _encode(model, batch)
            with hooks.patch(_listeners((modules, states))):
                embeds = _encode(model, batch, corrupt=True)
            goal = self._clean(clean, batch, None)
            start = embeds.detach().requires_grad_()
            latents = _Tail(self.renderer, self.last).run(start, batch)
            (pull,) = torch.autograd.grad(self._objective(latents, goal, batch), [start])
            grads = torch.autograd.grad(embeds, sum(states, []), pull, allow_unused=True)
        found = [
            _products(*three, keep=2)
            for three in zip(grads, sum(aims, []), sum(states, []), strict=True)
        ]
        return _finite(torch.stack(found))

    def _clean(self, embeds: Tensor, batch: Sequence[Run], into: "_Keep | None") -> Tensor | None:
        """Draw the clean runs without gradients, if anybody needs them; return their latents."""
        if into is None and self.objective == "score":
            return None
        with torch.no_grad():
            return _Tail(self.renderer, self.last, into).run(embeds, batch)

    def _objective(self, latents: Tensor, goal: Tensor | None, batch: Sequence[Run]) -> Tensor:
        """Return the sum of the runs' objectives; a run's states reach its own summand alone."""
        if self.objective == "score":
            assert self.renderer.scorer is not None
            images = _decode(self.renderer.model, latents)
            return self.renderer.scorer(images, [corruption.probe for corruption, _ in batch]).sum()
        assert goal is not None
        return -(latents - goal).square().sum() / 2


def choose(renderer: Renderer, objective: Objective | None, probe: Any) -> Objective:
    """Return the objective to use: the score if it has a gradient, unless told otherwise.

    Raises:
        ValueError: No such objective, or the score is asked for and has no gradient.
    """
    if objective not in (None, "score", "latents"):
        raise ValueError(f"`objective` must be 'score', 'latents' or None, got {objective!r}.")
    if objective == "latents":
        return objective
    with _frozen(renderer.model), torch.enable_grad():
        images = _decode(renderer.model, renderer.model.initial_latents([0])).requires_grad_()
        assert renderer.scorer is not None
        try:
            differentiable = renderer.scorer(images, [probe]).requires_grad
        except RuntimeError as error:
            if "requires grad" not in str(
                error
            ):  # numpy refuses a tensor with a gradient in these words
                raise
            differentiable = False
    if not differentiable and objective == "score":
        raise ValueError(
            "`score` returns numbers without a gradient: write it in torch operations outside `torch.no_grad`, or say "
            "objective='latents'."
        )
    return "score" if differentiable else "latents"


_Keep = tuple[
    Sequence[Module], list[list[Tensor]]
]  # for each module, what it returned, graph and all


class _Tail:
    """Denoises as `denoise` does; in the last steps states are kept and, unless under `no_grad`, gradients.

    With a twin, clean prompts run on the same latents too, without gradients, and their states are kept.
    """

    def __init__(
        self,
        renderer: Renderer,
        last: int,
        into: _Keep | None = None,
        twin: tuple[Tensor, _Keep] | None = None,
    ) -> None:
        self.renderer, self.into, self.twin = renderer, into, twin
        self.scheduler: Any = renderer.scheduler
        fresh: Any = type(self.scheduler).from_config(self.scheduler.config)
        fresh.set_timesteps(renderer.steps)
        self.first = len(fresh.timesteps) - last  # some schedulers take a step more than asked
        self.step = 0

    def run(self, embeds: Tensor, batch: Sequence[Run], *, leaf: bool = False) -> Tensor:
        """Return the final latents; with `leaf` gradients begin at the latents of the first late step."""
        seeds = [seed for _, seed in batch]
        latents = self.renderer.model.initial_latents(
            seeds, steps=self.renderer.steps, scheduler=self.scheduler
        )

        def cut(done: int, latents: Tensor) -> Tensor | None:
            return latents.detach().requires_grad_() if leaf and done == self.first else None

        # `denoise` is decorated to record no gradients; what it decorates records what is asked for.
        return inspect.unwrap(denoise)(
            self,
            latents.requires_grad_() if leaf and self.first == 0 else latents,
            embeds,
            self.renderer.model.encode([""]),
            steps=self.renderer.steps,
            guidance_scale=self.renderer.guidance_scale,
            on_step=cut,
            generators=[Generator().manual_seed(seed + 1) for seed in seeds],
        )

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict as the model does."""
        model, late = self.renderer.model, self.step >= self.first
        self.step += 1
        if not late:
            with torch.no_grad():
                return model.noise_pred(latents, t, prompt_embeds)
        if self.twin is not None:
            clean, keep = self.twin
            others = prompt_embeds[: len(prompt_embeds) - len(clean)]
            with torch.no_grad(), hooks.patch(_listeners(keep)):
                model.noise_pred(latents, t, torch.cat([others, clean]))
        with hooks.patch(_listeners(self.into)) if self.into else nullcontext():
            return model.noise_pred(latents, t, prompt_embeds)


def _listeners(keep: _Keep) -> dict[Module, Callable[[Tensor], Tensor]]:
    def listener(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def listen(output: Tensor) -> Tensor:
            into.append(output)
            return output

        return listen

    return {module: listener(into) for module, into in zip(*keep, strict=True)}


def _finite(numbers: Tensor) -> Tensor:
    cure = "load it in float32, lower `guidance_scale`, or take fewer of the `last` steps"
    return finite(numbers, "attributions", cure)


def _encode(model: Any, batch: Sequence[Run], *, corrupt: bool = False) -> Tensor:
    """Encode each run's prompt, clean or corrupted; gradients, if on, begin at the token embeddings."""
    with ExitStack() as stack:
        for part, encoder in enumerate(model.text_encoders):
            for row, (corruption, _) in enumerate(batch if corrupt else ()):
                stack.enter_context(noisy(encoder, corruption, first=row, past=row + 1, part=part))
            if torch.is_grad_enabled():
                begin = {encoder.get_input_embeddings(): lambda e: e.detach().requires_grad_()}
                stack.enter_context(hooks.patch(begin))
        ids = [
            torch.stack([corruption.parts[part][0] for corruption, _ in batch]).to(encoder.device)
            for part, encoder in enumerate(model.text_encoders)
        ]
        return text_features(model.text_encoders, ids)


def _decode(model: Any, latents: Tensor) -> Tensor:
    """Decode with gradients: what `decode` decorates with `no_grad`."""
    return inspect.unwrap(type(model).decode)(model, latents)


def _products(grad: Tensor | None, aim: Tensor, state: Tensor, keep: int = 1) -> Tensor:
    """Return the inner product of gradient and difference in all but the first `keep` dimensions, float64."""
    if grad is None:
        return torch.zeros(state.shape[:keep], dtype=torch.float64)
    product = grad.double() * (aim.double() - state.detach().double())
    return product.flatten(keep).sum(keep).cpu()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Take no gradients of weights inside the block."""
    parts = (*model.text_encoders, model.unet, model.vae)
    taken = [p for part in parts for p in part.parameters() if p.requires_grad]
    try:
        for parameter in taken:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in taken:
            parameter.requires_grad_(True)
