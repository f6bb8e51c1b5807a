"""A description of each metric, shown by `overpaint evaluate --explain NAME` and in `docs/metrics.md`."""

from dataclasses import dataclass

__all__ = ["MetricCard", "card", "cards"]

_CLIP = "image and text features of the CLIP named in the protocol (`features`); prompts are cut to its token limit"
_IMAGES = "image features of the CLIP named in the protocol; for `icons` those of `icons-judge`, before its heads"
_HESSEL = "Hessel et al., 2021, https://arxiv.org/abs/2104.08718"
_SCALE = "Values from different CLIPs, from different sizes of one CLIP, or on different scales do not compare."


@dataclass(frozen=True)
class MetricCard:
    """The definition of a metric.

    Attributes:
        name: Its name in files and on the command line.
        range: Its range and unit.
        direction: The better direction, for each kind of prompt.
        formula: The formula in words.
        features: The features that it is computed from.
        source: The publication that defines it.
        caveats: Limits of its meaning.
    """

    name: str
    range: str
    direction: str
    formula: str
    features: str
    source: str
    caveats: str

    def markdown(self) -> str:
        """Return the card as Markdown, as in `docs/metrics.md`."""
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
    for metric_card in _CARDS:
        if metric_card.name == name:
            return metric_card
    raise ValueError(f"unknown metric {name!r}: choose one of {', '.join(c.name for c in _CARDS)}.")


_CARDS = (
    MetricCard(
        "clip_cosine",
        "-1 to 1; about 0.2 to 0.35 for photographs and their captions with public CLIPs",
        "lower on the erased concept's prompts, unchanged on all others",
        "cosine of the picture's and the prompt's features, mean over pictures",
        _CLIP,
        _HESSEL + ", without factor and clamp",
        _SCALE,
    ),
    MetricCard(
        "clip_score_100",
        "-100 to 100",
        "as clip_cosine",
        "100 times clip_cosine",
        _CLIP,
        "torchmetrics' CLIPScore, which also clamps its mean at 0",
        _SCALE + " Published values of 25 to 35 are on this scale.",
    ),
    MetricCard(
        "clip_score_2.5",
        "0 to 2.5",
        "as clip_cosine",
        "2.5 times the larger of clip_cosine and 0, mean over pictures",
        _CLIP,
        _HESSEL + ", section 3",
        _SCALE + " Published values of 0.6 to 0.9 are on this scale.",
    ),
    MetricCard(
        "clip_accuracy",
        "0 to 1; a share of pictures",
        "towards 0 on the erased concept's prompts; near 1 on all others",
        "share of pictures whose cosine with the text of the erased concept is larger than with the text of its "
        "replacement; ties do not count",
        _CLIP + ", and the two texts of each case",
        "Kumari et al., 2023 (Concept Ablation), https://arxiv.org/abs/2303.13516, section 4.1",
        "One half is not the chance level, because a CLIP may prefer one of the two texts. A picture of neither "
        "concept is counted for one of them.",
    ),
    MetricCard(
        "judge_accuracy",
        "0 to 1; a share of pictures",
        "towards 0 on the erased concept's prompts; unchanged on all others",
        "share of pictures whose most probable label, among all of its kind, is the one that the prompt names",
        "`icons-judge`, a classifier that was not used to train `icons`; 64x64 pixels",
        "this package; like UA, IRA and CRA of Zhang et al., 2024 (UnlearnCanvas), https://arxiv.org/abs/2402.11846",
        "The judge has a closed list of labels and always returns one of them, even for an empty picture. Its error "
        "rate on real artwork is stated in its card.",
    ),
    MetricCard(
        "kid",
        "0 and up; for equal distributions the estimate is around 0 and can be negative; in units of the features",
        "close to the KID of two sets of seeds of the unedited model, which is in the column `before`, on prompts that "
        "should not change",
        "unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1) cubed, between pictures of the "
        "edited model and pictures of the unedited model from other seeds; features are scaled to norm sqrt(D), so "
        "that the kernel is (cos + 1) cubed; pictures of one prompt are not compared; the interval is a bootstrap "
        "over prompts",
        _IMAGES,
        "Bińkowski et al., 2018, https://arxiv.org/abs/1801.01401",
        "Depends on the features: values on `icons-judge`, on a CLIP and on Inception do not compare. The two sets "
        "must not share seeds, otherwise the estimate is too small.",
    ),
    MetricCard(
        "kid_p",
        "0 to 1",
        "above 0.05: no difference from a second set of seeds is shown",
        "share of random splits, exchanged within each prompt, whose KID is at least that of the true split, which is "
        "included",
        _IMAGES,
        "Gretton et al., 2012, https://jmlr.org/papers/v13/gretton12a.html, section 5; exchange within prompts is an "
        "addition of this package",
        "With few pictures the test has little power: a large value does not prove equality. Read it together with the "
        "interval of `kid`.",
    ),
    MetricCard(
        "fid",
        "0 and up",
        "as kid",
        "squared distance of the means plus the traces of both covariances (over n - 1) minus twice the trace of the "
        "root of their product, in float64, on the sets of pictures that kid compares",
        _IMAGES,
        "Heusel et al., 2017, https://arxiv.org/abs/1706.08500",
        "Has a positive bias that grows as the number of pictures falls. Values compare only for the same number of "
        "pictures and the same features, and never with published FID on Inception features. Below a few thousand "
        "pictures use kid.",
    ),
    MetricCard(
        "psnr",
        "dB, 0 and up; infinite for equal pictures, which count as 100 dB",
        "higher on prompts that should not change",
        "-10 times the decimal logarithm of the mean squared difference of pixels in [0, 1], of the pictures before "
        "and after the edit at one seed, mean over pictures",
        "none: pixels",
        "the usual definition; equals torchmetrics",
        "A shift by one pixel can change it as much as another subject.",
    ),
    MetricCard(
        "ssim",
        "-1 to 1; 1 for equal pictures",
        "higher on prompts that should not change",
        "structural similarity in a Gaussian window of standard deviation 1.5 pixels (11x11) for each channel, of the "
        "pictures before and after the edit at one seed, mean over pictures",
        "none: pixels",
        "Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861; computed by torchmetrics (extra `metrics`)",
        "Averaged over positions where the whole window lies inside the picture, as scikit-image does; torchmetrics' "
        "mean includes mirrored borders. In 64x64 pixels the window covers a sixth of the width, so values at other "
        "sizes do not compare.",
    ),
    MetricCard(
        "perceptual",
        "0 and up; 0 for equal pictures",
        "lower on prompts that should not change, higher on the erased concept's",
        "LPIPS's formula without learned weights: squared distance of unit features, mean over positions, summed over "
        "layers, of the pictures before and after the edit at one seed, mean over pictures",
        "every layer of the image encoder of the CLIP named in the protocol, all positions",
        "Zhang et al., 2018, https://arxiv.org/abs/1801.03924, equation 1, on another network",
        "This is not LPIPS, whose weights are not part of this package: values compare only on the same CLIP.",
    ),
    MetricCard(
        "empty_drift",
        "0 and up; relative",
        "towards 0",
        "norm of the change of the empty prompt's text features, divided by their norm before the edit",
        "the edited model's text encoder",
        "this package",
        "Classifier-free guidance uses the empty prompt for every picture, so its change affects all pictures. It "
        "measures a cause, not the effect on pictures. It is 0 for every edit of the UNet, and for SDXL, whose "
        "guidance reads zeros for the empty prompt by default.",
    ),
)
