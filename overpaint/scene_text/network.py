"""The network of a lettering model: two encoders, a layout head, an inpainting UNet, and its latents.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568.
Deviations: sizes; the layout head and the prediction of clean latents, see `layout` and `Config`; the network reads two
planes of positions, horizontal in the word and vertical between baseline and capital height.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.scene_text import alphabet
from overpaint.scene_text.attention import (
    Conditions,
    install_branches,
    install_decoupled,
    install_plain_attention,
)  # fmt: skip
from overpaint.scene_text.codec import make_codec
from overpaint.scene_text.config import Config
from overpaint.scene_text.encoders import CharacterEncoder, InstructionEncoder
from overpaint.scene_text.instructions import Tokenizer
from overpaint.scene_text.layout import (
    Edges,
    LayoutHead,
    coverage_bias,
    edges_from_logits,
    geometry,
    letter_features,
)  # fmt: skip

__all__ = ["Inputs", "Network", "Place", "Texts"]


@dataclass(frozen=True)
class Texts:
    """Words and instructions as numbers.

    Attributes:
        numbers: Characters, (B, L).
        counts: Characters of each word, (B,).
        tokens: Tokens of the instructions, (B, M).
    """

    numbers: Tensor
    counts: Tensor
    tokens: Tensor

    def dropped(self, characters: Tensor, instructions: Tensor) -> "Texts":
        """Return the texts with some rows emptied, by two masks, bool (B,)."""
        return Texts(
            self.numbers * ~characters[:, None], self.counts * ~characters, self.tokens * ~instructions[:, None]
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where words stand on their lines, in pixels, each (B,)."""

    start: Tensor  # left edge of the first letter
    end: Tensor  # right edge of the last letter
    capital: Tensor  # upper edge of capital letters
    baseline: Tensor  # lower edge of capital letters


@dataclass(frozen=True)
class Inputs:
    """Inputs of the UNet that do not change from step to step.

    Attributes:
        fixed: Channels beside the noisy latents: mask, masked picture, positions and features of letters, (B, C, h, w).
        conditions: Tokens for the cross-attentions.
        logits: Of the layout head, (B, L); `None` without a layout.
        edges: Edges that were used; `None` without a layout.
    """

    fixed: Tensor
    conditions: Conditions
    logits: Tensor | None
    edges: Edges | None


