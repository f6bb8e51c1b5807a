import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites, text_features
from overpaint.model.sampling import denoise
from overpaint.zoo import builders


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny pipeline's folder that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def test_load_returns_float32_for_weights_of_any_dtype(tiny_sd1, tmp_path):
    builders.tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    model = op.load(tmp_path)
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert model.name == str(tmp_path)
    for ours, theirs in zip(model.unet.parameters(), tiny_sd1.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())
    assert op.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_files_marked_fp16(copy, tiny_sd1):
    for file in copy.glob("*/*.safetensors"):
        file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    model = op.load(copy)
    assert torch.equal(next(model.unet.parameters()), next(tiny_sd1.unet.parameters()))


def test_settings_are_read_from_the_folder(copy):
    assert op.load(copy).guidance_scale == 7.5
    settings = {"guidance_scale": 4, "held_out": [["cat", "noto"]], "card": "x"}
    (copy / "overpaint.json").write_text(json.dumps(settings))
    model = op.load(copy)
    assert (model.guidance_scale, model.held_out) == (4.0, {("cat", "noto")})


def test_load_does_not_copy_a_live_pipeline():
    pipe = builders.tiny()
    model = op.load(pipe)
    assert model.pipe is pipe
    assert model.unet is pipe.unet


def test_a_picture_depends_only_on_prompt_and_seed(tiny_sd1):
    prompts = ["a cat", "a dog in noto style", "a cat"]
    first = tiny_sd1.generate(prompts, seed=[1, 2, 3], steps=3)
    again = tiny_sd1.generate(prompts, seed=[1, 2, 3], steps=3)
    assert torch.equal(first.images, again.images)
    for size in (1, 2):
        other = tiny_sd1.generate(prompts, seed=[1, 2, 3], steps=3, batch_size=size)
        assert torch.allclose(first.images, other.images, atol=1e-4)
    alone = tiny_sd1.generate("a cat", seed=3, steps=3)
    assert torch.allclose(first.images[2:], alone.images, atol=1e-4)
    assert (first.images[0] - first.images[2]).abs().max() > 0.05  # other seed
    same = tiny_sd1.generate(prompts, seed=1, steps=3)
    assert same.seeds == (1, 1, 1)
    assert torch.equal(same.images[0], same.images[2])
    assert not torch.equal(same.images[0], same.images[1])


def test_generate_equals_the_diffusers_pipeline(tiny_sd1):
    pipe = tiny_sd1.pipe
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a cat",
        latents=tiny_sd1.initial_latents([5]),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
    ).images
    ours = tiny_sd1.generate("a cat", seed=5, steps=4, guidance_scale=3.0)
    assert torch.allclose(ours.images, theirs, atol=1e-5)


def test_generate_equals_the_diffusers_pipeline_with_velocity_prediction(tiny_sd2):
    pipe = tiny_sd2.pipe
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a cat", latents=tiny_sd2.initial_latents([5]), num_inference_steps=3, height=16, width=16,
        output_type="pt",
    ).images  # fmt: skip
    ours = tiny_sd2.generate("a cat", seed=5, steps=3)
    assert ours.protocol["prediction_type"] == "v_prediction"
    assert torch.allclose(ours.images, theirs, atol=1e-5)


def test_generate_equals_the_diffusers_pipeline_for_sdxl(tiny_xl):
    pipe = tiny_xl.pipe
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.force_zeros_for_empty_prompt
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    for scale in (1.0, 5.0):
        theirs = pipe(
            ["a cat", "a dog"], latents=torch.stack(noise), num_inference_steps=3, height=16, width=16,
            guidance_scale=scale, output_type="pt",
        ).images  # fmt: skip
        ours = tiny_xl.generate(["a cat", "a dog"], seed=[5, 6], steps=3, guidance_scale=scale)
        assert torch.allclose(ours.images, theirs, atol=1e-5)
    assert ours.protocol["text_encoders"] == 2
    assert tiny_xl.guidance_scale == 5.0  # the pipeline's own default


def test_sdxl_encodes_the_empty_prompt_by_its_setting(tiny_xl):
    def stock(pipe):
        full, empty, full_pooled, empty_pooled = pipe.encode_prompt("a cat", device="cpu")
        return torch.cat([empty, full]), torch.cat([empty_pooled, full_pooled])

    model = op.load(builders.tiny("sdxl", text_layers=2))
    for zeros in (True, False):
        model.pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        with torch.no_grad():
            hidden, pooled = stock(model.pipe)
        ours = model.encode(["", "a cat"])
        assert ours.shape == (2, 78, 80)
        assert torch.allclose(ours[:, :77], hidden, atol=1e-5)
        assert torch.allclose(ours[:, 77, :40], pooled, atol=1e-5)
        assert not ours[:, 77, 40:].any()
        assert bool(ours[0].any()) is not zeros


