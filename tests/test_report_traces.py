"""The page of every form of trace that the command line saves."""

import json

import pytest
from trace_inputs import brightness

from overpaint import report, trace
from overpaint.probes import Probe
from overpaint.report import trace_headline
from overpaint.trace import Effects

PROBES = [
    Probe(str(i), "style", f"a {word} in openmoji style", "openmoji style", "openmoji")
    for i, word in enumerate(("cat", "dog"))
]
DRAWING = trace.Drawing(steps=1, solver="own")


@pytest.mark.parametrize(
    ("options", "heading", "figures"),
    [
        (("--part", "swap", "--target", "noto style"), "Direct effect of the prompt in the UNet", 1),
        (("--part", "text", "--direction", "corrupt"), "Causal trace of the text encoder", 2),
        (("--part", "text", "--heads", "--features-only"), "Causal trace of the text encoder", 1),
        (("--part", "text", "--screen", "0.05"), "Causal trace of the text encoder", 2),
        (("--part", "unet", "--heads"), "Causal trace of the UNet", 2),
        (("--part", "unet", "--source", "same_latent", "--windows", "--screen", "0.1"), "Causal trace of the UNet", 1),
    ],
)  # fmt: skip
def test_the_report_draws_what_trace_saves(run, tmp_path, options, heading, figures):
    code, _, err = run(
        "trace", "icons", *options, "--limit", 1, "--steps", 1, "--out", tmp_path, "--json"
    )
    assert code == 0, err
    code, out, err = run("report", tmp_path, "--json")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert heading in page
    assert page.count("<figure class=") == figures
    assert len(json.loads((tmp_path / "report.json").read_text())["figures"]) == figures


@pytest.fixture(scope="module")
def swapped(tiny_sd1):
    return trace.prompt_swap(
        tiny_sd1, PROBES, target="noto style", window=3, drawing=DRAWING, scorer=brightness, minimum_gap=-1
    )  # fmt: skip


def test_the_page_of_a_swap_states_its_windows_and_targets(swapped, tmp_path):
    swapped.save(tmp_path / "swap.parquet")
    page = report.save(tmp_path).read_text()
    assert "windows of 3 consecutive cross-attention layers" in page
    assert "a cat in noto style" in page
    assert "Bar chart of 14 UNet sites" in page
    assert trace_headline.headline(swapped) == (
        "2 prompts are too few to call any of 14 states causal (at least 13 are needed)."
    )


def test_a_window_reaches_the_threshold_for_max_by_its_own_score():
    """The target's score is 1 everywhere: a window that leaves it at 0 is not causal, one that shows it is."""
    rows = [
        {
            "site": f"unet.cross_attn.{i}", "part": "unet", "kind": "cross_attn", "index": i, "path": "", "role": "",
            "control": "", "window": "", "direction": "corrupt", "probe": str(probe), "seed": 0, "noise": 0,
            "score_clean": 0.1, "score_corrupted": 1.0, "score_restored": 0.1 + effect, "direct_effect": effect,
        }
        for probe in range(20)
        for i, effect in enumerate((0.01, 0.8))
    ]  # fmt: skip
    effects = Effects.of(rows, {"trace": "swap", "pick": "max"})
    assert [site.index for site in effects.causal()] == [1]
