"""Proof by one run that hooks see a model's sites as `sites` lists them: each once, in that order.

`sites` reads the order off the structure. Whether `forward` follows it, and whether a hook sees it do so, only a run
can tell: a compiled or fused module calls its parts around their hooks, a chunked one calls them several times, a
foreign attention processor may leave out the projection that joins the heads. An effect measured through such a hook
would be nought, or wrong, without a word.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sites import Site

__all__ = ["Runnable", "probe"]


class Runnable(sites.HasParts, Protocol):
    """A model as far as this file needs it; `TextToImage` is one."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Their number format."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Run every text encoder once."""
        ...

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the UNet once."""
        ...


@torch.no_grad()
def probe(model: Runnable) -> tuple[Site, ...]:
    """Run every part of `model` once, and return its sites in the order in which they ran.

    The picture is as small as the UNet takes, so that this costs a fraction of a denoising step. Attention slicing is
    no hindrance: it happens between the projections, where no hook is.

    Args:
        model: A `TextToImage`; also on the meta device, where only shapes are computed.

    Returns:
        What `sites.find` lists, proved: in one forward pass of each part every site's module, and in every attention
        the projection that joins the heads (`sites.head_input`), fired exactly once and in this order.

    Raises:
        UnsupportedModel: One did not, with its name; or `sites.find` refuses the model.
    """
    found = sites.find(model)
    wanted: list[str] = []
    modules: list[Module] = []
    for site in found:
        if sites.heads(model, site):
            wanted.append(f"{site.name} (heads)")
            modules.append(sites.head_input(model, site))
        wanted.append(site.name)
        modules.append(site.module(model))
    ran: list[str] = []
    listeners = {module: _noter(ran, name) for module, name in zip(modules, wanted, strict=True)}
    side = 2 ** (len(model.unet.down_blocks) - 1)
    shape = (1, model.unet.config.in_channels, side, side)
    with hooks.patch(listeners):
        embeds = model.encode(["a"])
        latents = torch.zeros(shape, device=model.device, dtype=model.dtype)
        model.noise_pred(latents, torch.tensor(1, device=model.device), embeds)
    _check(ran, wanted)
    return found


def _noter(ran: list[str], name: str) -> Callable[[Tensor], Any]:
    def note(output: Tensor) -> Tensor:
        ran.append(name)
        return output

    return note


def _check(ran: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if ran.count(name) != 1:
            raise UnsupportedModel(
                f"the hook of {name} fired {ran.count(name)} times in one forward pass, not once: a module is shared, "
                "replaced or called around its hooks. Use the pipeline as diffusers loads it."
            )
    for seen, name in zip(ran, wanted, strict=True):
        if seen != name:
            raise UnsupportedModel(
                f"{seen} ran where {name} was due, so this model's layers run in another order than they are listed. "
                "Use the pipeline as diffusers loads it."
            )
