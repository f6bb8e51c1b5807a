"""Which text layer to edit: what an edit of each does at the encoder's output, where the UNet reads it.

Source: ours; the paper edits layer 0, where its causal state is.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from overpaint.edit.captions import Pair, places
from overpaint.edit.change import Change
from overpaint.edit.weights import text_layers
from overpaint.model import TextToImage

__all__ = ["scan"]

_CHUNK = 256  # captions read at once


def scan(
    model: TextToImage,
    make: Callable[[int], Change],
    *,
    pairs: Sequence[Pair],
    unseen: Sequence[str],
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, float]]:
    """Return what an edit of each layer of the first text encoder misses and moves, in units of the movement asked for.

    Args:
        model: Each change is applied to it and taken back, bit for bit.
        make: Returns the change of a layer, from 0.
        pairs: Captions of the edited concepts beside those of their replacements; nothing may have been fitted to them.
        unseen: Captions that should not move.
        on_progress: Told what is done, of how much, and of what.

    Returns:
        A row a layer: `layer`, `missed` (squared distance of the edited old caption from the new one, over that of the
        unedited old one) and `drift` (squared movement of an average other caption, over that asked of an average old
        one).
    """
    count = len(text_layers(model))
    ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in pairs])
    old_ids, other_ids = ids[::2], model.tokenize(list(unseen))
    at, of = places(pairs, torch.arange(len(ids)), ids.shape[1])
    before, still = _outputs(model, ids), _outputs(model, other_ids)
    old, new = before.flatten(0, 1)[at], before.flatten(0, 1)[of]
    asked = float((new - old).square().sum())
    rows: list[dict[str, float]] = []
    for layer in range(count):
        if on_progress is not None:
            on_progress(layer, count, "trying every layer")
        with make(layer).applied(model):
            after, moved = _outputs(model, old_ids), _outputs(model, other_ids)
        whole = before.clone()
        whole[::2] = after
        missed = float((new - whole.flatten(0, 1)[at]).square().sum()) / asked
        drift = float((moved - still).square().sum()) / len(unseen) / (asked / len(pairs))
        rows.append({"layer": layer, "missed": missed, "drift": drift})
    return rows


def _outputs(model: TextToImage, ids: Tensor) -> Tensor:
    """Return the first text encoder's last states for token ids (B, L), shape (B, L, D), on the CPU in float32."""
    device = next(model.text_encoder.parameters()).device
    with torch.no_grad():
        read = [model.text_encoder(part.to(device))[0].float().cpu() for part in ids.split(_CHUNK)]
    return torch.cat(read)
