r"""LocoEdit: rewrite a concept in the few cross-attention layers that hold it.

The keys are the text features :math:`X` of the concept's last token in four frames, the targets what `to_k` and `to_v`
make of the new concept's. In the paper's row form :math:`W' = (X^\top X + \lambda I)^{-1}(X^\top Y W^\top + \lambda
W^\top)`, which is the shared solver transposed. `trace.swap` says which layers: those of the window whose pictures show
least of the concept.

Source: Basu et al., 2024 (LocoGen and LocoEdit), https://arxiv.org/abs/2405.01008, and the authors' code.
Deviations: the target is any concept (theirs is fixed to "a painting"); solved in float64.
"""

import time
from collections.abc import Mapping, Sequence

import torch

from overpaint.edit.captions import check_frames, check_pairs, plan
from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    Wanted,
    projections,
    read,
    rewrite,
)
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.model import TextToImage
from overpaint.model.sites import find_unet

__all__ = ["loco"]


def loco(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    layers: Sequence[Layer] | None = None,
    window: int = 2,
    ridge: float = 0.01,
    frames: Sequence[str] = FRAMES,
) -> Change:
    """Change that makes the located layers read each old concept as its new one; the model is not touched.

    Args:
        model: The model to edit.
        pairs: Old concept to new.
        layers: Cross-attention layers, best `trace.pick_window(trace.swap(...))`. `None` takes those that the paper
            found in Stable Diffusion 1 for styles: the `window` layers from the middle on, 8 and 9 of 16.
        window: How many layers, where `layers` does not say.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        frames: Captions around the concept: put before it, or filled in where they hold `{}`.

    Returns:
        The change of `to_k` and `to_v` in these layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, or a number is
            out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    check_pairs(pairs)
    check_frames(frames)
    sites = projections(model, _middle(model, window) if layers is None else layers, ("k", "v"))
    started = time.perf_counter()
    planned = plan(model, pairs, frames, "last_subject")
    places = list(pairs)
    length = max(max(p.old.last, p.new.last) for p in planned) + 2  # with the end of text
    features = read(model, ["", *(c.text for p in planned for c in (p.old, p.new))], length=length)
    wanted = Wanted(
        keys=torch.stack([features[p.old.text][p.old.last] for p in planned]),
        sources=torch.stack([features[p.new.text][p.new.last] for p in planned]),
        owners=tuple(places.index(p.names[0]) for p in planned),
        labels=tuple(f"{p.names[0]!r} → {p.names[1]!r}" for p in planned),
        preserved=features[""][:0],
        kept=(),
        empty=features[""],
        started=started,
    )
    protocol = {"method": "loco", "pairs": dict(pairs), "frames": list(frames)}
    return rewrite(model, sites, wanted, ridge=ridge, protocol=protocol)


def _middle(model: TextToImage, window: int) -> list[int]:
    count = sum(site.kind == "cross_attn" for site in find_unet(model.unet))
    if not 1 <= window <= count:
        raise ValueError(
            f"`window` must be from 1 to {count}, the cross-attention layers of this model, got {window}. 2 is usual."
        )
    start = min(count // 2, count - window)
    return list(range(start, start + window))
