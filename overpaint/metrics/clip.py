"""Metrics on a CLIP's features: the score on each of its scales, and the choice between two texts.

Papers print the same quantity on three scales, all under the name CLIP-Score. Each scale has a name of its own here.

Source: Hessel et al., 2021 (CLIPScore), https://arxiv.org/abs/2104.08718; Kumari et al., 2023 (Concept Ablation),
https://arxiv.org/abs/2303.13516, for the accuracy.
"""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["CLIP_SCALES", "clip_accuracy", "clip_score"]

CLIP_SCALES = ("clip_cosine", "clip_score_100", "clip_score_2.5")


def clip_score(
    image_features: Tensor, text_features: Tensor, *, scale: str = "clip_cosine"
) -> Tensor:
    r"""Return the CLIP score of each picture with its text.

    Args:
        image_features: Features of B pictures, of any norm, shape (B, D).
        text_features: Features of the text of each picture, shape (B, D).
        scale: `"clip_cosine"`, :math:`\cos \in [-1, 1]`; `"clip_score_100"`, :math:`100 \cos`, as torchmetrics before
            it clamps the mean at 0; or `"clip_score_2.5"`, :math:`2.5 \max(\cos, 0)`, as Hessel et al.

    Returns:
        Scores, float64, shape (B,).

    Raises:
        ValueError: No such scale, or the features do not pair up.
    """
    if scale not in CLIP_SCALES:
        raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(CLIP_SCALES)}.")
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"features must pair up as (B, D), got {tuple(image_features.shape)} and {tuple(text_features.shape)}: "
            "give one text for each picture, and both from one CLIP."
        )
    cosine = F.cosine_similarity(image_features.double(), text_features.double())
    if scale == "clip_score_100":
        return 100 * cosine
    return 2.5 * cosine.clamp(min=0) if scale == "clip_score_2.5" else cosine


def clip_accuracy(image_features: Tensor, target: Tensor, anchor: Tensor) -> Tensor:
    """Return whether each picture has a larger cosine with its target's text than with its anchor's; ties are False.

    Args:
        image_features: Features of B pictures, shape (B, D).
        target: Features of the text of the erased concept, shape (B, D).
        anchor: Features of the text of its replacement, shape (B, D).

    Returns:
        bool, shape (B,); the accuracy is its mean.
    """
    return clip_score(image_features, target) > clip_score(image_features, anchor)