def test_packed_features_equal_the_encoders_outputs(tiny_sd1, tiny_xl):
    ids = [tiny_xl.tokenize(["a cat"], encoder=i) for i in (0, 1)]
    assert ids[0][0, 3:].unique().tolist() == [tiny_xl.tokenizer.eos_token_id]
    assert ids[1][0, 4:].unique().tolist() == [0]  # the second pads with `!`
    first, second = tiny_xl.text_encoders
    assert first is tiny_xl.text_encoder
    with torch.no_grad():
        packed = text_features(tiny_xl.text_encoders, ids)[0]
        # The penultimate state of an encoder is the last one of an encoder without its last block.
        for encoder, rows, columns in ((first, ids[0], slice(32)), (second, ids[1], slice(32, 80))):
            layer = encoder.get_submodule(sites.find_text(encoder)[-1].path.removesuffix(".mlp"))
            with hooks.record_inputs(layer.layer_norm1, stop=True) as seen:
                encoder(rows)
            assert torch.equal(packed[:77, columns], seen[0][0])
        last = second(ids[1]).last_hidden_state[0, 3]  # at the first end-of-text token
        assert torch.allclose(packed[77, :40], second.text_projection.weight @ last, atol=1e-6)
    only = text_features(tiny_sd1.text_encoders, [tiny_sd1.tokenize(["a cat"])])
    assert torch.equal(only, tiny_sd1.encode(["a cat"]))


def test_load_sdxl_from_a_folder(tiny_xl, tmp_path):
    tiny_xl.pipe.save_pretrained(tmp_path)
    model = op.load(tmp_path)
    assert torch.equal(
        model.generate("a cat", steps=1).images, tiny_xl.generate("a cat", steps=1).images
    )
    (weights,) = (tmp_path / "text_encoder_2").glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["text_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedModel, match="text_encoder_2' are not this model's: 1 are missing.*text_proj"
    ):
        op.load(tmp_path)


def test_sdxl_decodes_half_precision_in_float32(tiny_xl):
    """Large weights make the decoder overflow in float16, as SDXL's does."""
    model = op.load(builders.tiny("sdxl", text_layers=1).to(torch.float16))
    vae, latents = model.vae, tiny_xl.initial_latents([0, 1], steps=20).half()
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(30000)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    images = model.decode(latents)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert vae.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(model.decode(latents)).all()


