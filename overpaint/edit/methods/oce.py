r"""OCE: rotate the outputs of the cross-attention's keys and values, so that erased concepts leave their subspace.

A weight moves to :math:`W' = P W` with an orthogonal :math:`P`, so lengths of outputs and angles between them stay. Let
:math:`C_e, C_a, C_p` hold the text features of the old concepts, the new ones and the preserved prompts in columns,
:math:`K_0` the mean of :math:`c c^\top` over everyday captions, and
:math:`S = W (K_0 + a\, C_p C_p^\top + \lambda I) W^\top`. With the singular value decomposition
:math:`M = U \Sigma V^\top`, :math:`P = U V^\top` maximises :math:`\mathrm{tr}(P^\top M)`, where

.. math:: M_{vector} = w\, W C_a C_e^\top W^\top + S, \qquad M_{subspace} = -w\, (I - R_a) R + S .

:math:`R` and :math:`R_a` project onto the span of :math:`W C_e` and of :math:`W C_a`. The vector form is the orthogonal
Procrustes problem :math:`\min_P w \|P W C_e - W C_a\|^2 + \mathrm{tr}\,(P - I) S (P - I)^\top`.

Where the everyday captions have less energy than :math:`w` along an erased direction, the subspace form turns what the
anchor does not share of it to the opposite side; where they have more, it turns the direction a little to the anchor.

Source: Sun et al., 2026, https://arxiv.org/abs/2605.28902.
Deviations: the authors' code was not read. The order of the two projectors is the one with which an erased direction
turns towards its anchor. Our everyday captions stand in for COCO's. The ridge, which the paper does not have, selects
the smallest rotation where captions leave it undetermined. Weights of the terms are arguments. The movement has full
rank, so its file is as large as the weights.
"""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from overpaint import probes
from overpaint.edit.change import Change
from overpaint.edit.least_squares import product
from overpaint.edit.methods.cross_attention import (
    Layer,
    SquaredNorms,
    check_weight,
    drift_report,
    pooled_remark,
    projection_sites,
    squared_norms,
)
from overpaint.edit.methods.text_keys import (
    FeatureEdit,
    Keys,
    check_contradictions,
    feature_edit,
    read_features,
    rows_from_last_token,
)
from overpaint.edit.movement import Movement
from overpaint.edit.null_space import span
from overpaint.edit.provenance import notes
from overpaint.edit.provenance import protocol as shared_protocol
from overpaint.edit.weights import find_weights
from overpaint.errors import CutPromptWarning, check_texts
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress
from overpaint.model.token_spans import end_of_text

__all__ = ["oce", "orthogonal", "subspace_term"]

Form = Literal["subspace", "vector"]
_BATCH = 64  # captions


