"""UCE against the paper's formula, on the tiny pipelines, and the parts that all edits of cross-attention share."""

import math

import pytest
import torch

from overpaint import edit
from overpaint.edit.least_squares import factorise, solve
from overpaint.edit.methods.cross_attention import projection_sites
from overpaint.edit.methods.text_keys import last_tokens, read_features, unconditional_features
from overpaint.edit.methods.uce import ARTISTS, OBJECTS, Search
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model.sites import get

MONET = {"van gogh": "painting", "snoopy": ""}


def bytes_of(model):
    parts = {"unet": model.unet, **{f"text{i}": e for i, e in enumerate(model.text_encoders)}}
    return {
        f"{part}.{name}": fingerprint(p)
        for part, module in parts.items()
        for name, p in module.named_parameters()
    }


def hooks_of(model):
    modules = [m for part in (model.unet, *model.text_encoders) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def exact(model, site):
    return find_weight(model, site).parameter.detach().double()


def last_token(model, text):
    """Return the features of `text` at its last word, found by the attention mask as in the authors' code."""
    mask = model.tokenizer(text, padding="max_length", truncation=True).attention_mask
    return model.encode([text])[0, sum(mask) - 2].double()


def close(a, b, *, to):
    return float((a - b).norm()) <= to * float(b.norm())


@pytest.mark.parametrize("preserve", [(), ("monet", "a dog")])
def test_every_weight_equals_the_papers_formula(tiny_sd2, preserve):
    change = edit.uce(tiny_sd2, MONET, preserve=preserve, preserve_weight=0.7, ridge=0.5)
    olds = [f + old for old in MONET for f in OBJECTS]
    news = [(f + new).strip() for new in MONET.values() for f in OBJECTS]
    c, g = (torch.stack([last_token(tiny_sd2, t) for t in texts], 1) for texts in (olds, news))
    p = torch.stack([last_token(tiny_sd2, t) for t in preserve], 1) if preserve else c[:, :0]
    assert len(change.movements) == 32
    for movement in change.movements:
        w = exact(tiny_sd2, movement.site)
        numerator = 0.5 * w + (w @ g) @ c.T + 0.7 * (w @ p) @ p.T
        system = 0.5 * torch.eye(64, dtype=torch.float64) + c @ c.T + 0.7 * p @ p.T
        expected = torch.linalg.solve(system, numerator, left=False)
        assert close(movement.delta, expected - w, to=1e-5)


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2"])
def test_keys_to_the_last_pad_equal_the_formula_over_these_tokens(request, name):
    model = request.getfixturevalue(name)
    pairs, preserve = {"van gogh": "painting", "snoopy": ""}, ("monet",)
    change = edit.uce(
        model, pairs, preserve=preserve, preserve_weight=0.7, keys="last_to_pads", frames=("",), layers=[2, 7]
    )  # fmt: skip

    def rows(text):
        mask = model.tokenizer(text, padding="max_length", truncation=True).attention_mask
        return model.encode([text])[
            0, sum(mask) - 2 :
        ].double()  # from the last word, or begin-of-text, on

    olds = [rows(old) for old in pairs]
    news = [rows(new)[: len(old)] for new, old in zip(pairs.values(), olds, strict=True)]
    # an old concept that ends later has fewer tokens after it, one that ends earlier repeats the last pad
    news = [
        torch.cat([new, new[-1:].expand(len(old) - len(new), -1)])
        for new, old in zip(news, olds, strict=True)
    ]
    c, g, p = torch.cat(olds), torch.cat(news), rows("monet")
    assert change.report["preserved_keys"] == len(p) == 76
    system = 0.5 * torch.eye(64).double() + c.T @ c + 0.7 * p.T @ p
    for movement in change.movements:
        w = exact(model, movement.site)
        expected = torch.linalg.solve(
            system, w @ (0.5 * torch.eye(64).double() + g.T @ c + 0.7 * p.T @ p), left=False
        )
        assert close(movement.delta, expected - w, to=1e-4)


def test_changes_with_other_keys_are_not_added_and_preserve_terms_are_read_again(tiny_sd1):
    options = {"preserve": ["monet"], "layers": [4], "frames": ("",)}
    pads = [
        edit.uce(tiny_sd1, {old: new}, keys="last_to_pads", **options)
        for old, new in MONET.items()
    ]  # fmt: skip
    with pytest.raises(ValueError, match="these changes differ in keys"):
        pads[0] + edit.uce(tiny_sd1, {"snoopy": ""}, **options)
    joint = edit.uce(tiny_sd1, MONET, keys="last_to_pads", **options)
    whole = {m.site: m.delta for m in joint.movements}
    stacked = edit.stack(tiny_sd1, pads)  # computes the preserve terms again
    assert all(close(m.delta, whole[m.site], to=1e-6) for m in stacked.movements)
    with pytest.raises(ValueError, match="`keys` must be 'last' or 'last_to_pads', got 'pads'"):
        edit.uce(tiny_sd1, MONET, keys="pads")


def test_without_preserve_the_change_equals_the_shared_solver(tiny_sd1):
    change = edit.uce(tiny_sd1, {"van gogh": "painting"}, frames=("",))
    for movement in change.movements[:4]:
        w = exact(tiny_sd1, movement.site)
        targets = movement.residuals + movement.keys.double() @ w.T
        alone = solve(movement.keys, targets, weight=w, ridge=0.5)
        assert close(movement.delta, alone.delta, to=1e-9)


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_only_the_named_weights_move_and_they_are_restored(request, name):
    model = request.getfixturevalue(name)
    before, hooks = bytes_of(model), hooks_of(model)
    change = edit.uce(model, MONET, preserve=["monet", ""])
    assert bytes_of(model) == before and hooks_of(model) == hooks
    count = 11 if name == "tiny_xl" else 16
    assert change.sites == tuple(
        f"unet.cross_attn.{i}.to_{kv}" for i in range(count) for kv in ("k", "v")
    )
    with change.applied(model):
        after = bytes_of(model)
        moved = {site for site in before if before[site] != after[site]}
        assert len(moved) == 2 * count
        assert all(site.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for site in moved)
    assert bytes_of(model) == before


def test_only_the_given_layers_move(tiny_sd1):
    layers = (3, "unet.cross_attn.1", get(tiny_sd1, "unet.cross_attn.3"))
    change = edit.uce(tiny_sd1, MONET, layers=layers)
    assert change.sites == tuple(f"unet.cross_attn.{i}.to_{kv}" for i in (1, 3) for kv in "kv")


def test_the_edited_layers_map_the_old_concept_to_the_targets_of_the_new_one(copied):
    change = edit.uce(copied, {"van gogh": "painting"}, ridge=1e-6)
    site = "unet.cross_attn.5.to_v"
    target = exact(copied, site) @ last_token(copied, "photo of painting")
    before = exact(copied, site) @ last_token(copied, "photo of van gogh")
    change.apply(copied)
    after = exact(copied, site) @ last_token(copied, "photo of van gogh")
    assert close(after, target, to=1e-3) and not close(before, target, to=0.3)
    assert change.report["residual_after"] < 1e-3 < change.report["residual_before"]


def test_preserved_prompts_drift_less_as_the_preserve_weight_grows(tiny_sd1):
    drifts = [
        edit.uce(tiny_sd1, MONET, preserve=["monet", "a dog"], preserve_weight=a).report["preserve_drift"]
        for a in (0.01, 1.0, 100.0)
    ]  # fmt: skip
    assert drifts[0] > drifts[1] > drifts[2]
    assert drifts[2] < 0.05 * drifts[0]
    off = edit.uce(tiny_sd1, MONET, preserve=["monet"], preserve_weight=0.0)
    plain = edit.uce(tiny_sd1, MONET)
    assert all(
        torch.equal(a.delta, b.delta) for a, b in zip(off.movements, plain.movements, strict=True)
    )


def test_the_sum_of_two_changes_is_their_joint_solution(tiny_sd1):
    first, second = ({old: new} for old, new in MONET.items())
    options = {"preserve": ["monet"], "layers": [0, 7]}
    joint = edit.uce(tiny_sd1, MONET, **options)
    apart = [edit.uce(tiny_sd1, pairs, **options) for pairs in (first, second)]
    for added in (apart[0] + apart[1], apart[1] + apart[0]):
        whole = {m.site: m.delta for m in joint.movements}
        assert all(close(m.delta, whole[m.site], to=1e-6) for m in added.movements)
    left = {m.site: m.delta for m in joint.without("snoopy").movements}
    assert all(close(left[m.site], m.delta, to=1e-6) for m in apart[0].movements)


def test_an_empty_concept_is_begin_of_text_or_the_last_token_of_the_frame(tiny_sd1):
    concepts = [("", ""), ("", "painting by "), ("painting by", ""), ("van gogh", "{} on a tree")]
    empty, framed, named, before = last_tokens(tiny_sd1, concepts)
    assert empty == ("", 0)
    assert framed == ("painting by", named[1])
    assert before == ("van gogh on a tree", 2)
    assert ARTISTS[0] == OBJECTS[0] == "" and len(ARTISTS) == len(OBJECTS) == 6


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_features_of_a_shorter_reading_equal_those_of_the_whole(request, name):
    model = request.getfixturevalue(name)
    texts = ["van gogh", "", "a photo of a dog"]
    short, whole = read_features(model, texts, length=8), read_features(model, texts)
    packed = model.encode(texts)
    rows = packed[:, :-1] if name == "tiny_xl" else packed
    for i, text in enumerate(texts):
        assert short[text].shape[0] == 8
        assert torch.allclose(short[text], whole[text][:8], atol=1e-5)
        branch = unconditional_features(model) if text == "" else whole[text]
        assert torch.allclose(branch, rows[i], atol=1e-5)
    assert whole[""].any()  # SDXL's unconditional branch is zero, its features of "" are not
    assert bool((unconditional_features(model) == 0).all()) == (name == "tiny_xl")


def test_weights_in_half_precision_are_restored(copied):
    copied.pipe.to(torch.float16)
    before = bytes_of(copied)
    change = edit.uce(copied, MONET)
    change.apply(copied)
    assert find_weight(copied, change.sites[0]).parameter.dtype == torch.float16
    change.revert(copied)
    assert bytes_of(copied) == before


def test_debias_balances_a_biased_model(tiny_sd1):
    """`classify` measures the movement of the concept towards each attribute; without movement it returns 88 % red."""
    site, texts = "unet.cross_attn.2.to_k", ["a house", "red", "blue"]
    c, red, blue = (last_token(tiny_sd1, text) for text in texts)
    still = exact(tiny_sd1, site) @ c
    axis = exact(tiny_sd1, site) @ (red / red.norm() - blue / blue.norm())
    seen = []

    def classify(model):
        moved = exact(model, site) @ c - still
        tilt = float(moved @ axis / axis.square().sum()) / float(c.norm())
        share = 1 / (1 + math.exp(-2 - 4 * tilt))
        seen.append(share)
        return {"red": share, "blue": 1 - share, "green": 0.0}

    before = bytes_of(tiny_sd1)
    half = {"red": 0.5, "blue": 0.5}
    progress = []
    change = edit.debias(
        tiny_sd1, "a house", half, classify=classify, search=Search(rounds=20, rate=0.4),
        on_progress=lambda *call: progress.append(call),
    )  # fmt: skip
    assert progress == [(i + 1, 20, "balancing attributes") for i in range(len(seen))]
    assert seen[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert abs(seen[-1] - 0.5) <= 0.05 < abs(seen[-2] - 0.5)
    assert change.report["off"] <= 0.05 and len(change.report["rounds"]) == len(seen)
    assert bytes_of(tiny_sd1) == before
    with change.applied(tiny_sd1) as model:
        assert classify(model)["red"] == seen[-2]


def test_debias_does_not_move_a_balanced_model(tiny_sd1):
    shares = {"red": 0.5, "blue": 0.5}
    change = edit.debias(tiny_sd1, "a house", shares, classify=lambda _: shares)
    assert all(not m.delta.any() for m in change.movements) and change.report["off"] == 0


@pytest.mark.parametrize("counts", [{"red": 0.5}, {"red": 3, "blue": 1}])
def test_a_classifier_with_other_attributes_or_counts_is_refused(copied, counts):
    before = bytes_of(copied)
    with pytest.raises(ValueError, match=r"`classify` returned .*'blue', from 0 to 1. Divide"):
        edit.debias(copied, "a house", {"red": 0.5, "blue": 0.5}, classify=lambda _: counts)
    assert bytes_of(copied) == before


@pytest.mark.parametrize("shares", [{}, {"red": 0.7, "blue": 0.7}, {"red": -0.1}, {" ": 0.5}])
def test_shares_and_rounds_out_of_range_are_refused(tiny_sd1, shares):
    with pytest.raises(ValueError, match="`shares` must give attributes their shares.*For two"):
        edit.debias(tiny_sd1, "a house", shares, classify=lambda _: {})
    with pytest.raises(ValueError, match="`rate` and `rounds` must be positive .*Leave them out"):
        edit.debias(
            tiny_sd1, "a house", {"red": 0.5}, classify=lambda _: {}, search=Search(rounds=0)
        )


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({}, {}, "`pairs` is empty: name at least one concept"),
        ({" ": "painting"}, {}, "the old concept of the pair ' ' → 'painting' is empty: name it"),
        ({"Van  Gogh": "van gogh"}, {}, "'Van  Gogh' equals its target: name another"),
        ({"van gogh " * 40: "cat"}, {}, "cut off by the limit of 77 tokens"),
        ({"apple": "cat", "Apple": "dog"}, {}, "contradictory pairs: .*two targets. Keep one"),
        (
            {"apple": "cat"},
            {"preserve": ["apple"]},
            "preserved prompt 'apple' has the same key as .* take it off",
        ),
        ({"apple": "cat"}, {"frames": ()}, "`frames` is empty: give at least one caption"),
        ({"apple": "cat"}, {"ridge": 0.0}, "`ridge` must be positive and finite"),
        ({"apple": "cat"}, {"preserve_weight": -1.0}, "`preserve_weight` must be 0 or more"),
        ({"apple": "cat"}, {"layers": []}, "at least one layer, got none: leave"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_is_not_changed(copied, pairs, options, message):
    before = bytes_of(copied)
    with pytest.raises(ValueError, match=message):
        edit.uce(copied, pairs, **options)
    assert bytes_of(copied) == before


def test_texts_in_place_of_lists_are_refused(tiny_sd1):
    for options in ({"preserve": "monet"}, {"frames": "a photo of "}):
        with pytest.raises(TypeError, match=r"must be a list of texts, got .* write \['...'\]"):
            edit.uce(tiny_sd1, MONET, **options)


def test_unknown_layers_and_matrices_are_refused(tiny_sd1):
    with pytest.raises(UnknownSite, match="unknown layer 16: .*cross_attn 0 to 15. Name one"):
        edit.uce(tiny_sd1, MONET, layers=[16])
    with pytest.raises(UnknownSite, match="'unet.self_attn.1' is no cross-attention layer: give"):
        edit.uce(tiny_sd1, MONET, layers=["unet.self_attn.1"])
    with pytest.raises(ValueError, match="moves 'k', 'v' or both.* got 'q': leave"):
        projection_sites(tiny_sd1, None, ("q",))


def test_a_nan_weight_and_a_transformed_input_are_refused(copied):
    damaged = find_weight(copied, "unet.cross_attn.4.to_v").parameter
    with torch.no_grad():
        damaged[0, 0] = math.nan
    with pytest.raises(ValueError, match="cross_attn.4.to_v holds NaN or infinity: load an und"):
        edit.uce(copied, MONET)
    block = get(copied, "unet.cross_attn.4").module(copied)
    block.to_v = torch.nn.Linear(32, damaged.shape[0], bias=False)
    with pytest.raises(
        UnsupportedModel, match="reads 32 numbers for each token, but the text features have"
    ):
        edit.uce(copied, MONET)


def test_weights_share_keys_and_right_factor(copied):
    """All weights read the same keys, so they share one right factor, also when they are solved again."""
    change = edit.uce(
        copied, {"dog": "cat", "monet": "painting"}, preserve=["a bird"], frames=("",)
    )
    assert change.report["rank"] == 2
    for edited in (
        change,
        change.without("dog"),
        change + edit.uce(copied, {"apple": "tree"}, preserve=["a bird"], frames=("",)),
    ):
        assert len({m.keys.data_ptr() for m in edited.movements}) == 1
        assert len({m.right.data_ptr() for m in edited.movements}) == 1
        for m in edited.movements:
            alone = factorise(m.keys, ridge=0.5, gram=m.gram).solve(m.residuals)
            assert float((m.delta - alone.delta).norm()) <= 1e-10 * float(m.delta.norm())
