"""Which states are causal: threshold, significance and controls, on tables whose truth is known."""

import json
import random

import numpy as np
import pytest
from scipy import stats

from overpaint.metrics import bootstrap
from overpaint.trace import Effects

LAYERS = 6
STRONG, WEAK = 2, 4  # the state that brings most of the concept back, and one that brings a little


def made(prompts=30, seeds=1, *, strength=0.7, weak=0.1, spread=0.05, salt=0):
    """Rows of `prompts` x `seeds` runs of six layers, clean about 0.9 and corrupted about 0.1."""
    draw = random.Random(salt)
    rows = []
    for prompt in range(prompts):
        ease = draw.gauss(0, spread)
        for seed in range(seeds):
            clean, corrupted = 0.9 + draw.gauss(0, 0.02), 0.1 + draw.gauss(0, 0.02)
            for layer in range(LAYERS):
                effect = draw.gauss(0, spread) + {STRONG: strength, WEAK: weak}.get(layer, 0)
                effect += ease if layer == STRONG else 0
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
    return Effects.of(made(), {"steps": 3})


def test_the_split_is_by_prompt_and_does_not_depend_on_order(effects):
    validation, rest = effects.split()
    names = [set(part.table["probe"].to_pylist()) for part in (validation, rest)]
    assert [len(n) for n in names] == [10, 20]
    assert not names[0] & names[1]
    assert len(validation) + len(rest) == len(effects)
    shuffled = made()
    random.Random(3).shuffle(shuffled)
    again = Effects.of(shuffled, {}).split()[0]
    assert set(again.table["probe"].to_pylist()) == names[0]
    assert validation.protocol == {"steps": 3, "part": "validation", "part_prompts": 10}


@pytest.mark.parametrize(("prompts", "count"), [(2, 1), (3, 1), (8, 2), (19, 6), (20, 10)])
def test_few_prompts_give_a_third_of_them_to_validation(prompts, count):
    parts = Effects.of(made(prompts), {}).split()
    assert [p.protocol["part_prompts"] for p in parts] == [count, prompts - count]


def test_a_prompt_stays_on_its_side_whatever_was_traced(effects):
    fewer = Effects.of([r for r in made() if r["index"] < 2], {})
    sides = [set(e.split()[0].table["probe"].to_pylist()) for e in (effects, fewer)]
    assert sides[0] == sides[1]


def test_what_cannot_be_split_is_refused(effects):
    with pytest.raises(ValueError, match="cannot split 1 prompt: trace at least two, or give"):
        Effects.of(made(1), {}).split()
    with pytest.raises(ValueError, match="`validation` must be at least 1 prompt, got 0"):
        effects.split(0)


def test_the_known_state_is_causal_and_the_weak_one_only_significant(effects):
    table = effects.summary().to_pylist()
    assert [r["site"] for r in table if r["causal"]] == [f"text.{STRONG}.mlp"]
    weak = table[WEAK]
    assert weak["p_holm"] < 0.05
    assert weak["score"] < 0.5
    assert all(r["p_holm"] > 0.05 for i, r in enumerate(table) if i not in (STRONG, WEAK))
    assert [site.index for site in effects.causal()] == [STRONG]


def test_threshold_of_the_validation_prompts_statistics_of_the_others(effects):
    validation, rest = effects.split()
    verdict = effects.test()
    assert verdict.protocol["threshold"] == validation.half_gap() != rest.half_gap()
    assert verdict.protocol["threshold_from"] == "half-gap of 10 validation prompts"
    assert verdict.protocol["part"] == "test"
    assert verdict.protocol["prompts_tested"] == 20
    assert json.loads(json.dumps(verdict.protocol)) == verdict.protocol
    means = rest.mean().to_pylist()
    for mine, theirs in zip(verdict.table.to_pylist(), means, strict=True):
        assert {k: mine[k] for k in theirs} == theirs
        assert mine["prompts"] == 20


def test_p_values_are_of_the_prompts_means_and_corrected_for_the_states():
    effects = Effects.of(made(8, seeds=3), {})
    table = effects.test(threshold=0.5).table.to_pylist()
    p = [r["p"] for r in table]
    for layer in (STRONG, 0):
        rows = [r for r in made(8, seeds=3) if r["index"] == layer]
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
        found = [causal(threshold=t / 20, alpha=alpha) for t in range(21)]
        assert all(after <= before for before, after in zip(found, found[1:], strict=False))
    for threshold in (0.05, 0.15, 0.5):
        assert causal(threshold=threshold, alpha=0.01) <= causal(threshold=threshold, alpha=1)
    assert causal(threshold=0.0, alpha=1) == {f"text.{n}.mlp" for n in range(LAYERS)}


def test_the_order_of_rows_changes_nothing(effects):
    shuffled = made()
    random.Random(1).shuffle(shuffled)
    tables = [sorted(e.summary().to_pylist(), key=lambda r: r["site"])
              for e in (effects, Effects.of(shuffled, {}))]  # fmt: skip
    assert tables[0] == tables[1]


def test_where_nothing_is_known_nothing_is_found():
    found = [
        len(Effects.of(made(16, strength=0, weak=0, salt=s), {}).causal(0.0)) > 0 for s in range(60)
    ]
    assert sum(found) <= 8  # 3 expected at alpha 0.05; 9 or more has probability 0.002


