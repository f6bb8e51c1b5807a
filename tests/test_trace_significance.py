"""Causal states: threshold, significance and controls, on tables with known effects."""

import json
import random

import numpy as np
import pytest
from scipy import stats

from overpaint.metrics import bootstrap
from overpaint.trace import Effects

LAYERS = 6
STRONG, WEAK = 2, 4  # the state that restores most of the concept, and one that restores a little


def trace_rows(prompts=30, seeds=1, *, strength=0.7, weak=0.1, spread=0.05, salt=0):
    """Rows of `prompts` x `seeds` runs of six layers, clean about 0.9 and corrupted about 0.1."""
    draw = random.Random(salt)
    rows = []
    for prompt in range(prompts):
        offset = draw.gauss(0, spread)
        for seed in range(seeds):
            clean, corrupted = 0.9 + draw.gauss(0, 0.02), 0.1 + draw.gauss(0, 0.02)
            for layer in range(LAYERS):
                effect = draw.gauss(0, spread) + {STRONG: strength, WEAK: weak}.get(layer, 0)
                effect += offset if layer == STRONG else 0
                rows.append(row(f"probe-{prompt}", layer, seed, clean, corrupted, effect))
    return rows


def row(probe, layer, seed, clean, corrupted, effect, control="", embed=None):
    scores = {
        "score_clean": clean, "score_corrupted": corrupted, "score_restored": corrupted + effect,
        "indirect_effect": effect,
    }  # fmt: skip
    return {
        "site": f"text.{layer}.mlp", "part": "text", "kind": "mlp", "index": layer, "noise": 0,
        "path": f"layers.{layer}.mlp", "role": "last_subject", "control": control, "seed": seed,
        "probe": probe, "embed_recovery": effect / 2 if embed is None else embed,
        **({} if control else scores),
    }  # fmt: skip


def control(probe, layer, name, embed):
    return row(probe, layer, None, 0, 0, 0, name, embed)


@pytest.fixture
def effects():
    return Effects.of(trace_rows(), {"steps": 3})


def test_the_split_is_by_prompt_and_independent_of_the_order(effects):
    validation, rest = effects.split()
    names = [set(part.table["probe"].to_pylist()) for part in (validation, rest)]
    assert [len(n) for n in names] == [10, 20]
    assert not names[0] & names[1]
    assert len(validation) + len(rest) == len(effects)
    shuffled = trace_rows()
    random.Random(3).shuffle(shuffled)
    again = Effects.of(shuffled, {}).split()[0]
    assert set(again.table["probe"].to_pylist()) == names[0]
    assert validation.protocol == {"steps": 3, "part": "validation", "part_prompts": 10}


@pytest.mark.parametrize(("prompts", "count"), [(2, 1), (3, 1), (8, 2), (19, 6), (20, 10)])
def test_a_third_of_few_prompts_is_for_validation(prompts, count):
    parts = Effects.of(trace_rows(prompts), {}).split()
    assert [p.protocol["part_prompts"] for p in parts] == [count, prompts - count]


def test_the_split_does_not_depend_on_the_traced_states(effects):
    fewer = Effects.of([r for r in trace_rows() if r["index"] < 2], {})
    sides = [set(e.split()[0].table["probe"].to_pylist()) for e in (effects, fewer)]
    assert sides[0] == sides[1]


def test_too_few_prompts_for_a_split_are_refused(effects):
    with pytest.raises(ValueError, match="cannot split 1 prompt: trace at least two, or give"):
        Effects.of(trace_rows(1), {}).split()
    with pytest.raises(ValueError, match="`validation` must be at least 1 prompt, got 0"):
        effects.split(0)


def test_the_strong_state_is_causal_and_the_weak_one_only_significant(effects):
    table = effects.summary().to_pylist()
    assert [r["site"] for r in table if r["causal"]] == [f"text.{STRONG}.mlp"]
    weak = table[WEAK]
    assert weak["p_holm"] < 0.05
    assert weak["score"] < 0.5
    assert all(r["p_holm"] > 0.05 for i, r in enumerate(table) if i not in (STRONG, WEAK))
    assert [site.index for site in effects.causal()] == [STRONG]


def test_the_threshold_is_from_the_validation_prompts_and_statistics_from_the_others(effects):
    validation, rest = effects.split()
    test = effects.test()
    assert test.protocol["threshold"] == validation.half_gap() != rest.half_gap()
    assert test.protocol["threshold_from"] == "half-gap of 10 validation prompts"
    assert test.protocol["part"] == "test"
    assert test.protocol["prompts_tested"] == 20
    assert json.loads(json.dumps(test.protocol)) == test.protocol
    means = rest.mean().to_pylist()
    for row, mean in zip(test.table.to_pylist(), means, strict=True):
        assert {k: row[k] for k in mean} == mean
        assert row["prompts"] == 20


