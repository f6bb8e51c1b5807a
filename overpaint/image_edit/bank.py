"""Bank of the inversion: keys and values of the up blocks' self-attention, for each step.

Keys and values are the outputs of `to_k` and `to_v` and are recorded and replaced there by hooks, so that any attention
processor can be in use.

Memory for R pictures and N steps: 2 R N times the sum over the layers of tokens times channels. For Stable Diffusion
1.5 at 512x512 that is 13.8 million numbers for each step and picture: 1.4 GB in half precision for one picture and 50
steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint.errors import UnsupportedModel
from overpaint.model import hooks
from overpaint.model.sites import find_unet

__all__ = ["Bank", "attentions", "token_grid"]


@dataclass
class Bank:
    """Keys and values of R inverted pictures.

    Attributes:
        layers: The self-attention modules.
        dtype: Dtype of the stored tensors.
        projections: For each step, for each layer, keys and values, both (R, tokens, D).
    """

    layers: tuple[Module, ...]
    dtype: torch.dtype = torch.float32
    projections: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the stored tensors."""
        pairs = [pair for step in self.projections.values() for pair in step]
        return sum(t.numel() * t.element_size() for pair in pairs for t in pair)

    @contextmanager
    def record(self, step: int) -> Iterator[None]:
        """Record keys and values of one pass of the UNet as those of `step`."""
        modules = [module for layer in self.layers for module in _projections(layer)]
        with hooks.record(modules) as outputs:
            yield
        recorded = [rows[-1].to(self.dtype) for rows in outputs]
        self.projections[step] = list(zip(recorded[::2], recorded[1::2], strict=True))

    @contextmanager
    def replace(self, step: int, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Replace keys and values of the UNet's passes.

        Args:
            step: Step whose stored tensors are used.
            change: Takes a layer's own tensor (B, tokens, D) and the stored one (R, tokens, D), and returns the tensor
                to use, (B, any number of tokens, D).
        """
        replacements = {
            module: partial(_changed, change, stored)
            for layer, pair in zip(self.layers, self.projections[step], strict=True)
            for module, stored in zip(_projections(layer), pair, strict=True)
        }
        with hooks.patch(replacements):
            yield


def _projections(layer: Any) -> tuple[Module, Module]:
    return layer.to_k, layer.to_v


def _changed(change: Callable[[Tensor, Tensor], Tensor], stored: Tensor, output: Tensor) -> Tensor:
    return change(output, stored.to(output))


def attentions(model: Any) -> tuple[Module, ...]:
    """Return the self-attention modules of the up blocks, in the order of execution.

    Raises:
        UnsupportedModel: The UNet has none there, or its projections are fused.
    """
    sites = find_unet(model.unet)
    modules = tuple(
        s.module(model) for s in sites if s.kind == "self_attn" and s.path.startswith("up_blocks.")
    )
    if not modules:
        raise UnsupportedModel(
            f"the up blocks of the UNet of {model.name!r} have no self-attention, whose keys and values an edit takes "
            "from the picture: use a Stable Diffusion model."
        )
    return modules


def token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the grid of a layer's tokens, for latents of `size`, each level half of the last."""
    height, width = size
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(
            f"{tokens} tokens of self-attention are no grid of halves of {size[0]}x{size[1]} latents: give `size` as a "
            "multiple of the UNet's largest stride."
        )
    return height, width
