"""Choose the text layer to edit: measure an edit of each layer at the state of the encoder that the UNet reads.

Source: ours; Basu et al., 2024, https://arxiv.org/abs/2310.13730, edit layer 0, because their tracing shows the
causal state there.
Deviations: none, the method is ours.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from overpaint.edit.captions import Pair, aligned_rows, encoder_features
from overpaint.edit.change import Change
from overpaint.edit.drift import feature_drift
from overpaint.edit.weights import encoder_index, text_layers
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = ["scan"]

_CHUNK = 256  # captions in one forward pass


def scan(
    model: TextToImage,
    edit_layer: Callable[[int], Change],
    *,
    pairs: Sequence[Pair],
    test_captions: Sequence[str],
    part: str = "text",
    on_progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Return, for an edit of each layer that the UNet reads, the missed target movement and the drift.

    Args:
        model: Each change is applied to it and reverted, bit for bit.
        edit_layer: Returns the change of a layer, numbered from 0.
        pairs: Captions of the edited concepts and of their replacements; no edit may be fitted to them.
        test_captions: Captions that should not move.
        part: The text encoder.
        on_progress: Called with (done, total, label).

    Returns:
        One row for each layer: `layer`, `missed` (squared distance of the edited old caption from the new one, over
        that of the unedited old one) and `drift` (mean squared movement of a test caption, over the mean target
        movement of an old one).
    """
    index = encoder_index(model, part)
    count = len(text_layers(model, part)) - model.clip_skip - (len(model.text_encoders) == 2)
    ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in pairs])
    old_ids, test_ids = ids[::2], model.tokenize(list(test_captions), encoder=index)
    key_rows, source_rows = aligned_rows(pairs, torch.arange(len(ids)), ids.shape[1])
    before, test_before = _outputs(model, ids, index), _outputs(model, test_ids, index)
    old, new = before.flatten(0, 1)[key_rows], before.flatten(0, 1)[source_rows]
    energy = float((new - old).square().sum())
    reference = (energy / len(pairs)) ** 0.5
    rows: list[dict[str, float]] = []
    for layer in range(count):
        if on_progress is not None:
            on_progress(layer, count, "editing each layer")
        with edit_layer(layer).applied(model):
            after = _outputs(model, old_ids, index)
            test_after = _outputs(model, test_ids, index)
        edited = before.clone()
        edited[::2] = after
        missed = float((new - edited.flatten(0, 1)[key_rows]).square().sum()) / energy
        drift = feature_drift(test_before, test_after, relative_to=reference) ** 2
        rows.append({"layer": layer, "missed": missed, "drift": drift})
    return rows


def _outputs(model: TextToImage, ids: Tensor, index: int) -> Tensor:
    """Return the state of a text encoder that the UNet reads, for token ids (B, L), shape (B, L, D), CPU, float32."""
    encoder = model.text_encoders[index]
    device = next(encoder.parameters()).device
    with torch.no_grad():
        parts = [
            encoder_features(model, index, part.to(device)).float().cpu()
            for part in ids.split(_CHUNK)
        ]
    return torch.cat(parts)
