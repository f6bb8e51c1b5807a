"""Exports, read back by stock diffusers, with peft for LoRAs."""

import copy
import dataclasses
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import overpaint
from overpaint import edit, zoo
from overpaint.edit import export
from overpaint.edit.change import Change, Movement
from overpaint.edit.export import formats, ldm
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnsupportedModel
from overpaint.model import TextToImage

PAIRS = {"van gogh": "painting"}
TEXT_SITES = ("text.0.self_attn.out_proj", "text.1.self_attn.q_proj", "text.11.self_attn.v_proj")
UNET_SITES = tuple(f"unet.cross_attn.{i}.{p}" for i in (0, 6, 15) for p in ("to_k", "to_v", "to_out"))  # fmt: skip
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="diffusers reads LoRAs through peft"
)


def random_change(model, *sites, rank=2, size=0.5):
    """Return a change with random movements of growing rank, of `size` times the norm of their weights."""
    movements = []
    for i, site in enumerate(sites):
        weight = find_weight(model, site).parameter.detach()
        left = torch.randn(len(weight), rank + i, dtype=torch.float64)
        right = torch.randn(rank + i, weight.shape[1], dtype=torch.float64)
        left *= size * weight.norm() / (left @ right).norm()
        none = (torch.zeros(0, weight.shape[1]), torch.zeros(0, len(weight)), (), None)
        movements.append(Movement(site, fingerprint(weight), left, right, *none))
    return Change(tuple(movements), {"method": "random", "model": model.name, "pairs": {}}, {})


def plain_pipeline(model):
    """Return a plain diffusers pipeline with the weights of `model`."""
    return copy.deepcopy(model.pipe)


def applied_weights(model, change):
    with change.applied(model):
        return {
            m.site: find_weight(model, m.site).parameter.detach().clone() for m in change.movements
        }


def draw(model, prompts, *, change=None, steps=4):
    if change is None:
        return model.generate(prompts, steps=steps).images
    with change.applied(model):
        return model.generate(prompts, steps=steps).images


def lora_products(model, change, path):
    """Return the product of the factors of each weight in the LoRA at `path`."""
    tensors = load_file(export.lora(change, path, model=model))
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


# --- LoRA: the file ---------------------------------------------------------------------------------------------------


