"""Attribution: gradients of a picture's score at every state, times the difference between clean and corrupted state.

A batch of runs (prompt, noise, seed) is denoised without gradients up to its last K steps, and with gradients in those.
Meanwhile the weights are frozen, so that the graph holds only activations, and gradients are returned, not accumulated.
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
Run = tuple[Corruption, int]  # the corrupted prompt and the seed


@dataclass(frozen=True)
class Attribution:
    """First-order effects of states on an objective.

    Attributes:
        renderer: Model, scorer, steps and guidance.
        last: Number of last steps with gradients.
        objective: `"score"` is the corrupted run's score; `"latents"` is minus half the squared distance of its
            latents to the clean ones.
    """

    renderer: Renderer
    last: int
    objective: Objective

    def of_unet(
        self, modules: Sequence[Module], batch: Sequence[Run], *, source: str, branches: str
    ) -> Tensor:
        """Return the attribution of each module in each run, shape (S, B), float64.

        Raises:
            UnsupportedModel: An attribution is not finite.
        """
        model, renderer = self.renderer.model, self.renderer
        states: list[list[Tensor]] = [[] for _ in modules]
        with _frozen(model), torch.enable_grad():
            with torch.no_grad():
                clean, corrupted = _encode(model, batch), _encode(model, batch, corrupt=True)
            corrupted_outputs: _Outputs = (modules, states)
            clean_states: list[list[Tensor]] = [[] for _ in modules]
            clean_outputs: _Outputs = (modules, clean_states)
            same = source == "same_latent"
            goal = self._clean(clean, batch, None if same else clean_outputs)
            twin = (clean, clean_outputs) if same else None
            denoiser = _LastSteps(renderer, self.last, corrupted_outputs, twin=twin)
            latents = denoiser.run(corrupted, batch, leaf=True)
            grads = torch.autograd.grad(
                self._objective(latents, goal, batch), sum(states, []), allow_unused=True
            )
        products = [
            _product(*three)
            for three in zip(grads, sum(clean_states, []), sum(states, []), strict=True)
        ]
        numbers = _finite(torch.stack(products).unflatten(0, (len(modules), -1)).sum(1))
        if renderer.guidance_scale == 1:
            return numbers
        empty, full = numbers.chunk(2, dim=1)  # the guided batch holds the unconditional rows first
        return empty + full if branches == "both" else full

    def of_text(self, modules: Sequence[Module], batch: Sequence[Run]) -> Tensor:
        """Return the attribution of each module in each run at each position, shape (S, B, L), float64.

        Raises:
            UnsupportedModel: An attribution is not finite.
        """
        model = self.renderer.model
        states: list[list[Tensor]] = [[] for _ in modules]
        with _frozen(model), torch.enable_grad():
            with torch.no_grad(), hooks.record(modules) as clean_states:
                clean = _encode(model, batch)
            with hooks.patch(_recorders((modules, states))):
                embeds = _encode(model, batch, corrupt=True)
            goal = self._clean(clean, batch, None)
            start = embeds.detach().requires_grad_()
            latents = _LastSteps(self.renderer, self.last).run(start, batch)
            (embeds_grad,) = torch.autograd.grad(self._objective(latents, goal, batch), [start])
            grads = torch.autograd.grad(embeds, sum(states, []), embeds_grad, allow_unused=True)
        products = [
            _product(*three, batch_dims=2)
            for three in zip(grads, sum(clean_states, []), sum(states, []), strict=True)
        ]
        return _finite(torch.stack(products))

    def _clean(
        self, embeds: Tensor, batch: Sequence[Run], outputs: "_Outputs | None"
    ) -> Tensor | None:
        """Denoise the clean runs without gradients and return their latents; `None` if neither is used."""
        if outputs is None and self.objective == "score":
            return None
        with torch.no_grad():
            return _LastSteps(self.renderer, self.last, outputs).run(embeds, batch)

    def _objective(self, latents: Tensor, goal: Tensor | None, batch: Sequence[Run]) -> Tensor:
        """Return the sum of the runs' objectives; a run's states affect only its own summand."""
        if self.objective == "score":
            assert self.renderer.scorer is not None
            images = _decode(self.renderer.model, latents)
            return self.renderer.scorer(images, [corruption.probe for corruption, _ in batch]).sum()
        assert goal is not None
        return -(latents - goal).square().sum() / 2


def choose(renderer: Renderer, objective: Objective | None, probe: Any) -> Objective:
    """Return `objective`; if it is `None`, `"score"` where the scores have a gradient, else `"latents"`.

    Raises:
        ValueError: No such objective, or it is `"score"` and the scores have no gradient.
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
            if "requires grad" not in str(error):  # numpy's message for a tensor with a gradient
                raise
            differentiable = False
    if not differentiable and objective == "score":
        raise ValueError(
            "`scorer` returns numbers without a gradient: write it in torch operations outside `torch.no_grad`, or "
            "pass objective='latents'."
        )
    return "score" if differentiable else "latents"


