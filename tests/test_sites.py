from collections import Counter

import pytest
import torch
from torch import nn

from overpaint import hooks, sites
from overpaint.errors import UnknownSite, UnsupportedModel

# Width and side of each level of SD-1.4 at 512 pixels, and the blocks that run there in order.
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


def test_census_of_sd14(sd14):
    found = sites.find_unet(sd14)
    kinds = Counter(site.kind for site in found)
    assert kinds == {"resnet": 22, "self_attn": 16, "cross_attn": 16, "mlp": 16}
    assert len({site.name for site in found}) == len({site.path for site in found}) == 70
    assert len(list(sd14.named_modules())) == 709
    assert sum(p.numel() for p in sd14.parameters()) == 859_520_964


def test_shapes_and_execution_order_of_sd14(sd14):
    found = sites.find_unet(sd14)
    ran = []
    names = {sd14.get_submodule(site.path): site.name for site in found}
    shapes = {}

    def seen(module):
        def note(output):
            ran.append(names[module])
            shapes[names[module]] = tuple(output.shape[1:])
            return output

        return note

    with hooks.patch({module: seen(module) for module in names}):
        sd14(
            torch.empty(1, 4, 64, 64, device="meta"),
            torch.tensor(1, device="meta"),
            torch.empty(1, 77, 768, device="meta"),
        )
    assert ran == [site.name for site in found]
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


def test_text_sites_in_both_trees(tiny_sd1):
    found = sites.find_text(tiny_sd1.text_encoder)
    assert Counter(site.kind for site in found) == {"self_attn": 12, "mlp": 12}
    assert [site.name for site in found[:3]] == [
        "text.0.self_attn",
        "text.0.mlp",
        "text.1.self_attn",
    ]

    nested = nn.Module()  # the tree of transformers 4, and of CLIPTextModelWithProjection
    nested.text_model = nn.Module()
    nested.text_model.encoder = tiny_sd1.text_encoder.get_submodule(
        found[0].path.partition("encoder.")[0] + "encoder"
    )
    other = sites.find_text(nested)
    assert [site.name for site in other] == [site.name for site in found]
    assert other[0].path == "text_model.encoder.layers.0.self_attn"


def test_find_lists_text_then_unet(tiny_sd1):
    found = sites.find(tiny_sd1)
    assert len(found) == 24 + 70
    assert [site.part for site in found] == ["text"] * 24 + ["unet"] * 70
    assert sites.get(tiny_sd1, "unet.cross_attn.3") in found
    assert all(isinstance(site.module(tiny_sd1), nn.Module) for site in found)


def test_unknown_site(tiny_sd1):
    with pytest.raises(
        UnknownSite,
        match=r"unknown site 'unet.cross_attn.16': this model has text.0 to 11 .*cross_attn.0 to 15.*"
        r"`overpaint sites`",
    ):
        sites.get(tiny_sd1, "unet.cross_attn.16")


def test_other_modules_are_refused():
    with pytest.raises(UnsupportedModel, match="Linear has no encoder layers"):
        sites.find_text(nn.Linear(1, 1))
    with pytest.raises(UnsupportedModel, match="Linear has no down, mid and up blocks"):
        sites.find_unet(nn.Linear(1, 1))


def test_models_that_hide_their_modules_are_refused():
    from overpaint.zoo import build

    unet = build.tiny().unet
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
