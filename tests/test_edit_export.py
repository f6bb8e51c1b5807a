"""Exports are read by code that is not ours: stock diffusers, with peft for LoRAs."""

import copy
import dataclasses
import importlib.util
import json
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


@pytest.fixture
def own(tiny_sd1):
    """A copy of the tiny model, to be changed at will."""
    return TextToImage(copy.deepcopy(tiny_sd1.pipe), name="own")


def moving(model, *sites, rank=2, size=0.5):
    """Return a change with random movements, of growing rank, each a good part of its weight's norm."""
    movements = []
    for i, site in enumerate(sites):
        weight = find_weight(model, site).parameter.detach()
        left = torch.randn(len(weight), rank + i, dtype=torch.float64)
        right = torch.randn(rank + i, weight.shape[1], dtype=torch.float64)
        left *= size * weight.norm() / (left @ right).norm()
        none = (torch.zeros(0, weight.shape[1]), torch.zeros(0, len(weight)), (), None)
        movements.append(Movement(site, fingerprint(weight), left, right, *none))
    return Change(tuple(movements), {"method": "random", "model": model.name, "pairs": {}}, {})


def stock(model):
    """Return a plain diffusers pipeline with the weights of `model`."""
    return copy.deepcopy(model.pipe)


def applied_weights(model, change):
    with change.applied(model):
        return {
            m.site: find_weight(model, m.site).parameter.detach().clone() for m in change.movements
        }


def pixels(model, prompts, *, change=None, steps=4):
    if change is None:
        return model.generate(prompts, steps=steps).images
    with change.applied(model):
        return model.generate(prompts, steps=steps).images


def written(model, change, path):
    """Return the product of the factors of each weight in the LoRA at `path`."""
    tensors = load_file(export.lora(change, path, model=model))
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


# --- LoRA: the file ---------------------------------------------------------------------------------------------------