def test_start_noise_is_scaled_by_the_schedule(tiny_xl, tiny_sd1):
    """Euler's scale for SDXL's spacing is sqrt(1 + sigma^2), with sigma the noise level of the first step."""
    raw = tiny_sd1.initial_latents([3])  # DDIM: scale 1
    cumulative = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    for steps in (2, 20):
        first = (steps - 1) * (1000 // steps) + 1
        sigma = ((1 - cumulative[first]) / cumulative[first]) ** 0.5
        scaled = tiny_xl.initial_latents([3], steps=steps)
        assert torch.allclose(scaled, raw * (1 + sigma**2) ** 0.5, rtol=1e-4)
    other = tiny_xl.initial_latents([3], steps=20, scheduler=tiny_sd1.scheduler)
    assert torch.equal(other, raw)


def test_images_and_protocol(tiny_sd1):
    pictures = tiny_sd1.generate(["a cat"] * 2, seed=7, steps=2, guidance_scale=1)
    assert pictures.images.shape == (2, 3, 16, 16)
    assert pictures.images.dtype == torch.float32
    assert 0 <= pictures.images.min() < pictures.images.max() <= 1
    settings = {"steps": 2, "guidance_scale": 1, "scheduler": "DDIMScheduler", "dtype": "float32"}
    assert pictures.protocol.items() >= settings.items()
    assert pictures.protocol["versions"]["torch"] == torch.__version__


def test_progress_counts_every_step(tiny_sd1):
    seen = []
    tiny_sd1.generate(["a"] * 3, steps=2, batch_size=2, on_progress=lambda *x: seen.append(x))
    assert seen == [(i, 4, "drawing") for i in (1, 2, 3, 4)]


def test_unguided_batches_hold_only_the_conditional_rows(tiny_sd1):
    class Recorder:
        scheduler = tiny_sd1.scheduler
        rows = []

        def noise_pred(self, latents, t, prompt_embeds):
            self.rows.append((latents.shape[0], prompt_embeds.shape[0]))
            return latents * 0.1

    embeds, latents = tiny_sd1.encode(["a", "b"]), tiny_sd1.initial_latents([0, 1])
    empty = tiny_sd1.encode([""])
    denoise(Recorder(), latents, embeds, empty, steps=1, guidance_scale=1)
    denoise(Recorder(), latents, embeds, empty, steps=1, guidance_scale=2)
    assert Recorder.rows == [(2, 2), (4, 4)]


def test_pndm_takes_one_more_step_and_runs_share_no_state(tiny_sd1):
    from diffusers import PNDMScheduler

    class Model:
        scheduler = PNDMScheduler.from_config(tiny_sd1.scheduler.config, skip_prk_steps=True)
        times = []

        def noise_pred(self, latents, t, prompt_embeds):
            self.times.append(int(t))
            return latents * 0.1

    counts = []
    run = {"steps": 50, "guidance_scale": 1, "on_step": lambda done, _: counts.append(done)}
    latents, embeds = tiny_sd1.initial_latents([0]), tiny_sd1.encode(["a"])
    first = denoise(Model(), latents, embeds, embeds, **run)
    assert counts == list(range(1, 52))
    assert Model.times[:4] == [981, 961, 961, 941]
    assert torch.equal(denoise(Model(), latents, embeds, embeds, **run), first)
    assert Model.times[:51] == Model.times[51:]


def test_ancestral_noise_depends_only_on_the_row(tiny_sd1):
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = builders.tiny()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    model = op.load(pipe)
    both = model.generate(["a cat", "a dog"], seed=[1, 2], steps=3)
    alone = model.generate("a dog", seed=2, steps=3)
    assert torch.allclose(both.images[1:], alone.images, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "`prompts` is empty: give at least one"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts: give one seed for all"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_generate_raise(tiny_sd1, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_sd1.generate(**{"prompts": ["a cat"], "steps": 1, **change})
    with pytest.raises(TypeError, match="`prompts` must be strings"):
        tiny_sd1.generate([3], steps=1)


def test_unknown_names_raise():
    with pytest.raises(
        ValueError, match=r"unknown model 'icon': it is neither a folder nor a name"
    ):
        op.load("icon")
    with pytest.raises(ValueError, match="unknown model 'no-one/nothing': there is no such folder"):
        op.load("no-one/nothing")


def test_single_files_raise(tmp_path):
    with pytest.raises(UnsupportedModel, match="model.ckpt' is a pickle, which can run any code"):
        op.load(tmp_path / "model.ckpt")
    with pytest.raises(UnsupportedModel, match="is a single file without the model's settings"):
        op.load("model.safetensors")


def test_folders_without_a_supported_pipeline_raise(copy, tmp_path):
    with pytest.raises(
        UnsupportedModel, match="is not a diffusers pipeline: it holds no model_ind"
    ):
        op.load(tmp_path)
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(
        UnsupportedModel, match="holds a FluxPipeline: only StableDiffusionPipeline"
    ):
        op.load(copy)
    index.write_text("{")
    with pytest.raises(UnsupportedModel, match="is not valid JSON"):
        op.load(copy)


def test_pickled_and_absent_weights_raise(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match=r"unet' holds pickled weights \(.bin\)"):
        op.load(copy)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(UnsupportedModel, match="unet' holds no weights: expected a .safetensors"):
        op.load(copy)


def test_damaged_weights_raise(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsupportedModel, match="could not be read as a Stable Diffusion pipeline"):
        op.load(copy)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_weights_raise(copy, part):
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedModel, match="are not this model's: 1 are missing, first|could not"
    ):
        op.load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_raise(value):
    pipe = builders.tiny()
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0] = value
    with pytest.raises(UnsupportedModel, match="unet.conv_out.weight hold NaN or infinite values"):
        op.load(pipe)


def test_other_pipelines_raise():
    with pytest.raises(
        UnsupportedModel, match="Linear is not a Stable Diffusion pipeline: it has no"
    ):
        op.load(torch.nn.Linear(1, 1))
    pipe = builders.tiny()
    pipe.text_encoder_2 = pipe.text_encoder
    with pytest.raises(UnsupportedModel, match="has two text encoders but is not SDXL"):
        op.load(pipe)
    both = builders.tiny("sdxl", text_layers=1)
    pipe = builders.tiny()
    pipe.unet = both.unet
    with pytest.raises(UnsupportedModel, match="UNet .* also takes 'text_time', which one text"):
        op.load(pipe)
    both.text_encoder = pipe.text_encoder
    with pytest.raises(
        UnsupportedModel, match=r"features of width 80, and they return 64 \+ 48: load the parts"
    ):
        op.load(both)


