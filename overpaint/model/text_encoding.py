"""The text features that a UNet reads, from one text encoder or two, at the last layer or an earlier one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from overpaint.errors import UnsupportedModel

__all__ = ["check_clip_skip", "text_features"]


def text_features(
    encoders: Sequence[Module], ids: Sequence[Tensor], *, clip_skip: int = 0
) -> Tensor:
    """Return the features of all text encoders packed into one tensor.

    One encoder (Stable Diffusion 1 and 2): its last hidden state, shape (N, L, D). Two encoders (SDXL): their
    penultimate hidden states, concatenated to width D = D_1 + D_2, and the pooled output of the second encoder, padded
    with zeros, as an additional last row: shape (N, L + 1, D). `TextToImage.noise_pred` unpacks it.

    Args:
        encoders: The text encoders, one or two.
        ids: Token ids for each of them, shape (N, L), on its device.
        clip_skip: Number of layers before these states that are not used, as in diffusers. With one encoder the final
            layer norm is applied to the earlier state. The pooled output is always that of the last layer.

    Source: Podell et al., 2023 (SDXL), https://arxiv.org/abs/2307.01952, section 2.1.
    """
    if len(encoders) == 1:
        if clip_skip == 0:
            return encoders[0](ids[0])[0]
        output = encoders[0](ids[0], output_hidden_states=True)
        return _final_layer_norm(encoders[0])(output.hidden_states[-1 - clip_skip])
    outputs = [
        encoder(rows, output_hidden_states=True)
        for encoder, rows in zip(encoders, ids, strict=True)
    ]
    hidden = torch.cat([output.hidden_states[-2 - clip_skip] for output in outputs], dim=-1)
    pooled = outputs[-1].text_embeds
    row = pad(pooled, (0, hidden.shape[-1] - pooled.shape[-1]))
    return torch.cat([hidden, row[:, None]], dim=1)


def check_clip_skip(encoders: Sequence[Any], clip_skip: int) -> None:
    """Raise unless at least one layer of each encoder is left before the state that the UNet reads.

    Raises:
        ValueError: `clip_skip` is negative, not an integer, or leaves no layer.
    """
    if isinstance(clip_skip, int) and not isinstance(clip_skip, bool) and clip_skip == 0:
        return
    read = 1 if len(encoders) == 1 else 2
    most = min(int(encoder.config.num_hidden_layers) for encoder in encoders) - read
    if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= most:
        raise ValueError(
            f"`clip_skip` must be an integer from 0 to {max(most, 0)} for this model, got {clip_skip!r}: it is the "
            "number of last layers of the text encoder to leave out; 0 reads what the model was trained with."
        )


def _final_layer_norm(encoder: Module) -> Module:
    norms = [m for name, m in encoder.named_modules() if name.rpartition(".")[2] == "final_layer_norm"]  # fmt: skip
    if not norms:
        raise UnsupportedModel(
            f"{type(encoder).__name__} has no final layer norm, which `clip_skip` needs: use a model with a "
            "`CLIPTextModel`, or leave `clip_skip` at 0."
        )
    return norms[0]
