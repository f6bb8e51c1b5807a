"""An exported folder is the folder of the model, in which only the edited weights and the card differ: every file."""

import dataclasses
import json
import shutil
import struct

import layouts
import pytest
import torch
from safetensors.torch import load_file, save_file

import overpaint as op
from overpaint.edit import export
from overpaint.edit.change import Change
from overpaint.edit.weights import find_weight
from overpaint.errors import UnsupportedModel

PAIRS = {"van gogh": "painting"}
ENCODER = "text_encoder/model.safetensors"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def differing(source, target):
    """Return the names of the files that are in one folder only, or differ."""
    before, after = contents(source), contents(target)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def header(content):
    """Return the header of a safetensors file: names in their order, dtypes, shapes, offsets and metadata."""
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size]


def edited(path):
    """Return the model of a folder and an edit of its text encoders."""
    model = op.load(path)
    return model, op.edit.quickfix(model, PAIRS)


def expected_weights(model, change):
    with change.applied(model):
        return [find_weight(model, s).parameter.detach().clone() for s in change.sites]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_only_the_edited_weights_and_the_card_differ(tmp_path, layout):
    source = layouts.folder(tmp_path / "in", layout, dtype=torch.float16)
    assert (source / "safety_checker").is_dir() is (layout == "sd1")
    model, change = edited(source)
    out = export.folder(model, change, tmp_path / "out")
    files = [ENCODER] if layout != "sdxl" else [ENCODER, ENCODER.replace("encoder/", "encoder_2/")]
    assert differing(source, out) == ["README.md", *files]
    for file in files:
        before, after = (source / file).read_bytes(), (out / file).read_bytes()
        assert header(before) == header(after)
        old, new = load_file(source / file), load_file(out / file)
        moved = [name for name in old if not torch.equal(old[name], new[name])]
        assert len(moved) == len(change.sites) // len(files)
        assert all(tensor.dtype == torch.float16 for tensor in new.values())
    again = op.load(out)
    for site, weight in zip(change.sites, expected_weights(model, change), strict=True):
        assert torch.equal(find_weight(again, site).parameter, weight.half().float())


def test_the_command_line_keeps_the_safety_checker_and_the_dtype(run, tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16)
    model, change = edited(source)
    change.save(tmp_path / "c.safetensors")
    assert run("apply", source, tmp_path / "c.safetensors", "--out", tmp_path / "a")[0] == 0
    arguments = (source, tmp_path / "c.safetensors", "--format", "folder", "--dtype", "stored")
    assert run("export", *arguments, "--out", tmp_path / "b")[0] == 0
    for out in (tmp_path / "a", tmp_path / "b"):
        assert differing(source, out) == ["README.md", ENCODER]
        assert (out / ENCODER).stat().st_size == (source / ENCODER).stat().st_size
    assert differing(tmp_path / "a", tmp_path / "b") == []
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "a")
    assert type(pipe.safety_checker).__name__ == "StableDiffusionSafetyChecker"