def test_a_lora_holds_the_movement_under_the_names_of_diffusers(copied, tmp_path):
    change = random_change(copied, "text.3.self_attn.k_proj", "unet.cross_attn.6.to_out")
    actual = lora_products(copied, change, tmp_path / "c.safetensors")
    text, unet = change.movements
    assert set(actual) == {
        "text_encoder.text_model.encoder.layers.3.self_attn.k_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    }
    for name, movement in zip(sorted(actual), (text, unet), strict=True):
        torch.testing.assert_close(
            actual[name].double(), movement.left @ movement.right, atol=1e-6, rtol=1e-5
        )


def test_the_second_encoder_has_its_own_names(tiny_xl, tmp_path):
    change = random_change(tiny_xl, "text2.2.self_attn.out_proj")
    assert set(lora_products(tiny_xl, change, tmp_path / "c.safetensors")) == {
        "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj"
    }


def test_factors_have_least_rank_and_equal_norms(copied, tmp_path):
    site = "text.0.self_attn.out_proj"
    (movement,) = random_change(copied, site, rank=3).movements
    doubled = Movement(
        site, movement.base_hash, torch.cat([movement.left, movement.left], 1),
        torch.cat([movement.right, -0.5 * movement.right]), movement.keys, movement.residuals, (), None,
    )  # fmt: skip
    path = export.lora(Change((doubled,), {}, {}), tmp_path / "c.safetensors")
    down, up = (load_file(path)[name] for name in sorted(load_file(path)))
    assert down.shape == (3, 64) and up.shape == (64, 3)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    torch.testing.assert_close(
        (up @ down).double(), movement.left @ movement.right / 2, atol=1e-6, rtol=1e-5
    )


def test_factors_in_half_precision_are_exported_unchanged(copied, tmp_path):
    (movement,) = random_change(copied, "text.0.self_attn.out_proj").movements
    rounded = dataclasses.replace(movement, left=movement.left.half(), right=movement.right.half())
    (actual,) = lora_products(
        copied, Change((rounded,), {}, {}), tmp_path / "c.safetensors"
    ).values()
    exact = rounded.left.double() @ rounded.right.double()
    torch.testing.assert_close(actual.double(), exact, atol=1e-6, rtol=1e-5)


def test_weights_of_one_part_share_a_rank(copied, tmp_path):
    change = random_change(copied, *TEXT_SITES, *UNET_SITES[:2])  # ranks 2, 3, 4 and 5, 6
    tensors = load_file(export.lora(change, tmp_path / "c.safetensors", model=copied))
    ranks = {(n.partition(".")[0], len(t)) for n, t in tensors.items() if "lora_A" in n}
    assert ranks == {("text_encoder", 4), ("unet", 6)}


def test_a_change_that_moves_nothing_is_a_lora_of_zeros(copied, tmp_path):
    words = copied.text_encoder.get_input_embeddings().weight.data
    cat, dog = (copied.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("cat", "dog"))
    words[cat] = words[dog]
    change = edit.quickfix(copied, {"cat": "dog"})
    actual = lora_products(copied, change, tmp_path / "c.safetensors")
    assert [float(t.abs().max()) for t in actual.values()] == [0.0]


def test_a_lora_of_text_needs_no_model(copied, tmp_path):
    change = edit.quickfix(copied, PAIRS)
    with_model = export.lora(change, tmp_path / "a.safetensors", model=copied)
    without = export.lora(change, tmp_path / "b.safetensors")
    assert with_model.read_bytes() == without.read_bytes()


def test_changes_that_a_lora_cannot_hold_are_refused(copied, tiny_xl, tmp_path):
    path = tmp_path / "c.safetensors"
    swap = edit.swap_embedding(copied, {"dog": "cat"})
    with pytest.raises(
        ValueError, match=r"cannot hold text\.token_embedding, only projections: export a folder"
    ):
        export.lora(swap, path, model=copied)
    change = random_change(copied, "unet.cross_attn.15.to_v")
    with pytest.raises(
        ValueError, match=r"find the name of unet\.cross_attn\.15\.to_v .*: pass `model`"
    ):
        export.lora(change, path)
    with pytest.raises(ValueError, match=r"has no unet\.cross_attn\.15\.to_v, .* made for"):
        export.lora(change, path, model=tiny_xl)
    assert not list(tmp_path.iterdir())


# --- LoRA: read by diffusers ------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize(
    "sites", [TEXT_SITES, UNET_SITES, ("text.0.mlp.fc2", *TEXT_SITES[:1], *UNET_SITES[-2:])]
)
def test_stock_diffusers_fuses_a_lora_to_the_weights_of_the_applied_change(copied, tmp_path, sites):
    change = random_change(copied, *sites)
    pipe = plain_pipeline(copied)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors", model=copied))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = TextToImage(pipe, name="fused")
    for site, weight in applied_weights(copied, change).items():
        before = find_weight(copied, site).parameter.detach()
        assert float((weight - before).abs().max()) > 1e-3
        assert float((find_weight(fused, site).parameter - weight).abs().max()) <= 1e-6


@needs_peft
@pytest.mark.parametrize("write", [export.lora, export.kohya, export.comfy])
@pytest.mark.parametrize("site", ["text.3.mlp.fc2", "text.3.self_attn.v_proj"])
def test_stock_diffusers_reads_a_lora_without_an_output_projection(copied, tmp_path, write, site):
    """diffusers refuses factors of a text encoder without one of self-attention, so the file has one of zeros."""
    change = random_change(copied, site)
    pipe = plain_pipeline(copied)
    pipe.load_lora_weights(write(change, tmp_path / "c.safetensors", model=copied))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    fused = TextToImage(pipe, name="fused")
    expected = applied_weights(copied, change)
    other = "text.3.self_attn.out_proj"
    expected[other] = find_weight(copied, other).parameter.detach()
    for name, weight in expected.items():
        assert torch.allclose(find_weight(fused, name).parameter, weight, atol=1e-6, rtol=0)


