"""Exports for web UIs: names against the key maps of their readers, factors, and bad input.

The key maps are facts of the readers, written down from their sources:

- ComfyUI, `comfy/lora.py`, `model_lora_keys_clip` and `model_lora_keys_unet`;
- AUTOMATIC1111, `extensions-builtin/Lora/networks.py`, `convert_diffusers_name_to_compvis` and
  `modules/textual_inversion/textual_inversion.py`.
"""

import importlib.util
import re

import pytest
import torch
from safetensors.torch import load_file
from test_edit_export import applied_weights, plain_pipeline, random_change

from overpaint import edit
from overpaint.edit import export
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage
from overpaint.model.sites import find_unet

TEXT = ("text.0.self_attn.out_proj", "text.3.self_attn.q_proj", "text.0.mlp.fc2")
UNET = tuple(f"unet.cross_attn.{i}.{p}" for i in (0, 6, 15) for p in ("to_k", "to_v", "to_out"))
PARTS = ("lora_up.weight", "lora_down.weight", "alpha")
CLIP_LAYERS = (
    "mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj",
)  # fmt: skip
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="diffusers reads LoRAs through peft"
)


def comfy_keys(model):
    """Return the names that ComfyUI knows for the layers that Overpaint edits."""
    encoders = {"clip_l": ("lora_te_", "lora_te1_")}
    if len(model.text_encoders) > 1:
        encoders = {"clip_l": ("lora_te1_",), "clip_g": ("lora_te2_",)}
    keys = set()
    for i, (encoder, prefixes) in enumerate(encoders.items()):
        keys.add(f"text_encoders.{encoder}.transformer.text_model.embeddings.token_embedding")
        for layer in range(model.text_encoders[i].config.num_hidden_layers):
            for name in CLIP_LAYERS:
                keys |= {
                    f"{p}text_model_encoder_layers_{layer}_{name.replace('.', '_')}"
                    for p in prefixes
                }
    names = [n for n, _ in model.unet.named_modules()]
    return keys | {f"lora_unet_{name.replace('.', '_')}" for name in names}