def test_edits_of_the_unet_change_its_file_only(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd2", dtype=torch.bfloat16)
    model = op.load(source)
    change = op.edit.uce(model, PAIRS)
    out = export.folder(model, change, tmp_path / "out")
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert differing(source, out) == ["README.md", unet]
    assert header((source / unet).read_bytes()) == header((out / unet).read_bytes())


def test_names_with_fp16_are_kept(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16, variant="fp16")
    model, change = edited(source)
    out = export.folder(model, change, tmp_path / "out")
    assert differing(source, out) == ["README.md", ENCODER.replace("model.", "model.fp16.")]


def test_shards_are_kept(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16)
    shutil.rmtree(source / "text_encoder")
    whole = layouts.pipeline("sd1").text_encoder.half()
    whole.save_pretrained(source / "text_encoder", max_shard_size="40KB")
    shards = sorted(path.name for path in (source / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 2
    model, change = edited(source)
    out = export.folder(model, change, tmp_path / "out")
    changed = differing(source, out)
    assert changed[0] == "README.md" and len(changed) == 2  # one shard holds the edited weight
    assert changed[1].removeprefix("text_encoder/") in shards
    again = op.load(out)
    (weight,) = expected_weights(model, change)
    assert torch.equal(find_weight(again, change.sites[0]).parameter, weight.half().float())


def test_other_forms_of_the_unedited_weights_are_left_out(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1")
    encoder = source / "text_encoder"
    numbers = load_file(source / ENCODER)
    half = {name: tensor.half() for name, tensor in numbers.items()}
    save_file(half, encoder / "model.fp16.safetensors", metadata={"format": "pt"})
    save_file({n: t * 2 for n, t in numbers.items()}, encoder / "model.other.safetensors")
    for place in (
        "text_encoder/pytorch_model.bin",
        "unet/pytorch_model.bin",
        "v1-5.ckpt",
        "LICENSE",
    ):
        (source / place).write_bytes(b"x")
    (encoder / "pytorch_model.bin").rename(encoder / "pytorch_model-1.bin")
    (encoder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model-1.bin"}}'
    )
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    (encoder / "model.other.safetensors").rename(encoder / "model.fp16.other.safetensors")
    model, change = edited(source)
    out = export.folder(model, change, tmp_path / "out")
    gone = sorted(contents(source).keys() - contents(out).keys())
    assert gone == [
        ".cache/lock", "text_encoder/model.fp16.other.safetensors", "text_encoder/pytorch_model-1.bin",
        "text_encoder/pytorch_model.bin.index.json", "v1-5.ckpt",
    ]  # fmt: skip
    name = "encoder.layers.0.self_attn.out_proj.weight"
    variant, plain = (
        load_file(out / "text_encoder" / "model.fp16.safetensors"),
        load_file(out / ENCODER),
    )
    key = next(key for key in variant if key.endswith(name))
    assert torch.allclose(variant[key], plain[key].half(), atol=1e-3)
    assert not torch.allclose(variant[key], half[key], atol=1e-2)


def test_other_changes_in_memory_are_written_too(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16)
    model = op.load(source)
    first = op.edit.quickfix(model, {"apple": "dog"})
    first.apply(model)
    second = op.edit.quickfix(model, PAIRS)
    again = op.load(export.folder(model, second, tmp_path / "out"))
    (weight,) = expected_weights(model, second)
    assert torch.equal(find_weight(again, second.sites[0]).parameter, weight.half().float())
    assert first.is_applied(model) and not second.is_applied(model)


def test_adapters_are_refused(tmp_path):
    model, change = edited(layouts.folder(tmp_path / "in", "sd1"))
    model.unet.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        UnsupportedModel, match=r"the unet of .* lacks, first 'extra\.bias': fuse and"
    ):
        export.folder(model, change, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_the_stored_dtype_cannot_hold_are_refused(tmp_path):
    model, change = edited(layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16))
    (movement,) = change.movements
    large = dataclasses.replace(movement, left=movement.left * 1e7)
    with pytest.raises(
        ValueError, match=r"holds numbers that torch\.float16 cannot, the dtype of its"
    ):
        export.folder(model, Change((large,), change.protocol, change.report), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_encoder_alone_is_not_exported(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1")
    model, change = edited(source / "text_encoder")
    with pytest.raises(
        UnsupportedModel, match="is exported with its pipeline: load the folder of the"
    ):
        export.folder(model, change, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="is a text encoder alone"):
        export.single_file(model, change, tmp_path / "out.safetensors")


def test_settings_are_written_when_they_differ(tmp_path):
    source = layouts.folder(tmp_path / "in", "sd1")
    (source / "overpaint.json").write_text('{"guidance_scale": 4, "card": "x"}')
    model, change = edited(source)
    out = export.folder(model, change, tmp_path / "a")
    assert differing(source, out) == ["README.md", ENCODER]
    skipping = op.load(source, clip_skip=1)
    out = export.folder(skipping, change, tmp_path / "b")
    settings = {"guidance_scale": 4.0, "card": "x", "clip_skip": 1}
    assert json.loads((out / "overpaint.json").read_text()) == settings
    assert op.load(out).clip_skip == 1


# --- live pipelines and local paths -----------------------------------------------------------------------------------


def test_a_live_pipeline_keeps_its_dtype_and_safety_checker(tmp_path):
    pipe = layouts.pipeline("sd1").to(torch.float16)
    pipe.save_pretrained(tmp_path / "in")
    model = op.load(pipe)
    change = op.edit.quickfix(model, PAIRS)
    out = export.folder(model, change, tmp_path / "out")
    assert differing(tmp_path / "in", out) == ["README.md", ENCODER]


def test_no_local_path_is_written(tmp_path):
    import diffusers

    source = layouts.folder(tmp_path / "someone" / "in", "sd1")
    live = diffusers.StableDiffusionPipeline.from_pretrained(source)
    live.save_pretrained(tmp_path / "someone" / "saved")  # diffusers writes the path of `in` there
    assert str(tmp_path) in (tmp_path / "someone" / "saved" / "unet" / "config.json").read_text()
    for i, origin in enumerate((live, tmp_path / "someone" / "saved")):
        model, change = edited(origin)
        out = export.folder(model, change, tmp_path / f"out{i}")
        for name, content in contents(out).items():
            assert str(tmp_path).encode() not in content, name
        assert json.loads((out / "model_index.json").read_text())["_name_or_path"] == "in"
        op.load(out)


def test_the_cache_of_the_hub_is_copied_and_what_it_lacks_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    source = layouts.folder(tmp_path / "in", "sd1", dtype=torch.float16)
    shutil.rmtree(source / "safety_checker")  # which loading does not download
    shutil.rmtree(source / "feature_extractor")
    place = tmp_path / "hub" / "models--someone--tiny"
    snapshot = shutil.copytree(source, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, change = edited("someone/tiny")
    out = export.folder(model, change, tmp_path / "out")
    assert differing(snapshot, out) == ["README.md", "model_index.json", ENCODER]
    assert (
        "The part `safety_checker` of the base model is not in" in (out / "README.md").read_text()
    )
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(out).safety_checker is None
