import json
from collections import Counter

import layouts
import pytest
import torch
from torch import nn

from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage, hooks, sites
from overpaint.trace import hook_check
from overpaint.zoo import builders

# Width and side of each level of SD-1.4 at 512 pixels, and the level of each block in execution order.
LEVELS = {"a": (320, 64), "b": (640, 32), "c": (1280, 16), "d": (1280, 8)}
RESNETS = "aabbccdd" + "dd" + "dddcccbbbaaa"
ATTENTIONS = "aabbcc" + "d" + "cccbbbaaa"


@pytest.fixture(scope="module")
def sd14():
    """SD-1.4's UNet without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )


def text_config(width, layers, heads, *, projection, activation="gelu"):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=activation,
    )


@pytest.fixture(scope="module")
def sd21():
    """SD-2.1 without weights: the published settings of its UNet and of its text encoder, OpenCLIP ViT-H."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = builders.tiny("sd2", text_layers=1)
    with torch.device("meta"):
        pipe.text_encoder = CLIPTextModel(text_config(1024, 23, 16, projection=512))
        pipe.unet = UNet2DConditionModel(
            sample_size=96,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    return TextToImage(pipe, name="sd21")


@pytest.fixture(scope="module")
def sdxl():
    """SDXL base without weights: published settings; its encoders are CLIP ViT-L and OpenCLIP ViT-bigG."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipe = builders.tiny("sdxl", text_layers=1)
    with torch.device("meta"):
        pipe.text_encoder = CLIPTextModel(
            text_config(768, 12, 12, projection=768, activation="quick_gelu")
        )
        pipe.text_encoder_2 = CLIPTextModelWithProjection(
            text_config(1280, 32, 20, projection=1280)
        )
        pipe.unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return TextToImage(pipe, name="sdxl")


def weights(module):
    return sum(p.numel() for p in module.parameters())


def test_number_of_sites_of_sd14(sd14):
    all_sites = sites.find_unet(sd14)
    kinds = Counter(site.kind for site in all_sites)
    assert kinds == {"resnet": 22, "self_attn": 16, "cross_attn": 16, "mlp": 16}
    assert len({site.name for site in all_sites}) == len({site.path for site in all_sites}) == 70
    assert len(list(sd14.named_modules())) == 709
    assert sum(p.numel() for p in sd14.parameters()) == 859_520_964


def test_shapes_and_execution_order_of_sd14(sd14):
    all_sites = sites.find_unet(sd14)
    ran = []
    names = {sd14.get_submodule(site.path): site.name for site in all_sites}
    shapes = {}

    def recorder(module):
        def record(output):
            ran.append(names[module])
            shapes[names[module]] = tuple(output.shape[1:])
            return output

        return record

    with hooks.patch({module: recorder(module) for module in names}):
        sd14(
            torch.empty(1, 4, 64, 64, device="meta"),
            torch.tensor(1, device="meta"),
            torch.empty(1, 77, 768, device="meta"),
        )
    assert ran == [site.name for site in all_sites]
    for i, level in enumerate(RESNETS):
        width, side = LEVELS[level]
        assert shapes[f"unet.resnet.{i}"] == (width, side, side)
    for i, level in enumerate(ATTENTIONS):
        width, side = LEVELS[level]
        for kind in ("self_attn", "cross_attn", "mlp"):
            assert shapes[f"unet.{kind}.{i}"] == (side * side, width)


def test_paths_of_sd14(sd14):
    paths = {site.name: site.path for site in sites.find_unet(sd14)}
    assert paths["unet.cross_attn.6"] == "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert paths["unet.cross_attn.8"] == "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert paths["unet.resnet.9"] == "mid_block.resnets.1"
    assert paths["unet.resnet.10"] == "up_blocks.0.resnets.0"
    assert paths["unet.mlp.15"] == "up_blocks.3.attentions.2.transformer_blocks.0.ff"


def test_number_and_order_of_sites_of_sd21(sd21):
    all_sites = hook_check.verified_sites(sd21)
    unet = [site for site in all_sites if site.part == "unet"]
    assert Counter(site.kind for site in unet) == {
        "resnet": 22, "self_attn": 16, "cross_attn": 16, "mlp": 16,
    }  # fmt: skip
    assert len(all_sites) == 70 + 2 * 23
    assert weights(sd21.unet) == 865_910_724
    assert weights(sd21.text_encoder) == 340_387_840
    heads = [sites.heads(sd21, site) for site in unet if site.kind == "cross_attn"]
    assert heads == [5] * 2 + [10] * 2 + [20] * 2 + [20] + [20] * 3 + [10] * 3 + [5] * 3


def test_number_and_order_of_sites_of_sdxl(sdxl):
    all_sites = hook_check.verified_sites(sdxl)
    unet = [site for site in all_sites if site.part == "unet"]
    assert Counter(site.kind for site in unet) == {
        "resnet": 17, "self_attn": 70, "cross_attn": 70, "mlp": 70,
    }  # fmt: skip
    assert Counter(site.part for site in all_sites) == {"text": 24, "text2": 64, "unet": 227}
    assert len({site.name for site in all_sites}) == len(all_sites)
    assert [site.part for site in all_sites] == sorted(site.part for site in all_sites)
    assert weights(sdxl.unet) == 2_567_463_684
    assert [weights(encoder) for encoder in sdxl.text_encoders] == [123_060_480, 694_659_840]
    by_name = {site.name: site for site in all_sites}
    # down blocks: 2 and 2 at width 640, 10 and 10 at 1280; mid block: 10; up blocks: 3 times 10 and 3 times 2
    heads = [sites.heads(sdxl, site) for site in unet if site.kind == "cross_attn"]
    assert heads == [10] * 4 + [20] * 20 + [20] * 10 + [20] * 30 + [10] * 6
    assert by_name["unet.cross_attn.24"].path == "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert by_name["unet.resnet.6"].path == "mid_block.resnets.0"
    assert by_name["text2.31.mlp"].path == "text_model.encoder.layers.31.mlp"
    assert sites.heads(sdxl, by_name["text.0.self_attn"]) == 12
    assert sites.heads(sdxl, by_name["text2.0.self_attn"]) == 20


def test_text_sites_in_both_layouts_of_transformers(tiny_sd1):
    all_sites = sites.find_text(tiny_sd1.text_encoder)
    assert Counter(site.kind for site in all_sites) == {"self_attn": 12, "mlp": 12}
    assert [site.name for site in all_sites[:3]] == [
        "text.0.self_attn",
        "text.0.mlp",
        "text.1.self_attn",
    ]

    nested = nn.Module()  # the layout of transformers 4, and of CLIPTextModelWithProjection
    nested.text_model = nn.Module()
    nested.text_model.encoder = tiny_sd1.text_encoder.get_submodule(
        all_sites[0].path.partition("encoder.")[0] + "encoder"
    )
    other = sites.find_text(nested)
    assert [site.name for site in other] == [site.name for site in all_sites]
    assert other[0].path == "text_model.encoder.layers.0.self_attn"

    second = sites.find_text(nested, "text2")
    assert [site.name for site in second[:2]] == ["text2.0.self_attn", "text2.0.mlp"]
    assert {site.part for site in second} == {"text2"}
    assert [site.path for site in second] == [site.path for site in other]


def test_find_returns_text_sites_then_unet_sites(tiny_sd1):
    all_sites = sites.find(tiny_sd1)
    assert len(all_sites) == 24 + 70
    assert [site.part for site in all_sites] == ["text"] * 24 + ["unet"] * 70
    assert sites.get(tiny_sd1, "unet.cross_attn.3") in all_sites
    assert all(isinstance(site.module(tiny_sd1), nn.Module) for site in all_sites)


def test_find_returns_the_sites_of_both_text_encoders(tiny_xl):
    all_sites = sites.find(tiny_xl)
    assert [site.part for site in all_sites] == ["text"] * 4 + ["text2"] * 6 + ["unet"] * 44
    first, second = sites.get(tiny_xl, "text.0.mlp"), sites.get(tiny_xl, "text2.0.mlp")
    assert first.module(tiny_xl).fc1.in_features == 32
    assert second.module(tiny_xl).fc1.in_features == 48


@pytest.mark.parametrize("name", ["text2.1.self_attn", "unet.self_attn.4", "unet.cross_attn.4"])
def test_head_input_is_the_concatenation_of_the_heads(tiny_xl, name):
    """Compared with attention computed head by head."""
    site = sites.get(tiny_xl, name)
    module, count = site.module(tiny_xl), sites.heads(tiny_xl, site)
    linear = sites.head_input(tiny_xl, site)
    if site.part == "unet":
        projections = (module.to_q, module.to_k, module.to_v)
    else:
        projections = (module.q_proj, module.k_proj, module.v_proj)
    embeds = tiny_xl.encode(["a cat"])
    with torch.no_grad(), hooks.record_inputs(linear) as joined, hooks.record(projections) as seen:
        tiny_xl.encode(["a cat"])
        tiny_xl.noise_pred(tiny_xl.initial_latents([0]), torch.tensor(500), embeds)
    queries, keys, values = (outputs[0][0].chunk(count, dim=-1) for outputs in seen)
    width = linear.in_features // count
    for h in range(count):
        scores = queries[h] @ keys[h].T / width**0.5
        if site.part != "unet":
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)  # causal
        expected = scores.softmax(-1) @ values[h]
        assert torch.allclose(joined[0][0, :, h * width : (h + 1) * width], expected, atol=1e-5)


def test_only_attention_has_heads(tiny_xl):
    for name in ("text.0.mlp", "unet.resnet.0", "unet.mlp.0"):
        site = sites.get(tiny_xl, name)
        assert sites.heads(tiny_xl, site) == 0
        with pytest.raises(ValueError, match=f"{name} has no attention heads: choose a site of ki"):
            sites.head_input(tiny_xl, site)


def test_an_unknown_site_of_two_encoders_raises(tiny_xl):
    with pytest.raises(
        UnknownSite,
        match=r"'text2.3.mlp': this model has text.0 to 1 \(self_attn, mlp\), text2.0 to 2 \(",
    ):
        sites.get(tiny_xl, "text2.3.mlp")


def test_an_unknown_site_raises(tiny_sd1):
    with pytest.raises(
        UnknownSite,
        match=r"unknown site 'unet.cross_attn.16': this model has text.0 to 11 .*cross_attn.0 to 15.*"
        r"`overpaint sites`",
    ):
        sites.get(tiny_sd1, "unet.cross_attn.16")


def test_other_modules_raise():
    with pytest.raises(UnsupportedModel, match="Linear has no encoder layers"):
        sites.find_text(nn.Linear(1, 1))
    with pytest.raises(UnsupportedModel, match="Linear has no down, mid and up blocks"):
        sites.find_unet(nn.Linear(1, 1))


def test_fused_chunked_and_compiled_models_raise():
    unet = builders.tiny().unet
    unet.fuse_qkv_projections()
    with pytest.raises(UnsupportedModel, match="projections are fused.*unfuse_qkv_projections"):
        sites.find_unet(unet)
    unet.unfuse_qkv_projections()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.set_chunk_feed_forward(1, dim=1)
    with pytest.raises(UnsupportedModel, match=r"in chunks.*set_chunk_feed_forward\(None\)"):
        sites.find_unet(unet)
    block.set_chunk_feed_forward(None)
    assert len(sites.find_unet(unet)) == 70
    with pytest.raises(UnsupportedModel, match="is compiled"):
        sites.find_unet(torch.compile(unet))


def test_submodules_compiled_in_place_raise():
    pipe = builders.tiny("sdxl", text_layers=1)
    pipe.unet.up_blocks[0].compile()
    with pytest.raises(UnsupportedModel, match=r"is compiled \(up_blocks.0\), so that hooks"):
        sites.find_unet(pipe.unet)
    pipe.text_encoder_2.text_model.compile()
    with pytest.raises(UnsupportedModel, match=r"is compiled \(text_model\)"):
        sites.find_text(pipe.text_encoder_2)
    assert sites.find_text(pipe.text_encoder)


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_the_command_lists_whole_paths_in_80_columns(run, tmp_path, monkeypatch, layout):
    layouts.folder(tmp_path / layout, layout)
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = run("sites", tmp_path / layout)
    lines = output.splitlines()
    assert code == 0 and max(len(line) for line in lines) <= 80 and "…" not in output
    listed = [tuple(line.split()) for line in lines[1:]]
    code, output, _ = run("sites", tmp_path / layout, "--json")
    sites_of_json = json.loads(output)["sites"]
    assert listed == [(site["name"], site["path"]) for site in sites_of_json]
    assert set(sites_of_json[0]) == {"name", "kind", "path"}
