"""UCE against the paper's formula written out, on the tiny pipelines; and what all edits of cross-attention share."""

import copy
import math

import pytest
import torch

from overpaint import edit
from overpaint.edit.least_squares import factorise, solve
from overpaint.edit.methods.cross_attention import projections, read, spot
from overpaint.edit.methods.uce import ARTISTS, OBJECTS
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage
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
    """Features of `text` at its last word, by the whole padded prompt and the attention mask (their code's way)."""
    mask = model.tokenizer(text, padding="max_length", truncation=True).attention_mask
    return model.encode([text])[0, sum(mask) - 2].double()


def close(a, b, *, to):
    return float((a - b).norm()) <= to * float(b.norm())


@pytest.fixture
def own(tiny_sd1):
    """A copy of the model that a test may spoil."""
    return TextToImage(copy.deepcopy(tiny_sd1.pipe), name="own")


@pytest.mark.parametrize("kept", [(), ("monet", "a dog")])
def test_every_weight_is_that_of_the_papers_formula(tiny_sd2, kept):
    change = edit.uce(tiny_sd2, MONET, preserve=kept, preserve_weight=0.7, ridge=0.5)
    olds = [f + old for old in MONET for f in OBJECTS]
    news = [(f + new).strip() for new in MONET.values() for f in OBJECTS]
    c, g = (torch.stack([last_token(tiny_sd2, t) for t in texts], 1) for texts in (olds, news))
    p = torch.stack([last_token(tiny_sd2, t) for t in kept], 1) if kept else c[:, :0]
    assert len(change.movements) == 32
    for movement in change.movements:
        w = exact(tiny_sd2, movement.site)
        numerator = 0.5 * w + (w @ g) @ c.T + 0.7 * (w @ p) @ p.T
        system = 0.5 * torch.eye(64, dtype=torch.float64) + c @ c.T + 0.7 * p @ p.T
        wanted = torch.linalg.solve(system, numerator, left=False)
        assert close(movement.delta, wanted - w, to=1e-5)


def test_without_preserve_it_is_the_shared_solver(tiny_sd1):
    change = edit.uce(tiny_sd1, {"van gogh": "painting"}, frames=("",))
    for movement in change.movements[:4]:
        w = exact(tiny_sd1, movement.site)
        targets = movement.residuals + movement.keys.double() @ w.T
        alone = solve(movement.keys, targets, weight=w, ridge=0.5)
        assert close(movement.delta, alone.delta, to=1e-9)


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_it_moves_the_weights_it_names_and_they_return(request, name):
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


def test_only_the_layers_asked_for_move(tiny_sd1):
    layers = (3, "unet.cross_attn.1", get(tiny_sd1, "unet.cross_attn.3"))
    change = edit.uce(tiny_sd1, MONET, layers=layers)
    assert change.sites == tuple(f"unet.cross_attn.{i}.to_{kv}" for i in (1, 3) for kv in "kv")


def test_the_edited_layers_read_the_old_concept_as_the_new_one(own):
    change = edit.uce(own, {"van gogh": "painting"}, ridge=1e-6)
    site = "unet.cross_attn.5.to_v"
    wanted = exact(own, site) @ last_token(own, "photo of painting")
    before = exact(own, site) @ last_token(own, "photo of van gogh")
    change.apply(own)
    after = exact(own, site) @ last_token(own, "photo of van gogh")
    assert close(after, wanted, to=1e-3) and not close(before, wanted, to=0.3)
    assert change.report["residual_after"] < 1e-3 < change.report["residual_before"]


def test_preserving_keeps_more_as_its_weight_grows(tiny_sd1):
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


def test_two_changes_add_up_to_the_joint_one(tiny_sd1):
    first, second = ({old: new} for old, new in MONET.items())
    options = {"preserve": ["monet"], "layers": [0, 7]}
    joint = edit.uce(tiny_sd1, MONET, **options)
    apart = [edit.uce(tiny_sd1, pairs, **options) for pairs in (first, second)]
    for added in (apart[0] + apart[1], apart[1] + apart[0]):
        whole = {m.site: m.delta for m in joint.movements}
        assert all(close(m.delta, whole[m.site], to=1e-6) for m in added.movements)
    left = {m.site: m.delta for m in joint.without("snoopy").movements}
    assert all(close(left[m.site], m.delta, to=1e-6) for m in apart[0].movements)


def test_the_empty_guide_is_begin_of_text_or_the_frames_last_word(tiny_sd1):
    assert spot(tiny_sd1, "") == ("", 0)
    assert spot(tiny_sd1, "", "painting by ") == ("painting by", spot(tiny_sd1, "painting by")[1])
    assert spot(tiny_sd1, "van gogh", "{} on a tree") == ("van gogh on a tree", 2)
    assert ARTISTS[0] == OBJECTS[0] == "" and len(ARTISTS) == len(OBJECTS) == 6


