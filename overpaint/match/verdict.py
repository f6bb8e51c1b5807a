r"""Verdict on a match, from the uncertainty of its pixels.

A pixel is **sure** if its uncertainty is at most 1 % of the source's longer side. The verdict depends on the share of
the target's pixels that are sure: "matched" from 60 % on, "partly matched" from 25 % on, "not matched" below.

The bounds were chosen on twelve photographs: seven of `train.photographs.VALIDATION`, and chelsea, rocket, camera,
coins and moon of scikit-image; no figure of `benchmarks/quality_match.py` depends on them. With the shipped matcher and
eight hypotheses:

- Of 67 pairs that show the same (shifted, enlarged, reduced, turned by 15 degrees, brighter, warped as in training), 55
  are matched and 12 partly; eight of the twelve are reduced, so that the source ends within the target.
- Of 12 targets whose right half is another photograph, 41 to 50 % is sure.
- Of 48 pairs that the matcher cannot match (turned by 180 degrees, mirrored, inverted, unrelated), 47 are not matched;
  rows of coins, mirrored, are partly matched.

The forward-backward error of a single hypothesis has about the same shares. `tests/test_match_verdict.py` measures the
verdicts on other photographs.
"""

from torch import Tensor

__all__ = ["MATCHED", "PARTLY", "SURE", "describe", "sure_share", "verdict"]

SURE = 0.01  # of the source's longer side: largest uncertainty of a sure pixel
MATCHED = 0.6  # share of sure pixels from which a match is "matched"
PARTLY = 0.25  # share of sure pixels from which a match is "partly matched"


def sure_share(uncertainty: Tensor, side: int) -> float:
    """Return the share of the pixels whose uncertainty is at most `SURE` times `side`.

    Args:
        uncertainty: In pixels of the source, shape (H, W): standard deviation, or forward-backward error.
        side: Longer side of the source, in pixels.
    """
    return (uncertainty <= SURE * side).float().mean().item()


def verdict(sure: float | None) -> str:
    """Return "matched", "partly matched" or "not matched" for a share of sure pixels; "unknown" for `None`."""
    if sure is None:
        return "unknown"
    if sure >= MATCHED:
        return "matched"
    return "partly matched" if sure >= PARTLY else "not matched"


def describe(sure: float | None) -> str:
    """Return the verdict and the share of sure pixels as one line of text."""
    if sure is None:
        return "unknown: a single hypothesis has no spread"
    return f"{verdict(sure)}: sure at {100 * sure:.0f} % of the picture"
