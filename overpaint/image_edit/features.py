"""Features of latents: outputs of the UNet's up blocks, from a pass that ends after the last block needed.

Source: Mou et al., 2024 (DragonDiffusion), https://arxiv.org/abs/2307.02421, section 3.4.2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.nn import Module

from overpaint.model import hooks

__all__ = ["blocks", "features", "frozen"]


class _LastBlock(BaseException):
    """Raised to end a pass of the UNet; `features` catches it."""


def blocks(unet: Any) -> tuple[Module, ...]:
    """Return the up blocks whose outputs are the features, in the order of execution.

    They are the first block whose output has at least half the size of the latents, and the next one: in Stable
    Diffusion 1 and 2 the second and the third of four, in SDXL the first two of three.
    """
    first = max(len(unet.up_blocks) - 3, 0)
    return tuple(unet.up_blocks[first : first + 2])


def features(run: Callable[[], object], modules: Sequence[Module]) -> list[Tensor]:
    """Return the outputs of `modules` in a pass, with their gradients; the pass ends after the last of them.

    Args:
        run: Calls the UNet.
        modules: In the order of execution.
    """
    outputs: list[Tensor] = []

    def add(output: Tensor) -> Tensor:
        outputs.append(output)
        if len(outputs) == len(modules):
            raise _LastBlock
        return output

    with hooks.patch(dict.fromkeys(modules, add)), suppress(_LastBlock):
        run()
    return outputs


@contextmanager
def frozen(module: Module) -> Iterator[None]:
    """Take the parameters of a module out of gradients, so that no activations are stored for them."""
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
