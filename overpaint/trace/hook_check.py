"""Check, in one forward pass, that the hook of each site fires once and in the order in which `sites` lists the sites.

`sites` reads the order off the model's structure. Only a run shows that `forward` follows it and that the hooks fire: a
compiled or fused module bypasses the hooks of its parts, a chunked module calls its parts several times, and a custom
attention processor may leave out the projection that joins the heads. An effect measured through such a hook would be
zero or wrong, without any error.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sites import Site

__all__ = ["Runnable", "verified_sites"]


class Runnable(sites.HasParts, Protocol):
    """The attributes of a model that this module uses; `TextToImage` has them."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Run every text encoder once."""
        ...

    def noise_pred(self, latents: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Run the UNet once."""
        ...


@torch.no_grad()
def verified_sites(model: Runnable) -> tuple[Site, ...]:
    """Run each part of `model` once, and return its sites in execution order.

    The picture is the smallest that the UNet accepts, so this costs a fraction of a denoising step. Attention slicing
    is allowed, since it acts between the projections, where there are no hooks.

    Args:
        model: A `TextToImage`; also on the meta device, where only shapes are computed.

    Returns:
        The sites that `sites.find` lists. In one forward pass of each part the hook of every site's module, and in
        every attention the hook of the projection that joins the heads (`sites.head_input`), fired exactly once and in
        this order.

    Raises:
        UnsupportedModel: A hook did not fire like this; the message names it. Or `sites.find` refuses the model.
    """
    listed = sites.find(model)
    expected: list[str] = []
    modules: list[Module] = []
    for site in listed:
        if sites.heads(model, site):
            expected.append(f"{site.name} (heads)")
            modules.append(sites.head_input(model, site))
        expected.append(site.name)
        modules.append(site.module(model))
    ran: list[str] = []
    recorders = {m: _recorder(ran, name) for m, name in zip(modules, expected, strict=True)}
    side = 2 ** (len(model.unet.down_blocks) - 1)
    shape = (1, model.unet.config.in_channels, side, side)
    with hooks.patch(recorders):
        embeds = model.encode(["a"])
        latents = torch.zeros(shape, device=model.device, dtype=model.dtype)
        model.noise_pred(latents, torch.tensor(1, device=model.device), embeds)
    _check(ran, expected)
    return listed


def _recorder(ran: list[str], name: str) -> Callable[[Tensor], Any]:
    def record(output: Tensor) -> Tensor:
        ran.append(name)
        return output

    return record


def _check(ran: Sequence[str], expected: Sequence[str]) -> None:
    for name in expected:
        if ran.count(name) != 1:
            raise UnsupportedModel(
                f"the hook of {name} fired {ran.count(name)} times in one forward pass, not once: a module is shared, "
                "replaced or called around its hooks. Use the pipeline as diffusers loads it."
            )
    for fired, name in zip(ran, expected, strict=True):
        if fired != name:
            raise UnsupportedModel(
                f"{fired} ran in the place of {name}, so the layers do not run in the order in which they are listed. "
                "Use the pipeline as diffusers loads it."
            )
