"""Edits of SDXL's two text encoders in one change: solved, applied, stacked, saved, cut and exported together."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import overpaint
from overpaint import edit
from overpaint.edit import export, verdict
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage

GOGH = {"van gogh": "monet"}
PROMPT = "a house in van gogh style"
AUTO = {
    "collateral": False,
    "contexts": 8,
    "background": 8,
    "preserve_weight": 5.0,
    "vocabulary": ["picasso", "snoopy", "a red apple"],
}


@pytest.fixture(scope="module")
def xl(real_vocabulary):
    """Two encoders of 2 and 3 layers with CLIP's vocabulary."""
    model = overpaint.load(real_vocabulary("sdxl"))
    model.encode([""])
    return model


@pytest.fixture(scope="module")
def change(xl):
    return edit.quickfix(xl, GOGH, preserve=["", "a cat"])


@pytest.fixture(scope="module")
def renamed(xl):
    return edit.rename(xl, GOGH, any_token=True, collateral=False)


def weights(model):
    return [p.detach().clone() for encoder in model.text_encoders for p in encoder.parameters()]


def moved(model, change):
    """Return how far `PROMPT` moves: in the first encoder, in the second one, and in the pooled vector."""
    before = model.encode([PROMPT])[0]
    with change.applied(model):
        shift = (model.encode([PROMPT])[0] - before).abs()
    first = model.text_encoders[0].config.hidden_size
    return float(shift[:77, :first].max()), float(shift[:77, first:].max()), float(shift[77].max())


METHODS = {
    "quickfix": lambda model, **options: edit.quickfix(model, GOGH, **options),
    "auto": lambda model, **options: edit.auto(model, GOGH, **AUTO, **options),
    "auto, layer": lambda model, **options: edit.auto(model, GOGH, tokens=False, **AUTO, **options),
    "swap_embedding": lambda model, **options: edit.swap_embedding(model, GOGH, **options),
    "random_site": lambda model, **options: edit.random_site(model, GOGH, **options),
}


