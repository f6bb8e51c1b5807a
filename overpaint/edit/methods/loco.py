r"""LocoEdit: edit a concept in the few cross-attention layers that hold it.

The keys are the text features :math:`X` of the concept's last token in four frames. The targets are the outputs of
`to_k` and `to_v` for the new concept's features :math:`Y`. In the paper's row form
:math:`W' = (X^\top X + \lambda I)^{-1} (X^\top Y W^\top + \lambda W^\top)`, which is the shared solver transposed.
`trace.prompt_swap` finds the layers: the window of layers with the pictures that show the concept least.

Source: Basu et al., 2024 (LocoGen and LocoEdit), https://arxiv.org/abs/2405.01008, and the authors' code.
Deviations: the target is any concept (theirs is fixed to "a painting"); solved in float64.
"""

from collections.abc import Mapping, Sequence

from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import Layer, projection_sites, solve_projections
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.edit.methods.text_keys import feature_edit
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
    """Return the change that makes the given layers map each old concept to its new one; the model is not modified.

    Args:
        model: The model to edit.
        pairs: Old concept to new; `""` erases a concept: it is mapped to the token before it.
        layers: Cross-attention layers, best those of `trace.pick_window(trace.prompt_swap(...))`. `None` takes the
            layers that the paper found in Stable Diffusion 1 for styles: `window` layers from the middle on, 8 and 9 of
            16.
        window: Number of layers, where `layers` is `None`.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.

    Returns:
        The change of `to_k` and `to_v` in these layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, or a number is
            out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    sites = projection_sites(
        model, _middle(model, window) if layers is None else layers, ("k", "v")
    )
    edit = feature_edit(model, pairs, (), frames=frames)
    protocol = {"method": "loco", "pairs": dict(pairs), "frames": list(frames)}
    return solve_projections(model, sites, edit, ridge=ridge, protocol=protocol)


def _middle(model: TextToImage, window: int) -> list[int]:
    count = sum(site.kind == "cross_attn" for site in find_unet(model.unet))
    if not 1 <= window <= count:
        raise ValueError(
            f"`window` must be from 1 to {count}, the cross-attention layers of this model, got {window}. 2 is usual."
        )
    start = min(count // 2, count - window)
    return list(range(start, start + window))