def webui_module(key):
    """Return the module of a checkpoint that AUTOMATIC1111 looks up for a key of a LoRA, `None` if it knows none."""
    if m := re.fullmatch(r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_input_blocks_{1 + int(m[1]) * 3 + int(m[2])}_1_{m[3]}"
    if m := re.fullmatch(r"lora_unet_mid_block_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_middle_block_1_{m[2]}"
    if m := re.fullmatch(r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)", key):
        return f"diffusion_model_output_blocks_{int(m[1]) * 3 + int(m[2])}_1_{m[3]}"
    if m := re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", key):
        return f"transformer_text_model_encoder_layers_{m[1]}_{m[2]}"
    return None


def products(path):
    """Return the movement that a reader adds for each name: up times down, times alpha by rank."""
    tensors = load_file(path)
    names = {name.partition(".lora_")[0].removesuffix(".alpha") for name in tensors}
    assert set(tensors) == {f"{name}.{part}" for name in names for part in PARTS}
    return {
        n: float(tensors[f"{n}.alpha"]) / len(tensors[f"{n}.lora_down.weight"])
        * (tensors[f"{n}.lora_up.weight"].double() @ tensors[f"{n}.lora_down.weight"].double())
        for n in names
    }  # fmt: skip


def test_names_of_kohya_are_known_to_comfyui_and_automatic1111(copied, tmp_path):
    change = random_change(copied, *TEXT, *UNET)
    moved = products(export.kohya(change, tmp_path / "c.safetensors", model=copied))
    assert len(moved) == len(change.movements)
    assert set(moved) <= comfy_keys(copied)
    assert all(webui_module(name) for name in moved)
    assert "lora_te_text_model_encoder_layers_0_self_attn_out_proj" in moved
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in moved
    assert (
        webui_module("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k")
        == "diffusion_model_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    )


def test_factors_of_kohya_are_the_movement(copied, tmp_path):
    change = random_change(copied, *TEXT[:1], UNET[3])
    moved = products(export.kohya(change, tmp_path / "c.safetensors", model=copied))
    paths = [s.path.replace(".", "_") for s in find_unet(copied.unet) if s.kind == "cross_attn"]
    names = (
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj", f"lora_unet_{paths[6]}_to_k",
    )  # fmt: skip
    for name, movement in zip(names, change.movements, strict=True):
        torch.testing.assert_close(moved[name], movement.delta, atol=1e-6, rtol=1e-5)


def test_the_encoders_of_sdxl_are_numbered(tiny_xl, tmp_path):
    change = random_change(tiny_xl, "text.0.self_attn.out_proj", "text2.1.self_attn.v_proj")
    moved = products(export.kohya(change, tmp_path / "a.safetensors"))
    zero = "lora_te2_text_model_encoder_layers_1_self_attn_out_proj"  # as diffusers wants one
    assert set(moved) == {
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_v_proj",
        zero,
    }
    assert not moved[zero].any()
    assert set(moved) <= comfy_keys(tiny_xl)
    first = edit.quickfix(tiny_xl, {"cat": "dog"}, encoder="text")
    for i, model in enumerate((None, tiny_xl)):
        (name,) = products(export.kohya(first, tmp_path / f"{i}.safetensors", model=model))
        assert name.startswith("lora_te1_")


@needs_peft
def test_stock_diffusers_fuses_kohyas_names_to_the_weights_of_the_applied_change(copied, tmp_path):
    change = random_change(copied, *TEXT[:2], *UNET[:2])
    pipe = plain_pipeline(copied)
    pipe.load_lora_weights(export.kohya(change, tmp_path / "c.safetensors", model=copied))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = TextToImage(pipe, name="fused")
    for site, weight in applied_weights(copied, change).items():
        assert float((find_weight(fused, site).parameter - weight).abs().max()) <= 1e-6


def test_token_rows_are_one_hot_factors_under_the_generic_names_of_comfyui(copied, tmp_path):
    change = edit.swap_embedding(copied, {"red cat": "blue dog"})
    path = export.comfy(change, tmp_path / "c.safetensors")
    ((name, moved),) = products(path).items()
    assert name == "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"
    assert name in comfy_keys(copied)
    torch.testing.assert_close(moved, change.delta, atol=1e-7, rtol=1e-6)
    up = load_file(path)[f"{name}.lora_up.weight"]
    assert up.sum(0).tolist() == [1.0, 1.0] and set(up.unique().tolist()) == {0.0, 1.0}


def test_rows_and_layers_share_a_file_for_comfyui(tiny_xl, tmp_path):
    rows = edit.swap_embedding(tiny_xl, {"cat": "dog"})
    layer = random_change(tiny_xl, "text2.1.self_attn.out_proj")
    both = edit.Change((*layer.movements, *rows.movements), rows.protocol, {})
    moved = products(export.comfy(both, tmp_path / "c.safetensors", model=tiny_xl))
    assert len(moved) == 3 and set(moved) <= comfy_keys(tiny_xl)


def test_a_textual_inversion_file_holds_the_new_row_of_its_word(copied, tmp_path):
    change = edit.swap_embedding(copied, {"cat": "dog"})
    table = copied.text_encoder.get_input_embeddings().weight.detach()
    (dog,) = copied.tokenizer("dog", add_special_tokens=False).input_ids
    folder = export.embeddings(copied, change, tmp_path / "embeddings")
    assert [file.name for file in folder.iterdir()] == ["cat.safetensors"]
    tensors = load_file(folder / "cat.safetensors")
    torch.testing.assert_close(tensors, {"emb_params": table[dog][None]})
    with change.applied(copied):
        again = export.embeddings(copied, change, tmp_path / "again")
    assert (again / "cat.safetensors").read_bytes() == (folder / "cat.safetensors").read_bytes()
    pipe = plain_pipeline(copied)
    pipe.load_textual_inversion(str(folder / "cat.safetensors"), token="<cat>")
    ids = pipe.tokenizer("<cat>", return_tensors="pt", padding="max_length").input_ids
    with torch.no_grad():
        features = pipe.text_encoder(ids)[0]
    torch.testing.assert_close(features, copied.encode(["dog"]), atol=1e-5, rtol=1e-5)


def test_a_file_for_sdxl_holds_the_rows_of_both_encoders(tiny_xl, tmp_path):
    change = edit.swap_embedding(tiny_xl, {"cat": "dog"})
    folder = export.embeddings(tiny_xl, change, tmp_path / "embeddings")
    tensors = load_file(folder / "cat.safetensors")
    widths = [encoder.config.hidden_size for encoder in tiny_xl.text_encoders]
    assert {n: t.shape for n, t in tensors.items()} == {"clip_l": (1, widths[0]), "clip_g": (1, widths[1])}  # fmt: skip


def test_changes_that_a_format_cannot_hold_are_refused(copied, tiny_xl, tmp_path):
    rows = edit.swap_embedding(copied, {"cat": "dog"})
    layer = edit.quickfix(copied, {"cat": "dog"})
    with pytest.raises(ValueError, match="names cannot express token rows"):
        export.kohya(rows, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="hold token rows alone"):
        export.embeddings(copied, layer, tmp_path / "e")
    with pytest.raises(ValueError, match="is no whole word"):
        export.embeddings(copied, edit.swap_embedding(copied, {"twemoji": "dog"}), tmp_path / "e")
    one = edit.swap_embedding(tiny_xl, {"cat": "dog"}, encoder="text")
    with pytest.raises(ValueError, match="a file must hold the rows of all"):
        export.embeddings(tiny_xl, one, tmp_path / "e")
    with pytest.raises(FileExistsError, match="name a new folder"):
        export.embeddings(copied, rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_each_format(run, tiny_folder, copied, tmp_path):
    edit.swap_embedding(copied, {"cat": "dog"}).save(tmp_path / "rows.safetensors")
    edit.quickfix(copied, {"cat": "dog"}).save(tmp_path / "layer.safetensors")
    for form, change, out in (
        ("kohya", "layer", "kohya.safetensors"),
        ("comfy", "rows", "comfy.safetensors"),
        ("embeddings", "rows", "embeddings"),
    ):
        arguments = (tmp_path / f"{change}.safetensors", "--format", form, "--out", tmp_path / out)
        assert run("export", tiny_folder, *arguments)[0] == 0
        assert (tmp_path / out).exists()
