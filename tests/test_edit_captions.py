"""Captions of concepts and of nothing: every method erases a concept to nothing, at the layer that the UNet reads."""

import pytest
import torch

import overpaint
from overpaint import edit
from overpaint.edit.captions import align_captions, caption, encoder_features
from overpaint.edit.weights import find_weight

GONE = {"van gogh": ""}
PROMPT = "a photo of van gogh"
LAYOUTS = ("sd1", "sd2", "sdxl")
METHODS = {
    "quickfix": edit.quickfix,
    "rename": lambda model, pairs: edit.rename(model, pairs, any_token=True, collateral=False),
    "auto": lambda model, pairs: edit.auto(
        model, pairs, contexts=8, background=8, preserve_weight=5.0, vocabulary=["monet"], collateral=False
    ),
    "uce": edit.uce,
    "time": edit.time,
    "loco": lambda model, pairs: edit.loco(model, pairs, window=11),
    "swap_embedding": edit.swap_embedding,
    "random_site": edit.random_site,
    "finetune": lambda model, pairs: edit.finetune(
        model, pairs, steps=2, pictures=1, picture_steps=2, frames=["a photo of "]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(real_vocabulary):
    return {layout: overpaint.load(real_vocabulary(layout)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_erases_a_concept_to_nothing(models, layout, name, tmp_path):
    model = models[layout]
    change = METHODS[name](model, GONE)
    assert change.pairs == GONE
    assert any(m.delta.abs().max() > 0 for m in change.movements)
    change.save(tmp_path / "c.safetensors")
    assert overpaint.Change.load(tmp_path / "c.safetensors").digest == change.digest
    before = model.encode([PROMPT])
    with change.applied(model):
        pass
    assert model.encode([PROMPT]).equal(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["quickfix", "auto", "swap_embedding"])
def test_text_edits_to_nothing_move_the_prompt(models, layout, name):
    model = models[layout]
    before = model.encode([PROMPT, "a photo of a dog"])
    with METHODS[name](model, GONE).applied(model):
        after = model.encode([PROMPT, "a photo of a dog"])
    concept, other = ((after - before).square().sum((1, 2))).tolist()
    assert concept > 0 and (name == "quickfix" or other < concept)


def test_the_caption_of_nothing_is_the_frame_alone(models):
    model = models["sd1"]
    nothing = caption(model, "", "a photo of {} in a park")
    assert nothing.text == "a photo of  in a park"
    assert (nothing.first, nothing.last, nothing.eos) == (3, 3, 7)
    bare = caption(model, " ", "")
    assert (bare.text, bare.first, bare.last, bare.eos) == ("", 0, 0, 1)


def test_tokens_after_an_erased_concept_are_aligned_with_themselves(models):
    (pair,) = align_captions(models["sd1"], GONE, ["a photo of {} in a park"], "subject_to_end")
    assert pair.positions[:6] == [(4, 3), (5, 3), (6, 4), (7, 5), (8, 6), (9, 7)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frame", ["", "painting by "])
def test_uce_maps_the_concept_to_the_token_before_it(models, layout, frame):
    model = models[layout]
    change = edit.uce(model, GONE, frames=[frame], layers=[0], ridge=1e-6)
    features = model.encode([f"{frame} "])[0]  # not "", whose features are zero in SDXL
    place = 2 if frame else 0
    width = change.movements[0].right.shape[1]
    source = features[place, :width].double()
    key = change.movements[0].keys[0].double()
    for movement in change.movements:
        weight = find_weight(model, movement.site).parameter.detach().double()
        new = weight + movement.left.double() @ movement.right.double()
        assert torch.allclose(new @ key, weight @ source, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_erased_tokens_get_the_row_of_the_end_of_text(models, layout):
    model = models[layout]
    van, gogh = model.tokenizer("van gogh", add_special_tokens=False).input_ids
    with edit.swap_embedding(model, GONE).applied(model):
        for encoder in model.text_encoders:
            table = encoder.get_input_embeddings().weight
            end = model.tokenizer.eos_token_id
            assert torch.allclose(table[van], table[end]) and torch.allclose(
                table[gogh], table[end]
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_that_the_unet_reads_follows_clip_skip(real_vocabulary, layout):
    for skip in (0, 1) if layout != "sdxl" else (0,):
        model = overpaint.load(real_vocabulary(layout), clip_skip=skip)
        packed = model.encode([PROMPT])
        parts = [
            encoder_features(model, i, model.tokenize([PROMPT], encoder=i))
            for i in range(len(model.text_encoders))
        ]
        joint = torch.cat(parts, dim=-1)
        assert torch.allclose(joint, packed[:, :77, : joint.shape[-1]], atol=1e-5)


@pytest.mark.parametrize("method", ["uce", "time", "loco"])
def test_edits_of_cross_attention_read_the_layer_of_clip_skip(real_vocabulary, method):
    """The keys are features of the skipped layer, those of the empty prompt as a concept too."""
    plain = overpaint.load(real_vocabulary("sd1"))
    skipping = overpaint.load(real_vocabulary("sd1"), clip_skip=1)
    frames = {"frames": [""]}
    change = getattr(edit, method)(skipping, GONE, **frames)
    key = skipping.encode(["van gogh"])[0, 2]
    assert bool((change.movements[0].keys - key).abs().sum(1).min() < 1e-4)
    other = getattr(edit, method)(plain, GONE, **frames)
    assert not torch.allclose(change.movements[0].keys, other.movements[0].keys, atol=1e-3)


def test_the_layer_scan_ends_at_the_layer_of_clip_skip(real_vocabulary):
    settings = {"contexts": 8, "background": 8, "vocabulary": ["monet"], "collateral": False}
    model = overpaint.load(real_vocabulary("sd1"), clip_skip=1)
    change = edit.auto(model, GONE, layer="auto", repair=False, **settings)
    assert [row["layer"] for row in change.report["layers"]] == [0]
    note = edit.quickfix(model, GONE, layer=1).report["notes"][0]
    assert note.startswith("the UNet reads the text features of 'text' before layer 1")
