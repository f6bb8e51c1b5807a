"""A copy of a model for one task: it shares every weight with the original except those that a change moves.

The studio could instead lock the model, edit its weights in place and restore them afterwards. But then a long task
could not yield in the middle, and a task that crashed would leave edited weights to the next user. With copies, nothing
writes to shared weights. Only the tree of modules is copied, which takes a few milliseconds; parameters and buffers
remain the same tensors. A copy therefore costs the bytes of the weights that move, some hundred kilobytes. Hooks are
registered on the copied modules, so they do not run when other users draw.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn import Module

from overpaint.edit import Change
from overpaint.edit.weights import find_weights
from overpaint.model import TextToImage

__all__ = ["copy_model"]

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_PARTS = (*_TEXT_ENCODERS, "unet", "vae")


def copy_model(
    model: TextToImage, change: Change | None = None, *, all_parts: bool = False
) -> TextToImage:
    """Return a copy of `model` with its own modules and shared weights, with `change` applied.

    Args:
        model: The original. Neither this function nor a `Change` that is applied to the copy writes to it.
        change: The weights that it moves are copied before they are moved. No weight is copied if `None`.
        all_parts: Copy the modules of the UNet and the decoder too, for work that registers hooks there.

    Raises:
        ValueError: The change was made for other weights, or overflows their dtype.
        UnknownSite: The model has no such weight.
        UnsupportedModel: A weight is quantised, fused, wrapped by an adapter, or not in memory.
    """
    sites = () if change is None else change.sites
    moved = {id(weight.parameter) for weight in find_weights(model, sites)}
    pipe = copy.copy(model.pipe)
    for name in _parts_to_copy(sites, all_parts=all_parts):
        part = getattr(model.pipe, name, None)
        if isinstance(part, Module):
            vars(pipe)[name] = _copy_modules(part, moved)
    model_copy = TextToImage(
        pipe, name=model.name, guidance_scale=model.guidance_scale, held_out=model.held_out,
        clip_skip=model.clip_skip,
    )  # fmt: skip
    if change is not None:
        change.apply(model_copy)
    return model_copy


def _parts_to_copy(sites: Sequence[str], *, all_parts: bool) -> Iterable[str]:
    """Return names of parts; text encoders always, because every edit and every trace registers hooks there."""
    if all_parts:
        return _PARTS
    if any(site.startswith("unet") for site in sites):
        return (*_TEXT_ENCODERS, "unet")
    return _TEXT_ENCODERS


def _copy_modules(part: Module, moved: set[int]) -> Any:
    """Return a copy of a tree of modules that shares all tensors but the parameters whose ids are in `moved`."""
    tensors = (*part.parameters(), *part.buffers())
    shared: dict[int, Any] = {id(t): t for t in tensors if id(t) not in moved}
    return copy.deepcopy(part, shared)