def test_a_lora_holds_the_movement_under_the_names_of_diffusers(own, tmp_path):
    change = moving(own, "text.3.self_attn.k_proj", "unet.cross_attn.6.to_out")
    found = written(own, change, tmp_path / "c.safetensors")
    text, unet = change.movements
    assert set(found) == {
        "text_encoder.text_model.encoder.layers.3.self_attn.k_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    }
    for name, movement in zip(sorted(found), (text, unet), strict=True):
        torch.testing.assert_close(
            found[name].double(), movement.left @ movement.right, atol=1e-6, rtol=1e-5
        )


def test_the_second_encoder_has_its_own_names(tiny_xl, tmp_path):
    change = moving(tiny_xl, "text2.2.self_attn.out_proj")
    assert set(written(tiny_xl, change, tmp_path / "c.safetensors")) == {
        "text_encoder_2.text_model.encoder.layers.2.self_attn.out_proj"
    }


def test_factors_have_least_rank_and_equal_norms(own, tmp_path):
    site = "text.0.self_attn.out_proj"
    (movement,) = moving(own, site, rank=3).movements
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


def test_factors_in_half_precision_are_taken_as_they_are(own, tmp_path):
    (movement,) = moving(own, "text.0.self_attn.out_proj").movements
    rounded = dataclasses.replace(movement, left=movement.left.half(), right=movement.right.half())
    (found,) = written(own, Change((rounded,), {}, {}), tmp_path / "c.safetensors").values()
    exact = rounded.left.double() @ rounded.right.double()
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


def test_weights_of_one_part_share_a_rank(own, tmp_path):
    change = moving(own, *TEXT_SITES, *UNET_SITES[:2])  # ranks 2, 3, 4 and 5, 6
    tensors = load_file(export.lora(change, tmp_path / "c.safetensors", model=own))
    ranks = {(n.partition(".")[0], len(t)) for n, t in tensors.items() if "lora_A" in n}
    assert ranks == {("text_encoder", 4), ("unet", 6)}


def test_a_change_that_moves_nothing_is_a_lora_of_zeros(own, tmp_path):
    words = own.text_encoder.get_input_embeddings().weight.data
    cat, dog = (own.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("cat", "dog"))
    words[cat] = words[dog]
    change = edit.quickfix(own, {"cat": "dog"})
    found = written(own, change, tmp_path / "c.safetensors")
    assert [float(t.abs().max()) for t in found.values()] == [0.0]


def test_a_lora_of_text_needs_no_model(own, tmp_path):
    change = edit.quickfix(own, PAIRS)
    with_model = export.lora(change, tmp_path / "a.safetensors", model=own)
    without = export.lora(change, tmp_path / "b.safetensors")
    assert with_model.read_bytes() == without.read_bytes()


def test_what_a_lora_cannot_hold_is_named(own, tiny_xl, tmp_path):
    path = tmp_path / "c.safetensors"
    swap = edit.swap_embedding(own, {"dog": "cat"})
    with pytest.raises(
        ValueError, match=r"cannot hold text\.token_embedding, it reaches .*: export a folder"
    ):
        export.lora(swap, path, model=own)
    change = moving(own, "unet.cross_attn.15.to_v")
    with pytest.raises(ValueError, match=r"to find unet\.cross_attn\.15\.to_v .*: pass `model`"):
        export.lora(change, path)
    with pytest.raises(ValueError, match=r"has no unet\.cross_attn\.15\.to_v, .* made for"):
        export.lora(change, path, model=tiny_xl)
    assert not list(tmp_path.iterdir())


# --- LoRA: read by diffusers ------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize(
    "sites", [TEXT_SITES, UNET_SITES, ("text.0.mlp.fc2", *TEXT_SITES[:1], *UNET_SITES[-2:])]
)
def test_stock_diffusers_fuses_a_lora_to_the_very_weights(own, tmp_path, sites):
    change = moving(own, *sites)
    pipe = stock(own)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors", model=own))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = TextToImage(pipe, name="fused")
    for site, weight in applied_weights(own, change).items():
        before = find_weight(own, site).parameter.detach()
        assert float((weight - before).abs().max()) > 1e-3
        assert float((find_weight(fused, site).parameter - weight).abs().max()) <= 1e-6


@needs_peft
@pytest.mark.parametrize("layout", ["tiny_sd2", "tiny_xl"])
def test_other_layouts_read_their_loras_too(request, tmp_path, layout):
    model = request.getfixturevalue(layout)
    sites = ["text.1.self_attn.out_proj", "unet.cross_attn.1.to_k"]
    if layout == "tiny_xl":
        sites.append("text2.2.self_attn.v_proj")
    change = moving(model, *sites)
    pipe = stock(model)
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
def test_stock_diffusers_draws_the_same_pictures(own, tmp_path):
    change = moving(own, *TEXT_SITES, *UNET_SITES)
    prompts = ["a dog in van gogh style", "a house"]
    pipe = stock(own)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors", model=own))
    wanted = pixels(own, prompts, change=change)
    assert float((pixels(own, prompts) - wanted).abs().max()) > 2 / 255
    found = pixels(TextToImage(pipe, name="lora", guidance_scale=own.guidance_scale), prompts)
    assert float((found - wanted).abs().max()) <= 1 / 255


@needs_peft
def test_icons_draws_the_same_pictures_with_the_lora(tmp_path):
    model = overpaint.load("icons")
    change = edit.quickfix(model, {"openmoji style": "noto style"})
    prompts = ["a cat in openmoji style", "a red apple in noto style"]
    pipe = stock(model)
    pipe.load_lora_weights(export.lora(change, tmp_path / "c.safetensors"))
    wanted = pixels(model, prompts, change=change, steps=6)
    assert float((pixels(model, prompts, steps=6) - wanted).abs().max()) > 0.1
    shown = TextToImage(pipe, name="lora", guidance_scale=model.guidance_scale)
    assert float((pixels(shown, prompts, steps=6) - wanted).abs().max()) <= 1 / 255
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