def test_p_values_are_of_prompt_means_and_corrected_for_the_states():
    effects = Effects.of(trace_rows(8, seeds=3), {})
    table = effects.test(threshold=0.5).table.to_pylist()
    p = [r["p"] for r in table]
    for layer in (STRONG, 0):
        rows = [r for r in trace_rows(8, seeds=3) if r["index"] == layer]
        names = sorted({r["probe"] for r in rows})
        means = [np.mean([r["indirect_effect"] for r in rows if r["probe"] == n]) for n in names]
        exact = stats.permutation_test(
            (means,), lambda x, axis: x.mean(axis), permutation_type="samples",
            alternative="greater", n_resamples=np.inf, vectorized=True,
        ).pvalue  # fmt: skip
        assert p[layer] == pytest.approx(exact)
    assert p[STRONG] == 1 / 256
    assert table[STRONG]["p_holm"] == pytest.approx(6 / 256)
    assert [r["n"] for r in table] == [24] * LAYERS
    assert effects.test(threshold=0.5).protocol["smallest_p"] == 1 / 256


def test_a_higher_threshold_or_a_smaller_alpha_never_adds_states(effects):
    def causal(**settings):
        table = effects.test(**settings).table.to_pylist()
        return {r["site"] for r in table if r["causal"]}

    for alpha in (0.01, 0.05, 1):
        sets = [causal(threshold=t / 20, alpha=alpha) for t in range(0, 21, 2)]
        assert all(after <= before for before, after in zip(sets, sets[1:], strict=False))
    for threshold in (0.05, 0.15, 0.5):
        assert causal(threshold=threshold, alpha=0.01) <= causal(threshold=threshold, alpha=1)
    assert causal(threshold=0.0, alpha=1) == {f"text.{n}.mlp" for n in range(LAYERS)}


def test_the_order_of_rows_changes_nothing(effects):
    shuffled = trace_rows()
    random.Random(1).shuffle(shuffled)
    tables = [sorted(e.summary().to_pylist(), key=lambda r: r["site"])
              for e in (effects, Effects.of(shuffled, {}))]  # fmt: skip
    assert tables[0] == tables[1]


def test_without_effects_few_states_are_causal():
    positives = [
        len(Effects.of(trace_rows(16, strength=0, weak=0, salt=s), {}).causal(0.0)) > 0
        for s in range(60)
    ]
    assert sum(positives) <= 8  # 3 expected at alpha 0.05; 9 or more has probability 0.002


def test_controls_are_in_the_table_paired_over_prompts():
    draw = random.Random(0)
    offset = {f"probe-{n}": draw.gauss(0, 1) for n in range(30)}
    rows = [
        {**r, "embed_recovery": 0.5 + offset[r["probe"]] if r["index"] == STRONG else 0.0}
        for r in trace_rows()
    ]
    rows += [control(probe, STRONG, "untrained", 0.2 + e) for probe, e in offset.items()]
    rows += [control(probe, STRONG, "other span", 0.1) for probe in offset]
    test = Effects.of(rows, {}).test()
    strong, other = test.table.to_pylist()[STRONG], test.table.to_pylist()[0]
    assert strong["trained_minus_untrained"] == pytest.approx(0.3)
    assert strong["trained_minus_untrained_low"] == pytest.approx(0.3)
    assert strong["trained_minus_untrained_high"] == pytest.approx(0.3)
    tested = set(Effects.of(rows, {}).split()[1].table["probe"].to_pylist())
    assert strong["untrained"] == pytest.approx(0.2 + np.mean([offset[p] for p in tested]))
    assert strong["other_span"] == pytest.approx(0.1)
    assert other["untrained"] is None
    assert other["trained_minus_untrained"] is None
    assert test.protocol["controls"] == {
        "untrained": "embed_recovery", "other_span": "embed_recovery",
    }  # fmt: skip


def test_a_control_with_pictures_is_compared_on_pictures():
    rows = trace_rows()
    rows += [
        {**control(f"probe-{n}", STRONG, "other span", 0.4), "indirect_effect": 0.01}
        for n in range(30)
    ]
    test = Effects.of(rows, {}).test()
    assert test.protocol["controls"] == {"other_span": "indirect_effect"}
    assert test.table.to_pylist()[STRONG]["other_span"] == pytest.approx(0.01)


