"""Digests of weights and scorers."""

import torch
from trace_inputs import brightness

import overpaint as op
from overpaint.scorers import judge as judges
from overpaint.scorers.protocols import scorer_name
from overpaint.trace import provenance
from overpaint.zoo import builders


def test_a_digest_covers_every_weight_of_a_model_and_of_a_judge(tiny_sd1):
    model = op.load(builders.tiny())
    assert provenance.fingerprint(model) == provenance.fingerprint(tiny_sd1)
    table = model.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[700, 5] += 1e-3
    assert provenance.fingerprint(model) != provenance.fingerprint(tiny_sd1)
    judge = judges.load()
    before = provenance.scorer_digest(judge.score)
    assert before == provenance.scorer_digest(judges.load().score)
    with torch.no_grad():
        next(iter(judge._heads.values()))[0] += 1e-3
    assert provenance.scorer_digest(judge.score) != before
    assert provenance.scorer_digest(brightness) is None
    assert scorer_name(judge.score) == "icons-judge"
