"""How far an edited concept itself moves: the figure by hand for every method, and the warning where it hardly does."""

import dataclasses

import pytest
import torch

from overpaint import edit
from overpaint.edit.captions import align_captions, layer_inputs
from overpaint.edit.drift import concept_movement
from overpaint.edit.verdict import CONCEPT_LIMIT, describe, warnings
from overpaint.edit.weights import find_weight
from overpaint.model.token_spans import find_span

PAIRS = {"van gogh": "painting", "snoopy": ""}
BARE = {"frames": ("",)}
CROSS_ATTENTION = {
    "uce": (edit.uce, {"ridge": 20.0}),
    "dp": (edit.dp, {"ridge": 20.0}),
    "loco": (edit.loco, {"ridge": 20.0}),
    "speed": (edit.speed, {"empty_tokens": 1, "ridge": 20.0}),
    "oce": (edit.oce, {"captions": ["a cat on a tree", "a dog"]}),
    "finetune": (edit.finetune, {"steps": 2, "lr": 1e-2, "pictures": 1, "picture_steps": 1}),
}
QUICK_AUTO = {
    "contexts": 8, "background": 8, "vocabulary": ["monet", "a dog"], "collateral": False, "repair": False,
}  # fmt: skip
# settings with which the edited concept stays where it is
WEAK = {
    "quickfix": (edit.quickfix, {"ridge": 1e6}),
    "random_site": (edit.random_site, {"ridge": 1e6}),
    "auto": (edit.auto, {"ridge": 1e6, **QUICK_AUTO}),
    "uce": (edit.uce, {"ridge": 1e6}),
    "dp": (edit.dp, {"ridge": 1e6}),
    "loco": (edit.loco, {"ridge": 1e6}),
    "time": (edit.time, {"ridge": 1e6}),
    "speed": (edit.speed, {"ridge": 1e6, "empty_tokens": 2}),
    "oce": (edit.oce, {"ridge": 1e6, "captions": ()}),
    "hirm": (edit.hirm, {"steps": 1, "lr": 1e-9}),
    "finetune": (edit.finetune, {"steps": 1, "lr": 1e-9, "pictures": 1, "picture_steps": 1}),
}
STRONG = {
    "quickfix": (edit.quickfix, {}),
    "auto": (edit.auto, QUICK_AUTO),
    "uce": (edit.uce, {}),
    "dp": (edit.dp, {}),
    "loco": (edit.loco, {}),
    "time": (edit.time, {}),
    "speed": (edit.speed, {"empty_tokens": 2}),
    "oce": (edit.oce, {"captions": ()}),
    "hirm": (edit.hirm, {"steps": 15, "lr": 1e-3}),
    "swap_embedding": (edit.swap_embedding, {}),
}
WORDS = (
    "cat", "dog", "tree", "house", "apple", "fish", "car", "bird", "robot", "rocket", "flag", "boat", "bear", "fox",
    "owl", "star", "moon", "sun",
)  # fmt: skip
LONG = [f"{first} {second}" for first in WORDS for second in WORDS[:5]]


def hardly(change):
    return [text for text in warnings(change) if " hardly move" in text]


def test_shares_by_hand():
    moved, requested = torch.tensor([9.0, 0.0, 1.0]), torch.tensor([9.0, 16.0, 4.0])
    assert concept_movement(moved, requested, (0, 0, 1), ["a", "b"]) == {"a": 0.6, "b": 0.5}
    none = concept_movement(moved, torch.tensor([0.0, 0.0, 1.0]), (0, 0, 1), ["a", "b", "c"])
    assert none == {"b": 1.0}  # of "a" and "c" no movement was requested


