"""Weights by name, several weights in one change, offloaded weights, and weights that are refused."""

import dataclasses

import accelerate
import pytest
import torch
from parameters import fingerprints
from peft import LoraConfig

from overpaint import edit
from overpaint.edit import Change, Movement, application
from overpaint.edit.weights import (
    find_weight,
    find_weights,
    fingerprint,
    is_site,
    text_layers,
)
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model.sites import find_unet

GOGH = {"van gogh": "painting"}
SITES = ("text.3.self_attn.q_proj", "unet.cross_attn.7.to_k", "unet.cross_attn.0.to_out")


def movement(model, site, *, seed=0, rank=2):
    weight = find_weight(model, site).parameter
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in weight.shape
    )
    none = torch.zeros(0, weight.shape[1]), torch.zeros(0, weight.shape[0])
    return Movement(site, fingerprint(weight), left, right.T.contiguous(), *none, (), None)


@pytest.fixture
def several(copied):
    return Change(tuple(movement(copied, site) for site in SITES), {"method": "hand"}, {})


def test_names_are_resolved_to_the_modules_that_run(copied):
    attentions = [s.module(copied) for s in find_unet(copied.unet) if s.kind == "cross_attn"]
    layers = text_layers(copied)
    modules = [layers[3].self_attn.q_proj, attentions[7].to_k, attentions[0].to_out[0]]
    weights = find_weights(copied, SITES)
    assert all(w.module is m for w, m in zip(weights, modules, strict=True))
    assert all(
        w.parameter is m.weight and w.bias is m.bias for w, m in zip(weights, modules, strict=True)
    )
    assert [w.encoder for w in weights] == [0, None, None]
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


def test_several_weights_move_together_and_are_restored(copied, several):
    before = fingerprints(copied)
    deltas = {m.site: m.delta for m in several.movements}
    values = [find_weight(copied, site).parameter.detach().clone() for site in SITES]
    several.apply(copied)
    assert several.is_applied(copied)
    assert sum(before[name] != value for name, value in fingerprints(copied).items()) == 3
    for site, value in zip(SITES, values, strict=True):
        assert torch.equal(
            find_weight(copied, site).parameter, (value.double() + deltas[site]).float()
        )
    several.revert(copied)
    assert fingerprints(copied) == before and not several.is_applied(copied)


@pytest.mark.parametrize("damaged", SITES)
def test_one_wrong_weight_stops_the_whole_change(copied, several, damaged):
    find_weight(copied, damaged).parameter.data[0, 0] += 1
    before = fingerprints(copied)
    with pytest.raises(ValueError, match=f"wrong base hash: {damaged}"):
        several.apply(copied)
    assert fingerprints(copied) == before


@pytest.mark.parametrize("damaged", SITES)
def test_one_weight_that_was_overwritten_stops_the_whole_revert(copied, several, damaged):
    several.apply(copied)
    find_weight(copied, damaged).parameter.data[0, 0] += 1
    before = fingerprints(copied)
    with pytest.raises(
        ValueError, match=f"{damaged} of 'copied' was modified after this change was applied"
    ):
        several.revert(copied)
    assert fingerprints(copied) == before


