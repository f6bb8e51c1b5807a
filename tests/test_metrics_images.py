"""Metrics of pictures compared with torchmetrics, scipy and plain loops, on noise and on generated icons."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import overpaint as op
from overpaint import evaluate, metrics

PROMPTS = [
    f"a {thing} in {style} style"
    for thing in ("cat", "castle", "rocket", "dog")
    for style in ("noto", "openmoji", "fluent")
]


@pytest.fixture(scope="module")
def icons():
    """Twelve pictures of the shipped model, and the same prompts from other seeds."""
    model = op.load("icons")
    return [
        model.generate(PROMPTS, seed=[first + i for i in range(12)], steps=4).images.float()
        for first in (0, 100)
    ]


@pytest.fixture(params=["noise", "icons"])
def pictures(request, icons):
    if request.param == "icons":
        return icons
    return list(torch.rand(2, 12, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def ssim_by_hand(a, b):
    """Wang's formula on one channel with scipy's Gaussian, averaged where the whole window lies inside."""

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (light * (2 * both + 9e-4) / (var_a + var_b + 9e-4)).mean()


def test_ssim_equals_wangs_formula(pictures):
    a, b = pictures
    expected = [
        np.mean([ssim_by_hand(*(x[i, c].double().numpy() for x in pictures)) for c in range(3)])
        for i in range(12)
    ]
    assert metrics.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(metrics.ssim(a, a), torch.ones(12, dtype=torch.float64))


def test_psnr_equals_torchmetrics_and_a_value_by_hand(pictures):
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = pictures
    theirs = image.peak_signal_noise_ratio(
        a.double(), b.double(), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    assert torch.allclose(metrics.psnr(a, b), theirs, atol=1e-6)
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert metrics.psnr(grey, grey + 0.1).item() == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(grey, grey).item() == float("inf")


def test_perceptual_equals_a_loop_over_layers_and_positions(pictures, judge):
    layers = [judge.layers(x) for x in pictures]
    assert len(layers[0]) == 5
    distances = metrics.perceptual(*layers)
    expected = 0.0
    for a, b in zip(*layers, strict=True):
        for p in range(a.shape[1]):
            x, y = a[3, p].double().numpy(), b[3, p].double().numpy()
            x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
            expected += ((x - y) ** 2).sum() / a.shape[1]
    assert distances[3].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(metrics.perceptual(layers[0], layers[0]), torch.zeros(12).double())


def test_clip_scores_equal_the_judges_cosine_on_three_scales(pictures, judge):
    seen, said = judge.image_features(pictures[0]), judge.text_features(PROMPTS)
    raw = metrics.clip_score(seen, said)
    assert torch.allclose(raw, judge.clip_score(pictures[0], PROMPTS).double(), atol=1e-6)
    by_hand = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(seen, said, strict=True)]
    assert raw.tolist() == pytest.approx(by_hand, abs=1e-6)
    hundred = metrics.clip_score(seen, said, scale="clip_score_100")
    assert hundred.tolist() == pytest.approx([100 * x for x in by_hand], abs=1e-4)
    hessel = metrics.clip_score(seen, -said, scale="clip_score_2.5")
    assert hessel.tolist() == pytest.approx([2.5 * max(-x, 0) for x in by_hand], abs=1e-6)


def test_clip_score_equals_torchmetrics(pictures, judge):
    ours = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")

    class Adapter:
        """The judge with the interface that torchmetrics calls; texts are given as features."""

        config = None

        def eval(self):
            return self

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return 3 * judge.image_features(pixels)  # the norm must not matter

        def get_text_features(self, ids, mask):
            return ids

    def read(text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {"input_ids": judge.text_features(text), "attention_mask": torch.ones(1, 1)}

    theirs = ours.clip_score(list(pictures[0]), PROMPTS, lambda: (Adapter(), read))
    seen, said = judge.image_features(pictures[0]), judge.text_features(PROMPTS)
    mine = metrics.clip_score(seen, said, scale="clip_score_100").mean().clamp(min=0)
    assert float(theirs) == pytest.approx(float(mine), abs=1e-4)


def test_clip_accuracy_is_false_for_ties_and_true_for_the_drawn_concept(icons, judge):
    seen = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    target, anchor = torch.tensor([[1.0, 0]]).expand(3, 2), torch.tensor([[0.0, 1]]).expand(3, 2)
    assert metrics.clip_accuracy(seen, target, anchor).tolist() == [True, False, False]
    other = [p.replace("noto", "openmoji") for p in PROMPTS if "noto" in p]
    texts = [judge.text_features(x) for x in ([p for p in PROMPTS if "noto" in p], other)]
    drawn = judge.image_features(icons[0][::3])
    assert metrics.clip_accuracy(drawn, *texts).float().mean() >= 0.75


def test_kid_and_fid_of_icons_equal_torchmetrics(icons, judge):
    kid = pytest.importorskip("torchmetrics.image.kid")
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = (judge.image_features(x).double() for x in icons)
    assert metrics.kid(a, b).value == pytest.approx(float(kid.poly_mmd(a, b)), abs=1e-8)
    theirs = fid._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert metrics.fid(a, b).value == pytest.approx(float(theirs), abs=1e-4)
    again = metrics.kid_test(a, b, groups=(PROMPTS, PROMPTS), permutations=200)
    assert again.indistinguishable


def test_every_metric_has_a_complete_card_and_an_unknown_metric_raises():
    names = [card.name for card in metrics.cards()]
    assert len(set(names)) == len(names)
    assert set(names) == set(evaluate.METRICS)
    for card in metrics.cards():
        assert all(getattr(card, field) for field in card.__dataclass_fields__)
        assert not any("|" in getattr(card, field) for field in card.__dataclass_fields__)
    assert metrics.card("kid").name == "kid"
    with pytest.raises(ValueError, match="unknown metric 'lpips': choose one of clip_cosine, "):
        metrics.card("lpips")


def test_the_documentation_contains_the_cards():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    head, body = page.split("\n## ", 1)
    assert "## " + body == "\n".join(card.markdown() for card in metrics.cards())
    assert "overpaint evaluate --explain" in head


def test_ssim_without_torchmetrics_raises_and_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    grey = torch.zeros(1, 3, 16, 16)
    with pytest.raises(op.MissingExtra, match="SSIM needs torchmetrics.*pip install torchmetrics"):
        metrics.ssim(grey, grey)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.psnr(x, x[:1]), r"same shape \(B, 3, H, W\).*draw both"),
        (lambda x: metrics.ssim(x[..., :8], x[..., :8]), "window of 11x11 pixels, got .* 16x8"),
        (lambda x: metrics.perceptual([x], [x]), r"same shapes \(B, P, D\)"),
        (lambda x: metrics.clip_score(x[:, 0, 0], x[:1, 0, 0]), "one text for each picture"),
        (lambda x: metrics.clip_score(x, x, scale="percent"), "unknown scale 'percent'"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 16, 16))
