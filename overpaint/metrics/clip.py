"""Numbers from a CLIP's features: the score on each of its scales, and the choice between two texts.

The scales are one number in three dresses, and papers print all three as CLIP-Score: each is named here, and none is
the default of any other.

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
    r"""Return how well each picture fits its text.

    Args:
        image_features: Of B pictures, of any length, shape (B, D).
        text_features: Of the text of each, shape (B, D).
        scale: `"clip_cosine"`, :math:`\cos \in [-1, 1]`; `"clip_score_100"`, :math:`100 \cos`, as torchmetrics before
            its cut of the mean at 0; or `"clip_score_2.5"`, :math:`2.5 \max(\cos, 0)`, as Hessel et al.

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
            "give one text a picture, and both from one CLIP."
        )
    cosine = F.cosine_similarity(image_features.double(), text_features.double())
    if scale == "clip_score_100":
        return 100 * cosine
    return 2.5 * cosine.clamp(min=0) if scale == "clip_score_2.5" else cosine


def clip_accuracy(image_features: Tensor, target: Tensor, anchor: Tensor) -> Tensor:
    """Return whether each picture lies nearer to its target's text than to its anchor's; a tie is no.

    Args:
        image_features: Of B pictures, shape (B, D).
        target: Of the text of what is to be erased, shape (B, D).
        anchor: Of the text of what should stand in its place, shape (B, D).

    Returns:
        bool, shape (B,); the accuracy is its mean.
    """
    return clip_score(image_features, target) > clip_score(image_features, anchor)
