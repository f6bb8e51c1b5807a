"""Diff-QuickFix on the tiny pipelines: keys, targets and solutions against explicit forward passes; bad arguments."""

import itertools
import math

import pytest
import torch

from overpaint import edit
from overpaint.edit import captions
from overpaint.edit.least_squares import solve
from overpaint.edit.movement import Targets
from overpaint.edit.weights import find_weight, fingerprint, text_layers
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model.hooks import record, record_inputs
from overpaint.model.token_spans import find_span

MONET = {"van gogh": "painting"}
FRAMES = ("", "a photo of ", "an image of ", "a picture of ")


def weight(model, layer=0, projection="out"):
    return getattr(text_layers(model)[layer].self_attn, f"{projection}_proj").weight


def targets_of(model, change):
    """Return the targets of the keys, without bias, float64."""
    return change.movements[0].residuals + change.keys.double() @ weight(model).detach().double().T


def bytes_of(model):
    return {name: fingerprint(p) for name, p in model.text_encoder.named_parameters()}


def layer_inputs(model, text, layer=0):
    """Return the inputs of the layer's out_proj in a whole forward pass, shape (L, D)."""
    linear = text_layers(model)[layer].self_attn.out_proj
    with record_inputs(linear) as seen:
        model.encode([text])
    return seen[0][0]