@pytest.mark.parametrize("name", METHODS)
def test_both_encoders_are_edited_in_one_change_and_restored(xl, name):
    before = weights(xl)
    change = METHODS[name](xl)
    parts = {site.partition(".")[0] for site in change.sites}
    assert parts == {"text", "text2"} and change.protocol["encoder"] == "all"
    assert "unedited_encoders" not in change.report
    assert set(change.report["encoders"]) == parts
    if name != "random_site":  # the only layer of the first encoder that the UNet reads is layer 0
        assert all(distance > 1e-3 for distance in moved(xl, change))
    change.apply(xl)
    change.revert(xl)
    assert all(map(torch.equal, before, weights(xl)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("encoder", "other"), [("text", "text2"), ("text2", "text")])
def test_one_encoder_is_edited_alone_and_the_report_names_the_other(xl, name, encoder, other):
    change = METHODS[name](xl, encoder=encoder)
    assert {site.partition(".")[0] for site in change.sites} == {encoder}
    assert change.report["unedited_encoders"] == [other]
    assert change.protocol["encoder"] == encoder
    first, second, pooled = moved(xl, change)
    if encoder == "text":
        assert second == pooled == 0
    else:
        assert first == 0 and pooled > 0


def test_each_encoder_is_solved_on_its_own_keys(xl, change):
    for part, movement in zip(("text", "text2"), change.movements, strict=True):
        alone = edit.quickfix(xl, GOGH, preserve=["", "a cat"], encoder=part)
        assert torch.equal(alone.delta, movement.delta)
        for name in ("empty_prompt_drift", "residual_after", "preserve_drift"):
            assert change.report["encoders"][part][name] == alone.report[name]
            assert change.report[name] >= alone.report[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_report_states_what_guidance_reads(xl, name):
    """By default guidance reads zeros for the empty prompt, which no edit moves."""
    assert xl.guidance_reads_zeros
    change = METHODS[name](xl)
    before = xl.encode([""])
    with change.applied(xl):
        assert torch.equal(xl.encode([""]), before)
    assert change.report.get("empty_prompt_drift", 0) == 0
    assert change.report["guidance_reads_zeros"] is True
    sentence = verdict.describe(change)
    assert "guidance reads zeros for the empty prompt, which no edit moves" in sentence
    assert "Warning" not in sentence


def test_the_report_states_the_drift_where_guidance_reads_the_empty_prompt(xl):
    xl.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        assert not xl.guidance_reads_zeros
        change = edit.quickfix(xl, GOGH)
        before = xl.encode([""])
        with change.applied(xl):
            assert not torch.equal(xl.encode([""]), before)
    finally:
        xl.pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert change.report["empty_prompt_drift"] > 0.01
    assert "guidance_reads_zeros" not in change.report
    assert "the empty prompt moves by" in verdict.describe(change)


def test_models_with_one_encoder_report_no_other(real_vocabulary):
    for layout in ("sd1", "sd2"):
        model = overpaint.load(real_vocabulary(layout))
        change = edit.quickfix(model, GOGH)
        assert change.site == "text.0.self_attn.out_proj" and change.protocol["encoder"] == "text"
        assert not {"encoders", "unedited_encoders"} & change.report.keys()


def test_changes_of_both_encoders_are_added_separated_saved_and_scaled(xl, change, tmp_path):
    other = edit.quickfix(xl, {"snoopy": "dog"}, preserve=["", "a cat"])
    both = edit.quickfix(xl, {**GOGH, "snoopy": "dog"}, preserve=["", "a cat"])
    for joint in (change + other, edit.stack(xl, [other, change])):
        for a, b in zip(joint.movements, both.movements, strict=True):
            assert a.site == b.site
            assert (a.delta - b.delta).norm() <= 1e-6 * b.delta.norm()
        rest = joint.without("snoopy")
        for a, b in zip(rest.movements, change.movements, strict=True):
            assert (a.delta - b.delta).norm() <= 1e-6 * b.delta.norm()
    change.save(tmp_path / "c.safetensors")
    loaded = overpaint.Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == change.digest
    completed = edit.complete(xl, loaded)
    for a, b in zip(completed.movements, change.movements, strict=True):
        assert torch.allclose(a.gram, b.gram)
    half = moved(xl, 0.5 * change)
    assert all(0 < h < w for h, w in zip(half, moved(xl, change), strict=True))
    small = change.compact(rank=4)
    assert small.sites == change.sites and small.report["compact_error"] < 1


def test_a_change_of_the_first_encoder_stacks_with_its_like_alone(xl, change):
    first = edit.quickfix(xl, {"snoopy": "dog"}, encoder="text")
    second = edit.quickfix(xl, {"a cat": "a dog"}, encoder="text")
    assert set(edit.stack(xl, [first, second]).pairs) == {"snoopy", "a cat"}
    with pytest.raises(ValueError, match="these changes move different weights"):
        edit.stack(xl, [first, change])


def test_automatic_changes_are_stacked_completed_and_cut_for_each_encoder(xl, tmp_path):
    settings = {**AUTO, "tokens": False, "repair": False}
    del settings["preserve_weight"]  # stacking chooses it anew
    first = edit.auto(xl, GOGH, **settings)
    second = edit.auto(xl, {"snoopy": "dog"}, **settings)
    joint = edit.stack(xl, [second, first])
    assert "unedited_encoders" not in joint.report  # each encoder was solved alone, both are edited
    again = edit.auto(xl, {"snoopy": "dog", **GOGH}, **settings)
    for a, b in zip(joint.movements, again.movements, strict=True):
        assert a.site == b.site
        assert (a.delta - b.delta).norm() <= 1e-6 * b.delta.norm()
    alone = edit.stack(xl, [joint], without=["snoopy"])
    assert set(alone.pairs) == set(GOGH)
    with pytest.raises(ValueError, match=r"add it with `edit\.stack"):
        first + second
    first.save(tmp_path / "c.safetensors")
    completed = edit.complete(xl, overpaint.Change.load(tmp_path / "c.safetensors"))
    for a, b in zip(completed.movements, first.movements, strict=True):
        assert (a.gram - b.gram).norm() <= 1e-6 * b.gram.norm()
    assert completed.compact(rank=4).sites == first.sites


def test_a_rename_moves_rows_of_both_embeddings(xl, renamed):
    assert {"text.token_embedding", "text2.token_embedding"} <= set(renamed.sites)
    gogh, monet = xl.tokenizer("gogh monet", add_special_tokens=False).input_ids
    tables = [find_weight(xl, f"{p}.token_embedding").parameter.clone() for p in ("text", "text2")]
    with renamed.applied(xl):
        for part, before in zip(("text", "text2"), tables, strict=True):
            row = find_weight(xl, f"{part}.token_embedding").parameter[gogh]
            assert torch.allclose(row, before[monet])


def test_a_file_with_rows_of_both_embeddings_is_small_and_equal(xl, renamed, tmp_path):
    renamed.save(tmp_path / "c.safetensors")
    loaded = overpaint.Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == renamed.digest
    assert (tmp_path / "c.safetensors").stat().st_size < 4_000_000


def test_the_layer_is_chosen_by_the_state_that_the_unet_reads(xl):
    change = edit.auto(
        xl, GOGH, **{**AUTO, "repair": False}, tokens=False, layer="auto", preserve=["a cat"]
    )
    assert [row["layer"] for row in change.report["encoders"]["text"]["layers"]] == [0]
    assert [row["layer"] for row in change.report["encoders"]["text2"]["layers"]] == [0, 1]


def test_layers_that_the_unet_does_not_read_are_noted(xl):
    change = edit.quickfix(xl, GOGH, layer=1)
    (note,) = change.report["notes"]
    assert "reads the text features of 'text' before layer 1" in note
    first, second, _ = moved(xl, change)
    assert first == 0 < second
    skipping = overpaint.TextToImage(xl.pipe, name="xl", clip_skip=0)
    assert "notes" not in edit.quickfix(skipping, GOGH).report


def test_exports_hold_both_encoders(xl, change, tmp_path):
    lora = load_file(export.lora(change, tmp_path / "lora.safetensors"))
    assert {name.partition(".")[0] for name in lora} == {"text_encoder", "text_encoder_2"}
    edited = overpaint.load(export.folder(xl, change, tmp_path / "edited"))
    with change.applied(xl):
        assert torch.equal(edited.encode([PROMPT]), xl.encode([PROMPT]))
    clone = TextToImage(copy.deepcopy(xl.pipe), name="clone")
    change.apply(clone)
    assert torch.allclose(edited.encode([PROMPT]), clone.encode([PROMPT]), atol=1e-5)


@pytest.mark.parametrize("method", ["uce", "time", "loco"])
def test_edits_of_cross_attention_read_both_encoders_and_name_the_pooled_vector(xl, method):
    settings = {"window": 11} if method == "loco" else {}
    change = getattr(edit, method)(xl, GOGH, **settings)
    wide = sum(encoder.config.hidden_size for encoder in xl.text_encoders)
    assert all(m.keys.shape[1] == wide == m.right.shape[1] for m in change.movements)
    packed = xl.encode(["van gogh"])[0]
    key = change.movements[0].keys[change.movements[0].keys[:, 0].ne(packed[0, 0])][0]
    assert key[:32].any() and key[32:].any()
    assert "pooled vector of the second text encoder" in change.report["notes"][-1]
