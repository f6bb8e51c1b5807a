"""The weights that an edit can move, several at a time: all of them or none, wherever they are kept."""

import copy
import dataclasses

import accelerate
import pytest
import torch
from peft import LoraConfig

from overpaint import edit
from overpaint.edit import Change, Movement
from overpaint.edit import application
from overpaint.edit.weights import (
    fingerprint,
    is_site,
    text_layers,
    find_weight,
    find_weights,
)
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage
from overpaint.model.sites import find_unet

GOGH = {"van gogh": "painting"}
SITES = ("text.3.self_attn.q_proj", "unet.cross_attn.7.to_k", "unet.cross_attn.0.to_out")


def everything(model):
    """The bytes of every tensor of the pipeline."""
    parts = (*model.text_encoders, model.unet, model.vae)
    return {(i, n): fingerprint(p) for i, m in enumerate(parts) for n, p in m.named_parameters()}


def movement(model, site, *, seed=0, rank=2):
    weight = find_weight(model, site).parameter
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in weight.shape
    )
    none = torch.zeros(0, weight.shape[1]), torch.zeros(0, weight.shape[0])
    return Movement(site, fingerprint(weight), left, right.T.contiguous(), *none, (), None)


@pytest.fixture
def own(tiny_sd1):
    """A copy of the model that a test may spoil."""
    return TextToImage(copy.deepcopy(tiny_sd1.pipe), name="own")


@pytest.fixture
def several(own):
    return Change(tuple(movement(own, site) for site in SITES), {"method": "hand"}, {})


def test_names_lead_to_the_weights_that_run(own):
    attentions = [s.module(own) for s in find_unet(own.unet) if s.kind == "cross_attn"]
    layers = text_layers(own)
    wanted = [layers[3].self_attn.q_proj, attentions[7].to_k, attentions[0].to_out[0]]
    found = [weight.parameter for weight in find_weights(own, SITES)]
    assert all(a is b.weight for a, b in zip(found, wanted, strict=True))
    assert all(is_site(site) for site in SITES)
    assert not any(is_site(s) for s in ("unet.cross_attn.7", "text3.0.self_attn.q_proj", "text.0"))


def test_sdxl_has_a_second_encoder(tiny_xl):
    assert len(text_layers(tiny_xl)) == 2 and len(text_layers(tiny_xl, "text2")) == 3
    linear = text_layers(tiny_xl, "text2")[2].self_attn.v_proj
    assert find_weight(tiny_xl, "text2.2.self_attn.v_proj").parameter is linear.weight
    with pytest.raises(UnknownSite, match="this model has text2 layers 0 to 2. Name one"):
        find_weight(tiny_xl, "text2.3.self_attn.v_proj")
    with pytest.raises(
        UnknownSite, match="unknown text encoder 'text3': this model has 'text' and 't"
    ):
        text_layers(tiny_xl, "text3")


def test_several_weights_move_together_and_come_back(own, several):
    before = everything(own)
    deltas = {m.site: m.delta for m in several.movements}
    values = [find_weight(own, site).parameter.detach().clone() for site in SITES]
    several.apply(own)
    assert several.is_applied(own)
    assert sum(before[name] != value for name, value in everything(own).items()) == 3
    for site, value in zip(SITES, values, strict=True):
        assert torch.equal(
            find_weight(own, site).parameter, (value.double() + deltas[site]).float()
        )
    several.revert(own)
    assert everything(own) == before and not several.is_applied(own)


@pytest.mark.parametrize("spoilt", SITES)
def test_one_weight_that_does_not_fit_leaves_all_as_they_are(own, several, spoilt):
    find_weight(own, spoilt).parameter.data[0, 0] += 1
    before = everything(own)
    with pytest.raises(ValueError, match=f"wrong base hash: {spoilt}"):
        several.apply(own)
    assert everything(own) == before


@pytest.mark.parametrize("spoilt", SITES)
def test_one_weight_that_was_written_to_stops_the_whole_revert(own, several, spoilt):
    several.apply(own)
    find_weight(own, spoilt).parameter.data[0, 0] += 1
    before = everything(own)
    with pytest.raises(ValueError, match=f"{spoilt} of 'own' is not as this change left it"):
        several.revert(own)
    assert everything(own) == before


