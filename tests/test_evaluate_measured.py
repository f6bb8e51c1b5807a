"""Metrics of an evaluation set, compared with the same pictures drawn and scored in the test."""

import json
import math

import pytest
import torch

from overpaint import edit, evaluate, metrics
from overpaint.metrics import Interval
from overpaint.probes import Case, EvaluationSet

LABELS = {"object": ("cat", "dog"), "style": ("noto", "blob"), "color": ("red", "blue")}
CASES = EvaluationSet(
    "mine", "table", "blob style", "noto style",
    (
        Case("a cat in blob style", "target", "a cat in blob style", "a cat in noto style", "blob style", 5),
        Case("a dog in blob style", "target", "a dog in blob style", "", "blob style"),
        Case("a dog", "other", "a dog", "a cat", "dog", 7),
        Case("a bird", "other", "a bird", "", "bird", 8),
    ),
)  # fmt: skip


class PatchScorer:
    """Features of a picture are the means of eight patches; features of a text are computed from its letters."""

    name = "eight patches"
    labels = LABELS

    def image_features(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images, (2, 4)).mean(1).flatten(1)
        return torch.nn.functional.normalize(cells - cells.mean(1, keepdim=True), dim=1)

    def text_features(self, prompts):
        rows = [torch.tensor([hash_(p, k) for k in range(8)]) for p in prompts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def layers(self, images):
        return (images.flatten(2).transpose(1, 2),)

    def classify(self, images, kind):
        mean = images.mean((1, 2, 3)) * 1000
        return torch.stack([(mean * (k + 1)).frac() for k in range(len(LABELS[kind]))], 1)


def hash_(text, k):
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(text)) * (k + 1))


@pytest.fixture(scope="module")
def swap(tiny_sd1):
    return edit.swap_embedding(tiny_sd1, {"blob style": "noto style"})


@pytest.fixture(scope="module")
def measures(tiny_sd1, swap):
    return evaluate.measure(
        tiny_sd1,
        swap,
        CASES,
        scorer=PatchScorer(),
        only=evaluate.METRICS,
        repeats=2,
        steps=2,
        batch_size=3,
    )


@pytest.fixture(scope="module")
def drawn(tiny_sd1, swap):
    """Pictures of the target prompts: before the edit, after it, and before it from the other seeds."""
    prompts = ["a cat in blob style"] * 2 + ["a dog in blob style"] * 2
    seeds = [5, 10005, 1, 10001]
    before = tiny_sd1.generate(prompts, seed=seeds, steps=2).images
    with swap.applied(tiny_sd1):
        after = tiny_sd1.generate(prompts, seed=seeds, steps=2).images
    again = tiny_sd1.generate(prompts, seed=[s + 1_000_000 for s in seeds], steps=2).images
    return prompts, before, after, again


def test_scores_equal_those_computed_from_the_same_pictures(measures, drawn):
    prompts, before, after, _ = drawn
    scorer = PatchScorer()
    texts = scorer.text_features(prompts)
    for name, images in (("before", before), ("after", after)):
        cosine = metrics.clip_score(scorer.image_features(images), texts)
        row = getattr(measures.row("target", "clip_cosine"), name)
        assert row.mean == pytest.approx(cosine.mean().item(), abs=1e-5)
        assert row.n == 4
        pair = (
            scorer.text_features([CASES.cases[0].old]),
            scorer.text_features([CASES.cases[0].new]),
        )
        is_closer = metrics.clip_accuracy(
            scorer.image_features(images[:2]), *(t.expand(2, -1) for t in pair)
        )
        accuracy = getattr(measures.row("target", "clip_accuracy"), name)
        assert (accuracy.mean, accuracy.n) == (is_closer.float().mean().item(), 2)
        assert accuracy.high - accuracy.low > 0.9  # one prompt is one unit, which shows nothing
        judged = scorer.classify(images, "style").argmax(1) == 1
        assert getattr(measures.row("target", "judge_accuracy"), name).mean == judged.float().mean()
    row = measures.row("target", "clip_cosine")
    assert row.change.mean == pytest.approx(row.after.mean - row.before.mean, abs=1e-6)
    assert measures.row("target", "clip_score_100").after.mean == pytest.approx(
        100 * row.after.mean
    )


def test_distances_equal_those_of_the_same_pictures(measures, drawn):
    prompts, before, after, again = drawn
    assert measures.row("target", "psnr").after.mean == pytest.approx(
        metrics.psnr(before, after).mean().item(), abs=1e-3
    )
    assert measures.row("target", "ssim").after.mean == pytest.approx(
        metrics.ssim(before, after).mean().item(), abs=1e-4
    )
    layers = (PatchScorer().layers(x) for x in (before, after))
    assert measures.row("target", "perceptual").after.mean == pytest.approx(
        metrics.perceptual(*layers).mean().item(), abs=1e-5
    )
    features = [8**0.5 * PatchScorer().image_features(x) for x in (before, after, again)]
    row = measures.row("target", "kid")
    for name, one in (("before", features[0]), ("after", features[1])):
        expected = metrics.kid(one, features[2], groups=(prompts, prompts))
        assert getattr(row, name).mean == pytest.approx(expected.value, abs=1e-4)
    test = metrics.kid_test(features[1], features[2], groups=(prompts, prompts))
    assert measures.row("target", "kid_p").after.mean == pytest.approx(test.p, abs=0.05)
    fid = metrics.fid(features[1] / 8**0.5, features[2] / 8**0.5).value
    assert measures.row("target", "fid").after.mean == pytest.approx(fid, abs=1e-4)


