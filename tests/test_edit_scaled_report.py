"""Reports of scaled changes: what follows from strength 1 is scaled, and everything else is left out."""

import dataclasses
import json

import pytest

from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.scaled_report import scaled_report
from overpaint.edit.verdict import describe

PAIR = {"van gogh": "painting"}
SMALL = {
    "contexts": 24, "background": 32, "vocabulary": ["monet", "snoopy", "van dyck"], "collateral": False,
    "preserve_weight": 0.0, "bound": 0.02, "allowance": 1e-6,
}  # fmt: skip


@pytest.fixture(scope="module")
def by_auto(tiny_shallow):
    return edit.auto(tiny_shallow, PAIR, **SMALL)


def test_norms_are_proportional_and_drifts_quadratic():
    report = {
        "empty_prompt_drift": 0.04, "delta_norm": 2.0, "concept_movement": {"a": 0.8}, "rank": 3, "missed": 0.3,
        "residual_before": 0.5, "residual_after": 0.1, "layer_missed": 0.2, "collateral": {"captions_moved": 9},
        "endangered": [{"concept": "b", "weight": 1.0, "drift_before": 0.08, "drift": 0.01}],
        "drifts": {"b": 0.01, "c": 0.03, "d": 0.001}, "not_kept": ["c", "everyday name"],
        "encoders": {"text": {"delta_norm": 1.0, "missed": 0.3}},
    }  # fmt: skip
    assert scaled_report(report, -0.5, {"bound": 0.02}) == {
        "empty_prompt_drift": 0.02, "delta_norm": 1.0, "concept_movement": {"a": 0.4}, "rank": 3,
        "residual_before": 0.5,
        "endangered": [{"concept": "b", "weight": 1.0, "drift_before": 0.02, "drift": 0.0025}],
        "drifts": {"b": 0.0025, "c": 0.0075, "d": 0.00025}, "not_kept": [], "encoders": {"text": {"delta_norm": 0.5}},
    }  # fmt: skip
    twice = scaled_report(report, 2, {"bound": 0.02})
    assert twice["not_kept"] == ["b", "c"]
    assert scaled_report(report, 1, {"bound": 0.02}) == report
    assert "not_kept" not in scaled_report(report, 2, {})


@pytest.mark.parametrize("value", [None, "x", 3, [3, None, {"drift": "x"}], {"a": None}, True])
def test_a_report_of_any_type_raises_nothing(value):
    names = ("concept_movement", "endangered", "drifts", "not_kept", "encoders", "delta_norm")
    for bound in (0.02, None, "x", True):
        scaled_report(dict.fromkeys(names, value), 0.5, {"bound": bound})


def test_drifts_at_half_strength_are_those_of_the_scaled_weights(tiny_shallow, by_auto):
    """The report of a strength equals what the same measurement of the scaled movement gives."""
    from overpaint.edit.caption_sums import Reader

    half = 0.5 * by_auto
    reader = Reader.at_layer(tiny_shallow, 0)
    gram, delta = reader.gram([""]), half.movements[0].delta
    moved = float((delta @ gram * delta).sum()) ** 0.5
    size = float((reader.weight @ gram * reader.weight).sum()) ** 0.5
    assert half.report["empty_prompt_drift"] == pytest.approx(moved / size, rel=1e-6)
    assert half.report["drifts"] == pytest.approx(
        {name: drift / 4 for name, drift in by_auto.report["drifts"].items()}
    )
    assert by_auto.report["drifts"].keys() == {*SMALL["vocabulary"], "painting"}
    for name in ("missed", "layer_missed", "layer_drift"):
        assert name in by_auto.report and name not in half.report


def test_names_that_are_not_kept_are_those_at_the_strength(by_auto):
    drifts, bound = by_auto.report["drifts"], by_auto.protocol["bound"]
    assert by_auto.report["not_kept"] == [n for n, drift in drifts.items() if drift > bound]
    assert by_auto.report["not_kept"]  # the allowance leaves no room to preserve them
    low = 0.5 * (bound / max(drifts.values())) ** 0.5
    assert (low * by_auto).report["not_kept"] == []
    high = 2 * (bound / min(drifts.values())) ** 0.5
    assert set((high * by_auto).report["not_kept"]) == set(drifts)
    assert describe(low * by_auto).count("not preserved, likely to change too") == 0


def test_the_command_line_reports_the_strength_that_it_writes(run, tiny_folder, tmp_path):
    def facts(strength):
        out = tmp_path / f"{strength}.safetensors"
        code, text, _ = run(
            "edit", tiny_folder, "--erase", "van gogh", "--replace", "painting", "--auto", "--no-repair",
            "--strength", strength, "--out", out, "--json",
        )  # fmt: skip
        assert code == 0
        return json.loads(text), Change.load(out)

    whole, change = facts(1)
    tenth, scaled = facts(0.1)
    assert tenth["empty_prompt_drift"] == pytest.approx(0.1 * whole["empty_prompt_drift"])
    assert "missed" in whole and "missed" not in tenth
    drifts, bound = change.report["drifts"], change.protocol["bound"]
    expected = {name for name, drift in drifts.items() if 0.01 * drift > bound}
    named = {row["concept"] for row in scaled.report["collateral"]["endangered"]}
    assert set(tenth["not_kept"]) == expected | named
    assert set(tenth["not_kept"]) < set(whole["not_kept"])  # the others were stale
    assert (
        scaled.report["collateral"]["captions_moved"]
        <= change.report["collateral"]["captions_moved"]
    )


def test_a_change_of_another_method_loses_the_names_measured_at_strength_one(quickfix_change):
    measured = {"collateral": {"captions_moved": 1}, "not_kept": ["monet"], "residual_after": 0.1}
    change = dataclasses.replace(quickfix_change, report=measured)
    assert (2 * change).report == {}
    assert "effects on other concepts were not measured" in describe(2 * change)