# Modules, and for each a list to which its outputs are added, with their graph.
_Outputs = tuple[Sequence[Module], list[list[Tensor]]]


class _LastSteps:
    """Denoises as `denoise` does, and records states in the last steps, with gradients unless under `no_grad`.

    With a twin, clean prompts also run on the same latents, without gradients, and their states are recorded.
    """

    def __init__(
        self,
        renderer: Renderer,
        last: int,
        outputs: _Outputs | None = None,
        twin: tuple[Tensor, _Outputs] | None = None,
    ) -> None:
        self.renderer, self.outputs, self.twin = renderer, outputs, twin
        self.scheduler: Any = renderer.scheduler
        fresh: Any = type(self.scheduler).from_config(self.scheduler.config)
        fresh.set_timesteps(renderer.steps)
        self.first = len(fresh.timesteps) - last  # some schedulers take one step more than `steps`
        self.step = 0

    def run(self, embeds: Tensor, batch: Sequence[Run], *, leaf: bool = False) -> Tensor:
        """Return the final latents; with `leaf` gradients begin at the latents of the first recorded step."""
        seeds = [seed for _, seed in batch]
        latents = self.renderer.model.initial_latents(
            seeds, steps=self.renderer.steps, scheduler=self.scheduler
        )

        def cut(done: int, latents: Tensor) -> Tensor | None:
            return latents.detach().requires_grad_() if leaf and done == self.first else None

        # `denoise` is decorated with `no_grad`; the function inside the decorator has gradients.
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
        """Return the model's prediction, and record states in the last steps."""
        model, late = self.renderer.model, self.step >= self.first
        self.step += 1
        if not late:
            with torch.no_grad():
                return model.noise_pred(latents, t, prompt_embeds)
        if self.twin is not None:
            clean, outputs = self.twin
            others = prompt_embeds[: len(prompt_embeds) - len(clean)]
            with torch.no_grad(), hooks.patch(_recorders(outputs)):
                model.noise_pred(latents, t, torch.cat([others, clean]))
        with hooks.patch(_recorders(self.outputs)) if self.outputs else nullcontext():
            return model.noise_pred(latents, t, prompt_embeds)


def _recorders(outputs: _Outputs) -> dict[Module, Callable[[Tensor], Tensor]]:
    def recorder(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def record(output: Tensor) -> Tensor:
            into.append(output)
            return output

        return record

    return {module: recorder(into) for module, into in zip(*outputs, strict=True)}


def _finite(numbers: Tensor) -> Tensor:
    remedy = "load it in float32, lower `guidance_scale`, or take fewer of the `last` steps"
    return finite(numbers, "attributions", remedy)


def _encode(model: Any, batch: Sequence[Run], *, corrupt: bool = False) -> Tensor:
    """Encode each run's prompt, clean or corrupted; gradients, if on, begin at the token embeddings."""
    with ExitStack() as stack:
        for part, encoder in enumerate(model.text_encoders):
            for row, (corruption, _) in enumerate(batch if corrupt else ()):
                stack.enter_context(noisy(encoder, corruption, first=row, end=row + 1, part=part))
            if torch.is_grad_enabled():
                begin = {encoder.get_input_embeddings(): lambda e: e.detach().requires_grad_()}
                stack.enter_context(hooks.patch(begin))
        ids = [
            torch.stack([corruption.parts[part][0] for corruption, _ in batch]).to(encoder.device)
            for part, encoder in enumerate(model.text_encoders)
        ]
        return text_features(model.text_encoders, ids, clip_skip=model.clip_skip)


def _decode(model: Any, latents: Tensor) -> Tensor:
    """Decode with gradients: call `decode` without its decorator `no_grad`."""
    return inspect.unwrap(type(model).decode)(model, latents)


def _product(grad: Tensor | None, clean: Tensor, state: Tensor, batch_dims: int = 1) -> Tensor:
    """Return the inner product of gradient and (clean - state) over all but the first `batch_dims` axes, float64."""
    if grad is None:
        return torch.zeros(state.shape[:batch_dims], dtype=torch.float64)
    product = grad.double() * (clean.double() - state.detach().double())
    return product.flatten(batch_dims).sum(batch_dims).cpu()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Set `requires_grad` of all weights to false inside the block."""
    parts = (*model.text_encoders, model.unet, model.vae)
    trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