def test_a_zero_change_changes_nothing(tiny_sd1, swap):
    same = evaluate.measure(
        tiny_sd1, 0 * swap, CASES, scorer=PatchScorer(), only=evaluate.METRICS, steps=2
    )
    for row in same.rows:
        if row.change.n:
            assert row.change.mean == 0
        if row.metric in ("kid", "kid_p", "fid"):
            assert row.before == row.after or math.isnan(row.after.high)
            assert row.before.mean == row.after.mean
    assert same.row("other", "psnr").after.mean == 100
    assert same.row("other", "perceptual").after.mean == 0
    assert same.row("model", "empty_drift").after.mean == 0


def test_a_metric_counts_only_the_cases_with_its_label_or_text(measures, swap):
    assert (
        measures.row("other", "clip_accuracy").after.n == 2
    )  # of the dog alone: a bird has no second text
    assert measures.row("other", "judge_accuracy").after.n == 2  # the judge knows no bird
    assert measures.row("other", "clip_cosine").after.n == 4
    assert measures.protocol["features"] == "eight patches"
    assert measures.protocol["change_digest"] == swap.digest
    assert (measures.protocol["cases"], measures.protocol["repeats"]) == (4, 2)


def test_a_role_of_one_prompt_has_no_kernel_distance(tiny_sd1, swap):
    one = EvaluationSet("one", "timed", "blob style", "noto style", CASES.cases[:1])
    options = {"only": ["kid", "kid_p", "fid"], "repeats": 2, "steps": 1}
    measures = evaluate.measure(tiny_sd1, swap, one, scorer=PatchScorer(), **options)
    counted = {row.metric: (row.before.n, row.after.n) for row in measures.rows}
    assert counted == {"kid": (0, 0), "kid_p": (0, 0), "fid": (2, 2)}


def test_flat_names_and_aliases(measures):
    flat = measures.flat()
    assert flat["target_clip_cosine_before"] == measures.row("target", "clip_cosine").before.mean
    assert "target_psnr_before" not in flat
    assert flat["empty_drift_after"] == measures.row("model", "empty_drift").after.mean
    target = measures.row("target", "clip_accuracy").after
    assert measures.aliases()["reliability"] == Interval(
        1 - target.mean, 1 - target.high, 1 - target.low, 2
    )
    assert flat["locality"] == measures.row("other", "clip_accuracy").after.mean
    assert "generality" not in flat


def test_measures_are_saved_as_json_without_nan_and_loaded(measures, tmp_path):
    path = measures.save(tmp_path / "new")
    words = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert words["set"] == "mine"
    assert len(words["rows"]) == len(measures.rows)
    assert [p.name for p in path.parent.iterdir()] == ["measures.json"]
    assert evaluate.Measures.load(path.parent).flat() == pytest.approx(measures.flat(), nan_ok=True)


def test_progress_counts_every_picture_of_the_necessary_runs(tiny_sd1, swap):
    calls = []
    options = {"scorer": PatchScorer(), "steps": 1, "batch_size": 3}
    evaluate.measure(
        tiny_sd1, swap, CASES, only=["psnr"], on_progress=lambda *at: calls.append(at), **options
    )
    assert calls == [(3, 8, "before"), (4, 8, "before"), (7, 8, "after"), (8, 8, "after")]


def test_bad_input_is_an_error(tiny_sd1, swap, measures):
    class Clip(PatchScorer):
        labels = None
        size = 512

    def run(**options):
        return evaluate.measure(
            tiny_sd1, swap, CASES, steps=1, **{"scorer": PatchScorer(), **options}
        )

    with pytest.raises(ValueError, match="unknown metric 'lpips': choose one of clip_cosine"):
        run(only=["lpips"])
    with pytest.raises(ValueError, match="is a CLIP without labels, which `judge_accuracy` needs"):
        run(only=["judge_accuracy"], scorer=Clip())
    with pytest.raises(ValueError, match=r"reads pictures of 512x512 pixels, .*for example a CLIP"):
        run(scorer=Clip())
    with pytest.raises(
        ValueError, match="`repeats` must be at least 1, got 0: it is the number of"
    ):
        run(repeats=0)
    with pytest.raises(
        ValueError, match="'kid' of 'general' was not measured: choose one of target "
    ):
        measures.row("general", "kid")