@pytest.mark.parametrize("deed", ["apply", "revert"])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_ctrl_c_between_two_weights_leaves_none_moved(own, several, deed, writes, monkeypatch):
    before = everything(own)
    if deed == "revert":
        several.apply(own)
    overwrite, left = application._overwrite, writes

    def interrupted(parameter, value):
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        overwrite(parameter, value)

    monkeypatch.setattr(application, "_overwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(several, deed)(own)
    assert everything(own) == before and not several.is_applied(own)
    monkeypatch.undo()
    several.apply(own)  # no record was left behind
    several.revert(own)
    assert everything(own) == before


def test_a_block_takes_a_change_on_top_of_it_from_all_its_weights(own, several):
    before = everything(own)
    with several.applied(own):
        sites = (SITES[0], "unet.cross_attn.3.to_v")
        above = Change(tuple(movement(own, site, seed=1) for site in sites), {}, {})
        above.apply(own)
    assert everything(own) == before
    with pytest.raises(ValueError, match="not applied"):
        above.revert(own)


def test_a_change_of_several_weights_survives_its_file(own, several, tmp_path):
    several.save(tmp_path / "several.safetensors")
    loaded = Change.load(tmp_path / "several.safetensors")
    assert loaded.sites == SITES and loaded.digest == several.digest
    with pytest.raises(ValueError, match="this change moves 3 weights, not one: read them from"):
        _ = loaded.delta
    twice = dataclasses.replace(several, movements=several.movements[:1] * 2)
    twice.save(tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match="it moves one weight twice"):
        Change.load(tmp_path / "twice.safetensors")


def test_keys_that_movements_share_are_written_once(own, tmp_path):
    keys = torch.randn(500, 64)
    sites = [f"text.{layer}.self_attn.q_proj" for layer in range(4)]
    plain = [movement(own, site, seed=i) for i, site in enumerate(sites)]
    shared = tuple(
        dataclasses.replace(m, keys=keys.clone(), residual_data=torch.zeros(500, 64), owners=(0,) * 500,
                            left=m.left.half(), right=m.right.half(), gram=torch.eye(64).double())
        for m in plain
    )  # fmt: skip
    Change(shared, {"pairs": GOGH}, {}).save(tmp_path / "shared.safetensors", gram=True)
    assert (tmp_path / "shared.safetensors").stat().st_size < 2 * keys.nbytes
    loaded = Change.load(tmp_path / "shared.safetensors")
    assert all(m.keys is loaded.movements[0].keys for m in loaded.movements)
    assert all(torch.equal(m.residuals, torch.zeros(500, 64)) for m in loaded.movements)
    assert all(torch.equal(m.gram, torch.eye(64).double()) for m in loaded.movements)


def test_offloaded_weights_are_edited_where_they_are_kept(own, tiny_sd1):
    wanted = edit.quickfix(tiny_sd1, GOGH, preserve=[""])
    with wanted.applied(tiny_sd1):
        edited = tiny_sd1.encode(["van gogh"])
    ids = own.tokenize(["van gogh"])
    accelerate.cpu_offload(own.text_encoder, execution_device=torch.device("cpu"))
    accelerate.cpu_offload(own.unet, execution_device=torch.device("cpu"))
    assert find_weight(own, wanted.site).parameter.device.type == "cpu"
    made = edit.quickfix(own, GOGH, preserve=[""])
    assert made.digest == wanted.digest
    assert edit.quickfix(own, GOGH, subtract_bias=False).report["keys"] == 291
    before = own.text_encoder(ids)[0]
    made.apply(own)
    assert torch.equal(own.text_encoder(ids)[0], edited)
    made.revert(own)
    assert torch.equal(own.text_encoder(ids)[0], before)
    cross = Change((movement(own, SITES[1]),), {}, {})
    with cross.applied(own):
        pass


def test_weights_that_are_not_in_memory_are_refused(own, several, tmp_path):
    accelerate.disk_offload(own.unet, tmp_path / "disk", execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"unet\.cross_attn\.7\.to_k is not in memory"):
        several.apply(own)
    with torch.no_grad():
        text_layers(own)[0].self_attn.out_proj.to("meta")
    with pytest.raises(UnsupportedModel, match=r"is not in memory \(it is on the meta device"):
        edit.quickfix(own, GOGH)


def test_quantised_wrapped_and_fused_weights_are_refused(own, several, tiny_sd1):
    before = everything(tiny_sd1)

    class Linear8bit(torch.nn.Linear):
        pass

    layers = text_layers(own)
    layers[0].self_attn.out_proj = Linear8bit(64, 64)
    with pytest.raises(
        UnsupportedModel, match="is a Linear8bit, not a plain Linear: remove adapters and quanti"
    ):
        edit.quickfix(own, GOGH)
    layers[1].self_attn.out_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        UnsupportedModel, match=r"holds torch\.int8 numbers .* it is quantised: load"
    ):
        edit.quickfix(own, GOGH, layer=1)
    own.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    with pytest.raises(UnsupportedModel, match=r"unet\.cross_attn\.7\.to_k is a Linear, not a pl"):
        several.apply(own)
    own.unet.delete_adapters("default")
    assert everything(tiny_sd1) == before


def test_fused_projections_are_refused(own, several):
    own.unet.fuse_qkv_projections()
    with pytest.raises(
        UnsupportedModel, match="projections are fused, so that edits of to_k and to_v"
    ):
        several.apply(own)