@pytest.mark.parametrize("name", CROSS_ATTENTION)
def test_in_cross_attention_it_is_the_movement_at_the_last_token(tiny_sd1, name):
    method, settings = CROSS_ATTENTION[name]
    change = method(tiny_sd1, PAIRS, **BARE, layers=[2, 9], **settings)

    def feature(text):
        place = find_span(tiny_sd1.tokenizer, text, text).last if text else 0
        return tiny_sd1.encode([text])[0, place].double()

    for old, new in PAIRS.items():
        moved = requested = 0.0
        for m in change.movements:
            weight = find_weight(tiny_sd1, m.site).parameter.detach().double()
            moved += float((m.delta @ feature(old)).square().sum())
            requested += float((weight @ (feature(new) - feature(old))).square().sum())
        expected = (moved / requested) ** 0.5
        assert change.report["concept_movement"][old] == pytest.approx(expected, rel=1e-3)
    assert change.report["concept_movement"].keys() == PAIRS.keys()


@pytest.mark.parametrize("preserve_weight", [0.0, 3.0])
def test_in_the_text_encoder_it_is_the_movement_of_the_layers_outputs(tiny_sd1, preserve_weight):
    change = edit.quickfix(
        tiny_sd1, PAIRS, **BARE, positions="last_subject", ridge=1.0, preserve=["monet"],
        preserve_weight=preserve_weight,
    )  # fmt: skip
    weight = find_weight(tiny_sd1, change.site).parameter.detach().double()
    for pair in align_captions(tiny_sd1, PAIRS, ("",), "last_subject"):
        ids = torch.stack([pair.old.ids, pair.new.ids])
        old, new = layer_inputs(tiny_sd1, change.site, ids).double()
        ((a, b),) = pair.positions
        expected = (change.delta @ old[a]).norm() / (weight @ (new[b] - old[a])).norm()
        share = change.report["concept_movement"][pair.names[0]]
        assert share == pytest.approx(float(expected), rel=1e-5)


def test_hirm_measures_the_states_that_it_trains(tiny_sd1):
    change = edit.hirm(tiny_sd1, {"van gogh": "painting"}, steps=3, lr=1e-3)
    pair = align_captions(tiny_sd1, {"van gogh": "painting"}, ("",), "subject_to_end")[0]
    layers = [m for m in tiny_sd1.text_encoder.modules() if hasattr(m, "self_attn")]
    from overpaint.model.hooks import record

    def states(ids):
        with torch.no_grad(), record([layers[-1]]) as (outputs,):
            tiny_sd1.text_encoder(ids[None])
        return outputs[0][0].double()

    old, new = states(pair.old.ids), states(pair.new.ids)
    places = [dict(pair.positions).get(p, p) for p in range(len(old))]
    with change.applied(tiny_sd1):
        moved = states(pair.old.ids) - old
    expected = float(moved.norm() / (new[places] - old).norm())
    assert change.report["concept_movement"]["van gogh"] == pytest.approx(expected, rel=1e-3)


def test_token_rows_count_those_that_stay(tiny_sd1):
    whole = edit.swap_embedding(tiny_sd1, {"van gogh": "claude monet"})
    assert whole.report["concept_movement"] == {"van gogh": 1.0}
    renamed = edit.rename(
        tiny_sd1, {"openmoji style": "noto style"}, any_token=True, collateral=False
    )
    assert renamed.report["concept_movement"] == {"openmoji style": 1.0}


def test_a_renamed_part_of_a_concept_is_a_part_of_its_movement(real_vocabulary):
    import overpaint

    model = overpaint.load(real_vocabulary("sd1"))
    renamed = edit.rename(model, {"red wizkid": "green dog"}, collateral=False)
    assert renamed.report["unmoved"] == {"red wizkid": {"red</w>": "a frequent word"}}
    share = renamed.report["concept_movement"]["red wizkid"]
    table = model.text_encoder.get_input_embeddings().weight.detach().double()
    ids = model.tokenizer("red wizkid green dog", add_special_tokens=False).input_ids
    red, wizkid, green, dog = table[ids]
    first, second = (red - green).square().sum(), (wizkid - dog).square().sum()
    assert share == pytest.approx(float((second / (first + second)).sqrt()), rel=1e-6)


