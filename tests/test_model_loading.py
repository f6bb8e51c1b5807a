"""Parts that are loaded when they are first used, text encoders alone, dtypes, devices, inpainting and offloading."""

import json
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch

import overpaint as op
from overpaint.edit.weights import find_weight
from overpaint.errors import UnsupportedModel
from overpaint.zoo import builders

PAIRS = {"van gogh": "painting"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that returns the folder of a layout with CLIP's vocabulary, written once."""
    root, written = tmp_path_factory.mktemp("layouts"), {}

    def folder_of(layout):
        if layout not in written:
            written[layout] = layouts.folder(root / layout, layout, dtype=torch.float16)
        return written[layout]

    return folder_of


def loaded(model):
    """Return the names of the parts whose weights are in memory."""
    parts = ("text_encoder", "text_encoder_2", "unet", "vae")
    return [name for name in parts if model.folder.is_loaded(name) and model.folder.files_of(name)]


# --- parts are loaded when they are first used ------------------------------------------------------------------------


def test_an_edit_of_text_loads_the_text_encoder_only(folders, tmp_path):
    model = op.load(folders("sd1"))
    assert loaded(model) == []
    assert (model.size, model.dtype, model.device.type) == ((16, 16), torch.float32, "cpu")
    assert len(op.model.sites.find(model)) == 4 + 22 + 3 * 16
    assert "StableDiffusionPipeline, 1 text encoder, pictures of 16x16" in repr(model)
    assert loaded(model) == []
    change = op.edit.quickfix(model, PAIRS)
    change.apply(model)
    assert loaded(model) == ["text_encoder"]
    assert change.is_applied(model)
    assert model.pipe.text_encoder is model.text_encoder  # the edited one
    assert loaded(model) == ["text_encoder", "unet", "vae"]
    assert change.is_applied(model)
    assert type(model.pipe).__name__ == "StableDiffusionPipeline"


def test_lazy_parts_draw_what_the_whole_pipeline_draws(folders):
    import diffusers

    for layout in ("sd1", "sd2", "sdxl"):
        stock = diffusers.DiffusionPipeline.from_pretrained(folders(layout), dtype=torch.float32)
        expected = op.load(stock).generate("a cat", seed=3, steps=2).images
        assert torch.equal(
            op.load(folders(layout)).generate("a cat", seed=3, steps=2).images, expected
        )


def test_a_part_that_is_damaged_raises_when_it_is_first_used(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folders("sd1"), tmp_path / "copy")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    model = op.load(copy)
    op.edit.quickfix(model, PAIRS)
    with pytest.raises(
        UnsupportedModel, match=r"weights unet\.conv_out\.bias hold NaN or infinite"
    ):
        model.generate("a cat", steps=1)


# --- a text encoder alone ---------------------------------------------------------------------------------------------


def test_a_text_encoder_alone_is_edited_as_in_its_pipeline(folders):
    alone, whole = op.load(folders("sd1") / "text_encoder"), op.load(folders("sd1"))
    change = op.edit.quickfix(alone, PAIRS)
    assert change.digest == op.edit.quickfix(whole, PAIRS).digest
    with change.applied(whole), change.applied(alone):
        assert torch.equal(alone.encode(["van gogh"]), whole.encode(["van gogh"]))
    assert {site.part for site in op.model.sites.find(alone)} == {"text"}
    assert "text encoder alone" in repr(alone)
    for use in (
        lambda: alone.generate("a cat"),
        lambda: alone.unet,
        lambda: alone.pipe,
        lambda: alone.scheduler,
        lambda: alone.size,
    ):
        with pytest.raises(
            UnsupportedModel, match="is a text encoder alone, which can be edited but"
        ):
            use()


def test_text_encoders_that_cannot_be_edited_alone_raise(folders, tmp_path):
    with pytest.raises(
        UnsupportedModel, match="is one of the two text encoders of SDXL, .* together"
    ):
        op.load(folders("sdxl") / "text_encoder")
    model = op.load(folders("sd1"))
    model.text_encoder.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(UnsupportedModel, match="is a text encoder without its tokenizer: put the"):
        op.load(tmp_path / "text_encoder")


def test_folders_of_other_architectures_name_what_is_supported(folders, tmp_path):
    with pytest.raises(
        UnsupportedModel,
        match="holds a UNet2DConditionModel and no model_index.json: only StableDif",
    ):
        op.load(folders("sd1") / "unet")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UnsupportedModel, match="holds a LlamaForCausalLM and no model_index.json"):
        op.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(
        UnsupportedModel,
        match=r"holds a StableDiffusion3Pipeline: only .*XLPipeline, and the inpaint",
    ):
        op.load(tmp_path)
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["os", "system"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part in ("text_encoder", "unet", "vae"):
        (tmp_path / part).mkdir()
        source = next((folders("sd1") / part).glob("*.safetensors"))
        (tmp_path / part / source.name).write_bytes(source.read_bytes())
    with pytest.raises(UnsupportedModel, match="which is no class of diffusers or transformers"):
        op.load(tmp_path)


# --- dtypes and devices -----------------------------------------------------------------------------------------------


def test_dtypes_have_names(folders):
    assert op.load(folders("sd1")).text_encoder.dtype == torch.float32
    for dtype in ("float16", torch.float16, "stored", None):
        model = op.load(folders("sd1"), dtype=dtype)
        assert model.dtype == model.text_encoder.dtype == model.unet.dtype == torch.float16
    assert op.load(folders("sd1"), dtype="bfloat16").vae.dtype == torch.bfloat16
    for dtype in ("half", "int8", torch.int8):
        with pytest.raises(ValueError, match="`dtype` must be one of float16, bfloat16, float32"):
            op.load(folders("sd1"), dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "meta", "gpu", "", "cpu:cpu"])
