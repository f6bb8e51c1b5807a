r"""Cross-attention to two encoders, averaged: :math:`h \leftarrow h + \frac12 f_{inst}(h) + \frac12 f_{char}(h)`.

`install_branches` builds the network of DiffSTE's public code: at each place two whole transformers.
`install_decoupled` gives the existing cross-attention keys and values of its own for the characters, as IP-Adapter does
for pictures; query and output are shared. Both read `Conditions`, which diffusers' UNet passes on as its
`encoder_hidden_states`. A condition that is `None` is left out of the mean.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568, figure 2; Ye et al., 2023 (IP-Adapter),
https://arxiv.org/abs/2308.06721, equation 5, for the decoupled form.
Deviations: the optional bias of the character attention, see `layout`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Branches",
    "CharacterProcessor",
    "Conditions",
    "DecoupledProcessor",
    "SelfProcessor",
    "install_branches",
    "install_decoupled",
    "install_plain_attention",
]


@dataclass(frozen=True)
class Conditions:
    """Inputs of the cross-attentions.

    Attributes:
        instructions: Features of the instruction, (B, L, D); `None` to leave them out.
        characters: Tokens of the characters, (B, L, E); `None` to leave them out.
        bias: Bias of the character attention by number of columns, each (B, columns, L); empty without a layout.
        aspect: Width of the latents divided by their height.
    """

    instructions: Tensor | None
    characters: Tensor | None
    bias: dict[int, Tensor]
    aspect: float = 1.0


class CharacterProcessor(nn.Module):
    """Attention processor with a bias from the layout, for the character branch of `Branches`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias_scale = nn.Parameter(torch.ones(heads))

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Conditions,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the output of the attention layer `attn`, shape of `hidden_states` (B, N, C)."""
        tokens = encoder_hidden_states.characters
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key, value = _heads(attn.to_k(tokens), attn.heads), _heads(attn.to_v(tokens), attn.heads)
        output = _attend(
            query, key, value, _bias(encoder_hidden_states, hidden_states, self.bias_scale)
        )
        return attn.to_out[1](attn.to_out[0](output))


class DecoupledProcessor(nn.Module):
    """Attention processor with keys and values of its own for characters, which returns the mean of two attentions."""

    def __init__(self, width: int, character_width: int, heads: int, *, has_layout: bool) -> None:
        super().__init__()
        self.to_k_char = nn.Linear(character_width, width, bias=False)
        self.to_v_char = nn.Linear(character_width, width, bias=False)
        self.bias_scale = nn.Parameter(torch.ones(heads)) if has_layout else None

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Conditions,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the output of the attention layer `attn`, shape of `hidden_states` (B, N, C)."""
        conditions = encoder_hidden_states
        query = _heads(attn.to_q(hidden_states), attn.heads)
        outputs = []
        if conditions.instructions is not None:
            key, value = attn.to_k(conditions.instructions), attn.to_v(conditions.instructions)
            outputs.append(_attend(query, _heads(key, attn.heads), _heads(value, attn.heads), None))
        if conditions.characters is not None:
            key, value = (
                self.to_k_char(conditions.characters),
                self.to_v_char(conditions.characters),
            )
            bias = _bias(conditions, hidden_states, self.bias_scale)
            outputs.append(_attend(query, _heads(key, attn.heads), _heads(value, attn.heads), bias))
        return attn.to_out[1](attn.to_out[0](sum(outputs) / len(outputs)))


class Branches(nn.Module):
    """Two transformers in the place of one, `text` for the instruction and `char` for the characters."""

    def __init__(self, text: nn.Module, char: nn.Module) -> None:
        super().__init__()
        self.text, self.char = text, char

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Conditions, **options: Any
    ) -> tuple[Tensor]:
        """Return the mean of the outputs, shape of `hidden_states` (B, C, H, W), as a tuple of one."""
        options["return_dict"] = False
        outputs = []
        for branch, tokens in (
            (self.text, encoder_hidden_states.instructions), (self.char, encoder_hidden_states.characters),
        ):  # fmt: skip
            if tokens is None:
                continue
            has_layout = branch is self.char and encoder_hidden_states.bias
            passed = encoder_hidden_states if has_layout else tokens
            outputs.append(branch(hidden_states, encoder_hidden_states=passed, **options)[0])
        return (torch.stack(outputs).mean(0),)


def install_branches(
    unet: Any, character_width: int, *, heads: int = 2, has_layout: bool = False
) -> None:
    """Replace each transformer of `unet` by two: itself, and a new one for characters.

    Args:
        unet: A `UNet2DConditionModel`, changed in place.
        character_width: Width of the character tokens.
        heads: Attention heads of the new transformers.
        has_layout: Whether their cross-attention gets a bias from the layout.
    """
    models: Any = import_module("diffusers.models.transformers.transformer_2d")
    for block, number, old in _transformers(unet):
        new = models.Transformer2DModel(
            heads, old.in_channels // heads, in_channels=old.in_channels, num_layers=len(old.transformer_blocks),
            cross_attention_dim=character_width, norm_num_groups=old.norm.num_groups,
            use_linear_projection=old.use_linear_projection,
        )  # fmt: skip
        if has_layout:
            for layer in new.transformer_blocks:
                layer.attn2.set_processor(CharacterProcessor(heads))
        block.attentions[number] = Branches(old, new)


class SelfProcessor:
    """Attention processor of self-attention by plain products."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the output of the attention layer `attn`, shape of `hidden_states` (B, N, C)."""
        query, key, value = (
            _heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[1](attn.to_out[0](_attend(query, key, value, None)))


def install_plain_attention(unet: Any) -> None:
    """Compute the self-attention of `unet` by plain products."""
    for module in unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.set_processor(SelfProcessor())


def install_decoupled(unet: Any, character_width: int, *, has_layout: bool = False) -> None:
    """Give each cross-attention of `unet` keys and values of its own for characters.

    Args:
        unet: A `UNet2DConditionModel`, changed in place.
        character_width: Width of the character tokens.
        has_layout: Whether the character attention gets a bias from the layout.
    """
    for _, _, transformer in _transformers(unet):
        for layer in transformer.transformer_blocks:
            attn = layer.attn2
            width = attn.to_q.out_features
            attn.set_processor(
                DecoupledProcessor(width, character_width, attn.heads, has_layout=has_layout)
            )


def _transformers(unet: Any) -> Iterator[tuple[Any, int, Any]]:
    """Yield block, number and module of each transformer of the UNet."""
    middle = [unet.mid_block] if unet.mid_block is not None else []
    for block in [*unet.down_blocks, *middle, *unet.up_blocks]:
        for number, transformer in enumerate(getattr(block, "attentions", None) or []):
            yield block, number, transformer


def _bias(conditions: Conditions, hidden_states: Tensor, scale: Tensor | None) -> Tensor | None:
    """Return the bias of the attention of each latent to each letter, (B, heads, N, L)."""
    if scale is None or not conditions.bias:
        return None
    columns = round(math.sqrt(hidden_states.shape[1] * conditions.aspect))
    bias = conditions.bias[columns][:, None] * scale[None, :, None, None]  # (B, heads, columns, L)
    rows = hidden_states.shape[1] // columns
    return bias.repeat(1, 1, rows, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention (B, N, C) of (B, heads, N, d).

    On a CPU with few tokens the plain products are twice as fast to train as torch's fused attention.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
