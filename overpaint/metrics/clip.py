"""Metrics on the features of a CLIP: CLIP score on three scales, and accuracy with two texts.

Papers report the CLIP score on three different scales under one name. Here each scale has its own name.

Source: Hessel et al., 2021 (CLIPScore), https://arxiv.org/abs/2104.08718; Kumari et al., 2023 (Concept Ablation),
https://arxiv.org/abs/2303.13516 (accuracy).
"""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["CLIP_SCALES", "clip_accuracy", "clip_score"]

CLIP_SCALES = ("clip_cosine", "clip_score_100", "clip_score_2.5")


def clip_score(
    image_features: Tensor, text_features: Tensor, *, scale: str = "clip_cosine"
) -> Tensor:
    r"""Return the CLIP score of each pair of picture and text.

    Args:
        image_features: Features of B pictures, shape (B, D); their norms do not matter.
        text_features: Features of the text of each picture, shape (B, D).
        scale: `"clip_cosine"`, :math:`\cos \in [-1, 1]`; `"clip_score_100"`, :math:`100 \cos`, as in torchmetrics,
            which also sets a negative mean to 0; or `"clip_score_2.5"`, :math:`2.5 \max(\cos, 0)`, as in Hessel et al.

    Returns:
        Scores, float64, shape (B,).

    Raises:
        ValueError: `scale` is unknown, or the two shapes differ.
    """
    if scale not in CLIP_SCALES:
        raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(CLIP_SCALES)}.")
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"picture and text features must have the same shape (B, D), got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}: pass one text for each picture, encoded by the same CLIP."
        )
    cosine = F.cosine_similarity(image_features.double(), text_features.double())
    if scale == "clip_score_100":
        return 100 * cosine
    return 2.5 * cosine.clamp(min=0) if scale == "clip_score_2.5" else cosine


def clip_accuracy(image_features: Tensor, target: Tensor, anchor: Tensor) -> Tensor:
    """Return for each picture if it is closer to its target text than to its anchor text, by cosine; False for ties.

    Args:
        image_features: Features of B pictures, shape (B, D).
        target: Features of the text with the erased concept, shape (B, D).
        anchor: Features of the text with the replacement, shape (B, D).

    Returns:
        bool, shape (B,); the mean over the pictures is the accuracy.
    """
    return clip_score(image_features, target) > clip_score(image_features, anchor)