def test_import_does_not_load_diffusers_or_transformers():
    code = "import sys, overpaint; print({'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_size_equals_the_size_of_generated_pictures(tiny_sd1, tiny_xl):
    for model in (tiny_sd1, tiny_xl):
        assert model.size == tuple(model.generate("a cat", steps=1).images.shape[-2:])


def test_a_guidance_scale_of_nan_raises(tiny_sd1):
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number, got nan"):
        tiny_sd1.generate("a cat", steps=1, guidance_scale=float("nan"))


@pytest.mark.parametrize(
    "words", ["{", '{"guidance_scale": "much"}', '{"guidance_scale": NaN}', '{"held_out": [1]}']
)
def test_damaged_settings_raise(copy, words):
    (copy / "overpaint.json").write_text(words)
    with pytest.raises(
        UnsupportedModel, match=r"overpaint.json' (are damaged|is not a finite number)"
    ):
        op.load(copy)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_folder):
    """A local hub cache with the model `someone/tiny`, in the layout of huggingface_hub; its snapshot folder."""
    from huggingface_hub import constants

    place = tmp_path / "hub" / "models--someone--tiny"
    snapshot = place / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_load_reads_a_hub_id_from_the_local_cache(hub, tiny_sd1):
    model = op.load("someone/tiny")
    assert model.name == "someone/tiny"
    assert torch.equal(model.encode(["a cat"]), tiny_sd1.encode(["a cat"]))


def test_a_damaged_model_of_the_hub_raises(hub):
    weights = hub / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("conv_in.bias")
    weights.unlink()
    save_file(tensors, weights)
    with pytest.raises(UnsupportedModel, match=r"1 are missing, first 'conv_in.bias'"):
        op.load("someone/tiny")


def with_text_model(pipe):
    """Add the attribute `text_model` of transformers 4, which diffusers reads for `clip_skip` in Stable Diffusion 1."""
    vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    return pipe


def test_clip_skip_reads_the_layer_that_diffusers_reads():
    deep = with_text_model(builders.tiny(text_layers=4))
    model = op.load(deep, clip_skip=2)
    full = op.load(deep)
    with torch.no_grad():
        expected, negative = deep.encode_prompt(
            "a cat", "cpu", 1, do_classifier_free_guidance=True, clip_skip=2
        )
    assert torch.allclose(model.encode(["a cat"]), expected, atol=1e-5)
    assert not torch.allclose(full.encode(["a cat"]), expected, atol=1e-2)
    assert torch.allclose(model.encode(["a cat", ""])[1:], negative, atol=1e-5)
    other = full.with_clip_skip(2)
    assert other.pipe is full.pipe
    assert torch.equal(other.encode(["a cat"]), model.encode(["a cat"]))


def test_clip_skip_reads_earlier_layers_of_both_encoders_of_sdxl():
    model = op.load(builders.tiny("sdxl", text_layers=4), clip_skip=1)
    with torch.no_grad():
        hidden, _, pooled, _ = model.pipe.encode_prompt("a cat", device="cpu", clip_skip=1)
    features = model.encode(["a cat"])
    assert torch.allclose(features[:, :77], hidden, atol=1e-5)
    assert torch.allclose(features[:, 77, :40], pooled, atol=1e-5)


def test_tracing_and_editing_read_the_features_that_the_unet_reads():
    from overpaint.edit.methods.text_keys import read_features
    from overpaint.probes import Probe
    from overpaint.trace import Noise, TextStates, corruption, text_encoder
    from overpaint.trace.text_encoder_trace import encode_restored

    model = op.load(builders.tiny(text_layers=4), clip_skip=2)
    features = read_features(model, ["a cat"])
    assert torch.allclose(features["a cat"], model.encode(["a cat"])[0], atol=1e-5)
    probe = Probe("b", "object", "a cat in noto style", "cat")
    noise = Noise(sigma=1.0)
    (corrupted,), _ = corruption.corruptions(model, [probe], noise)
    clean = encode_restored(model.text_encoders, corrupted, [], clip_skip=2)[:1]
    assert torch.allclose(clean, model.encode([probe.prompt]), atol=1e-5)
    effects = text_encoder(
        model, [probe], generate=False, noise=noise, controls="none",
        states=TextStates(positions=("last_subject",)),
    )  # fmt: skip
    recovered = {row["site"]: row["embed_recovery"] for row in effects.table.to_pylist()}
    assert recovered["text.2.mlp"] == recovered["text.3.self_attn"] == 0  # the UNet reads layer 1
    assert recovered["text.1.mlp"] > 0
    assert effects.protocol["clip_skip"] == 2