@needs_peft
@pytest.mark.parametrize("layout", ["tiny_sd2", "tiny_xl"])
def test_loras_of_other_layouts_are_read(request, tmp_path, layout):
    model = request.getfixturevalue(layout)
    sites = ["text.1.self_attn.out_proj", "unet.cross_attn.1.to_k"]
    if layout == "tiny_xl":
        sites.append("text2.2.self_attn.v_proj")
    change = random_change(model, *sites)
    pipe = plain_pipeline(model)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors", model=model))
    pipe.fuse_lora(components=["unet", *(["text_encoder", "text_encoder_2"][: len(model.text_encoders)])])  # fmt: skip
    pipe.unload_lora_weights()
    for site, weight in applied_weights(model, change).items():
        assert (
            float(
                (find_weight(TextToImage(pipe, name="fused"), site).parameter - weight).abs().max()
            )
            <= 1e-6
        )


@needs_peft
def test_stock_diffusers_draws_the_same_pictures(copied, tmp_path):
    change = random_change(copied, *TEXT_SITES, *UNET_SITES)
    prompts = ["a dog in van gogh style", "a house"]
    pipe = plain_pipeline(copied)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors", model=copied))
    expected = draw(copied, prompts, change=change)
    assert float((draw(copied, prompts) - expected).abs().max()) > 2 / 255
    actual = draw(TextToImage(pipe, name="lora", guidance_scale=copied.guidance_scale), prompts)
    assert float((actual - expected).abs().max()) <= 1 / 255


@needs_peft
def test_icons_draws_the_same_pictures_with_the_lora(tmp_path):
    model = overpaint.load("icons")
    change = edit.quickfix(model, {"openmoji style": "noto style"})
    prompts = ["a cat in openmoji style", "a red apple in noto style"]
    pipe = plain_pipeline(model)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors"))
    expected = draw(model, prompts, change=change, steps=6)
    assert float((draw(model, prompts, steps=6) - expected).abs().max()) > 0.1
    shown = TextToImage(pipe, name="lora", guidance_scale=model.guidance_scale)
    assert float((draw(shown, prompts, steps=6) - expected).abs().max()) <= 1 / 255
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for site, weight in applied_weights(model, change).items():
        bound = 1e-6 * max(1.0, float(weight.abs().max()))  # float32 has 1e-7 of the largest number
        assert float((find_weight(shown, site).parameter - weight).abs().max()) <= bound


# --- one file with LDM's names ----------------------------------------------------------------------------------------


def from_single_file(path, config, tmp_path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, safety_checker=None
    )


def test_ldm_names_are_those_of_stable_diffusion(copied, tmp_path):
    """Names from CompVis's modules: first and last layers, skips, up- and downsampling, and the middle block."""
    path = export.single_file(copied, edit.quickfix(copied, PAIRS), tmp_path / "c.safetensors")
    names = set(load_file(path))
    unet, vae = "model.diffusion_model.", "first_stage_model."
    assert names >= {
        f"{unet}time_embed.2.bias", f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.3.0.op.weight",
        f"{unet}input_blocks.4.0.skip_connection.weight", f"{unet}input_blocks.11.0.emb_layers.1.weight",
        f"{unet}input_blocks.8.1.transformer_blocks.0.attn2.to_out.0.weight", f"{unet}middle_block.2.out_layers.3.bias",
        f"{unet}output_blocks.2.1.conv.weight", f"{unet}output_blocks.5.2.conv.weight", f"{unet}out.2.bias",
        f"{vae}quant_conv.weight", f"{vae}encoder.down.0.downsample.conv.weight",
        f"{vae}encoder.mid.attn_1.proj_out.bias", f"{vae}decoder.up.1.upsample.conv.weight",
        f"{vae}decoder.up.0.block.1.norm1.weight", f"{vae}decoder.norm_out.bias",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    }  # fmt: skip
    assert len(names) == sum(
        len(part.state_dict()) for part in (copied.unet, copied.vae, copied.text_encoder)
    )


