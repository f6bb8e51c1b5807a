"""Predicted drift, metrics of an evaluation set and attacks: computed by hand, shown on the page, and damaged files."""

import json
import math

import pytest
import torch
from test_report import scores

from overpaint import edit, report
from overpaint.evaluate import Measure, Measures, measures, predicted_drift
from overpaint.evaluate.attack_results import Attack, Attempt
from overpaint.evaluate.results import Comparison
from overpaint.images.charts import Point
from overpaint.metrics import Interval
from overpaint.probes.questions import Question
from overpaint.report import drift_section

NONE = Interval(math.nan, math.nan, math.nan, 0)


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return edit.quickfix(tiny_sd1, {"van gogh": "painting"})


def questions_about(*pairs):
    return tuple(
        Question(prompt, 0, role, "cat", style)
        for role, style, prompt in (*pairs, ("target", "van gogh", "a cat, van gogh"))
    )


def test_predicted_drift_is_relative_to_the_distance_from_the_empty_prompt(tiny_sd1, change):
    texts = ("a cat, monet", "a dog, monet")
    questions = questions_about(("other", "monet", texts[0]), ("other held out", "monet", texts[1]))
    drift = predicted_drift.predict(tiny_sd1, {"one": change}, questions, kind="style")
    before = [tiny_sd1.encode([t])[0].double() for t in (*texts, "")]
    with change.applied(tiny_sd1):
        after = [tiny_sd1.encode([t])[0].double() for t in texts]
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=False))
    distance = sum(float((b - before[2]).square().sum()) for b in before[:2])
    assert drift == {"one": {"monet": pytest.approx(math.sqrt(moved / distance), rel=1e-4)}}
    assert drift["one"]["monet"] > 0


def test_a_zero_change_has_no_drift_and_the_model_is_unchanged(tiny_sd1, change):
    before = tiny_sd1.encode(["a cat, monet"])
    changes = {"no edit": None, "none": change * 0.0, "half": change * 0.5, "whole": change}
    drift = predicted_drift.predict(
        tiny_sd1, changes, questions_about(("other", "x", "a cat, monet")), kind="style"
    )
    assert list(drift) == ["none", "half", "whole"]
    assert drift["none"]["x"] == 0
    assert 0 < drift["half"]["x"] < drift["whole"]["x"]
    assert torch.equal(tiny_sd1.encode(["a cat, monet"]), before)


def test_changes_of_the_unet_are_left_out(tiny_sd1):
    unet = edit.uce(tiny_sd1, {"van gogh": "painting"})
    assert all(site.startswith("unet") for site in unet.sites)
    assert (
        predicted_drift.predict(
            tiny_sd1, {"uce": unet}, questions_about(("other", "x", "a")), kind="style"
        )
        == {}
    )


def test_points_pair_predicted_drift_with_measured_loss():
    comparison = Comparison({"a": scores("a", 0.02)}, {}, (), {})
    series = drift_section.points(
        comparison, {"a": {"noto": 0.3, "unknown": 1}, "gone": {"noto": 1}}
    )
    (point,) = series["a"]
    assert list(series) == ["a"]
    assert (point.x, point.label) == (0.3, "noto")
    assert (point.y, point.low, point.high) == pytest.approx((2, -3, 7))  # 90 % fell to 88 %


def test_the_rank_correlation_is_one_for_monotonic_points_and_nan_for_constant_ones():
    rows = [Point(x, x**3, 0, 0, "") for x in (0.1, 0.5, 0.2)]
    assert drift_section.rank_correlation({"a": rows[:2], "b": rows[2:]}) == pytest.approx(1)
    assert drift_section.rank_correlation({"a": [Point(-p.x, p.y, 0, 0, "") for p in rows]}) < -0.99
    assert math.isnan(drift_section.rank_correlation({"a": [Point(0, 1, 0, 0, "")] * 3}))


def test_drift_is_loaded_from_its_file_and_a_damaged_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        predicted_drift.load(tmp_path)
    predicted_drift.save({"a": {"noto": 0.25}}, tmp_path)
    assert predicted_drift.load(tmp_path) == {"a": {"noto": 0.25}}
    (tmp_path / predicted_drift.FILE).write_text('{"predicted": {"a": 3}}')
    with pytest.raises(ValueError, match=r"drift.json' is damaged .*: .* or delete it"):
        predicted_drift.load(tmp_path)


def test_an_evaluation_set_is_shown_with_the_meaning_of_each_metric(tmp_path):
    rows = (
        Measure("target", "clip_accuracy", Interval(0.9, 0.8, 1, 20), Interval(0.1, 0, 0.2, 20),
                Interval(-0.8, -0.9, -0.7, 20)),
        Measure("other", "psnr", NONE, Interval(24.13, 24.13, 24.13, 1), NONE),
    )  # fmt: skip
    Measures("my <set>", "old", "new", rows, {"seed": 3, "versions": {"torch": "2"}}).save(tmp_path)
    page = report.save(tmp_path)
    text = page.read_text()
    assert "<h1>old → new</h1>" in text
    assert "Measured on my &lt;set&gt;" in text
    assert "−0.800<small>−0.900 to −0.700, n\N{NO-BREAK SPACE}20</small>" in text
    assert "24.1<small>n\N{NO-BREAK SPACE}1</small>" in text
    assert "What each metric means" in text
    assert "<dt>Versions</dt><dd>torch 2</dd>" in text
    words = json.loads(page.with_suffix(".json").read_text())
    first = words["tables"][0]["rows"][0]
    assert first["Change"] == {"mean": -0.8, "low": -0.9, "high": -0.7, "n": 20}
    (tmp_path / measures.FILE).write_text("{}")
    with pytest.raises(
        ValueError, match=r"measures.json' is damaged .*Make it again with .overpaint evaluate"
    ):
        report.save(tmp_path)


def test_an_attack_is_shown_with_the_scores_from_other_seeds(tmp_path):
    def interval(mean):
        return Interval(mean, mean - 0.05, mean + 0.05, 12)

    plain = Attempt("plain", "as they are", interval(0.1))
    best = Attempt("paraphrase", "old <b>", interval(0.9), interval(0.5))
    ends = (interval(0.9), interval(0.1), interval(0.0))
    Attack("old", *ends, (best, plain), {"score": "share of old"}).save(tmp_path)
    text = report.save(tmp_path).read_text()
    summary = "The best of 2 attempts, paraphrase “old &lt;b&gt;”, brought old back, 50 % of what the edit removed."
    assert summary in text
    assert "0.50<small>0.45 to 0.55, n\N{NO-BREAK SPACE}12</small>" in text
    assert "0.90<small>0.85 to 0.95" in text  # the unedited model
    assert text.count("0.90<small>") == 1  # the score of the search itself is not shown
    weak = Attempt("paraphrase", "old <b>", interval(0.9), interval(0.12))
    Attack("old", *ends, (weak, plain), {"score": "share of old"}).save(tmp_path)
    assert "it does not show that the edit is robust." in report.save(tmp_path).read_text()
    (tmp_path / "attack.json").write_text("[]")
    with pytest.raises(ValueError, match=r"attack.json' is damaged .*: .* Make it again with"):
        report.save(tmp_path)