@pytest.mark.parametrize("method", ["apply", "revert"])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_ctrl_c_between_two_weights_leaves_none_moved(copied, several, method, writes, monkeypatch):
    before = fingerprints(copied)
    if method == "revert":
        several.apply(copied)
    overwrite, left = application._overwrite, writes

    def interrupt(parameter, value):
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        overwrite(parameter, value)

    monkeypatch.setattr(application, "_overwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        getattr(several, method)(copied)
    assert fingerprints(copied) == before and not several.is_applied(copied)
    monkeypatch.undo()
    several.apply(copied)  # no record was left behind
    several.revert(copied)
    assert fingerprints(copied) == before


def test_a_block_removes_a_later_change_from_all_its_weights(copied, several):
    before = fingerprints(copied)
    with several.applied(copied):
        sites = (SITES[0], "unet.cross_attn.3.to_v")
        above = Change(tuple(movement(copied, site, seed=1) for site in sites), {}, {})
        above.apply(copied)
    assert fingerprints(copied) == before
    with pytest.raises(ValueError, match="not applied"):
        above.revert(copied)


def test_a_change_of_several_weights_is_saved_and_loaded(copied, several, tmp_path):
    several.save(tmp_path / "several.safetensors")
    loaded = Change.load(tmp_path / "several.safetensors")
    assert loaded.sites == SITES and loaded.digest == several.digest
    with pytest.raises(ValueError, match="this change moves 3 weights, not one: read them from"):
        _ = loaded.delta
    twice = dataclasses.replace(several, movements=several.movements[:1] * 2)
    twice.save(tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match="it moves one weight twice"):
        Change.load(tmp_path / "twice.safetensors")


def test_keys_that_movements_share_are_written_once(copied, tmp_path):
    keys = torch.randn(500, 64)
    sites = [f"text.{layer}.self_attn.q_proj" for layer in range(4)]
    plain = [movement(copied, site, seed=i) for i, site in enumerate(sites)]
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


def test_offloaded_weights_are_edited_in_the_memory_of_accelerate(copied, tiny_sd1):
    expected = edit.quickfix(tiny_sd1, GOGH, preserve=[""])
    with expected.applied(tiny_sd1):
        edited = tiny_sd1.encode(["van gogh"])
    ids = copied.tokenize(["van gogh"])
    accelerate.cpu_offload(copied.text_encoder, execution_device=torch.device("cpu"))
    accelerate.cpu_offload(copied.unet, execution_device=torch.device("cpu"))
    assert find_weight(copied, expected.site).parameter.device.type == "cpu"
    change = edit.quickfix(copied, GOGH, preserve=[""])
    assert change.digest == expected.digest
    assert edit.quickfix(copied, GOGH, subtract_bias=False).report["keys"] == 291
    before = copied.text_encoder(ids)[0]
    change.apply(copied)
    assert torch.equal(copied.text_encoder(ids)[0], edited)
    change.revert(copied)
    assert torch.equal(copied.text_encoder(ids)[0], before)
    cross = Change((movement(copied, SITES[1]),), {}, {})
    with cross.applied(copied):
        pass


def test_weights_that_are_not_in_memory_are_refused(copied, several, tmp_path):
    accelerate.disk_offload(copied.unet, tmp_path / "disk", execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"unet\.cross_attn\.7\.to_k is not in memory"):
        several.apply(copied)
    with torch.no_grad():
        text_layers(copied)[0].self_attn.out_proj.to("meta")
    with pytest.raises(UnsupportedModel, match=r"is not in memory \(it is on the meta device"):
        edit.quickfix(copied, GOGH)


def test_quantised_wrapped_and_fused_weights_are_refused(copied, several, tiny_sd1):
    before = fingerprints(tiny_sd1)

    class Linear8bit(torch.nn.Linear):
        pass

    layers = text_layers(copied)
    layers[0].self_attn.out_proj = Linear8bit(64, 64)
    with pytest.raises(
        UnsupportedModel, match="is a Linear8bit, not a plain Linear: remove adapters and quanti"
    ):
        edit.quickfix(copied, GOGH)
    layers[1].self_attn.out_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        UnsupportedModel, match=r"holds torch\.int8 numbers .* it is quantised: load"
    ):
        edit.quickfix(copied, GOGH, layer=1)
    copied.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    with pytest.raises(UnsupportedModel, match=r"unet\.cross_attn\.7\.to_k is a Linear, not a pl"):
        several.apply(copied)
    copied.unet.delete_adapters("default")
    assert fingerprints(tiny_sd1) == before


def test_fused_projections_are_refused(copied, several):
    copied.unet.fuse_qkv_projections()
    with pytest.raises(
        UnsupportedModel, match="projections are fused, so that edits of to_k and to_v"
    ):
        several.apply(copied)