@pytest.mark.parametrize("value", [-1, 4, 1.5, True])
def test_a_clip_skip_that_leaves_no_layer_raises(value):
    with pytest.raises(
        ValueError, match="`clip_skip` must be an integer from 0 to 3 for this model"
    ):
        op.load(builders.tiny(text_layers=4), clip_skip=value)


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_negative_prompt_size_and_clip_skip_draw_what_diffusers_draws(layout):
    pipe = with_text_model(builders.tiny(layout, text_layers=4))
    pipe.set_progress_bar_config(disable=True)
    model = op.load(pipe)
    noise = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(5))[None]
    theirs = pipe(
        "a cat", negative_prompt="a dog in noto style", latents=noise, num_inference_steps=3, height=24, width=16,
        guidance_scale=4.0, clip_skip=1, output_type="pt",
    ).images  # fmt: skip
    options = {"seed": 5, "steps": 3, "guidance_scale": 4.0}
    ours = model.generate(
        "a cat", negative_prompt="a dog in noto style", height=24, width=16, clip_skip=1, **options
    )
    assert ours.images.shape == (1, 3, 24, 16)
    assert torch.allclose(ours.images, theirs, atol=1e-5)
    assert ours.protocol["negative_prompt"] == "a dog in noto style"
    assert ours.protocol["clip_skip"] == 1
    plain = model.generate("a cat", height=24, width=16, **options)
    assert not torch.allclose(plain.images, theirs, atol=1e-3)
    with_skip = op.load(pipe, clip_skip=1).generate(
        "a cat", negative_prompt="a dog in noto style", height=24, width=16, **options
    )
    assert torch.equal(with_skip.images, ours.images)


def test_an_empty_negative_prompt_of_sdxl_is_encoded_as_in_diffusers():
    pipe = builders.tiny("sdxl", text_layers=2)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))[None]
    theirs = pipe(
        "a cat", negative_prompt="", latents=noise, num_inference_steps=2, height=16, width=16, output_type="pt"
    ).images  # fmt: skip
    ours = op.load(pipe).generate("a cat", negative_prompt="", seed=5, steps=2)
    assert torch.allclose(ours.images, theirs, atol=1e-5)


def test_each_prompt_may_have_its_own_negative_prompt(tiny_sd1):
    prompts, others = ["a cat", "a dog"], ["a house", "a tree"]
    both = tiny_sd1.generate(prompts, negative_prompt=others, seed=[1, 2], steps=2, batch_size=1)
    for i in (0, 1):
        alone = tiny_sd1.generate(prompts[i], negative_prompt=others[i], seed=i + 1, steps=2)
        assert torch.allclose(both.images[i], alone.images[0], atol=1e-5)
    assert both.protocol["negative_prompt"] == others


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"height": 12},
            ValueError,
            "`height` must be a multiple of 8 of at least 8 pixels, got 12",
        ),
        (
            {"width": 0},
            ValueError,
            "`width` must be a multiple of 8 of at least 8 pixels, got 0: the",
        ),
        ({"width": 16.0}, ValueError, "`width` must be a multiple of 8"),
        ({"negative_prompt": ["a"] * 3}, ValueError, "3 negative prompts for 1 prompts: give one"),
        ({"negative_prompt": [1]}, TypeError, "`negative_prompt` must be a string or strings"),
        ({"clip_skip": 99}, ValueError, "`clip_skip` must be an integer from 0 to 11"),
    ],
)
def test_bad_sizes_and_negative_prompts_raise(tiny_sd1, change, error, message):
    with pytest.raises(error, match=message):
        tiny_sd1.generate("a cat", steps=1, **change)


def test_the_command_line_draws_with_the_same_options(run, tiny_folder, tmp_path):
    words = ["--seed", "3", "--steps", "2", "--width", "24", "--clip-skip", "2", "--json"]
    options = (*words, "--negative-prompt", "a dog")
    code, _, error = run("generate", tiny_folder, "a cat", "--out", tmp_path / "out", *options)
    assert (code, error) == (0, "")
    expected = op.load(tiny_folder, clip_skip=2).generate(
        "a cat", seed=3, steps=2, negative_prompt="a dog", width=24
    )
    (written,) = expected.save(tmp_path / "expected")
    assert (tmp_path / "out" / "0000.png").read_bytes() == written.read_bytes()
    code, _, error = run("generate", tiny_folder, "a cat", "--out", tmp_path / "no", "--height", 20)
    assert code == 2 and "`height` must be a multiple of 8" in error
