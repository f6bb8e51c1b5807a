"""OCE, DP, SPEED, HiRM and UCE with pads, on CLIP's vocabulary in all layouts, in float32 and float16."""

import pytest
import torch

import overpaint
from overpaint import edit
from overpaint.edit.weights import find_weight, fingerprint

PAIRS = {"van gogh": "painting", "r2d2": ""}
PRESERVE = ["claude monet", "a dog", "a robot", "tree"]
METHODS = {
    "oce": (edit.oce, {"preserve": PRESERVE, "captions": ["a man on a horse", "two apples"]}),
    "dp": (edit.dp, {"preserve": PRESERVE, "safe": ["art"]}),
    "speed": (edit.speed, {"preserve": PRESERVE, "empty_tokens": 2}),
    "hirm": (edit.hirm, {"steps": 2, "lr": 1e-3}),
    "uce": (edit.uce, {"preserve": PRESERVE, "keys": "last_to_pads"}),
}


def bytes_of(model):
    parts = {"unet": model.unet, **{f"text{i}": e for i, e in enumerate(model.text_encoders)}}
    return {
        f"{part}.{name}": fingerprint(p)
        for part, module in parts.items()
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("name", METHODS)
def test_only_the_named_weights_move_and_files_hold_the_whole_change(
    real_vocabulary, tmp_path, name, layout
):
    model = overpaint.load(real_vocabulary(layout))
    method, settings = METHODS[name]
    before = bytes_of(model)
    change = method(model, PAIRS, **settings)
    assert bytes_of(model) == before
    assert change.protocol["method"] == name and change.pairs == PAIRS
    names = [site.rpartition(".")[2] for site in change.sites]
    if name == "hirm":
        assert len(names) == 5 * len(model.text_encoders)
    else:
        count = 11 if layout == "sdxl" else 16
        assert names == (["to_v"] * count if name == "speed" else ["to_k", "to_v"] * count)
    change.save(tmp_path / "c.safetensors")
    loaded = edit.Change.load(tmp_path / "c.safetensors")
    assert loaded.digest == change.digest and loaded.protocol == change.protocol
    moved = {id(find_weight(model, site).parameter) for site in change.sites}
    with loaded.applied(model):
        after = bytes_of(model)
        differ = {n for n in before if before[n] != after[n]}
    assert len(differ) == len(moved) == len(change.sites)
    assert bytes_of(model) == before


@pytest.mark.parametrize("name", METHODS)
def test_float16_weights_give_the_change_of_the_same_numbers_in_float32(real_vocabulary, name):
    """The features of a float16 encoder are rounded, so only the solve is the same."""
    method, settings = METHODS[name]
    settings = settings | ({} if name == "hirm" else {"layers": [0, 5]})
    half = overpaint.load(real_vocabulary("sd1"), dtype="float16")
    before = bytes_of(half)
    change = method(half, {"van gogh": "painting"}, **settings)
    for movement in change.movements:
        assert bool(movement.delta.isfinite().all())
        weight = find_weight(half, movement.site).parameter
        assert weight.dtype == torch.float16
    whole = method(overpaint.load(real_vocabulary("sd1")), {"van gogh": "painting"}, **settings)
    for a, b in zip(change.movements, whole.movements, strict=True):
        assert float((a.delta - b.delta).norm()) < 0.25 * float(b.delta.norm())
    change.apply(half)
    assert bytes_of(half) != before
    change.revert(half)
    assert bytes_of(half) == before
