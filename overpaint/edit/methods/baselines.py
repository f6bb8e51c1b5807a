"""Two baselines: swapping token embeddings, and the same solve at a random site.

Source: the reviewers of Basu et al., 2024, requested the first, https://openreview.net/forum?id=Qmw9ne6SOQ; the second
is ours.
Deviations: none.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from overpaint.edit.captions import Positions, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.encoders import Encoder, edited_parts, joined
from overpaint.edit.methods import token_rows
from overpaint.edit.methods.quickfix import FRAMES, quickfix
from overpaint.edit.null_space import PreserveWeight
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.weights import PROJECTIONS, text_layers
from overpaint.errors import check_seed
from overpaint.model import TextToImage

__all__ = ["random_site", "swap_embedding"]


def swap_embedding(
    model: TextToImage, pairs: Mapping[str, str], *, encoder: Encoder = "all"
) -> Change:
    """Return the change that copies the new concept's token embeddings over those of the old concept.

    Tokens are matched as in `token_rows.target_rows`. All other prompts with one of the old tokens change too, which is
    the weakness of this baseline.

    Args:
        model: Its text encoders must be CLIPs; it is not modified.
        pairs: Old concept to new; for `""` each token of the old one gets the embedding of the end of text.
        encoder: As in `quickfix`.

    Returns:
        The change of the token embedding of each encoder.

    Raises:
        ValueError: A concept is empty or equals its target, or one token would get two embeddings.
        TypeError: `pairs` is no dictionary of texts.
    """
    check_pairs(pairs)
    return joined(
        model, {part: _swapped(model, pairs, part) for part in edited_parts(model, encoder)}
    )


def _swapped(model: TextToImage, pairs: Mapping[str, str], part: str) -> Change:
    """Return the change of the token embedding of one encoder."""
    targets = token_rows.target_rows(model, pairs, part)
    rows = token_rows.joint_rows(model, targets, pairs, part)
    movement = token_rows.movement(model, rows, part)
    rank = movement.left.shape[1]
    report: dict[str, Any] = {
        "tokens": rank,
        "rank": rank,
        "delta_norm": float(movement.right.norm()),
        "concept_movement": token_rows.row_movement(model, targets, targets, part),
    }
    report |= notes(model, [*pairs, *pairs.values()])
    return Change((movement,), protocol("swap_embedding", model, pairs), report)


def random_site(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    seed: int = 0,
    preserve: Sequence[str] = (),
    preserve_weight: PreserveWeight = 0.1,
    ridge: float = 0.01,
    positions: Positions = "from_subject_to_end",
    frames: Sequence[str] = FRAMES,
    encoder: Encoder = "all",
) -> Change:
    """Return `quickfix` at a layer after the first and at a projection, both drawn by `seed`; a control.

    This edit reaches its targets as well as an edit at the traced site does. If the pictures do not change with it, the
    site determines the effect, not the size of the movement.

    Args:
        model: As in `quickfix`.
        pairs: Old concept to new.
        seed: Seed of the layer and the projection.
        preserve: As in `quickfix`.
        preserve_weight: As in `quickfix`.
        ridge: As in `quickfix`.
        positions: As in `quickfix`.
        frames: As in `quickfix`.
        encoder: As in `quickfix`; in all encoders it is the same layer and projection.

    Returns:
        The change of that weight of each encoder.

    Raises:
        ValueError: The model has one text layer only, or as `quickfix`.
        TypeError: As `quickfix`.
        UnsupportedModel: As `quickfix`.
    """
    last = min(len(text_layers(model, part)) for part in edited_parts(model, encoder)) - 1
    if last < 1:
        raise ValueError(
            "a random site needs a second text layer: this model has one. Compare with `swap_embedding`."
        )
    seed = check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layer = int(torch.randint(1, last + 1, (1,), generator=generator))
    projection = PROJECTIONS[int(torch.randint(len(PROJECTIONS), (1,), generator=generator))]
    change = quickfix(
        model,
        pairs,
        preserve=preserve,
        preserve_weight=preserve_weight,
        ridge=ridge,
        positions=positions,
        frames=frames,
        layer=layer,
        projection=projection,
        encoder=encoder,
    )
    return dataclasses.replace(
        change, protocol={**change.protocol, "method": "random_site", "seed": seed}
    )