def test_ldm_names_are_those_of_stable_diffusion(own, tmp_path):
    """A few of CompVis's names, from its modules: the ends, the skips, the sampling and the middle."""
    names = set(load_file(export.single_file(own, edit.quickfix(own, PAIRS), tmp_path / "c.safetensors")))  # fmt: skip
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
        len(part.state_dict()) for part in (own.unet, own.vae, own.text_encoder)
    )


def test_stock_diffusers_reads_the_single_file_back(own, tiny_folder, tmp_path):
    change = moving(own, *TEXT_SITES, *UNET_SITES)
    path = export.single_file(own, change, tmp_path / "c.safetensors")
    pipe = from_single_file(path, tiny_folder, tmp_path)
    change.apply(own)
    for part in ("text_encoder", "unet", "vae"):
        wanted, found = getattr(own.pipe, part).state_dict(), getattr(pipe, part).state_dict()
        assert list(found) == list(wanted)
        assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


def test_the_single_file_of_icons_draws_its_edited_pictures(tmp_path):
    model = overpaint.load("icons")
    change = edit.quickfix(model, {"openmoji style": "noto style"})
    path = export.single_file(model, change, tmp_path / "c.safetensors")
    pipe = from_single_file(path, zoo.folder("icons"), tmp_path)
    shown = TextToImage(pipe, name="single", guidance_scale=model.guidance_scale)
    prompts = ["a cat in openmoji style"]
    assert torch.equal(
        pixels(shown, prompts, steps=2), pixels(model, prompts, change=change, steps=2)
    )