@pytest.mark.parametrize("name", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_reading_short_gives_what_reading_whole_gives(request, name):
    model = request.getfixturevalue(name)
    texts = ["van gogh", "", "a photo of a dog"]
    short, whole = read(model, texts, length=8), read(model, texts)
    packed = model.encode(texts)
    rows = packed[:, :-1] if name == "tiny_xl" else packed
    for i, text in enumerate(texts):
        assert short[text].shape[0] == 8
        assert torch.allclose(short[text], whole[text][:8], atol=1e-5)
        assert torch.allclose(whole[text], rows[i], atol=1e-5)
    assert bool((whole[""] == 0).all()) == (name == "tiny_xl")


def test_half_precision_is_solved_in_double_and_returns(own):
    own.pipe.to(torch.float16)
    before = bytes_of(own)
    change = edit.uce(own, MONET)
    change.apply(own)
    assert find_weight(own, change.sites[0]).parameter.dtype == torch.float16
    change.revert(own)
    assert bytes_of(own) == before


def test_a_biased_model_is_brought_into_balance(tiny_sd1):
    """`classify` reads how far the concept moved towards each attribute: with no movement it sees 88 % red."""
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
    change = edit.debias(tiny_sd1, "a house", half, classify=classify, rounds=20, rate=0.4)
    assert seen[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert abs(seen[-1] - 0.5) <= 0.05 < abs(seen[-2] - 0.5)
    assert change.report["off"] <= 0.05 and len(change.report["rounds"]) == len(seen)
    assert bytes_of(tiny_sd1) == before
    with change.applied(tiny_sd1) as model:
        assert classify(model)["red"] == seen[-2]


def test_a_balanced_model_is_left_alone(tiny_sd1):
    shares = {"red": 0.5, "blue": 0.5}
    change = edit.debias(tiny_sd1, "a house", shares, classify=lambda _: shares)
    assert all(not m.delta.any() for m in change.movements) and change.report["off"] == 0


@pytest.mark.parametrize("found", [{"red": 0.5}, {"red": 3, "blue": 1}])
def test_a_classifier_that_counts_something_else_is_refused(own, found):
    before = bytes_of(own)
    with pytest.raises(ValueError, match=r"`classify` returned .*'blue', from 0 to 1. Divide"):
        edit.debias(own, "a house", {"red": 0.5, "blue": 0.5}, classify=lambda _: found)
    assert bytes_of(own) == before


@pytest.mark.parametrize("shares", [{}, {"red": 0.7, "blue": 0.7}, {"red": -0.1}, {" ": 0.5}])
def test_shares_that_cannot_be_are_refused(tiny_sd1, shares):
    with pytest.raises(ValueError, match="`shares` must give attributes their shares.*For two"):
        edit.debias(tiny_sd1, "a house", shares, classify=lambda _: {})
    with pytest.raises(ValueError, match="`rate` and `rounds` must be positive .*Leave them out"):
        edit.debias(tiny_sd1, "a house", {"red": 0.5}, classify=lambda _: {}, rounds=0)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({}, {}, "`pairs` is empty: name at least one concept"),
        ({" ": "painting"}, {}, "the old concept of the pair ' ' → 'painting' is empty: name it"),
        ({"Van  Gogh": "van gogh"}, {}, "'Van  Gogh' equals its target: name another"),
        ({"van gogh " * 40: "cat"}, {}, "cut off by the limit of 77 tokens"),
        ({"apple": "cat", "Apple": "dog"}, {}, "contradictory pairs: .*two targets. Keep one"),
        ({"apple": "cat"}, {"preserve": ["apple"]}, "preserved prompt 'apple' is .* take it off"),
        ({"apple": "cat"}, {"frames": ()}, "`frames` is empty: give at least one caption"),
        ({"apple": "cat"}, {"ridge": 0.0}, "`ridge` must be positive and finite"),
        ({"apple": "cat"}, {"preserve_weight": -1.0}, "`preserve_weight` must be 0 or more"),
        ({"apple": "cat"}, {"layers": []}, "at least one layer, got none: leave"),
    ],
)
def test_what_cannot_be_edited_is_refused(own, pairs, options, message):
    before = bytes_of(own)
    with pytest.raises(ValueError, match=message):
        edit.uce(own, pairs, **options)
    assert bytes_of(own) == before


def test_texts_in_place_of_lists_are_refused(tiny_sd1):
    for options in ({"preserve": "monet"}, {"frames": "a photo of "}):
        with pytest.raises(TypeError, match=r"lists of texts: write \['...'\]"):
            edit.uce(tiny_sd1, MONET, **options)


def test_layers_that_are_not_there_are_refused(tiny_sd1):
    with pytest.raises(UnknownSite, match="unknown layer 16: .*cross_attn 0 to 15. Name one"):
        edit.uce(tiny_sd1, MONET, layers=[16])
    with pytest.raises(UnknownSite, match="'unet.self_attn.1' is no cross-attention layer: give"):
        edit.uce(tiny_sd1, MONET, layers=["unet.self_attn.1"])
    with pytest.raises(ValueError, match="moves 'k', 'v' or both.* got 'q': leave"):
        projections(tiny_sd1, None, ("q",))


def test_weights_that_cannot_be_solved_are_refused(own):
    damaged = find_weight(own, "unet.cross_attn.4.to_v").parameter
    with torch.no_grad():
        damaged[0, 0] = math.nan
    with pytest.raises(ValueError, match="cross_attn.4.to_v holds NaN or infinity: load an und"):
        edit.uce(own, MONET)
    block = get(own, "unet.cross_attn.4").module(own)
    block.to_v = torch.nn.Linear(32, damaged.shape[0], bias=False)
    with pytest.raises(UnsupportedModel, match="reads 32 numbers a token, the text features have"):
        edit.uce(own, MONET)


def test_weights_share_what_they_have_in_common(own):
    """All of them read the same keys: one right factor and one factorisation serve, also when solved again."""
    change = edit.uce(own, {"dog": "cat", "monet": "painting"}, preserve=["a bird"], frames=("",))
    assert change.report["rank"] == 2
    for made in (
        change,
        change.without("dog"),
        change + edit.uce(own, {"apple": "tree"}, preserve=["a bird"], frames=("",)),
    ):
        assert len({m.keys.data_ptr() for m in made.movements}) == 1
        assert len({m.right.data_ptr() for m in made.movements}) == 1
        for m in made.movements:
            alone = factorise(m.keys, ridge=0.5, gram=m.gram).solve(m.residuals)
            assert float((m.delta - alone.delta).norm()) <= 1e-10 * float(m.delta.norm())
