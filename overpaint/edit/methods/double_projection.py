r"""DP: two projections in closed form; the erased concept goes to a safe subspace, and what is preserved does not move.

The target of a key :math:`c` is its projection onto the span of safe concepts :math:`S` (columns),
:math:`c^* = S (S^\top S)^+ S^\top c`, or the new concept's feature. With an orthonormal basis :math:`U_2` of the
complement of the preserved keys :math:`C_p`, the movement is :math:`\Delta = Z U_2^\top` with

.. math:: \min_Z \sum_c \|W (c^* - c) - Z U_2^\top c\|^2 + \lambda \|Z\|^2 ,

so :math:`\Delta C_p = 0`; see `null_space`. For one concept and :math:`\lambda \to 0` it is
:math:`W (c^* - c) x^\top U_2^\top / \|x\|^2` with :math:`x = U_2^\top c`. If :math:`U_2` leaves out only the :math:`k`
largest singular directions of :math:`C_p`, preserved outputs move by at most :math:`\|Z\| \sigma_{k+1}`.

Source: Zhang et al., 2026, https://arxiv.org/abs/2604.10032.
Deviations: the authors' code was not read. A small ridge stands in for the pseudo-inverse. With safe concepts, the new
concept is one of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from overpaint.edit.change import Change
from overpaint.edit.methods.cross_attention import (
    Layer,
    Projection,
    projection_sites,
    solve_projections,
)
from overpaint.edit.methods.text_keys import Keys, feature_edit
from overpaint.edit.methods.uce import OBJECTS
from overpaint.edit.null_space import EXACT, span
from overpaint.errors import check_texts
from overpaint.model import TextToImage

__all__ = ["dp", "projected_onto"]


def dp(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    safe: Sequence[str] = (),
    rank: int | None = None,
    ridge: float = 1e-6,
    matrices: Sequence[Projection] = ("k", "v"),
    keys: Keys = "last",
    frames: Sequence[str] = OBJECTS,
    layers: Sequence[Layer] | None = None,
) -> Change:
    """Return the change that maps each old concept to a safe one and moves no preserved output.

    The model is not modified.

    Args:
        model: The model to edit.
        pairs: Old concept to new; `""` erases a concept: it is mapped to the token before its place, begin-of-text
            where the frame is empty.
        preserve: Concepts whose outputs do not change at all, at the tokens that `keys` names.
        safe: Further concepts; each key is then projected onto the span of these and of the new concept. Without any,
            the new concept is the target.
        rank: Number of directions of the preserved keys that are held, the largest ones; all if `None`. Fewer leave
            more room for the edit, and preserved outputs move by at most the spectral norm of the movement times the
            next singular value of the preserved keys.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive; the paper's least squares is
            the limit 0.
        matrices: Which projections move: `("k", "v")` or one of them.
        keys: As in `uce`.
        frames: Captions around the concept: a prefix, or a text in which `{}` is replaced.
        layers: Cross-attention layers, all if `None`.

    Returns:
        The change of these projections in all layers.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, a preserved
            concept is edited, the preserved keys leave no direction for a concept, or a number is out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
    """
    check_texts(safe, "safe")
    if rank is not None and rank < 1:
        raise ValueError(
            f"`rank` must be 1 or more, got {rank!r}. Leave it out to hold all directions, and leave `preserve` out to "
            "hold none."
        )
    sites = projection_sites(model, layers, matrices)
    edit = feature_edit(model, pairs, preserve, frames=frames, keys=keys)
    if safe:
        others = [
            feature_edit(model, dict.fromkeys(pairs, name), (), frames=frames, keys=keys).sources
            for name in safe
        ]
        anchors = torch.stack([edit.sources, *others], 1)
        edit = dataclasses.replace(edit, sources=projected_onto(edit.keys, anchors).float())
    protocol = {
        "method": "dp", "pairs": dict(pairs), "preserve": list(preserve), "preserve_weight": EXACT,
        "safe": list(safe), "rank": rank, "matrices": list(matrices), "keys": keys, "frames": list(frames),
    }  # fmt: skip
    basis = span(edit.preserve, rank=rank)
    return solve_projections(model, sites, edit, ridge=ridge, basis=basis, protocol=protocol)


def projected_onto(keys: Tensor, anchors: Tensor) -> Tensor:
    """Return the projection of each key onto the span of its anchors, shape (N, D), float64.

    Args:
        keys: Shape (N, D).
        anchors: Shape (N, S, D).
    """
    columns = anchors.double().transpose(1, 2)
    weights = torch.linalg.pinv(columns, rtol=1e-6) @ keys.double()[..., None]
    return (columns @ weights)[..., 0]