@pytest.mark.parametrize("name", WEAK)
def test_every_method_warns_of_a_concept_that_hardly_moves(tiny_sd1, name):
    method, settings = WEAK[name]
    change = method(tiny_sd1, PAIRS, **settings)
    (text,) = hardly(change)
    assert text.startswith("Warning: 'van gogh', 'snoopy' hardly move, by ")
    assert "of the way to the replacement" in text and "preserve fewer prompts" in text
    assert text in describe(change)


@pytest.mark.parametrize("name", STRONG)
def test_no_method_warns_where_the_concept_moves(tiny_sd1, name):
    method, settings = STRONG[name]
    change = method(tiny_sd1, {"van gogh": "painting"}, **settings)
    assert not hardly(change), change.report["concept_movement"]


def test_oce_at_its_default_weight_warns_of_a_long_preserve_list(tiny_sd1):
    few, many = (
        edit.oce(tiny_sd1, {"van gogh": "painting"}, preserve=names, captions=(), layers=[1])
        for names in (LONG[:1], LONG)
    )
    assert not hardly(few)
    assert many.report["concept_movement"]["van gogh"] < CONCEPT_LIMIT and len(hardly(many)) == 1


def test_only_the_concept_that_hardly_moves_is_named_and_strength_counts(quickfix_change):
    shares = {"a cat": 0.02, "a dog": 0.5, "fox": 0.0}
    change = dataclasses.replace(quickfix_change, report={"concept_movement": shares})
    (text,) = hardly(change)
    assert text.startswith("Warning: 'a cat', 'fox' hardly move, by 2.0 % of the way")
    (text,) = hardly(0.1 * change)
    assert text.startswith("Warning: 'a cat', 'a dog', 'fox' hardly move, by 5.0 % of the way")
    (text,) = hardly(10 * change)
    assert text.startswith("Warning: 'fox' hardly moves, by 0.0 % of the way")


def test_a_sum_and_a_part_of_it_are_measured_again(tiny_sd1):
    first, second = (edit.uce(tiny_sd1, {old: new}) for old, new in PAIRS.items())
    joint, total = edit.uce(tiny_sd1, PAIRS), first + second
    for old in PAIRS:
        assert total.report["concept_movement"][old] == pytest.approx(
            joint.report["concept_movement"][old], rel=1e-4
        )
    alone = total.without("snoopy").report["concept_movement"]
    assert alone == pytest.approx(first.report["concept_movement"], rel=1e-4)
    mixed = (0.25 * first + second).report["concept_movement"]
    assert mixed["van gogh"] < 0.3 < 0.8 * mixed["snoopy"]


def test_a_compact_change_reports_the_movement_that_is_left(tiny_sd1):
    pairs = {"van gogh": "painting", "snoopy": "dog", "r2d2": "robot", "cat": "tree"}
    change = edit.quickfix(tiny_sd1, pairs, positions="last_subject")
    small = change.compact(rank=1)
    keys, owners = change.keys.double(), torch.tensor(change.movements[0].owners)
    for i, old in enumerate(pairs):
        rows = keys[owners == i]
        left = (rows @ small.delta.T).norm() / (rows @ change.delta.T).norm()
        expected = change.report["concept_movement"][old] * float(left)
        assert small.report["concept_movement"][old] == pytest.approx(expected, rel=1e-6)
    assert min(small.report["concept_movement"].values()) < 0.9 * min(
        change.report["concept_movement"].values()
    )


def test_of_two_encoders_the_smaller_movement_is_reported(tiny_xl):
    change = edit.quickfix(tiny_xl, {"blob style": "noto style"}, ridge=1.0)
    shares = [part["concept_movement"]["blob style"] for part in change.report["encoders"].values()]
    assert len(shares) == 2 and shares[0] != shares[1]
    assert change.report["concept_movement"] == {"blob style": min(shares)}
