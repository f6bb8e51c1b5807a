"""What each number means: a protocol card a metric, which `overpaint evaluate --explain NAME` shows."""

from dataclasses import dataclass

__all__ = ["MetricCard", "card", "cards"]

_CLIP = "image and text features of the CLIP that is named in the protocol (`features`), of prompts cut to its limit"
_IMAGES = "image features of the CLIP named in the protocol; for `icons` those of `icons-judge`, before its heads"
_HESSEL = "Hessel et al., 2021, https://arxiv.org/abs/2104.08718"
_SCALE = "Figures of two CLIPs, or of two sizes of one, do not compare; neither do figures on two scales."


@dataclass(frozen=True)
class MetricCard:
    """The protocol of a metric.

    Attributes:
        name: As in files and on the command line.
        range: What values it can take, and their unit.
        direction: What a reader should hope for, and of which pictures.
        formula: In words.
        features: What it looks with.
        source: Who says so.
        caveats: What it does not say.
    """

    name: str
    range: str
    direction: str
    formula: str
    features: str
    source: str
    caveats: str

    def markdown(self) -> str:
        """Return the card as it stands in `docs/metrics.md`."""
        rows = ("range", "direction", "formula", "features", "source", "caveats")
        body = "\n".join(f"| {row} | {getattr(self, row)} |" for row in rows)
        return f"## {self.name}\n\n| | |\n|---|---|\n{body}\n"


def cards() -> tuple[MetricCard, ...]:
    """Return every card, in the order of the documentation."""
    return _CARDS


def card(name: str) -> MetricCard:
    """Return the card of one metric.

    Raises:
        ValueError: There is no such metric.
    """
    for found in _CARDS:
        if found.name == name:
            return found
    raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(c.name for c in _CARDS)}.")


_CARDS = (
    MetricCard(
        "clip_cosine",
        "-1 to 1; real pictures and their captions lie near 0.2 to 0.35 with public CLIPs",
        "lower on the erased concept's prompts, unchanged on all others",
        "cosine of the picture's and the prompt's features, mean over pictures",
        _CLIP,
        _HESSEL + ", without factor and cut",
        _SCALE,
    ),
    MetricCard(
        "clip_score_100",
        "-100 to 100",
        "as clip_cosine",
        "100 times clip_cosine",
        _CLIP,
        "torchmetrics' CLIPScore, which also cuts its mean at 0",
        _SCALE + " Tables that print 25 to 35 mean this one.",
    ),
    MetricCard(
        "clip_score_2.5",
        "0 to 2.5",
        "as clip_cosine",
        "2.5 times the larger of clip_cosine and 0, picture by picture",
        _CLIP,
        _HESSEL + ", section 3",
        _SCALE + " Tables that print 0.6 to 0.9 mean this one.",
    ),
    MetricCard(
        "clip_accuracy",
        "0 to 1; the share of pictures",
        "towards 0 on the erased concept's prompts; near 1 on all others",
        "share of pictures whose cosine with the text of what was asked for is larger than with the text of what "
        "stands in its place; a tie counts as no",
        _CLIP + ", and the two texts of each case",
        "Kumari et al., 2023 (Concept Ablation), https://arxiv.org/abs/2303.13516, section 4.1",
        "One half is no chance level: a CLIP may lean to either text. A picture of neither is counted as one of them.",
    ),
    MetricCard(
        "judge_accuracy",
        "0 to 1; the share of pictures",
        "towards 0 on the erased concept's prompts; unchanged on all others",
        "share of pictures whose likeliest label, among all of its kind, is the one that the prompt names",
        "`icons-judge`, a classifier that had no part in making `icons`; 64x64 pixels",
        "this package; as the UA, IRA and CRA of Zhang et al., 2024 (UnlearnCanvas), https://arxiv.org/abs/2402.11846",
        "The judge knows a closed list of labels and must choose one, also for a picture of nothing. Its own errors on "
        "real artwork stand in its card.",
    ),
    MetricCard(
        "kid",
        "about 0 and up; below 0 by chance where sets are equal; the unit is that of the features",
        "near the KID of two sets of seeds of the unedited model, which stands under `before`, on prompts that should "
        "stay",
        "unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1) cubed, of the edited model's "
        "pictures and the unedited model's from other seeds; unit features are first made as long as the root of D, so "
        "that the kernel is (cos + 1) cubed; pictures of one prompt are not compared; interval by drawing prompts",
        _IMAGES,
        "Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401",
        "Depends on the features: figures on `icons-judge`, on a CLIP and on Inception are three scales. Pictures of "
        "the same seeds must not be compared: the estimate would come out too small.",
    ),
    MetricCard(
        "kid_p",
        "0 to 1",
        "above 0.05: no difference from a second set of seeds was shown",
        "share of random splits, swapped within each prompt, whose KID is at least that of the true split, counting "
        "the true one",
        _IMAGES,
        "Gretton et al., 2012, https://jmlr.org/papers/v13/gretton12a.html, section 5; the splits are our own",
        "With few pictures hardly anything is shown: a large value proves no equality. Read it beside the interval of "
        "`kid`.",
    ),
    MetricCard(
        "fid",
        "0 and up",
        "as kid",
        "squared distance of the means plus the trace of both covariances (over n - 1) less twice that of the root of "
        "their product, in float64, on the sets of pictures that kid compares",
        _IMAGES,
        "Heusel et al., 2017, https://arxiv.org/abs/1706.08500",
        "Too large by an amount that grows as pictures get fewer; no interval can mend that. Only figures of as many "
        "pictures and the same features compare, and none with published FID on Inception features. Below some "
        "thousands of pictures read kid.",
    ),
    MetricCard(
        "psnr",
        "dB, 0 and up; infinite for equal pictures, which are counted at 100 dB",
        "higher on prompts that should stay",
        "minus 10 times the decimal logarithm of the mean squared difference of pixels in [0, 1], before against after "
        "at one seed, mean over pictures",
        "none: pixels",
        "the usual definition; equal to torchmetrics",
        "A shift by a pixel costs as much as another subject.",
    ),
    MetricCard(
        "ssim",
        "-1 to 1; 1 for equal pictures",
        "higher on prompts that should stay",
        "structural similarity in a Gaussian window of 1.5 pixels (11x11), a channel at a time, before against after "
        "at one seed, mean over pictures",
        "none: pixels",
        "Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861; computed by torchmetrics (extra `metrics`)",
        "Averaged where the window lies inside, as scikit-image does; torchmetrics' own mean counts mirrored borders. "
        "Of 64x64 pixels the window sees a sixth of the width: figures of other sizes do not compare.",
    ),
    MetricCard(
        "perceptual",
        "0 and up; 0 for equal pictures",
        "lower on prompts that should stay, higher on the erased concept's",
        "LPIPS's formula without learned weights: squared distance of unit features, mean over places, summed over "
        "layers, before against after at one seed, mean over pictures",
        "every layer of the image tower of the CLIP named in the protocol, all places",
        "Zhang et al., 2018, https://arxiv.org/abs/1801.03924, equation 1, on another network",
        "Not LPIPS, whose weights are no part of this package: figures compare only on the same CLIP.",
    ),
    MetricCard(
        "empty_drift",
        "0 and up; a share",
        "towards 0",
        "length of the movement of the empty prompt's text features, by their length before",
        "the edited model's own text encoder",
        "this package",
        "Guidance subtracts the empty prompt from every picture, so it stands for what all pictures share; a measure "
        "of cause, not of what is seen. Of an edit of the UNet it is 0 and says nothing.",
    ),
)