def test_untrained_and_other_words_stand_beside_each_state_paired_over_prompts():
    draw = random.Random(0)
    ease = {f"probe-{n}": draw.gauss(0, 1) for n in range(30)}
    rows = [
        {**r, "embed_recovery": 0.5 + ease[r["probe"]] if r["index"] == STRONG else 0.0}
        for r in made()
    ]
    rows += [control(probe, STRONG, "untrained", 0.2 + e) for probe, e in ease.items()]
    rows += [control(probe, STRONG, "other span", 0.1) for probe in ease]
    verdict = Effects.of(rows, {}).test()
    strong, other = verdict.table.to_pylist()[STRONG], verdict.table.to_pylist()[0]
    assert strong["trained_minus_untrained"] == pytest.approx(0.3)
    assert strong["trained_minus_untrained_low"] == pytest.approx(0.3)
    assert strong["trained_minus_untrained_high"] == pytest.approx(0.3)
    tested = set(Effects.of(rows, {}).split()[1].table["probe"].to_pylist())
    assert strong["untrained"] == pytest.approx(0.2 + np.mean([ease[p] for p in tested]))
    assert strong["other_span"] == pytest.approx(0.1)
    assert other["untrained"] is None
    assert other["trained_minus_untrained"] is None
    assert verdict.protocol["controls"] == {
        "untrained": "embed_recovery", "other_span": "embed_recovery",
    }  # fmt: skip


def test_a_control_with_pictures_is_compared_on_pictures():
    rows = made()
    rows += [
        {**control(f"probe-{n}", STRONG, "other span", 0.4), "indirect_effect": 0.01}
        for n in range(30)
    ]
    verdict = Effects.of(rows, {}).test()
    assert verdict.protocol["controls"] == {"other_span": "indirect_effect"}
    assert verdict.table.to_pylist()[STRONG]["other_span"] == pytest.approx(0.01)


def test_corrupting_instead_of_restoring_is_held_to_the_mirrored_threshold():
    rows = made()
    for r in rows:
        r["score_restored"] = r["score_clean"] - r["indirect_effect"]
        r["direction"] = "corrupt"
    mirrored = Effects.of(rows, {})
    assert [site.index for site in mirrored.causal()] == [STRONG]
    assert mirrored.summary().to_pylist() == Effects.of(made(), {}).summary().to_pylist()


def test_without_pictures_there_is_significance_but_no_threshold():
    keys = ("score_clean", "score_corrupted", "score_restored", "indirect_effect")
    bare = Effects.of([{k: v for k, v in r.items() if k not in keys} for r in made()], {})
    verdict = bare.test()
    assert {r["causal"] for r in verdict.table.to_pylist()} == {None}
    assert verdict.table.to_pylist()[STRONG]["p_holm"] < 0.05
    assert verdict.protocol["threshold"] is None
    assert verdict.protocol["prompts_tested"] == 30
    with pytest.raises(ValueError, match="hold no scores: trace again with `generate=True`"):
        bare.causal()


def test_alpha_out_of_range(effects):
    for alpha in (0, 1.5):
        with pytest.raises(ValueError, match="`alpha` must lie above 0 and be at most 1, got"):
            effects.test(alpha=alpha)


def test_agreement_of_two_traces_over_what_they_share():
    first = Effects.of(made(salt=1), {})
    second = Effects.of([r for r in made(20, salt=2) if r["index"] != 5], {})
    found = first.agreement(second)
    names = {f"probe-{n}" for n in range(20)}
    means = [
        [bootstrap([r["indirect_effect"] for r in made(count, salt=salt)
                    if r["index"] == layer and r["probe"] in names]).mean for layer in range(5)]
        for count, salt in ((30, 1), (20, 2))
    ]  # fmt: skip
    assert found.mean == pytest.approx(stats.spearmanr(*means).statistic)
    assert found.n == 5
    assert found.low <= found.mean <= found.high
    same = first.agreement(first, other_value="embed_recovery")
    assert (same.mean, same.low, same.high, same.n) == pytest.approx((1, 1, 1, 6))


def test_maps_that_share_nothing_cannot_agree(effects):
    other = Effects.of([{**r, "probe": "else"} for r in made(1)], {})
    with pytest.raises(ValueError, match="share 0 prompts and 6 states, too few to compare"):
        effects.agreement(other)


def test_after_screening_the_correction_is_for_all_states_that_could_have_been_chosen():
    tested = Effects.of(made(8, seeds=1), {}).test(threshold=0.5)
    note = {"screen": {"states": 60, "drawn": LAYERS}}
    screened = Effects.of(made(8, seeds=1), note).test(threshold=0.5)
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
    rows = [r for r in made(6, seeds=3) if r["probe"] == "probe-0" or r["seed"] == 0]
    effects = Effects.of(rows, {})
    strong = [r for r in rows if r["index"] == STRONG]
    by_prompt = {
        name: [r for r in strong if r["probe"] == name] for name in {r["probe"] for r in strong}
    }
    means = [np.mean([r["indirect_effect"] for r in found]) for found in by_prompt.values()]
    found = effects.test(threshold=0.5).table.to_pylist()[STRONG]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert (found["n"], found["prompts"]) == (8, 6)
    assert effects.mean().to_pylist()[STRONG]["mean"] == found["mean"]
    ends = [
        np.mean([(r["score_clean"] + r["score_corrupted"]) / 2 for r in found])
        for found in by_prompt.values()
    ]
    assert effects.half_gap() == pytest.approx(np.mean(ends))


def test_a_score_is_not_tested_against_zero(effects):
    with pytest.raises(
        ValueError, match="`score_restored` cannot be tested against zero, .*: test"
    ):
        effects.test("score_restored")
