"""A training loop that can be killed at any moment: every few minutes its whole state goes to one safetensors file.

The schedule follows wall time: the learning rate rises over the first 2 % of the minutes and falls to zero along a
cosine over the rest. The checkpoint holds the time already spent, so a run that is killed and resumed follows the same
schedule, and a finished run can be continued with more minutes. A step counts for a minute at most, so that the time in
which a process was stopped or the computer slept is not lost.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint import files
from overpaint.model.sampling import Progress
from overpaint.optim import DiffGrad
from overpaint.train.muon import Muon

__all__ = [
    "Outer", "Schedule", "damage_named", "fit", "load_tensors", "optimizers", "rate", "remove_checkpoints",
    "save_tensors",
]  # fmt: skip

CHECKPOINT_SECONDS = 180.0
PROGRESS_SECONDS = 10.0
LONGEST_STEP_SECONDS = 60.0  # of a step, in the time that counts
Outer = Literal["adamw", "diffgrad"]  # updates embeddings, vectors, the first and the last layer


@dataclass(frozen=True)
class Schedule:
    """Settings of one stage of a training."""

    minutes: float  # wall time in all, including the time before a resume
    lr: float  # peak learning rate, the same for both optimisers (AdamW: betas 0.9, 0.99)
    steps: int | None = (
        None  # number of steps instead of minutes, so that runs on a busy machine compare
    )
    weight_decay: float = 0.01  # decoupled, for matrices only
    ema_decay: float = 0.0  # of the exponential average of the weights per step; 0: no average
    muon: bool = True  # update the matrices inside the network with Muon, else with `optimizer`
    # Updates embeddings, vectors, the first and the last layer: "adamw", or "diffgrad" at twice the rate, since its
    # friction is about one half.
    optimizer: Outer = "adamw"

    def share(self, step: int, spent: float) -> float:
        """Return the part of the training that is done, 0 to 1, after `step` steps and `spent` seconds."""
        return step / self.steps if self.steps else spent / (60 * self.minutes)


@dataclass
class _State:
    """Counters of a run: steps done, seconds spent, smoothed loss."""

    step: int = 0
    spent: float = 0.0
    smooth: float = math.nan


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    stage: str,
    folder: Path,
    on_progress: Progress | None = None,
    on_save: Callable[[int], None] | None = None,
) -> nn.Module:
    """Train `model` on `loss(step)` and return it with its averaged weights, in evaluation mode.

    Continues from the checkpoint if there is one.

    Args:
        model: Trained in place; all parameters that require a gradient.
        loss: Called with the number of the step, which seeds its random draws; returns a scalar.
        schedule: Time, learning rate and optimisers.
        stage: Name of the checkpoint, `<folder>/<stage>.safetensors`.
        folder: Folder of the checkpoint.
        on_progress: Called with (done, 1000, label) every ten seconds.
        on_save: Called with the step after each checkpoint, while `model` holds the averaged weights. Its time does
            not count.

    Raises:
        ValueError: There is no such optimiser, or the checkpoint was trained with another one.
        FloatingPointError: The loss is not finite.
    """
    pair = optimizers(
        model, lr=schedule.lr, decay=schedule.weight_decay, muon=schedule.muon, outer=schedule.optimizer
    )  # fmt: skip
    named = model.named_parameters() if schedule.ema_decay else ()
    average = {name: p.detach().clone() for name, p in named}
    path = folder / f"{stage}.safetensors"
    state = _State()
    if path.exists():
        state = _restore(path, model, pair, average, schedule.optimizer)
    last = saved = reported = time.monotonic()
    model.train()
    while (share := schedule.share(state.step, state.spent)) < 1:
        _set_rate(pair, rate(schedule.lr, share))
        value = _update(model, loss, pair, state.step)
        state.step += 1
        if average:
            _blend(average, model, min(schedule.ema_decay, state.step / (state.step + 10)))
        state.smooth = _smooth(state.smooth, value)
        now = time.monotonic()
        state.spent, last = state.spent + min(now - last, LONGEST_STEP_SECONDS), now
        share = schedule.share(state.step, state.spent)
        if on_progress and now - reported > PROGRESS_SECONDS:
            reported = now
            on_progress(int(1000 * min(share, 1)), 1000, f"{stage}, loss {state.smooth:.4f}")
        if now - saved > CHECKPOINT_SECONDS or share >= 1:
            saved = now
            _save(path, model, pair, average, state, schedule.optimizer)
            if on_save:
                _swap(average, model)
                model.eval()
                on_save(state.step)
                _swap(average, model)
                model.train()
                last = saved = time.monotonic()
    _swap(average, model)
    return model.eval()


def remove_checkpoints(folder: Path, stages: Iterable[str]) -> None:
    """Remove the checkpoints of `stages` from `folder`, so that `fit` starts over."""
    for stage in stages:
        (folder / f"{stage}.safetensors").unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of a training.

    Raises:
        ValueError: The file is damaged.
        OSError: The file cannot be read.
    """
    with damage_named(path):
        return load_file(path)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path`, atomically."""
    with files.atomic(path) as draft:
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()}, draft, metadata=metadata
        )


def optimizers(
    model: nn.Module, *, lr: float, decay: float, muon: bool = True, outer: Outer = "adamw"
) -> list[torch.optim.Optimizer]:
    """Return `outer` for embeddings, vectors, the first and the last layer, and Muon for the other matrices.

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
    """Return the learning rate of a run with peak `lr` when the part `share` of it is done, 0 to 1."""
    return lr * min(1.0, share / 0.02 + 1e-3) * 0.5 * (1 + math.cos(math.pi * share))


def _update(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    pair: list[torch.optim.Optimizer],
    step: int,
) -> Tensor:
    """Take one optimiser step, with clipped gradients, and return the loss."""
    value = loss(step)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for each in pair:
        each.step()
        each.zero_grad(set_to_none=True)
    return value


def _set_rate(pair: list[torch.optim.Optimizer], lr: float) -> None:
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
    state: _State,
    outer: Outer,
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for kind, optimizer in enumerate(pair):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{kind}.{index}.{k}": v for k, v in values.items()}
    tensors = {k: v.clone() for k, v in tensors.items()}  # safetensors refuses shared storage
    save_tensors(tensors, path, {"progress": json.dumps(vars(state)), "optimizer": outer})


def _restore(
    path: Path,
    model: nn.Module,
    pair: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
    outer: Outer,
) -> _State:
    with damage_named(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    began = metadata.get("optimizer", "adamw")
    if began != outer:
        raise ValueError(
            f"`optimizer` must be {began!r} for {str(path)!r}, which was trained with it, got {outer!r}. Go on with "
            f"{began!r}, or start anew with `resume=False` (`--no-resume`)."
        )
    with damage_named(path):
        state = _state(metadata)
        _load_tensors(load_file(path), model, pair, average)
    return state


def _state(metadata: Mapping[str, str]) -> _State:
    """Return the progress in the metadata of a checkpoint."""
    state = _State(**files.from_json(metadata["progress"]))
    if type(state.step) is not int or state.step < 0 or not 0 <= state.spent < math.inf:
        raise ValueError("its progress is not that of a training")
    return state


def _load_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    pair: list[torch.optim.Optimizer],
    average: dict[str, Tensor],
) -> None:
    """Copy the tensors of a checkpoint into the model, its optimisers and the averages."""
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for name, value in average.items():
        value.copy_(tensors[f"average.{name}"])
    for kind, optimizer in enumerate(pair):
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{kind}."):
                _, _, index, name = key.split(".", 3)
                states.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise a `ValueError` that names `path` if the block finds that this file of a training is damaged."""
    try:
        yield
    except (
        AttributeError, ArithmeticError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError,
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"the training's file {str(path)!r} is damaged ({reason}): delete it, or start anew with `resume=False` "
            "(`--no-resume`)."
        ) from error
