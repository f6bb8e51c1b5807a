"""Printed results are one short line, without the numbers of tensors and tables."""

import pytest
import torch

import overpaint as op
from overpaint import edit
from overpaint.evaluate import Measure, Measures
from overpaint.evaluate.attack_results import Attack, Attempt
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.match import Match
from overpaint.metrics import Interval
from overpaint.probes.questions import Question
from overpaint.trace import Effects

SHARE = Interval(0.5, 0.25, 0.75, 8)
PAIR = Paired(SHARE, Interval(0.0, 0.0, 0.37, 8), SHARE)


def scores(name):
    return Scores(
        name, "style", "openmoji", "noto", efficacy=PAIR, redirection=PAIR, generality={"unseen wordings": PAIR},
        others={"blob": PAIR}, specificity={"style": PAIR, "object": PAIR}, empty_drift=0.01,
        protocol={"questions": list(range(500))},
    )  # fmt: skip


def effects():
    rows = [
        {
            "site": f"text.{n}.mlp", "part": "text", "kind": "mlp", "index": n, "path": "", "role": "eos",
            "control": control, "probe": f"p{p}", "prompt": "a cat", "concept": "cat", "seed": 0, "noise": 0,
            "embed_recovery": 0.5,
        }
        for n in range(3) for p in range(4) for control in ("", "untrained")
    ]  # fmt: skip
    return Effects.of(rows, {"steps": 4})


def results(model):
    attempt = Attempt("paraphrase", "x", SHARE, SHARE)
    images = torch.rand(3, 3, 64, 48)
    square = torch.rand(64, 48)
    return {
        "pictures": op.Pictures(images, ("a cat", "a cat", "a dog"), (0, 1, 2), {"steps": 8}),
        "scores": scores("change"),
        "comparison": Comparison(
            {n: scores(n) for n in "abcdefg"}, {}, (Question("p", 0, "target", "cat", "noto"),) * 50, {"before": images}
        ),
        "measures": Measures(
            "mine", "old", "new", (Measure("target", "psnr", SHARE, SHARE, SHARE),) * 20, {"a": [0] * 500}
        ),
        "attack": Attack("old", SHARE, SHARE, SHARE, (attempt,) * 20, {"prompts": ["a"] * 99}),
        "effects": effects(),
        "change": edit.quickfix(model, {f"cat {i}": "dog" for i in range(9)}),
        "model": model,
        "match": Match(torch.zeros(2, 64, 48), square, torch.rand(3, 64, 48), square > 0),
        "pair": PAIR,
    }  # fmt: skip


NAMES = {
    "pictures": "3 pictures, 48x64 of 'a cat' and 1 more",
    "scores": "still openmoji: 0.50 [0.25, 0.75] → 0.00 [0.00, 0.37]",
    "comparison": "Comparison of 7 methods, still openmoji: a 0.00 [0.00, 0.37]",
    "measures": "Measures on 'mine', after erasing 'old': target psnr 0.5",
    "attack": "Attack on 'old': not brought back by 20 attempts",
    "effects": "Effects: 24 rows, 3 sites, 4 prompts, controls: untrained",
    "change": "Change by quickfix: cat 0 → dog, cat 1 → dog, cat 2 → dog and 6 more; moves text.0.self_attn.out_proj",
    "model": "1 text encoder, pictures of",
    "match": "Match of 48x64 pixels: matched, median uncertainty",
    "pair": "0.50 [0.25, 0.75] → 0.00 [0.00, 0.37]",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_result_prints_one_short_readable_line(tiny_sd1, name):
    text = str(results(tiny_sd1)[name])
    assert NAMES[name] in text
    assert "\n" not in text
    assert len(text) < 250
    assert "tensor(" not in text and "object at 0x" not in text