def test_devices_that_are_not_there_raise(folders, run, tmp_path, device):
    with pytest.raises(ValueError, match=f"cannot use device '{device}': .*Use 'cpu', or a device"):
        op.load(folders("sd1"), device=device)
    code, _, error = run("load", folders("sd1"), "--device", device)
    assert code == 2
    assert error.startswith(f"overpaint: cannot use device '{device}'")
    assert "fault of overpaint" not in error
    code, _, other = run("train", "icons", "--device", device, "--out", tmp_path / "icons")
    assert (code, other) == (2, error)


def test_the_command_line_lists_a_model_without_reading_weights(folders, run, monkeypatch):
    from overpaint.model import pipeline_folder

    monkeypatch.setattr(
        pipeline_folder, "check_finite", lambda *_: pytest.fail("weights were read")
    )
    code, output, _ = run("load", folders("sdxl"), "--dtype", "float16", "--json")
    facts = json.loads(output)
    assert (code, facts["text_encoder_2"]) == (0, "CLIPTextModelWithProjection")
    assert facts["unet_parameters"] == sum(
        p.numel() for p in layouts.pipeline("sdxl").unet.parameters()
    )
    assert run("sites", folders("sdxl"))[0] == 0


# --- inpainting -------------------------------------------------------------------------------------------------------


def test_inpainting_models_are_edited_exported_and_loaded_again(folders, tmp_path):
    model = op.load(folders("inpainting"))
    change = op.edit.quickfix(model, PAIRS)
    again = op.load(op.edit.export.folder(model, change, tmp_path / "out"))
    with change.applied(model):
        expected = find_weight(model, change.sites[0]).parameter.detach().clone()
    assert torch.equal(find_weight(again, change.sites[0]).parameter, expected.half().float())
    assert type(again.pipe).__name__ == "StableDiffusionInpaintPipeline"
    op.edit.uce(model, PAIRS).apply(model)  # and edits of the UNet


def test_drawing_with_an_inpainting_model_says_what_it_needs(folders, run, tmp_path):
    from overpaint.probes import Probe

    message = "takes 9 channels, 5 of them for a mask and a masked picture, so it cannot draw from"
    model = op.load(folders("inpainting"))
    probe = Probe("b", "object", "a cat in noto style", "cat")
    for draw in (
        lambda: model.generate("a cat"),
        lambda: model.initial_latents([0]),
        lambda: op.trace.unet(model, [probe], scorer=lambda images, _: images.mean((1, 2, 3))),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            draw()
    code, _, error = run("generate", folders("inpainting"), "a cat", "--out", tmp_path / "out")
    assert code == 2 and message in error


# --- offloading -------------------------------------------------------------------------------------------------------


def test_a_pipeline_offloaded_by_accelerate_is_loaded_and_edited():
    from accelerate import cpu_offload

    pipe = builders.tiny(text_layers=2)
    expected = op.edit.quickfix(op.load(builders.tiny(text_layers=2)), PAIRS)
    reference = op.load(builders.tiny(text_layers=2)).encode(["van gogh"])
    for part in ("text_encoder", "unet", "vae"):  # as enable_sequential_cpu_offload does with a GPU
        cpu_offload(getattr(pipe, part), torch.device("cpu"))
    assert next(pipe.unet.parameters()).device.type == "meta"
    model = op.load(pipe)
    assert torch.equal(model.encode(["van gogh"]), reference)
    change = op.edit.quickfix(model, PAIRS)
    assert change.digest == expected.digest
    with change.applied(model):
        assert not torch.equal(model.encode(["van gogh"]), reference)
    assert torch.equal(model.encode(["van gogh"]), reference)


def test_offloaded_weights_that_are_not_finite_raise():
    from accelerate import cpu_offload

    pipe = builders.tiny(text_layers=2)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("inf")
    cpu_offload(pipe.vae, torch.device("cpu"))
    with pytest.raises(
        UnsupportedModel, match=r"vae\.decoder\.conv_out\.bias hold NaN or infinite"
    ):
        op.load(pipe)


def test_weights_on_the_meta_device_raise():
    pipe = builders.tiny(text_layers=2)
    pipe.unet.to("meta")
    with pytest.raises(
        UnsupportedModel, match=r"unet\.conv_in\.weight are on the meta device, with"
    ):
        op.load(pipe)


# --- quiet ------------------------------------------------------------------------------------------------------------


def test_python_calls_print_nothing(folders):
    code = (
        "import sys, overpaint as op; model = op.load(sys.argv[1]); "
        "model.generate('a cat ' * 30, steps=1); op.edit.quickfix(model, {'van gogh': 'painting'})"
    )
    for layout in ("sd1", "sdxl"):
        done = subprocess.run(
            [sys.executable, "-c", code, folders(layout)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_an_edit_of_sd14s_encoder_takes_less_than_1_2_gib(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import speed_edit

    assert speed_edit.peak_gib() < 1.2


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_each_layout_draws_with_clips_vocabulary(real_vocabulary, layout):
    model = op.load(real_vocabulary(layout))
    assert model.tokenize(["a cat"])[0, :4].tolist() == [49406, 320, 2368, 49407]
    pictures = model.generate("a cat", steps=1, negative_prompt="a dog", height=24, width=16)
    assert pictures.images.shape == (1, 3, 24, 16)