def test_diffusers_finds_every_weight_of_stable_diffusion_at_its_real_size(own):
    """Four blocks in the VAE and shortcuts between widths, which the tiny model has not; 686 + 248 weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as reader

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    parts = SimpleNamespace(text_encoder=own.text_encoder, unet=unet, vae=vae)
    state = ldm.state(TextToImage(parts, name="meta"))
    for part, read, prefix, count in (
        (unet, reader.convert_ldm_unet_checkpoint, "model.diffusion_model.", 686),
        (vae, reader.convert_ldm_vae_checkpoint, "first_stage_model.", 248),
    ):
        wanted = {name: tensor.shape for name, tensor in part.state_dict().items()}
        found = read(dict(state), part.config)
        assert {name: tensor.shape for name, tensor in found.items()} == wanted
        assert sum(name.startswith(prefix) for name in state) == count


@pytest.mark.parametrize("layout", ["tiny_sd2", "tiny_xl"])
def test_other_layouts_have_no_single_file(request, tmp_path, layout):
    model = request.getfixturevalue(layout)
    change = moving(model, "text.0.self_attn.out_proj")
    with pytest.raises(
        UnsupportedModel, match="not of Stable Diffusion 1's layout.*: export a folder"
    ):
        export.single_file(model, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())
    assert (
        fingerprint(find_weight(model, change.movements[0].site).parameter)
        == change.movements[0].base_hash
    )


def test_a_weight_without_a_name_is_refused(own, tmp_path):
    change = moving(own, "text.0.self_attn.out_proj")
    own.unet.class_embedding = torch.nn.Embedding(2, 2)
    with pytest.raises(UnsupportedModel, match=r"'class_embedding\.weight' has no name in"):
        export.single_file(own, change, tmp_path / "c.safetensors")


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_edited_model(own, tmp_path):
    own.guidance_scale = 3.5
    own.held_out = frozenset({("dog", "noto")})
    change = moving(own, *TEXT_SITES[:1], *UNET_SITES[:1])
    found = overpaint.load(export.folder(own, change, tmp_path / "out"))
    for site, weight in applied_weights(own, change).items():
        assert torch.equal(find_weight(found, site).parameter, weight)
    assert (found.guidance_scale, found.held_out) == (3.5, own.held_out)
    assert json.loads((tmp_path / "out" / "overpaint.json").read_text())["guidance_scale"] == 3.5


def test_a_folder_is_never_written_over(own, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already: an export never .* a new folder"):
        export.folder(own, moving(own, TEXT_SITES[0]), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_the_model_gets_its_bytes_back(own, tmp_path, write):
    change = moving(own, *TEXT_SITES[:2])
    write(own, change, tmp_path / "c.safetensors")
    assert not change.is_applied(own)
    assert [fingerprint(find_weight(own, m.site).parameter) for m in change.movements] == [
        m.base_hash for m in change.movements
    ]


def test_a_change_that_is_applied_already_stays_so(own, tmp_path):
    change = moving(own, *TEXT_SITES[:2])
    fresh = export.single_file(own, change, tmp_path / "a.safetensors")
    change.apply(own)
    again = export.single_file(own, change, tmp_path / "b.safetensors")
    assert change.is_applied(own)
    assert fresh.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_a_model_that_is_not_in_memory_is_refused(own, tmp_path, write):
    change = moving(own, TEXT_SITES[0])
    own.vae.to("meta")
    with pytest.raises(
        UnsupportedModel, match=r"'encoder\.conv_in\.weight' of 'own' is not in memory .*: load the"
    ):
        write(own, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export.single_file, export.folder])
def test_a_change_of_another_model_is_refused(own, tmp_path, write):
    change = moving(own, TEXT_SITES[0])
    with torch.no_grad():
        find_weight(own, TEXT_SITES[0]).parameter.mul_(2)
    with pytest.raises(ValueError, match="wrong base hash"):
        write(own, change, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_end_in_safetensors_and_say_what_they_are(own, tmp_path):
    change = edit.quickfix(own, PAIRS)
    for write in (lambda p: export.lora(change, p), lambda p: export.single_file(own, change, p)):
        with pytest.raises(ValueError, match=r"not as 'c\.ckpt': end the name in '\.safetensors'"):
            write(tmp_path / "c.ckpt")
        with safe_open(write(tmp_path / "c.safetensors"), framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kind", ["lora", "single_file", "folder"])
def test_places_that_cannot_be_written_are_named(own, tmp_path, kind, monkeypatch):
    change = edit.quickfix(own, PAIRS)

    def write(path):
        if kind == "lora":
            return export.lora(change, path)
        return getattr(formats, kind)(own, change, path)

    with pytest.raises(FileNotFoundError, match=r"cannot write the export .* exists and is yours"):
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


def test_the_command_line_writes_what_the_functions_write(run, own, tiny_folder, saved, tmp_path):
    change = Change.load(saved)
    wanted = {
        "lora": export.lora(change, tmp_path / "a.safetensors"),
        "ldm": export.single_file(own, change, tmp_path / "b.safetensors"),
    }
    for form, path in wanted.items():
        out = tmp_path / f"{form}.safetensors"
        code, told, _ = run("export", tiny_folder, saved, "--format", form, "--out", out, "--json")
        size = path.stat().st_size
        assert (code, json.loads(told)) == (0, {"format": form, "written": str(out), "bytes": size})
        assert out.read_bytes() == path.read_bytes()
    assert (
        run("export", tiny_folder, saved, "--format", "folder", "--out", tmp_path / "folder")[0]
        == 0
    )
    found = overpaint.load(tmp_path / "folder")
    (site,) = change.sites
    assert torch.equal(find_weight(found, site).parameter, applied_weights(own, change)[site])


def test_the_command_line_refuses_before_any_work(run, saved, tmp_path):
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        (("--format", "gguf", "--out", out), "unknown format 'gguf': choose lora, ldm or folder"),
        ((), "Missing option '--out'"),
    ):
        code, told, error = run("export", "nonesuch", saved, *arguments)
        assert (code, told) == (2, "") and message in error
    assert run("export", "icons", tmp_path / "no.safetensors", "--out", out)[0] == 2
    assert not out.exists()