def test_corrupting_instead_of_restoring_has_the_mirrored_threshold():
    rows = trace_rows()
    for r in rows:
        r["score_restored"] = r["score_clean"] - r["indirect_effect"]
        r["direction"] = "corrupt"
    mirrored = Effects.of(rows, {})
    assert [site.index for site in mirrored.causal()] == [STRONG]
    assert mirrored.summary().to_pylist() == Effects.of(trace_rows(), {}).summary().to_pylist()


def test_without_pictures_there_are_p_values_but_no_threshold():
    keys = ("score_clean", "score_corrupted", "score_restored", "indirect_effect")
    bare = Effects.of([{k: v for k, v in r.items() if k not in keys} for r in trace_rows()], {})
    test = bare.test()
    assert {r["causal"] for r in test.table.to_pylist()} == {None}
    assert test.table.to_pylist()[STRONG]["p_holm"] < 0.05
    assert test.protocol["threshold"] is None
    assert test.protocol["prompts_tested"] == 30
    with pytest.raises(ValueError, match="hold no scores: trace again with `generate=True`"):
        bare.causal()


def test_alpha_out_of_range_is_refused(effects):
    for alpha in (0, 1.5):
        with pytest.raises(ValueError, match="`alpha` must lie above 0 and be at most 1, got"):
            effects.test(alpha=alpha)


def test_agreement_is_over_the_shared_prompts_and_states():
    first = Effects.of(trace_rows(salt=1), {})
    second = Effects.of([r for r in trace_rows(20, salt=2) if r["index"] != 5], {})
    interval = first.agreement(second)
    names = {f"probe-{n}" for n in range(20)}
    means = [
        [bootstrap([r["indirect_effect"] for r in trace_rows(count, salt=salt)
                    if r["index"] == layer and r["probe"] in names]).mean for layer in range(5)]
        for count, salt in ((30, 1), (20, 2))
    ]  # fmt: skip
    assert interval.mean == pytest.approx(stats.spearmanr(*means).statistic)
    assert interval.n == 5
    assert interval.low <= interval.mean <= interval.high
    same = first.agreement(first, other_value="embed_recovery")
    assert (same.mean, same.low, same.high, same.n) == pytest.approx((1, 1, 1, 6))


def test_agreement_of_maps_that_share_no_prompt_is_refused(effects):
    other = Effects.of([{**r, "probe": "else"} for r in trace_rows(1)], {})
    with pytest.raises(ValueError, match="share 0 prompts and 6 states, too few to compare"):
        effects.agreement(other)


def test_after_screening_the_correction_counts_all_screened_states():
    tested = Effects.of(trace_rows(8, seeds=1), {}).test(threshold=0.5)
    note = {"screen": {"states": 60, "drawn": LAYERS}}
    screened = Effects.of(trace_rows(8, seeds=1), note).test(threshold=0.5)
    plain, corrected = (v.table.to_pylist() for v in (tested, screened))
    assert plain[STRONG]["p_holm"] == pytest.approx(6 / 256)
    assert corrected[STRONG]["p_holm"] == pytest.approx(60 / 256)
    assert (plain[STRONG]["causal"], corrected[STRONG]["causal"]) == (True, False)
    assert tested.protocol["family"] == 6
    assert tested.reason == ""
    assert screened.protocol["family"] == 60
    assert screened.reason == "so few prompts (8) cannot show that any of 60 states is causal"


def test_prompts_weigh_the_same_in_mean_p_and_threshold():
    """One prompt has three seeds and the others one: rows of the first must not count threefold."""
    rows = [r for r in trace_rows(6, seeds=3) if r["probe"] == "probe-0" or r["seed"] == 0]
    effects = Effects.of(rows, {})
    strong = [r for r in rows if r["index"] == STRONG]
    by_prompt = {
        name: [r for r in strong if r["probe"] == name] for name in {r["probe"] for r in strong}
    }
    means = [np.mean([r["indirect_effect"] for r in runs]) for runs in by_prompt.values()]
    state = effects.test(threshold=0.5).table.to_pylist()[STRONG]
    assert state["mean"] == pytest.approx(np.mean(means))
    assert (state["n"], state["prompts"]) == (8, 6)
    assert effects.mean().to_pylist()[STRONG]["mean"] == state["mean"]
    ends = [
        np.mean([(r["score_clean"] + r["score_corrupted"]) / 2 for r in runs])
        for runs in by_prompt.values()
    ]
    assert effects.half_gap() == pytest.approx(np.mean(ends))


def test_a_score_cannot_be_tested_against_zero(effects):
    with pytest.raises(
        ValueError, match="`score_restored` cannot be tested against zero, .*: test"
    ):
        effects.test("score_restored")