def oce(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    preserve: Sequence[str] = (),
    preserve_weight: float = 1.0,
    erase_weight: float = 1.0,
    ridge: float = 0.01,
    form: Form = "subspace",
    keys: Keys = "last",
    frames: Sequence[str] = ("",),
    layers: Sequence[Layer] | None = None,
    captions: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Change:
    """Return the change that rotates the outputs of cross-attention away from each old concept.

    The model is not modified.

    Args:
        model: The model to edit.
        pairs: Old concept to new, as `{"van gogh": "painting"}`; `""` has the features of the token before its place,
            begin-of-text where the frame is empty.
        preserve: Concepts whose outputs should not change, at the tokens that `keys` names.
        preserve_weight: Weight of one preserved key against the mean everyday caption, 0 or more.
        erase_weight: Weight of the erased outputs, positive. In the subspace form it is in units of an output's squared
            length.
        ridge: Pull towards the old weights, in units of a key's squared norm. Positive.
        form: `"subspace"` erases the span of all old concepts, `"vector"` each key; preserved keys count one by one in
            both. Many keys, as with pads, span nearly all outputs: take the vector form then.
        keys: As in `uce`.
        frames: Captions around the concept. Each frame adds directions to the erased subspace, so the default is the
            bare concept.
        layers: Cross-attention layers, all if `None`.
        captions: Everyday captions, which are read at the tokens that `keys` names; `probes.everyday("validation")` if
            `None`, and the empty list leaves the term out. Reading takes most of the time. Captions that are too long
            are cut.
        on_progress: Called with (captions read, all captions, label).

    Returns:
        The change of `to_k` and `to_v` in all layers, of full rank. It cannot be added to another one.

    Raises:
        ValueError: A concept is empty, cut off or equals its target, two pairs contradict one another, a preserved
            concept is edited, the new concepts' outputs span the old ones', or a number or a choice is out of range.
        TypeError: A list of texts is one text.
        UnknownSite: The UNet has no such layer.
        UnsupportedModel: The projections do not read the text features, or are not plain matrices in memory.
    """
    _check_settings(preserve_weight, erase_weight, ridge, form)
    captions = probes.everyday("validation") if captions is None else captions
    check_texts(captions, "captions")
    sites = projection_sites(model, layers, ("k", "v"))
    edit = feature_edit(model, pairs, preserve, frames=frames, keys=keys)
    check_contradictions(edit)
    everyday = _second_moment(model, captions, keys, on_progress, width=edit.keys.shape[1])
    still = everyday + preserve_weight * product(edit.preserve)
    still += ridge * torch.eye(len(still), dtype=torch.float64)
    solving = time.perf_counter()
    movements: list[Movement] = []
    squares: list[SquaredNorms] = []
    for weight in find_weights(model, sites):
        matrix = weight.parameter.detach().to("cpu", torch.float64)
        check_weight(weight.site, matrix, edit.keys.shape[1])
        left, right = _rotation(matrix, edit, still, erase_weight, form)
        residuals = (edit.sources.double() - edit.keys.double()) @ matrix.T
        inputs = [rows.double() for rows in (edit.keys, edit.preserve, edit.empty)]
        squares.append(squared_norms(left @ right, residuals, inputs, edit, weight.parameter))
        movements.append(
            Movement.of_weight(weight.site, weight.parameter, left.float(), right.float())
        )
    report = drift_report(edit, movements, squares, list(pairs)) | {
        "captions": len(captions),
        "seconds": {
            "keys": round(solving - edit.started, 6),
            "solve": round(time.perf_counter() - solving, 6),
        },
    }
    settings = {
        "preserve": list(preserve), "preserve_weight": preserve_weight, "erase_weight": erase_weight, "ridge": ridge,
        "form": form, "keys": keys, "frames": list(frames), "captions": len(captions), "sites": sites,
    }  # fmt: skip
    report |= notes(model, [*pairs, *pairs.values()], pooled_remark(model))
    return Change(
        tuple(movements), shared_protocol("oce", model, pairs, unet=True) | settings, report
    )


def orthogonal(moment: Tensor) -> Tensor:
    r"""Return the orthogonal matrix :math:`P` with the largest :math:`\mathrm{tr}(P^\top M)` for a square `moment`."""
    u, _, vh = torch.linalg.svd(moment)
    return u @ vh


def subspace_term(erased: Tensor, anchors: Tensor) -> Tensor:
    r"""Return :math:`-(I - R_a) R` for erased and anchor outputs, shapes (N, D) and (M, D); a (D, D) matrix."""
    basis, others = span(erased), span(anchors)
    projector = basis @ basis.T
    return others @ (others.T @ projector) - projector


def _rotation(
    weight: Tensor, edit: FeatureEdit, still: Tensor, erase_weight: float, form: Form
) -> tuple[Tensor, Tensor]:
    """Return factors of the movement of one weight, shapes (D_out, R) and (R, D_in) with R = min(D_out, D_in).

    The rotation is computed in the range of the weight; in the other directions it has no effect.
    """
    out, width = weight.shape
    basis, inner = (
        (torch.eye(out, dtype=torch.float64), weight) if out <= width else torch.linalg.qr(weight)
    )
    erased, anchors = edit.keys.double() @ inner.T, edit.sources.double() @ inner.T
    term = subspace_term(erased, anchors) if form == "subspace" else anchors.T @ erased
    if form == "subspace" and float(term.norm()) < 1e-6:
        raise ValueError(
            f"the outputs of the new concepts span those of the old ones, {len(inner)} numbers each, so nothing is "
            "erased: give fewer `frames`, keys='last', or form='vector'."
        )
    turn = orthogonal(erase_weight * term + inner @ still @ inner.T)
    return basis @ (turn - torch.eye(len(turn), dtype=torch.float64)), inner


def _second_moment(
    model: TextToImage,
    captions: Sequence[str],
    keys: Keys,
    on_progress: Progress | None,
    *,
    width: int,
) -> Tensor:
    """Return the mean of c c^T over the tokens of `captions` that `keys` names, shape (D, D), float64."""
    total, count = torch.zeros(width, width, dtype=torch.float64), 0
    for start in range(0, len(captions), _BATCH):
        batch = captions[start : start + _BATCH]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CutPromptWarning)  # a cut caption is a caption too
            ends = [end_of_text(model.tokenizer, ids) for ids in model.tokenize(batch)]
            length = max(ends) + 1 if keys == "last" else None
            features = read_features(model, batch, length=length)
        rows = torch.cat(
            [
                rows_from_last_token(features[caption], max(end - 1, 0), keys)
                for caption, end in zip(batch, ends, strict=True)
            ]
        )
        total += product(rows)
        count += len(rows)
        if on_progress is not None:
            on_progress(start + len(batch), len(captions), "reading captions")
    return total / max(count, 1)


def _check_settings(preserve_weight: float, erase_weight: float, ridge: float, form: str) -> None:
    for name, value, least in (
        ("preserve_weight", preserve_weight, 0.0),
        ("erase_weight", erase_weight, math.ulp(0.0)),
        ("ridge", ridge, math.ulp(0.0)),
    ):
        if isinstance(value, str) or not (math.isfinite(value) and value >= least):
            bound = "positive" if least else "0 or more"
            raise ValueError(
                f"`{name}` must be {bound} and finite, got {value!r}. Leave it out for the default."
            )
    if form not in get_args(Form):
        raise ValueError(f"`form` must be 'subspace' or 'vector', got {form!r}. Leave it out.")