def hooks_of(model):
    return [m for m in model.text_encoder.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.fixture
def biased(copied):
    """Return a copy whose biases are not zero, as in a trained model."""
    with torch.no_grad():
        for layer in text_layers(copied):
            layer.self_attn.out_proj.bias.normal_(0, 0.02)
    return copied


@pytest.mark.parametrize(
    ("old", "new", "pairs"),
    [
        ("van gogh", "painting", 291),
        ("snoopy", "dog", 295),
        ("r2d2", "robot", 283),
        ("president of the united states", "joe biden", 279),
    ],
)
def test_the_number_of_keys_is_that_printed_by_the_release(tiny_sd1, old, new, pairs):
    change = edit.quickfix(tiny_sd1, {old: new})
    assert change.report["keys"] == len(change.keys) == pairs
    assert change.movements[0].owners == (0,) * pairs


def test_a_longer_new_prompt_repeats_its_last_target_once_for_each_frame(tiny_sd1):
    """In CLIP's tokens "golden retriever" is one longer than "dog", as "grumpy cat" is here: one repeat a frame."""
    change = edit.quickfix(tiny_sd1, {"dog": "grumpy cat"})
    lengths = [77 - find_span(tiny_sd1.tokenizer, f + "dog", "dog").last for f in FRAMES]
    ends = list(itertools.accumulate(lengths))
    assert len(change.keys) == ends[-1]
    targets = targets_of(tiny_sd1, change)
    apart = (targets[1:] - targets[:-1]).norm(dim=1)
    repeats = [i + 1 for i in range(len(apart)) if apart[i] <= 1e-9]
    assert repeats == [end - 1 for end in ends]


def test_keys_and_targets_are_layer_inputs_aligned_by_the_last_token(biased):
    change = edit.quickfix(biased, MONET, frames=["a photo of "])
    old, new = (
        layer_inputs(biased, "a photo of van gogh"),
        layer_inputs(biased, "a photo of painting"),
    )
    assert torch.allclose(change.keys, old[5:], atol=1e-6)
    assert torch.allclose(
        targets_of(biased, change), new[4:-1].double() @ weight(biased).double().T, atol=1e-6
    )


@pytest.mark.parametrize(
    ("positions", "offsets"), [("last_subject", [0]), ("last_subject+eos", [0, 1])]
)
def test_positions_at_the_last_subject_token_and_the_end(tiny_sd1, positions, offsets):
    change = edit.quickfix(tiny_sd1, MONET, positions=positions, frames=["", "a photo of {}."])
    bare, framed = (
        layer_inputs(tiny_sd1, "van gogh"),
        layer_inputs(tiny_sd1, "a photo of van gogh."),
    )
    # "gogh" is at 2, and at 5 in the frame, where a full stop comes before the end of text
    expected = [bare[2 + i] for i in offsets] + [framed[5 + 2 * i] for i in offsets]
    assert torch.allclose(change.keys, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize(("positions", "count"), [("subject", 3), ("subject_to_end", 73)])
def test_every_token_of_the_concept_is_aligned_from_its_last(tiny_sd1, positions, count):
    """The old concept is at 4 to 6, the new one at 4: earlier tokens of the old one get the first target too."""
    old, new = "van gogh painting", "cat"
    change = edit.quickfix(tiny_sd1, {old: new}, positions=positions, frames=["a photo of {}."])
    before, after = (layer_inputs(tiny_sd1, f"a photo of {text}.") for text in (old, new))
    assert torch.allclose(change.keys, before[4 : 4 + count], atol=1e-6)
    sources = after[[4, 4, *range(4, 4 + count - 2)]]
    expected = sources.double() @ weight(tiny_sd1).detach().double().T
    assert torch.allclose(targets_of(tiny_sd1, change), expected, atol=1e-6)
    longer = edit.quickfix(tiny_sd1, {new: old}, positions=positions, frames=["a photo of {}."])
    first = (
        before[6].double() @ weight(tiny_sd1).detach().double().T
    )  # its last token, not its first
    assert torch.allclose(targets_of(tiny_sd1, longer)[0], first, atol=1e-6)


def test_the_end_of_text_is_found_before_another_padding_token(tiny_sd2):
    change = edit.quickfix(tiny_sd2, MONET, positions="last_subject+eos", frames=[""])
    assert torch.allclose(change.keys, layer_inputs(tiny_sd2, "van gogh")[2:4], atol=1e-6)


@pytest.mark.parametrize(("layer", "projection"), [(0, "out"), (3, "q"), (11, "k"), (7, "v")])
def test_any_layer_and_projection_equals_the_formula_on_a_whole_forward_pass(
    tiny_sd1, layer, projection
):
    linear = getattr(text_layers(tiny_sd1)[layer].self_attn, f"{projection}_proj")
    texts = ["van gogh", "painting", "monet"]
    with record_inputs(linear) as seen:
        tiny_sd1.encode(texts)
    old, new, preserved = seen[0].double()
    keys, sources = old[2:], new[1:-1]
    w = linear.weight.detach().double()
    system = 0.01 * torch.eye(64).double() + keys.T @ keys + 0.1 * preserved.T @ preserved
    moved = torch.linalg.solve(system, keys.T @ (sources - keys) @ w.T).T
    change = edit.quickfix(
        tiny_sd1, MONET, preserve=["monet"], frames=[""], layer=layer, projection=projection
    )
    assert change.site == f"text.{layer}.self_attn.{projection}_proj"
    assert float((change.delta - moved).norm() / moved.norm()) <= 1e-5


def test_primal_and_dual_solutions_agree(tiny_sd1):
    dual, primal = (edit.quickfix(tiny_sd1, MONET, solver=s).delta for s in ("dual", "primal"))
    assert float((dual - primal).norm() / dual.norm()) <= 1e-8


def test_a_target_with_equal_inputs_moves_nothing(biased):
    words = find_weight(biased, "text.token_embedding").parameter
    cat, dog = (biased.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("cat", "dog"))
    words.data[cat] = words.data[dog]
    change = edit.quickfix(biased, {"cat": "dog"})
    assert float(change.delta.norm()) <= 1e-10
    release = edit.quickfix(biased, {"cat": "dog"}, subtract_bias=False)
    assert float(release.delta.norm()) > 0.01


@pytest.mark.parametrize("subtract_bias", [True, False])
def test_the_edited_layer_maps_the_old_concept_to_the_outputs_of_the_new_one(biased, subtract_bias):
    linear = text_layers(biased)[0].self_attn.out_proj
    with record([linear]) as before:
        biased.encode(["painting"])
    change = edit.quickfix(
        biased,
        MONET,
        ridge=1e-9,
        positions="last_subject",
        frames=[""],
        subtract_bias=subtract_bias,
    )
    with change.applied(biased), record([linear]) as after:
        biased.encode(["van gogh"])
    excess = after[0][0][0, 2] - before[0][0][0, 1]
    expected = torch.zeros_like(excess) if subtract_bias else linear.bias.detach()
    assert torch.allclose(excess, expected, atol=1e-5)


def test_preserved_prompts_move_less_and_the_empty_one_is_allowed(tiny_sd1):
    def drift(**options):
        change = edit.quickfix(tiny_sd1, MONET, **options)
        inputs = layer_inputs(tiny_sd1, "").double()
        return float((inputs @ change.delta.T).norm()), change

    plain, _ = drift()
    ignored, change = drift(preserve=["", "a cat"], preserve_weight=0.0)
    assert ignored == plain
    preserved, change = drift(preserve=["", "a cat"], preserve_weight=1.0)
    assert preserved < 0.5 * plain
    assert change.report["preserved_keys"] == 2 * 77
    assert (
        change.report["empty_prompt_drift"]
        < 0.5 * edit.quickfix(tiny_sd1, MONET).report["empty_prompt_drift"]
    )
    assert drift(preserve=[""], preserve_weight=1e8)[0] < 1e-3 * plain


def test_the_report_holds_residuals_and_condition(tiny_sd1):
    change = edit.quickfix(tiny_sd1, MONET, preserve=["monet"])
    k, w = change.keys.double(), weight(tiny_sd1).detach().double()
    v = targets_of(tiny_sd1, change)
    after = float((k @ (w + change.delta).T - v).norm() / v.norm())
    assert change.report["residual_after"] == pytest.approx(after, rel=1e-4)
    assert change.report["residual_after"] < change.report["residual_before"]
    again = solve(change.keys, v, weight=w, ridge=0.01)
    plain = edit.quickfix(tiny_sd1, MONET).report
    assert plain["condition_number"] == pytest.approx(again.condition_number, rel=1e-6)
    assert plain["effective_rank"] == again.effective_rank
    assert 0 < plain["rank"] <= 64
    assert set(plain["seconds"]) == {"keys", "values", "solve", "report"}


def test_several_concepts_are_solved_jointly_in_any_order(tiny_sd1):
    pairs = {"van gogh": "painting", "snoopy": "dog"}
    joint = edit.quickfix(tiny_sd1, pairs, preserve=["monet"])
    swapped = edit.quickfix(tiny_sd1, dict(reversed(pairs.items())), preserve=["monet"])
    assert float((joint.delta - swapped.delta).norm() / joint.delta.norm()) <= 1e-8
    parts = [edit.quickfix(tiny_sd1, {old: new}, preserve=["monet"]) for old, new in pairs.items()]
    stacked = [edit.stack(tiny_sd1, order) for order in (parts, parts[::-1])]
    assert torch.equal(stacked[0].left, stacked[1].left)
    assert float((joint.delta - stacked[0].delta).norm() / joint.delta.norm()) <= 1e-8
    assert stacked[0].pairs == pairs


def test_only_the_keys_are_computed_and_no_hook_is_left(tiny_sd1):
    with record(text_layers(tiny_sd1)) as calls:
        edit.quickfix(tiny_sd1, MONET, layer=2)
    assert [len(c) for c in calls] == [1, 1] + [0] * 10
    assert hooks_of(tiny_sd1) == []


def test_solving_does_not_modify_the_model(copied):
    before = bytes_of(copied)
    edit.quickfix(copied, MONET, preserve=[""])
    edit.swap_embedding(copied, MONET)
    edit.random_site(copied, MONET)
    assert bytes_of(copied) == before


def test_a_failure_inside_the_encoder_leaves_no_hook(copied):
    copied.text_encoder.get_input_embeddings().weight.data = torch.zeros(0, 64)
    with pytest.raises((IndexError, RuntimeError)):
        edit.quickfix(copied, MONET)
    assert hooks_of(copied) == []


def test_an_encoder_that_does_not_call_the_projection_is_refused(copied, monkeypatch):
    monkeypatch.setattr(
        text_layers(copied)[0].self_attn,
        "forward",
        lambda hidden_states, **_: (hidden_states, None),
    )
    with pytest.raises(UnsupportedModel, match=r"did not call text\.0\.self_attn\.out_proj once"):
        edit.quickfix(copied, MONET)
    assert hooks_of(copied) == []


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({}, {}, "`pairs` is empty: name at least one concept"),
        ({"": "dog"}, {}, "the old concept of the pair '' → 'dog' is empty: name it"),
        ({"a <|endoftext|> dog": "cat"}, {}, "holds the special token '<|endoftext|>', which begins or ends"),
        ({"dog": "<|StartOfText|>"}, {}, "holds the special token '<|startoftext|>'.* name the concept in words"),
        (MONET, {"preserve": ["a cat <|endoftext|>"]}, "holds the special token '<|endoftext|>'"),
        ({"van gogh": "Van  Gogh"}, {}, "the concept 'van gogh' equals its target: name another"),
        (MONET, {"ridge": -0.1}, r"`ridge` must be positive and finite, got -0\.1"),
        (MONET, {"ridge": math.nan}, "`ridge` must be positive and finite, got nan"),
        (MONET, {"preserve_weight": -1}, "`preserve_weight` must be 0 or more"),
        (MONET, {"positions": "all"}, "`positions` must be one of 'from_subject_to_end'"),
        (MONET, {"projection": "o"}, "`projection` must be one of 'q', 'k', 'v', 'out'"),
        (MONET, {"solver": "qr"}, "the solver must be 'dual' or 'primal'"),
        (MONET, {"frames": []}, "`frames` is empty: give at least one caption"),
        (MONET, {"frames": ["{} and {}"]}, "holds the concept twice: leave one '{}'"),
        ({"dog": "a " * 80}, {}, "is cut off by the limit of 77 tokens"),
        (MONET, {"preserve": ["van gogh on a beach"]}, r"begins with 'van gogh', which is edited: take"),
        ({"cat": "dog", "Cat": "bird"}, {}, r"contradictory pairs: 'cat' → 'dog' and 'Cat' → 'bird'.*Keep one"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_the_model_is_not_modified(tiny_sd1, pairs, options, message):
    before = bytes_of(tiny_sd1)
    with pytest.raises(ValueError, match=message):
        edit.quickfix(tiny_sd1, pairs, **options)
    assert bytes_of(tiny_sd1) == before and hooks_of(tiny_sd1) == []


def test_one_text_in_place_of_a_list_is_refused(tiny_sd1):
    with pytest.raises(TypeError, match="`preserve` must be a list of texts, got 'monet'"):
        edit.quickfix(tiny_sd1, MONET, preserve="monet")


@pytest.mark.parametrize("layer", [-1, 12])
def test_an_unknown_layer_is_refused(tiny_sd1, layer):
    with pytest.raises(UnknownSite, match="0 to 11"):
        edit.quickfix(tiny_sd1, MONET, layer=layer)


def test_nan_weights_are_refused(copied):
    weight(copied).data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the weight at text\.0\.self_attn\.out_proj holds NaN"):
        edit.quickfix(copied, MONET)
    with pytest.raises(ValueError, match="`keys` holds NaN or infinity"):
        edit.quickfix(copied, MONET, layer=1)
    copied.text_encoder.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(ValueError, match=r"the weight at text\.token_embedding holds NaN"):
        edit.swap_embedding(copied, MONET)


def test_pairs_contradict_at_the_queries_of_layer_0_whose_padding_keys_are_equal(tiny_sd1):
    """The input of layer 0's q depends on a token and its position alone: padding has one key for all concepts."""
    pairs = {"van gogh": "painting", "snoopy": "grumpy cat"}
    with pytest.raises(ValueError, match="contradictory pairs: .* give one key"):
        edit.quickfix(tiny_sd1, pairs, projection="q")
    assert (
        edit.quickfix(tiny_sd1, pairs, projection="q", positions="last_subject").report["rank"] > 0
    )


def test_changes_with_different_settings_cannot_be_stacked(tiny_sd1):
    first = edit.quickfix(tiny_sd1, {"dog": "cat"})
    with pytest.raises(ValueError, match="contradictory pairs: 'dog' → 'bird' and 'dog' → 'cat'"):
        edit.stack(tiny_sd1, [first, edit.quickfix(tiny_sd1, {"dog": "bird"})])
    with pytest.raises(ValueError, match="these changes differ in ridge: make them again"):
        edit.stack(tiny_sd1, [first, edit.quickfix(tiny_sd1, {"fish": "bird"}, ridge=1.0)])
    with pytest.raises(
        ValueError,
        match="only changes that were solved can be added .* 'swap_embedding'",
    ):
        edit.stack(tiny_sd1, [edit.swap_embedding(tiny_sd1, MONET)])
    with pytest.raises(ValueError, match="nothing to stack"):
        edit.stack(tiny_sd1, [])
    with (
        first.applied(tiny_sd1),
        pytest.raises(ValueError, match="wrong base hash: .* Revert what"),
    ):
        edit.stack(tiny_sd1, [first])


def test_an_edit_of_sdxls_first_encoder_does_not_change_the_second(tiny_xl):
    prompt = ["a house in van gogh style"]
    before, weights = tiny_xl.encode(prompt), bytes_of(tiny_xl)
    change = edit.quickfix(tiny_xl, MONET, encoder="text")
    assert change.protocol["encoder"] == "text"
    assert change.report["unedited_encoders"] == ["text2"]
    with change.applied(tiny_xl):
        after = tiny_xl.encode(prompt)
    moved = (after - before)[0]
    assert moved[:, :32].abs().max() > 0.1
    assert not moved[:, 32:].any()
    assert not moved[77].any()  # the pooled row is the second encoder's
    assert bytes_of(tiny_xl) == weights


def test_an_edit_of_sdxls_second_encoder_does_not_change_the_first(tiny_xl):
    prompt = ["a house in van gogh style"]
    before, weights = tiny_xl.encode(prompt), bytes_of(tiny_xl)
    change = edit.quickfix(tiny_xl, MONET, encoder="text2", preserve=[""])
    assert change.site == "text2.0.self_attn.out_proj"
    assert change.report["residual_after"] < change.report["residual_before"]
    with change.applied(tiny_xl):
        moved = (tiny_xl.encode(prompt) - before)[0]
    assert not moved[:77, :32].any()
    assert moved[:77, 32:].abs().max() > 0.01
    assert moved[77].any()  # the pooled row is this encoder's
    assert bytes_of(tiny_xl) == weights


def test_the_second_encoder_is_read_with_its_own_padding(tiny_xl):
    """Its padding token is "!", not the end of text, so its keys there differ."""
    change = edit.quickfix(tiny_xl, MONET, encoder="text2", frames=[""])
    linear = text_layers(tiny_xl, "text2")[0].self_attn.out_proj
    with record_inputs(linear) as seen:
        tiny_xl.text_encoders[1](tiny_xl.tokenize(["van gogh"], encoder=1))
    assert torch.allclose(change.keys, seen[0][0, 2:], atol=1e-6)


def test_a_model_without_a_second_encoder_is_refused(tiny_sd1):
    with pytest.raises(
        UnknownSite, match="unknown text encoder 'text2': this model has 'text'. Nam"
    ):
        edit.quickfix(tiny_sd1, MONET, encoder="text2")


@pytest.mark.parametrize(
    "site", ["text.0.self_attn.out_proj", "text.0.self_attn.v_proj", "text.1.self_attn.out_proj"]
)
def test_layer_inputs_equal_those_of_a_plain_forward_pass(tiny_sd1, site):
    """Rows are read in batches, equal rows once, and before the first attention equal tokens once."""
    texts = [
        f"{a} {b}" for a in ("a red", "the red", "an") for b in "abcdefghijklmnopqrstuvwxyz"
    ] + ["a red a"]
    ids = tiny_sd1.tokenize(texts)
    module = getattr(text_layers(tiny_sd1)[int(site[5])].self_attn, site.rpartition(".")[2])
    with torch.no_grad(), record_inputs(module) as seen:
        tiny_sd1.text_encoder(ids)
    inputs = captions.layer_inputs(tiny_sd1, site, ids)
    torch.testing.assert_close(inputs, seen[0], rtol=1e-5, atol=1e-6)
    features, rows = captions.read_layer(tiny_sd1, site, ids)
    assert len(features) == len(texts) - 1 and rows[-1] == rows[0]


def test_captions_of_one_call_equal_those_of_single_calls(tiny_sd1):
    concepts = [
        (c, f)
        for c in ("van gogh", " dog ", "é", "a")
        for f in ("", "a photo of ", "the {} of a dog")
    ]
    for whole, (concept, frame) in zip(
        captions.captions(tiny_sd1, concepts), concepts, strict=True
    ):
        alone = captions.caption(tiny_sd1, concept, frame)
        assert (whole.text, whole.first, whole.last, whole.eos) == (
            alone.text,
            alone.first,
            alone.last,
            alone.eos,
        )
        assert torch.equal(whole.ids, alone.ids)
    assert captions.captions(tiny_sd1, []) == []
    with pytest.raises(ValueError, match="cut off by the limit of 77 tokens"):
        captions.captions(tiny_sd1, [("dog", ""), ("dog", "very " * 80)])


@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_by_sums_equals_that_by_rows(tiny_sd1, bias):
    """More keys than columns are solved by sums; the dual form reads each row."""
    pairs = {"monet": "painting", "dog": "cat"}
    change, rows = (
        edit.quickfix(tiny_sd1, pairs, solver=s, subtract_bias=bias) for s in ("auto", "dual")
    )
    assert len(change.keys) > change.keys.shape[1]
    assert float((change.delta - rows.delta).norm()) <= 1e-8 * float(rows.delta.norm())
    for name in ("residual_before", "residual_after", "delta_norm", "empty_prompt_drift"):
        assert change.report[name] == pytest.approx(rows.report[name], rel=1e-7)
    a, b = change.movements[0], rows.movements[0]
    assert isinstance(a.residual_data, Targets) and isinstance(b.residual_data, torch.Tensor)
    assert torch.equal(a.residuals, b.residuals) and a.residuals is a.residuals
