"""A public CLIP as the scorer, compared with the forward pass of transformers' CLIP."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import overpaint as op
from overpaint import zoo
from overpaint.probes import Probe
from overpaint.scorers.clip import Clip
from overpaint.trace import Drawing, TextStates, UNetStates, provenance

CAT = Probe("a", "object", "a cat in noto style", "cat")
DOG = Probe("b", "count", "two dogs", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a random CLIP that reads pictures of 32x32 pixels, with the tokenizer of the shipped judge."""
    from transformers import CLIPTokenizerFast

    path = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizerFast.from_pretrained(zoo.folder("icons-judge"))
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_score_equals_the_cosine_of_clips_forward_pass(folder):
    from transformers import CLIPTokenizerFast

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tokens = CLIPTokenizerFast.from_pretrained(folder)(
        [CAT.prompt, DOG.prompt], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder).eval()(
            **tokens, pixel_values=(images - mean) / std
        )
    expected = F.cosine_similarity(output.image_embeds, output.text_embeds)
    assert torch.allclose(Clip(folder).score(images, [CAT, DOG]), expected, atol=1e-6)


def test_pictures_of_any_size_are_read_and_gradients_pass(folder):
    clip = Clip(folder)
    plain = torch.full((1, 3, 32, 32), 0.25)
    large = torch.full((1, 3, 512, 512), 0.25, requires_grad=True)
    score = clip.score(large, [CAT])
    assert torch.allclose(score, clip.score(plain, [CAT]), atol=1e-6)
    (grad,) = torch.autograd.grad(score.sum(), [large])
    assert grad.abs().sum() > 0
    assert (
        provenance.scorer_digest(clip.score)
        == provenance.scorer_digest(Clip(folder).score)
        is not None
    )


def test_a_trace_uses_its_scores(tiny_sd1, folder):
    clip = Clip(folder)
    effects = op.trace.unet(
        tiny_sd1,
        [CAT],
        drawing=Drawing(steps=1, solver="own"),
        states=UNetStates(only=["unet.mlp.0"]),
        scorer=clip.score,
    )
    (row,) = effects.table.to_pylist()
    image = tiny_sd1.generate(CAT.prompt, seed=0, steps=1).images
    assert row["score_clean"] == pytest.approx(clip.score(image, [CAT]).item(), abs=1e-5)
    assert effects.protocol["scorer"] == folder.name  # no path of this machine


def test_a_folder_without_a_complete_clip_is_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load a CLIP from .*: name a folder that"):
        Clip(tmp_path)
    half = shutil.copytree(folder, tmp_path / "half")
    weights = load_file(half / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot load a CLIP .*it lacks visual_projection.weight"):
        Clip(half)


def test_a_scorer_of_another_picture_size_is_an_error_before_any_is_drawn(tiny_sd1):
    class Large:
        name, size = "mine", 512

        def score(self, images, probes):
            raise AssertionError("no picture should be drawn")

    height, width = tiny_sd1.size
    message = f"mine reads pictures of 512x512 pixels, and .* draws {width}x{height}: pass another `scorer`"
    for trace in (op.trace.unet, op.trace.text_encoder):
        with pytest.raises(ValueError, match=message):
            trace(tiny_sd1, [CAT], drawing=Drawing(steps=1), scorer=Large().score)
    options = {"generate": False, "controls": "none", "states": TextStates(positions=("eos",))}
    assert len(op.trace.text_encoder(tiny_sd1, [CAT], scorer=Large().score, **options)) == 24


def test_its_features_and_layers_equal_those_of_clips_towers_and_measure_an_edit(tiny_sd1, folder):
    clip = Clip(folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [CAT.prompt, DOG.prompt]
    cosine = (clip.image_features(images) * clip.text_features(prompts)).sum(1)
    assert torch.allclose(cosine, clip.score(images, [CAT, DOG]), atol=1e-6)
    assert torch.allclose(clip.image_features(images).norm(dim=1), torch.ones(2))
    assert [tuple(layer.shape) for layer in clip.layers(images)] == [(2, 17, 32)] * 2
    change = op.edit.swap_embedding(tiny_sd1, {"noto style": "blob style"})
    cases = op.probes.load_shipped_set("style", "noto style", "blob style").thinned(2)
    measures = op.evaluate.measure(
        tiny_sd1, change, cases, scorer=clip, only=["clip_cosine", "perceptual"], steps=1
    )
    drawn = [case for case in cases.cases if case.role == "other"]
    before = tiny_sd1.generate([c.prompt for c in drawn], seed=[4, 5], steps=1).images
    expected = clip.score(before, drawn).mean().item()
    assert measures.row("other", "clip_cosine").before.mean == pytest.approx(expected, abs=1e-5)
    assert measures.row("target", "perceptual").after.mean > 0
    assert measures.protocol["features"] == folder.name
