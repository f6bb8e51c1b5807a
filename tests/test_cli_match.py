"""`overpaint match`: what it writes is what the function finds, and bad input is one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from overpaint import match
from overpaint.match import flow

FILES = {"arrows.png", "confidence.png", "flow.flo", "flow.npy", "std.npy", "warped.png", "wheel.png"}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two pictures of different sizes and a small matcher whose hypotheses differ, on disk."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    blobs = F.interpolate(torch.rand(1, 3, 12, 16, generator=generator), (96, 128), mode="bicubic")
    pixels = (blobs[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[8:88, 6:106]).convert("L").save(folder / "b.png")
    matcher = match.Matcher.build(match.Config.smoke(), seed=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for part in (matcher.coarse, matcher.fine):
            part.unet.conv_out.weight.normal_(0, 0.05)
    matcher.save(folder / "matcher")
    return folder


def test_match_writes_the_result_of_the_function(run, inputs, tmp_path):
    pair = (inputs / "a.png", inputs / "b.png")
    code, out, err = run(
        "match", *pair, "-o", tmp_path, "--matcher", inputs / "matcher", "--samples", 2,
        "--steps", 3, "--seed", 7, "--cycle", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert {p.name for p in tmp_path.iterdir()} == FILES
    result = match.dense(*pair, matcher=inputs / "matcher", samples=2, steps=3, seed=7, cycle=True)
    assert flow.read_flo(tmp_path / "flow.flo")[0].equal(result.flow)
    assert (np.load(tmp_path / "std.npy") == result.std.numpy()).all()
    facts = json.loads(out)
    assert (facts["verdict"], facts["sure"]) == (result.verdict, result.sure)
    assert facts["size"] == "100x80"
    assert facts["flo"] == str(tmp_path / "flow.flo")
    assert facts["moved_median"] == pytest.approx(result.flow.norm(dim=0).median().item())
    assert facts["inside"] == pytest.approx(result.inside.float().mean().item())
    assert facts["missed_median"] == result.consistency[result.inside].median().item()


def test_match_prints_one_line_a_fact_and_draws_dark_views(run, inputs, tmp_path):
    command = ("match", inputs / "a.png", inputs / "b.png", "--matcher", inputs / "matcher")
    code, out, _ = run(*command, "--samples", 1, "--steps", 1, "--dark", "--out", tmp_path)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["wheel"] == str(tmp_path / "wheel.png")
    assert "std_median" not in lines  # of one hypothesis there is none
    assert lines["verdict"] == "unknown: a single hypothesis has no spread"
    with Image.open(tmp_path / "wheel.png") as view:
        assert view.convert("RGB").getpixel((view.width - 2, view.height - 2)) == (24, 27, 34)


def test_a_failed_match_is_named_on_the_first_line_and_the_exit_code_is_0(run, inputs, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")  # nothing to match
    command = ("match", inputs / "a.png", tmp_path / "red.png", "--matcher", inputs / "matcher")
    code, out, _ = run(*command, "--samples", 2, "--out", tmp_path / "text")
    assert code == 0
    assert out.splitlines()[0].split(maxsplit=1) == [
        "verdict", "not matched: sure at 0 % of the picture",
    ]  # fmt: skip
    code, out, _ = run(*command, "--samples", 1, "--json", "--out", tmp_path / "json")
    assert code == 0
    assert (json.loads(out)["verdict"], json.loads(out)["sure"]) == ("not matched", 0)


def test_a_single_hypothesis_has_no_verdict_unless_matched_both_ways(run, inputs, tmp_path):
    pair = (inputs / "a.png", inputs / "a.png")
    command = ("match", *pair, "--matcher", inputs / "matcher", "--samples", 1, "--json")
    _, out, _ = run(*command, "--out", tmp_path / "forth")
    assert (json.loads(out)["verdict"], json.loads(out)["sure"]) == ("unknown", None)
    _, out, _ = run(*command, "--cycle", "--out", tmp_path / "back")
    assert json.loads(out)["verdict"] != "unknown"
    assert 0 <= json.loads(out)["sure"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{a}", "{tmp}/none.png"), "`image_b`: there is no file"),
        (("{tmp}", "{a}"), "`image_a`: cannot read"),
        (("{a}", "{a}", "--samples", "0"), "'--samples': 0 is out of range: give 1 to 10000"),
        (("{a}", "{a}", "--steps", "9"), "`steps` must be 1 to 5, got 9"),
        (("{a}", "{a}", "--matcher", "{tmp}/none"), "unknown matcher"),
        (("{a}",), "Missing argument 'image_b'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(run, inputs, tmp_path, arguments, message):
    filled = [x.format(a=inputs / "a.png", tmp=tmp_path) for x in arguments]
    own = () if "--matcher" in arguments else ("--matcher", inputs / "matcher")
    code, out, err = run("match", *filled, *own, "-o", tmp_path)
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("overpaint: ")
    assert list(tmp_path.iterdir()) == []
