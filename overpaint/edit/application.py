"""Add movements to the weights of a model, and restore the original bytes exactly.

Subtracting a movement would not return the original bytes, least of all in half precision, so the original tensor is
stored and written back. The stored tensors form a stack on the parameter that they belong to. There is no global state:
two wrappers of one pipeline see the same stack, a deep copy of the model starts with an empty stack, and the stored
tensors are freed together with the model. Several weights move together or not at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overpaint.edit.least_squares import one_thread
from overpaint.edit.movement import Movement
from overpaint.edit.stored_weights import is_base_of
from overpaint.edit.weights import Weight, find_weights, fingerprint
from overpaint.model import TextToImage

__all__ = ["applied", "apply", "is_applied", "revert"]

_STACK = "_overpaint_applied"


@dataclass(frozen=True, eq=False)
class _Record:
    """One change applied to one weight.

    Attributes:
        digest: Digest of the change.
        original: The weight before the change.
        result: `fingerprint` of the weight after.
        everywhere: All weights of the change with their records; shared by these records.
    """

    digest: str
    original: Tensor
    result: str
    everywhere: list[tuple[nn.Parameter, "_Record"]]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Parameters, their new values and the records to push; nothing is written yet."""

    parameters: list[nn.Parameter]
    values: list[Tensor]
    records: list[_Record]
    depths: list[int]


def is_applied(model: TextToImage, movements: Sequence[Movement], digest: str) -> bool:
    """Return whether the change `digest` is the last one applied to each of its weights in `model`."""
    stacks = [_stack(parameter) for parameter in _parameters(model, movements)]
    return all(stack and stack[-1].digest == digest for stack in stacks)


def apply(model: TextToImage, movements: Sequence[Movement], digest: str) -> None:
    """Add the movements of the change `digest` to the weights of `model` in place. Raises as `Change.apply`."""
    plan = _prepare(model, movements, digest)
    try:
        _move(plan)
    except BaseException:
        _restore(plan.parameters, plan.records, plan.depths)
        raise


def revert(model: TextToImage, movements: Sequence[Movement], digest: str) -> None:
    """Write back the weights that `apply` stored. Raises as `Change.revert`."""
    parameters = _parameters(model, movements)
    for movement, parameter in zip(movements, parameters, strict=True):
        _check_last(digest, movement.site, parameter, model.name)
    records = [_stack(parameter)[-1] for parameter in parameters]
    depths = [len(_stack(parameter)) - 1 for parameter in parameters]
    try:
        _restore(parameters, records, depths)
    except BaseException:  # after Ctrl-C between two weights, restore the others too
        _restore(parameters, records, depths)
        raise


@contextmanager
def applied(
    model: TextToImage, movements: Sequence[Movement], digest: str
) -> Iterator[TextToImage]:
    """Apply on entry and restore on exit, also after an exception."""
    plan = _prepare(model, movements, digest)
    try:
        _move(plan)
        yield model
    finally:
        _restore(plan.parameters, plan.records, plan.depths)


def _parameters(model: TextToImage, movements: Sequence[Movement]) -> list[nn.Parameter]:
    return [weight.parameter for weight in find_weights(model, [m.site for m in movements])]


def _prepare(model: TextToImage, movements: Sequence[Movement], digest: str) -> _Plan:
    weights = find_weights(model, [m.site for m in movements])
    parameters = [weight.parameter for weight in weights]
    values: list[Tensor] = []
    records: list[_Record] = []
    everywhere: list[tuple[nn.Parameter, _Record]] = []
    for movement, weight in zip(movements, weights, strict=True):
        _check_base(movement, weight, model)
        parameter = weight.parameter
        values.append(_finite(movement, parameter))
        with one_thread():
            original = parameter.detach().clone()
        records.append(_Record(digest, original, fingerprint(values[-1]), everywhere))
        everywhere.append((parameter, records[-1]))
    return _Plan(parameters, values, records, [len(_stack(parameter)) for parameter in parameters])


def _check_base(movement: Movement, weight: Weight, model: TextToImage) -> None:
    parameter = weight.parameter
    if is_base_of(model, weight, movement.base_hash, movement.casts):
        return
    advice = "apply it to the model it was made for, unedited, in the dtype it was made in or a cast of it"
    if parameter.dtype in (torch.float16, torch.bfloat16):
        advice += (
            "; float16 and bfloat16 round numbers differently, so if the change was made in the other of them, load "
            "the model in float32, or from its folder"
        )
    if _stack(parameter):
        advice = (
            "revert the change applied there first, or make one change of both with `edit.stack`"
        )
    raise ValueError(
        f"wrong base hash: {movement.site} of {model.name!r} is {fingerprint(parameter)[:12]}, the change was made for "
        f"{movement.base_hash[:12]}. To use it, {advice}."
    )


def _check_last(digest: str, site: str, parameter: nn.Parameter, name: str) -> None:
    """Raise unless the change `digest` is the last one at `parameter` and the weight is as that change left it."""
    stack = _stack(parameter)
    if digest not in (record.digest for record in stack):
        raise ValueError(
            f"this change is not applied to {site} of {name!r}: there is nothing to revert. `apply` it first, or "
            "load the model again if it was saved in its edited state."
        )
    if stack[-1].digest != digest:
        raise ValueError(
            f"another change was applied to {site} after this one: revert that one first."
        )
    if fingerprint(parameter) != stack[-1].result:
        raise ValueError(
            f"{site} of {name!r} was modified after this change was applied: to discard that modification too, "
            "load the model again."
        )


def _finite(movement: Movement, parameter: nn.Parameter) -> Tensor:
    value = movement.added_to(parameter)
    if not _is_finite(value):
        raise ValueError(
            f"applied to {movement.site} the change gives numbers that {value.dtype} cannot hold: load the model in "
            "float32 and make it again, or raise `ridge`."
        )
    return value


@one_thread()
def _is_finite(tensor: Tensor) -> bool:
    ends = (
        torch.stack(tensor.aminmax()) if tensor.numel() else tensor
    )  # NaN is both the minimum and the maximum
    return bool(torch.isfinite(ends).all())


def _stack(parameter: nn.Parameter) -> list[_Record]:
    """Return the records of the changes applied to `parameter`, oldest first; the list is an attribute of it."""
    return vars(parameter).setdefault(_STACK, [])


def _move(plan: _Plan) -> None:
    for parameter, value, record in zip(plan.parameters, plan.values, plan.records, strict=True):
        _overwrite(parameter, value)
        _stack(parameter).append(record)


def _restore(
    parameters: Sequence[nn.Parameter], records: Sequence[_Record], depths: Sequence[int]
) -> None:
    """Write back the originals. A change applied later on one of these weights is removed from all of its weights."""
    queue = list(zip(parameters, depths, strict=True))
    while queue:
        parameter, depth = queue.pop()
        above = _stack(parameter)[depth:]
        if not above:
            continue
        _overwrite(parameter, above[0].original)
        del _stack(parameter)[depth:]
        for other, record in (pair for later in above for pair in later.everywhere):
            if record in _stack(other):
                queue.append((other, _stack(other).index(record)))
    for parameter, record in zip(parameters, records, strict=True):
        _overwrite(parameter, record.original)


@torch.no_grad()
@one_thread()
def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)
