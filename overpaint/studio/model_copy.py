"""A model for one user: every weight shared with all others but those that a change moves.

Lending the model out under a lock and putting its bytes back would do for one change after another; but then a long
piece of work could not give way in the middle, and one that dies badly would leave its weights to the next user. Here
nobody writes to what others read. Modules are copied as a tree, a few milliseconds; their parameters and buffers stay
the very same tensors, so that a private model costs the bytes of the weights that move, some hundred kilobytes. Hooks
go on the copied tree and never see what others draw.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn import Module

from overpaint.edit import Change
from overpaint.edit.weights import weights_at
from overpaint.model import TextToImage

__all__ = ["private"]

_TEXT = ("text_encoder", "text_encoder_2")
_PARTS = (*_TEXT, "unet", "vae")


def private(
    model: TextToImage, change: Change | None = None, *, whole: bool = False
) -> TextToImage:
    """Return a model of its own modules and shared weights; with `change` applied, if one is given.

    Args:
        model: Nothing of it is written to, neither now nor by what is done to the private one through a `Change`.
        change: Its weights are copied before they are moved.
        whole: Copy the modules of UNet and decoder too, for work that puts hooks there.

    Raises:
        ValueError: The change was made for other weights, or overflows their dtype.
        UnknownSite: The model has no such weight.
        UnsupportedModel: A weight is quantised, fused, wrapped by an adapter, or not in memory.
    """
    sites = () if change is None else change.sites
    own = {id(parameter) for parameter in weights_at(model, sites)}
    pipe = copy.copy(model.pipe)
    for name in _named(sites, whole=whole):
        part = getattr(model.pipe, name, None)
        if isinstance(part, Module):
            vars(pipe)[name] = _twin(part, own)
    mine = TextToImage(
        pipe, name=model.name, guidance_scale=model.guidance_scale, held_out=model.held_out
    )
    if change is not None:
        change.apply(mine)
    return mine


def _named(sites: Sequence[str], *, whole: bool) -> Iterable[str]:
    """Return the parts to copy: text encoders always, for every edit and every trace reads them with hooks."""
    if whole:
        return _PARTS
    return (*_TEXT, "unet") if any(site.startswith("unet") for site in sites) else _TEXT


def _twin(part: Module, own: set[int]) -> Any:
    """Return a copy of a tree of modules that shares all tensors but the parameters in `own`."""
    tensors = (*part.parameters(), *part.buffers())
    shared: dict[int, Any] = {id(t): t for t in tensors if id(t) not in own}
    return copy.deepcopy(part, shared)
