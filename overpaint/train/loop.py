"""A training loop that survives `kill -9`: every few minutes the whole state goes to one safetensors file.

The schedule is by wall time: the learning rate rises over the first 2 % of the minutes given and falls to zero along
a cosine over the rest. Time already spent is part of the checkpoint, so a run killed and resumed ends with the same
schedule, and a finished run can be continued with more minutes.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint.optim import DiffGrad
from overpaint.train.muon import Muon

__all__ = ["Outer", "Progress", "fit", "optimizers", "rate", "save_tensors"]

CHECKPOINT_SECONDS = 180.0
Outer = Literal["adamw", "diffgrad"]  # what updates embeddings, vectors and both ends


@dataclass(frozen=True)
class Progress:
    """Where a training run stands: stage, share of its time used in [0, 1], step, smoothed loss."""

    stage: str
    share: float
    step: int
    loss: float
    seconds_left: float


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    stage: str,
    folder: Path,
    minutes: float,
    lr: float,
    steps: int | None = None,
    weight_decay: float = 0.01,
    ema_decay: float = 0.0,
    muon: bool = True,
    optimizer: Outer = "adamw",
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    on_save: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train `model` on `loss(step)` for `minutes` and leave its averaged weights in it.

    Args:
        model: Trained in place; all of its parameters that require a gradient.
        loss: Called with the step's number, which seeds what it draws; returns a scalar.
        stage: Name of the checkpoint, `<folder>/<stage>.safetensors`.
        folder: Where the checkpoint lies.
        minutes: Wall time in all, time spent before a resume counted in.
        lr: Peak learning rate, one for both optimisers (AdamW: betas 0.9, 0.99).
        steps: End after so many steps instead, whatever their time, so that runs on a busy machine compare.
        weight_decay: Decoupled decay, on matrices only.
        ema_decay: Decay of the exponential average of the weights a step; 0 keeps none.
        muon: Update the matrices inside the network with Muon; else `optimizer` throughout.
        optimizer: What updates embeddings, vectors and both ends: "adamw", or "diffgrad" at twice the rate, since its
            friction is near one half.
        resume: Continue from the checkpoint where there is one.
        on_progress: Told about progress every few seconds.
        on_save: Called with the step after each checkpoint, the averaged weights in `model`. Its time is not counted.

    Raises:
        ValueError: There is no such optimiser, or the checkpoint was trained with another one.
        FloatingPointError: The loss is no longer a finite number.
    """
    pair = optimizers(model, lr=lr, decay=weight_decay, muon=muon, outer=optimizer)
    average = (
        {name: p.detach().clone() for name, p in model.named_parameters()} if ema_decay else {}
    )
    path = folder / f"{stage}.safetensors"
    step, spent, smooth = 0, 0.0, math.nan
    if resume and path.exists():
        step, spent, smooth = _restore(path, model, pair, average, optimizer)
    budget = minutes * 60
    last = saved = told = time.monotonic()
    model.train()
    while (share := step / steps if steps else spent / budget) < 1:
        _turn(pair, rate(lr, share))
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in pair:
            each.step()
            each.zero_grad(set_to_none=True)
        step += 1
        if average:
            _blend(average, model, min(ema_decay, step / (step + 10)))
        smooth = _smooth(smooth, value)
        now = time.monotonic()
        spent, last = spent + now - last, now
        if on_progress and now - told > 10:
            told = now
            left = spent * (steps / step - 1) if steps else max(0.0, budget - spent)
            on_progress(Progress(stage, share, step, smooth, left))
        done = step >= steps if steps else spent >= budget
        if now - saved > CHECKPOINT_SECONDS or done:
            saved = now
            progress = {"step": step, "spent": spent, "smooth": smooth}
            _save(path, model, pair, average, progress, optimizer)
            if on_save:
                _swap(average, model)
                model.eval()
                on_save(step)
                _swap(average, model)
                model.train()
                last = saved = time.monotonic()
    _swap(average, model)
    return model.eval()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to a safetensors file beside `path`, then rename it into place."""
    beside = path.with_name(path.name + ".partial")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, beside, metadata=metadata)
    os.replace(beside, path)


def optimizers(
    model: nn.Module, *, lr: float, decay: float, muon: bool = True, outer: Outer = "adamw"
) -> list[torch.optim.Optimizer]:
    """Return Muon for what lies inside (matrices, convolutions), after `outer` for embeddings, vectors and both ends.

    Raises:
        ValueError: There is no such `outer`.
    """
    if outer not in get_args(Outer):
        raise ValueError(
            f"`optimizer` must be one of {', '.join(get_args(Outer))}, got {outer!r}. Leave it out for AdamW."
        )
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    ends = ("embed", "conv_in", "conv_out", "head", "projection")
    inside = {n for n, p in named if muon and p.ndim > 1 and not any(end in n for end in ends)}
    matrices = [p for n, p in named if n not in inside and p.ndim > 1]
    vectors = [p for n, p in named if n not in inside and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (0.9, 0.99)
    first = (
        DiffGrad(groups, lr=2 * lr, betas=betas, decoupled_weight_decay=True, fused=True)
        if outer == "diffgrad"
        else torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    )
    rest = [p for n, p in named if n in inside]
    return [first, Muon(rest, lr, decay=decay)] if inside else [first]


def rate(lr: float, share: float) -> float:
    """Return the learning rate of a run of peak `lr` when `share` of its time is used, in [0, 1]."""
    return lr * min(1.0, share / 0.02 + 1e-3) * 0.5 * (1 + math.cos(math.pi * share))


def _turn(pair: list[torch.optim.Optimizer], lr: float) -> None:
    for each in pair:
        for group in each.param_groups:
            group["lr"] = 2 * lr if isinstance(each, DiffGrad) else lr


def _smooth(before: float, value: Tensor) -> float:
    now = float(value.detach())
    if not math.isfinite(now):
        raise FloatingPointError(
            f"the loss became {now}: resume from the checkpoint with a lower rate."
        )
    return now if math.isnan(before) else 0.98 * before + 0.02 * now


def _blend(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(
            list(average.values()), [p.detach() for p in model.parameters()], 1 - decay
        )


@torch.no_grad()
def _swap(average: dict[str, Tensor], model: nn.Module) -> None:
    """Exchange the values of the averages and of the weights."""
    for name, parameter in model.named_parameters():
        if name in average:
            before = parameter.detach().clone()
            parameter.copy_(average[name])
            average[name].copy_(before)


def _save(
    path: Path,
    model: nn.Module,
    pair: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
    progress: dict[str, float],
    outer: Outer,
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for kind, optimizer in enumerate(pair):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{kind}.{index}.{k}": v for k, v in state.items()}
    tensors = {k: v.clone() for k, v in tensors.items()}  # safetensors refuses shared storage
    save_tensors(tensors, path, {"progress": json.dumps(progress), "optimizer": outer})


def _restore(
    path: Path,
    model: nn.Module,
    pair: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
    outer: Outer,
) -> tuple[int, float, float]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    began = metadata.get("optimizer", "adamw")
    if began != outer:
        raise ValueError(
            f"`optimizer` must be {began!r} for {str(path)!r}, which was trained with it, got {outer!r}. Go on with "
            f"{began!r}, or start anew with `resume=False` (`--no-resume`)."
        )
    tensors = load_file(path)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for name, value in average.items():
        value.copy_(tensors[f"average.{name}"])
    for kind, optimizer in enumerate(pair):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{kind}."):
                _, _, index, name = key.split(".", 3)
                state.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    progress = json.loads(metadata["progress"])
    return progress["step"], progress["spent"], progress["smooth"]
