"""One range of seeds everywhere: 0 to 2**63 - 1, refused with one message before any work."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import overpaint as op
from overpaint import demo, evaluate, match, metrics, trace
from overpaint.edit import vocabulary
from overpaint.errors import LARGEST_SEED, check_seed, later_seed
from overpaint.evaluate import attack
from overpaint.probes import Probe, questions
from overpaint.probes.evaluation_sets import Case, EvaluationSet

LABELS = {"style": ("noto", "blob", "emoji"), "object": ("cat", "dog", "fish")}
PROBE = Probe("a", "style", "a cat in noto style", "noto style", "noto")
NUMBERS = np.random.default_rng(0).normal(size=(12, 3))
CASES = EvaluationSet("mine", "csv", "cat", "dog", (Case("a cat", "target", "cat", "dog"),))
FEW = {"contexts": 4, "background": 4, "vocabulary": ["fox"]}


def drawing(seed):
    return trace.Drawing(steps=1, seeds=(seed,))


CALLS = {
    "generate": lambda x, s: x.model.generate("a cat", seed=s, steps=1),
    "generate one each": lambda x, s: x.model.generate(["a cat", "a dog"], seed=[0, s], steps=1),
    "latents": lambda x, s: x.model.initial_latents([s]),
    "drawing": lambda x, s: drawing(s),
    "probe": lambda x, s: trace.text_encoder(x.model, [replace(PROBE, seed=s)], scorer=lambda i, p: [0.5]),
    "auto": lambda x, s: op.edit.auto(x.model, {"cat": "dog"}, seed=s, **FEW),
    "random site": lambda x, s: op.edit.random_site(x.model, {"cat": "dog"}, seed=s),
    "finetune": lambda x, s: op.edit.finetune(x.model, {"cat": "dog"}, seed=s, steps=1, picture_steps=1, pictures=1),
    "frames": lambda x, s: vocabulary.frames(["a"], size=2, seed=s),
    "measure": lambda x, s: evaluate.measure(x.model, x.change, CASES, scorer=x.scorer, seed=s),
    "case": lambda x, s: evaluate.measure(
        x.model, x.change, replace(CASES, cases=(replace(CASES.cases[0], seed=s),)), scorer=x.scorer
    ),
    "compare": lambda x, s: evaluate.compare(x.model, {"a": None}, erase="noto style", scorer=x.scorer, seed=s),
    "attack": lambda x, s: attack.search(x.model, x.change, CASES, scorer=x.scorer, seed=s),
    "questions": lambda x, s: questions.build("style", "noto", labels=LABELS, size=2, seed=s),
    "preserve": lambda x, s: questions.preserve_prompts("style", "noto", labels=LABELS, size=2, seed=s),
    "bootstrap": lambda x, s: metrics.bootstrap([0, 1], seed=s),
    "share": lambda x, s: metrics.share([0, 1], seed=s),
    "kid": lambda x, s: metrics.kid(NUMBERS, NUMBERS + 1, seed=s),
    "kid test": lambda x, s: metrics.kid_test(NUMBERS, NUMBERS + 1, seed=s),
    "match": lambda x, s: match.dense(torch.rand(3, 40, 40), torch.rand(3, 40, 40), seed=s),
    "demo": lambda x, s: demo.run(x.model, x.out, seed=s),
}  # fmt: skip


@pytest.fixture
def inputs(tiny_sd1, quickfix_change, tmp_path, judge):
    return SimpleNamespace(
        model=tiny_sd1, change=quickfix_change, scorer=judge, out=tmp_path / "out"
    )


@pytest.mark.parametrize("seed", [-1, 10**20, 1.5, "3"], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_seed_out_of_range_is_refused_with_one_message(inputs, name, seed):
    message = rf"`\w+` must be an integer from 0 to 2\*\*63 - 1, got {re.escape(repr(seed))}\."
    with pytest.raises(ValueError, match=message):
        CALLS[name](inputs, seed)
    assert not inputs.out.exists()


@pytest.mark.parametrize("seed", [LARGEST_SEED, np.int64(3)], ids=["largest", "numpy"])
@pytest.mark.parametrize(
    "name",
    ["generate", "latents", "drawing", "random site", "finetune", "frames", "questions", "share"],
)
def test_every_seed_in_range_is_accepted(inputs, name, seed):
    CALLS[name](inputs, seed)


def test_seeds_are_counted_up_within_the_range():
    assert later_seed(LARGEST_SEED - 1, 1) == LARGEST_SEED
    assert later_seed(LARGEST_SEED, 3) == 2
    rows = questions.build("style", "noto", labels=LABELS, size=4, seed=LARGEST_SEED)
    assert {check_seed(row.seed) for row in rows} == {LARGEST_SEED, 0, 1, 2}


def test_the_largest_seed_draws_what_torch_draws(tiny_sd1):
    generator = torch.Generator().manual_seed(2**63 - 1)
    latents = tiny_sd1.initial_latents([LARGEST_SEED])
    assert torch.equal(latents[0], torch.randn(latents.shape[1:], generator=generator))