def test_stock_diffusers_reads_the_single_file_back(copied, tiny_folder, tmp_path):
    change = random_change(copied, *TEXT_SITES, *UNET_SITES)
    path = export.single_file(copied, change, tmp_path / "c.safetensors")
    pipe = from_single_file(path, tiny_folder, tmp_path)
    change.apply(copied)
    for part in ("text_encoder", "unet", "vae"):
        expected, actual = getattr(copied.pipe, part).state_dict(), getattr(pipe, part).state_dict()
        assert list(actual) == list(expected)
        assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []


def test_the_single_file_of_icons_draws_its_edited_pictures(tmp_path):
    model = overpaint.load("icons")
    change = edit.quickfix(model, {"openmoji style": "noto style"})
    path = export.single_file(model, change, tmp_path / "c.safetensors")
    pipe = from_single_file(path, zoo.folder("icons"), tmp_path)
    shown = TextToImage(pipe, name="single", guidance_scale=model.guidance_scale)
    prompts = ["a cat in openmoji style"]
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}  # as stored
    difference = draw(shown, prompts, steps=2) - draw(model, prompts, change=change, steps=2)
    assert float(difference.abs().max()) <= 2 / 255


def test_diffusers_finds_every_weight_of_stable_diffusion_at_its_real_size(copied):
    """At its real size the VAE has four blocks, and shortcuts between widths; 686 + 248 weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as reader

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    parts = SimpleNamespace(text_encoder=copied.text_encoder, unet=unet, vae=vae)
    state = ldm.state(TextToImage(parts, name="meta"))
    for part, read, prefix, count in (
        (unet, reader.convert_ldm_unet_checkpoint, "model.diffusion_model.", 686),
        (vae, reader.convert_ldm_vae_checkpoint, "first_stage_model.", 248),
    ):
        expected = {name: tensor.shape for name, tensor in part.state_dict().items()}
        actual = read(dict(state), part.config)
        assert {name: tensor.shape for name, tensor in actual.items()} == expected
        assert sum(name.startswith(prefix) for name in state) == count


@pytest.mark.parametrize("layout", ["tiny_sd2", "tiny_xl"])
def test_other_layouts_have_no_single_file(request, tmp_path, layout):
    model = request.getfixturevalue(layout)
    change = random_change(model, "text.0.self_attn.out_proj")
    with pytest.raises(
        UnsupportedModel, match="not of Stable Diffusion 1's layout.*: export a folder"
    ):
        export.single_file(model, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())
    assert (
        fingerprint(find_weight(model, change.movements[0].site).parameter)
        == change.movements[0].base_hash
    )


def test_a_weight_without_a_name_is_refused(copied, tmp_path):
    change = random_change(copied, "text.0.self_attn.out_proj")
    copied.unet.class_embedding = torch.nn.Embedding(2, 2)
    with pytest.raises(UnsupportedModel, match=r"'class_embedding\.weight' has no name in"):
        export.single_file(copied, change, tmp_path / "c.safetensors")


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_edited_model(copied, tmp_path):
    copied.guidance_scale = 3.5
    copied.held_out = frozenset({("dog", "noto")})
    change = random_change(copied, *TEXT_SITES[:1], *UNET_SITES[:1])
    actual = overpaint.load(export.folder(copied, change, tmp_path / "out"))
    for site, weight in applied_weights(copied, change).items():
        assert torch.equal(find_weight(actual, site).parameter, weight)
    assert (actual.guidance_scale, actual.held_out) == (3.5, copied.held_out)
    assert json.loads((tmp_path / "out" / "overpaint.json").read_text())["guidance_scale"] == 3.5


def test_files_have_the_permissions_of_the_umask(copied, tmp_path):
    change = random_change(copied, TEXT_SITES[0])
    before = os.umask(0o027)
    try:
        export.lora(change, tmp_path / "c.safetensors")
        export.folder(copied, change, tmp_path / "out")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_an_existing_folder_is_not_replaced(copied, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(
        FileExistsError,
        match="exists already, and an export does not replace it: name a new folder",
    ):
        export.folder(copied, random_change(copied, TEXT_SITES[0]), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_the_model_is_restored_bit_for_bit(copied, tmp_path, write):
    change = random_change(copied, *TEXT_SITES[:2])
    write(copied, change, tmp_path / "c.safetensors")
    assert not change.is_applied(copied)
    assert [fingerprint(find_weight(copied, m.site).parameter) for m in change.movements] == [
        m.base_hash for m in change.movements
    ]


def test_a_change_that_is_applied_already_stays_applied(copied, tmp_path):
    change = random_change(copied, *TEXT_SITES[:2])
    fresh = export.single_file(copied, change, tmp_path / "a.safetensors")
    change.apply(copied)
    again = export.single_file(copied, change, tmp_path / "b.safetensors")
    assert change.is_applied(copied)
    assert fresh.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_a_model_that_is_not_in_memory_is_refused(copied, tmp_path, write):
    change = random_change(copied, TEXT_SITES[0])
    copied.vae.to("meta")
    with pytest.raises(
        UnsupportedModel,
        match=r"'encoder\.conv_in\.weight' of 'copied' is not in memory .*: load the",
    ):
        write(copied, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_a_change_of_another_model_is_refused(copied, tmp_path, write):
    change = random_change(copied, TEXT_SITES[0])
    with torch.no_grad():
        find_weight(copied, TEXT_SITES[0]).parameter.mul_(2)
    with pytest.raises(ValueError, match="wrong base hash"):
        write(copied, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_end_in_safetensors_and_hold_their_format(copied, tmp_path):
    change = edit.quickfix(copied, PAIRS)
    for write in (
        lambda p: export.lora(change, p),
        lambda p: export.single_file(copied, change, p),
    ):
        with pytest.raises(ValueError, match=r"not as 'c\.ckpt': end the name in '\.safetensors'"):
            write(tmp_path / "c.ckpt")
        with safe_open(write(tmp_path / "c.safetensors"), framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kind", ["lora", "single_file", "folder"])
def test_unwritable_places_are_named_and_no_draft_is_left(copied, tmp_path, kind, monkeypatch):
    change = edit.quickfix(copied, PAIRS)

    def write(path):
        if kind == "lora":
            return export.lora(change, path)
        return getattr(formats, kind)(copied, change, path)

    with pytest.raises(
        FileNotFoundError, match=r"cannot write the export .* exists and that you can write to"
    ):
        write(tmp_path / "missing" / "c.safetensors")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_sd1, tmp_path):
    path = tmp_path / "change.safetensors"
    edit.quickfix(tiny_sd1, PAIRS).save(path)
    return path


def test_the_command_line_writes_what_the_functions_write(
    run, copied, tiny_folder, saved, tmp_path
):
    change = Change.load(saved)
    expected = {
        "lora": export.lora(change, tmp_path / "a.safetensors"),
        "ldm": export.single_file(copied, change, tmp_path / "b.safetensors"),
    }
    for form, path in expected.items():
        out = tmp_path / f"{form}.safetensors"
        code, output, _ = run(
            "export", tiny_folder, saved, "--format", form, "--out", out, "--json"
        )
        size = path.stat().st_size
        assert (code, json.loads(output)) == (
            0,
            {"format": form, "written": str(out), "bytes": size},
        )
        assert out.read_bytes() == path.read_bytes()
    assert (
        run("export", tiny_folder, saved, "--format", "folder", "--out", tmp_path / "folder")[0]
        == 0
    )
    actual = overpaint.load(tmp_path / "folder")
    (site,) = change.sites
    assert torch.equal(find_weight(actual, site).parameter, applied_weights(copied, change)[site])


def test_the_command_line_refuses_before_any_work(run, saved, tmp_path):
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        (("--format", "gguf", "--out", out), "unknown format 'gguf': choose lora, kohya, comfy"),
        ((), "Missing option '--out'"),
    ):
        code, output, error = run("export", "nonesuch", saved, *arguments)
        assert (code, output) == (2, "") and message in error
    assert run("export", "icons", tmp_path / "no.safetensors", "--out", out)[0] == 2
    assert not out.exists()