class Network(nn.Module):
    """All trained parts of a lettering model.

    Attributes:
        config: Sizes and switches.
        tokenizer: Of the instructions.
        codec: Latents of pictures.
        unet: A `UNet2DConditionModel`, whose `encoder_hidden_states` are `Conditions`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.pieces, config.instruction_length)
        self.codec = make_codec(config.codec, config.latent_channels)
        self.characters = CharacterEncoder(
            config.text_length, config.text_width, both_ends=config.both_ends, has_layout=config.has_layout
        )  # fmt: skip
        self.instructions = InstructionEncoder(
            len(self.tokenizer), config.instruction_length, config.instruction_width, config.instruction_layers
        )  # fmt: skip
        self.layout_head = self.letter_projection = None
        if config.has_layout:
            width = config.instruction_width if config.instructions else 0
            self.layout_head = LayoutHead(config.text_width, width)
        if config.layout_features:
            self.letter_projection = nn.Linear(config.text_width, config.feature_width)
        self.unet = _unet(config)

    def texts(self, words: list[str], instructions: list[str]) -> Texts:
        """Return words and instructions as numbers, on the device of the network."""
        numbers, counts = alphabet.encode(words, self.config.text_length)
        device = self.unet.device
        tokens = self.tokenizer.encode(instructions)
        return Texts(numbers.to(device), counts.to(device), tokens.to(device))

    def natural_width(self, texts: Texts) -> Tensor:
        """Return the width of each word in heights of a capital letter, (B,), by the layout head.

        Raises:
            ValueError: The network has no layout head.
        """
        _, pooled = self.instructions(texts.tokens)
        logits = self._logits(texts, pooled)
        if logits is None:
            raise ValueError("this model has no layout head: name the width of the word.")
        return logits.logsumexp(-1).exp()

    def inputs(
        self,
        images: Tensor,
        mask: Tensor,
        texts: Texts,
        place: Place,
        *,
        edges: Edges | None = None,
    ) -> Inputs:
        """Return the fixed inputs of the UNet.

        Args:
            images: Lines, RGB in [-1, 1], (B, 3, H, W); pixels under the mask are not read.
            mask: 1 where the word is to be written, (B, 1, H, W).
            texts: Words and instructions; a row without characters has no layout.
            place: Where the words stand.
            edges: True edges of the letters, in training; by default those of the layout head.
        """
        config = self.config
        height, width = config.grid
        known = self.codec.encode(images * (1 - mask))
        fixed = [nn.functional.pixel_unshuffle(mask, 4), known, self._positions(place)]
        features, pooled = self.instructions(texts.tokens)
        logits = self._logits(texts, pooled)
        shape = bias = None
        if logits is not None:
            valid = self._valid(texts)
            edges = edges or edges_from_logits(logits, valid, place.start, place.end)
            edges = replace(edges, valid=valid)
            shape = geometry(edges, config.line.width)
            if config.layout in ("both", "bias"):
                columns = [width >> level for level in range(len(config.channels))]
                bias = {n: coverage_bias(edges, n, config.line.width) for n in columns}
        if self.letter_projection is not None and edges is not None:
            embeddings = self.letter_projection(self.characters.embedding(texts.numbers))
            columns = letter_features(
                edges, embeddings, width, config.subcolumns, config.line.width
            )
            fixed.append(columns[:, :, None].expand(-1, -1, height, -1))
        conditions = Conditions(
            features if config.instructions else None,
            self.characters(texts.numbers, texts.counts, shape) if config.characters else None,
            bias or {},
            width / height,
        )
        return Inputs(
            torch.cat(fixed, 1), conditions, logits, edges if logits is not None else None
        )

    def forward(self, latents: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Return the prediction of `config.prediction`, shape of `latents`.

        Args:
            latents: Noisy latents, (B, C, h, w).
            t: Timesteps, (B,) or a single number.
            inputs: Of `inputs`.
        """
        joined = torch.cat([latents, inputs.fixed.to(latents.dtype)], 1)
        return self.unet(joined, t, inputs.conditions, return_dict=False)[0]

    def _logits(self, texts: Texts, pooled: Tensor) -> Tensor | None:
        if self.layout_head is None:
            return None
        embeddings = self.characters.embedding(texts.numbers)
        pooled_or_none = pooled if self.config.instructions else None
        return self.layout_head(embeddings, pooled_or_none, self._valid(texts))

    def _valid(self, texts: Texts) -> Tensor:
        places = torch.arange(self.config.text_length, device=texts.counts.device)
        return (places < texts.counts[:, None]).float()

    def _positions(self, place: Place) -> Tensor:
        """Return two planes, (B, 2, h, w): -1 to 1 within the word, zero beside it; 0 to 1 from baseline to capital."""
        height, width = self.config.grid
        xs = (torch.arange(width, device=place.start.device) + 0.5) * 4
        ys = (torch.arange(height, device=place.start.device) + 0.5) * 4
        across = (xs - place.start[:, None]) / (place.end - place.start)[:, None] * 2 - 1
        across = across * (across.abs() <= 1)
        up = (place.baseline[:, None] - ys) / (place.baseline - place.capital)[:, None]
        shape = (-1, -1, height, width)
        return torch.cat([
            across[:, None, None].expand(shape), up[:, None, :, None].expand(shape),
        ], 1)  # fmt: skip


def _unet(config: Config) -> Any:
    """Return the UNet of a configuration, with attention to both encoders at every level."""
    diffusers: Any = import_module("diffusers")
    levels = len(config.channels)
    latents = config.latents
    channels = 2 * latents + 16 + 2 + config.layout_features
    unet = diffusers.UNet2DConditionModel(
        sample_size=config.grid,
        in_channels=channels,
        out_channels=latents,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn" if config.middle else None,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=config.instruction_width,
        attention_head_dim=tuple(
            n // config.head_width for n in config.channels
        ),  # the number of heads
        norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift",
    )
    has_bias = config.has_layout and config.layout in ("both", "bias")
    if config.mode == "branch":
        install_branches(unet, config.text_width, has_layout=has_bias)
    else:
        install_decoupled(unet, config.text_width, has_layout=has_bias)
    install_plain_attention(unet)
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet
