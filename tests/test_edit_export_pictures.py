"""Pictures that stock diffusers draws with each export, compared with those of the applied change.

Three models: `icons`; a folder of Stable Diffusion 1.5's layout with CLIP's real vocabulary; and one of SDXL's. The
pictures are drawn by the pipelines of diffusers themselves, from the same initial noise.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from test_edit_export import random_change

import overpaint
from overpaint import edit, zoo
from overpaint.edit import Change, export
from overpaint.model.sampling import make_scheduler

STEPS = 4
LARGEST = 1e-4
SITES = {
    "sd1": ("text.0.self_attn.out_proj", "text.1.mlp.fc2", "unet.cross_attn.0.to_k", "unet.cross_attn.9.to_out"),
    "sdxl": ("text.0.self_attn.v_proj", "text2.1.mlp.fc2", "unet.cross_attn.1.to_v"),
}  # fmt: skip
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="diffusers reads LoRAs through peft"
)


@pytest.fixture(scope="module")
def icons():
    return overpaint.load("icons")


@pytest.fixture(scope="module")
def icons_change(icons):
    return edit.quickfix(icons, {"dog": "cat"})


def expected_pictures(model, change, prompts):
    """Return the pictures of the applied change, after a check that it changes them."""
    seeds = list(range(len(prompts)))
    before = model.generate(prompts, seed=seeds, steps=STEPS).images
    with change.applied(model):
        after = model.generate(prompts, seed=seeds, steps=STEPS).images
    assert float((after - before).abs().max()) > 50 * LARGEST
    return after


def drawn(pipe, model, prompts):
    """Return the pictures that a pipeline of diffusers draws from the noise of `model`, (N, 3, H, W) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    unscaled = make_scheduler(model, "ddim")  # the pipeline scales the noise itself
    return pipe(
        prompts, latents=model.initial_latents(range(len(prompts)), scheduler=unscaled),
        num_inference_steps=STEPS, guidance_scale=model.guidance_scale, output_type="pt",
        height=model.size[0], width=model.size[1],
    ).images  # fmt: skip


def assert_equal_pictures(pipe, model, change, prompts):
    expected = expected_pictures(model, change, prompts)
    assert float((drawn(pipe, model, prompts) - expected).abs().max()) <= LARGEST


def stock(folder):
    """Return the pipeline that diffusers loads from a folder in float32, without a safety checker."""
    options = (
        {} if "XL" in (Path(folder) / "model_index.json").read_text() else {"safety_checker": None}
    )
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **options)


@needs_peft
@pytest.mark.parametrize("write", [export.lora, export.kohya, export.comfy])
def test_a_lora_of_text_draws_the_pictures_of_the_change_on_icons(
    icons, icons_change, tmp_path, write
):
    pipe = stock(zoo.folder("icons"))
    pipe.load_lora_weights(write(icons_change, tmp_path / "c.safetensors"))
    assert_equal_pictures(pipe, icons, icons_change, ["a dog", "a dog in noto style"])


@needs_peft
@pytest.mark.parametrize("write", [export.lora, export.kohya, export.comfy])
@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_a_lora_draws_the_pictures_of_the_change_in_real_layouts(
    real_vocabulary, tmp_path, layout, write
):
    model = overpaint.load(real_vocabulary(layout))
    change = random_change(model, *SITES[layout])
    pipe = stock(real_vocabulary(layout))
    pipe.load_lora_weights(write(change, tmp_path / "c.safetensors", model=model))
    assert_equal_pictures(pipe, model, change, ["van gogh, a starry night", "a house"])


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_a_folder_draws_the_pictures_of_the_change_in_real_layouts(
    real_vocabulary, tmp_path, layout
):
    model = overpaint.load(real_vocabulary(layout))
    change = random_change(model, *SITES.get(layout, SITES["sd1"]))
    pipe = stock(export.folder(model, change, tmp_path / "out"))
    assert_equal_pictures(pipe, model, change, ["van gogh, a starry night", "a house"])


def as_stored():
    """Return `icons` in float32, and its edit by the weights that its half-precision files can hold."""
    stored = overpaint.load("icons", dtype="stored")
    change = edit.quickfix(stored, {"dog": "cat"})
    return stored, change


def half_precision_pictures(stored, change, prompts):
    """Return the pictures in float32 of the change applied to the half-precision weights."""
    with change.applied(stored):
        state = {n: t.float() for n, t in stored.text_encoder.state_dict().items()}
    model = overpaint.load("icons")
    before = model.generate(prompts, seed=[0, 1], steps=STEPS).images
    model.text_encoder.load_state_dict(state)
    after = model.generate(prompts, seed=[0, 1], steps=STEPS).images
    assert float((after - before).abs().max()) > 50 * LARGEST
    return model, after


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_a_whole_model_draws_the_pictures_of_the_change_on_icons(tmp_path, form):
    """The files of `icons` are float16, so the edited weights are rounded once, as in a change applied in float16."""
    stored, change = as_stored()
    prompts = ["a dog", "a dog in noto style"]
    if form == "folder":
        pipe = stock(export.folder(stored, change, tmp_path / "out"))
    else:
        path = export.single_file(stored, change, tmp_path / "c.safetensors")
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=str(zoo.folder("icons")), local_files_only=True,
            safety_checker=None, dtype=torch.float32,
        )  # fmt: skip
    model, expected = half_precision_pictures(stored, change, prompts)
    assert float((drawn(pipe, model, prompts) - expected).abs().max()) <= LARGEST


def test_a_single_file_draws_the_pictures_of_the_change_in_the_real_layout(
    real_vocabulary, tmp_path
):
    model = overpaint.load(real_vocabulary("sd1"))
    change = random_change(model, *SITES["sd1"])
    path = export.single_file(model, change, tmp_path / "c.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(
        str(path), config=str(real_vocabulary("sd1")), local_files_only=True, safety_checker=None
    )
    assert_equal_pictures(pipe, model, change, ["van gogh, a starry night", "a house"])


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_textual_inversion_files_draw_the_pictures_of_a_rename(real_vocabulary, tmp_path, layout):
    """diffusers refuses a word that the vocabulary has, so it gets the file under another name."""
    model = overpaint.load(real_vocabulary(layout))
    change = edit.rename(model, {"gogh": "monet"}, any_token=True, collateral=False)
    folder = export.embeddings(model, change, tmp_path / "words")
    pipe = stock(real_vocabulary(layout))
    state = load_file(folder / "gogh.safetensors")
    parts = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}
    for name, rows in state.items():
        tokenizer, encoder = parts.get(name, parts["clip_l"])
        pipe.load_textual_inversion(
            {"<gogh>": rows}, token="<gogh>",
            tokenizer=getattr(pipe, tokenizer), text_encoder=getattr(pipe, encoder),
        )  # fmt: skip
    expected = expected_pictures(model, change, ["van gogh, a starry night"])
    actual = drawn(pipe, model, ["van <gogh>, a starry night"])
    assert float((actual - expected).abs().max()) <= LARGEST


def test_a_lora_with_token_rows_draws_the_pictures_of_the_change_as_comfyui_adds_it(
    real_vocabulary, tmp_path
):
    """diffusers knows no token rows in a LoRA, so the movement is added as ComfyUI's reader adds it."""
    model = overpaint.load(real_vocabulary("sd1"))
    rows = edit.rename(model, {"gogh": "monet"}, any_token=True, collateral=False)
    change = Change((*rows.movements, *random_change(model, SITES["sd1"][0]).movements), rows.protocol, {})  # fmt: skip
    tensors = load_file(export.comfy(change, tmp_path / "c.safetensors"))
    pipe = stock(real_vocabulary("sd1"))
    weights = {
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding":
            pipe.text_encoder.get_input_embeddings().weight,
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj":
            pipe.text_encoder.encoder.layers[0].self_attn.out_proj.weight,
    }  # fmt: skip
    assert {name.partition(".lora_")[0].removesuffix(".alpha") for name in tensors} == set(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            up, down = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("up", "down"))
            weight += float(tensors[f"{name}.alpha"]) / len(down) * (up @ down)
    assert_equal_pictures(pipe, model, change, ["van gogh, a starry night", "a house"])
