r"""Widths of letters: a head that predicts them, and how they enter the network.

DiffSTE's character attention has to find out by itself which pixels belong to which letter. Here a head predicts the
width of each letter, as duration predictors do in speech synthesis. Each token gives a logit; its exponential is the
width of the letter in heights of a capital. A softmax over the word gives shares of the given width, and cumulative
sums the left and right edge of each letter, :math:`l_i` and :math:`r_i`. The sum of the exponentials is the natural
width of the word. In training the network sees the true edges.

The edges enter in three ways: as features of the character tokens; as bias of the character attention, which is
:math:`\log(c + 10^{-3})` with the share :math:`c` of a column that the letter covers, times a scale for each head; and
as input features of each column of latents: an embedding of its letter and the place within it.

Source: our addition to DiffSTE; Ren et al., 2019 (FastSpeech), https://arxiv.org/abs/1905.09263, section 3.3, for the
idea of a duration predictor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "Edges",
    "LayoutHead",
    "coverage_bias",
    "edges_from_logits",
    "geometry",
    "layout_loss",
    "letter_features",
]

GEOMETRY = 18  # features of `geometry`
_UNIT = 16.0  # pixels; scale of letter widths in features


@dataclass(frozen=True)
class Edges:
    """Edges of letters.

    Attributes:
        left: Left edge of each letter in pixels of the line, (B, L).
        right: Right edge, (B, L).
        valid: 1 for letters, 0 for padding, (B, L).
    """

    left: Tensor
    right: Tensor
    valid: Tensor


class LayoutHead(nn.Module):
    """Logit of the width of each letter, from its token and the mean token of the instruction."""

    def __init__(self, text_width: int, instruction_width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(text_width + instruction_width, 96), nn.SiLU(), nn.Linear(96, 1)
        )

    def forward(self, tokens: Tensor, pooled: Tensor | None, valid: Tensor) -> Tensor:
        """Return logits (B, L); those of padding are -10,000.

        Args:
            tokens: Embeddings of the characters, without positions, (B, L, D).
            pooled: Mean of the instruction's tokens, (B, E); `None` if there is no instruction encoder.
            valid: 1 for letters, (B, L).
        """
        if pooled is not None:
            tokens = torch.cat([tokens, pooled[:, None].expand(-1, tokens.shape[1], -1)], -1)
        return self.net(tokens).squeeze(-1).float().masked_fill(valid == 0, -1e4)


def edges_from_logits(logits: Tensor, valid: Tensor, start: Tensor, end: Tensor) -> Edges:
    """Return the edges of letters that share the width from `start` to `end`.

    Args:
        logits: Of `LayoutHead`, (B, L).
        valid: 1 for letters, (B, L).
        start: Left edge of the word in pixels, (B,).
        end: Right edge, (B,).
    """
    shares = logits.softmax(-1) * valid
    sums = shares.cumsum(-1)
    width = (end - start)[:, None]
    return Edges(start[:, None] + (sums - shares) * width, start[:, None] + sums * width, valid)


def layout_loss(logits: Tensor, edges: Edges, height: Tensor) -> tuple[Tensor, Tensor]:
    """Return two losses of each row: divergence of the shares from the true ones, and error of the natural width.

    Args:
        logits: Of `LayoutHead`, (B, L).
        edges: True edges.
        height: Height of a capital letter in pixels, (B,).

    Returns:
        The Kullback-Leibler divergence of the predicted from the true shares, and the absolute difference of the
        logarithms of predicted and true width in heights of a capital, both (B,).
    """
    widths = (edges.right - edges.left).clamp(min=0) * edges.valid
    total = widths.sum(-1).clamp(min=1e-3)
    shares = widths / total[:, None]
    logs = logits.log_softmax(-1).clamp(min=-30)
    divergence = (shares * (shares.clamp(min=1e-6).log() - logs)).sum(-1)
    difference = logits.logsumexp(-1) - (total / height).log()
    return divergence, difference.abs()


def geometry(edges: Edges, line_width: int) -> Tensor:
    """Return features of the edges for the character tokens, (B, L, 18); zero for padding."""
    left, right = edges.left / line_width, edges.right / line_width
    places = torch.stack([left, right, (left + right) / 2], -1)
    turns = 2 * math.pi * torch.cat([places, 4 * places], -1)
    wide = ((edges.right - edges.left) / _UNIT)[..., None]
    ones = torch.ones_like(wide)
    return (
        torch.cat([places, wide, turns.sin(), turns.cos(), ones, ones], -1) * edges.valid[..., None]
    )


def coverage_bias(edges: Edges, columns: int, line_width: int) -> Tensor:
    """Return the logarithm of the share of each column that each letter covers, (B, columns, L).

    Columns without a letter attend to the padding.
    """
    step = line_width / columns
    start = torch.arange(columns, device=edges.left.device)[None, :, None] * step
    common = torch.minimum(start + step, edges.right[:, None]) - torch.maximum(
        start, edges.left[:, None]
    )
    cover = common.clamp(min=0) / step * edges.valid[:, None]
    rest = (1 - cover.sum(-1, keepdim=True)).clamp(min=0) * (1 - edges.valid[:, None])
    return (cover + rest + 1e-3).log()


def letter_features(
    edges: Edges, embeddings: Tensor, columns: int, subcolumns: int, line_width: int
) -> Tensor:
    """Return features of the letter in each column of latents, (B, subcolumns * (D + 6), columns).

    For each of `subcolumns` points of a column: the embedding of the letter there; the place within the letter from -1
    to 1, its sine and cosine and the cosine of twice the place; 1 inside of a letter; and the width of the letter.

    Args:
        edges: Edges of letters.
        embeddings: Embedding of each letter, (B, L, D).
        columns: Columns of latents.
        subcolumns: Points in a column.
        line_width: Width of the line in pixels.
    """
    count = columns * subcolumns
    points = (torch.arange(count, device=edges.left.device) + 0.5) * (line_width / count)
    to_left, to_right = (
        points[None, :, None] - edges.left[:, None],
        edges.right[:, None] - points[None, :, None],
    )
    inside = (
        torch.sigmoid(to_left / 0.4) * torch.sigmoid(to_right / 0.4) * edges.valid[:, None]
    )  # (B, count, L)
    width = edges.right - edges.left
    place = (2 * to_left / width.clamp(min=1)[:, None] - 1).clamp(-1.2, 1.2)
    here = (inside * place).sum(-1, keepdim=True)
    total = inside.sum(-1, keepdim=True)
    wide = (inside * (width / _UNIT)[:, None]).sum(-1, keepdim=True)
    turn = math.pi * here
    features = torch.cat([
        inside @ embeddings, here, turn.sin() * total, turn.cos() * total, (2 * turn).cos() * total, total, wide,
    ], -1)  # fmt: skip
    return features.unflatten(1, (columns, subcolumns)).flatten(2).transpose(1, 2)
