"""Movements in several dtypes: one change for all casts of a model, sums that are rounded once."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import overpaint
from overpaint import edit
from overpaint.edit import export, storage
from overpaint.edit.movement import Movement
from overpaint.edit.weights import (
    cast_hashes,
    find_weight,
    fingerprint,
    half_sample,
    is_base,
    of_one_weight,
)
from overpaint.model import TextToImage

GOGH = {"van gogh": "monet"}
SITE = "text.0.self_attn.out_proj"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders with the same tiny model, stored in float16 and in float32 that no half precision can hold."""
    from overpaint.zoo import builders

    folder = tmp_path_factory.mktemp("stored")
    builders.tiny(text_layers=2).save_pretrained(folder / "float32")
    builders.tiny(text_layers=2).to(torch.float16).save_pretrained(folder / "float16")
    return folder


def weight(model, site=SITE):
    return find_weight(model, site).parameter


def check(change, model):
    """Apply and revert: every weight is the exact sum rounded once, and then the old bytes."""
    for movement in change.movements:
        before = weight(model, movement.site).detach().clone()
        exact = before.double() + movement.left.double() @ movement.right.double()
        with change.applied(model):
            after = weight(model, movement.site).detach().clone()
        assert after.dtype == before.dtype and not after.equal(before)
        # no other number of this dtype is nearer to the exact sum
        up, down = (next_number(after, towards) for towards in (1, -1))
        error = (after.double() - exact).abs()
        assert bool((error <= (up.double() - exact).abs()).all())
        assert bool((error <= (down.double() - exact).abs()).all())
        assert weight(model, movement.site).equal(before)


def next_number(tensor, direction):
    """Return the neighbours of float16, bfloat16 or float32 numbers, upwards or downwards."""
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits = tensor.view(kind)
    step = torch.where(bits >= 0, direction, -direction).to(kind)
    return torch.where(tensor == 0, tensor, (bits + step).view(tensor.dtype))


METHODS = {
    "quickfix": edit.quickfix,
    "swap_embedding": edit.swap_embedding,
    "uce": edit.uce,
    "auto": lambda model, pairs: edit.auto(
        model, pairs, contexts=8, background=8, vocabulary=["monet", "a dog"], collateral=False
    ),
}


@pytest.mark.parametrize(
    ("made", "used"), [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]]
)
def test_a_change_fits_every_cast_of_float16_weights(stored, made, used):
    change = edit.quickfix(overpaint.load(stored / "float16", dtype=made), GOGH)
    check(change, overpaint.load(stored / "float16", dtype=used))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("used", HALF)
def test_a_change_of_float32_weights_fits_their_casts(stored, method, used):
    change = METHODS[method](overpaint.load(stored / "float32"), GOGH)
    check(change, overpaint.load(stored / "float32", dtype=used))


@pytest.mark.parametrize("made", HALF)
def test_a_change_of_a_cast_fits_the_float32_weights(stored, made):
    change = edit.quickfix(overpaint.load(stored / "float32", dtype=made), GOGH)
    check(change, overpaint.load(stored / "float32"))


@pytest.mark.parametrize(
    ("made", "used"), [("float32", "float16"), ("float16", "float32")], ids=["to half", "from half"]
)
def test_a_change_fits_files_of_another_dtype_that_are_loaded_in_float32(stored, made, used):
    change = edit.quickfix(overpaint.load(stored / made), GOGH)
    check(change, overpaint.load(stored / used))


@pytest.mark.parametrize(("made", "used"), list(itertools.product(DTYPES, DTYPES)))
def test_other_weights_are_refused_in_every_dtype(stored, made, used):
    change = edit.quickfix(overpaint.load(stored / "float32", dtype=made), GOGH)
    model = overpaint.load(stored / "float32", dtype=used)
    with torch.no_grad():
        weight(model)[3, 4] *= 1.02  # more than one step of bfloat16
    with pytest.raises(ValueError, match=f"wrong base hash: {SITE}"):
        change.apply(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("made", "used"), [HALF, HALF[::-1]], ids=["to bfloat16", "to float16"])
def test_a_change_in_one_half_precision_fits_the_other_from_the_same_folder(
    stored, method, made, used
):
    change = METHODS[method](overpaint.load(stored / "float32", dtype=made), GOGH)
    model = overpaint.load(stored / "float32", dtype=used)
    check(change, model)
    if method == "quickfix":
        assert edit.stack(model, [change]).sites == change.sites


def in_half(stored, made, pairs, path):
    """Return a change made in a half precision, read back from its file."""
    edit.quickfix(overpaint.load(stored / "float32", dtype=made), pairs).save(path)
    return overpaint.Change.load(path)


def test_changes_in_two_half_precisions_are_added_at_the_float16_weight(stored, tmp_path):
    first, second = (
        in_half(stored, made, pairs, tmp_path / f"{i}.safetensors")
        for i, (made, pairs) in enumerate(zip(HALF, (GOGH, {"cat": "dog"}), strict=True))
    )
    total = first + second
    assert total.digest == (second + first).digest
    (half,), (brain,), (movement,) = first.movements, second.movements, total.movements
    assert movement.base_hash == half.base_hash != brain.base_hash
    assert movement.casts == (*half.casts, brain.base_hash)
    assert movement.left.dtype == torch.float64
    both = GOGH | {"cat": "dog"}
    # the solution for the keys and residuals of both, as they were read in each dtype
    keys, residuals = (
        torch.cat([getattr(m, name).double() for m in (half, brain)])
        for name in ("keys", "residuals")
    )
    system = keys @ keys.T + first.ridge * torch.eye(len(keys)).double()
    expected = residuals.T @ torch.linalg.solve(system, keys)
    assert float((total.delta - expected).norm()) < 1e-6 * float(expected.norm())
    joint = edit.quickfix(overpaint.load(stored / "float32"), both)
    distance = float((total.delta - joint.delta).norm())
    assert distance < 0.1 * float(joint.delta.norm())  # 0.04 with bfloat16 alone
    assert set(movement.owners) == {0, 1} and total.pairs == both
    total.save(tmp_path / "sum.safetensors")
    loaded = overpaint.Change.load(tmp_path / "sum.safetensors")
    for made in DTYPES:
        check(loaded, overpaint.load(stored / "float32", dtype=made))
    model = overpaint.load(stored / "float32", dtype=torch.bfloat16)
    check(loaded, overpaint.load(model.pipe))  # a live pipeline, without the stored numbers
    # a third one joins in either dtype, in any order
    third = in_half(stored, torch.bfloat16, {"tree": "house"}, tmp_path / "third.safetensors")
    orders = [(first + second) + third, first + (second + third), third + loaded]
    assert len({change.digest for change in orders}) == 1
    assert edit.stack(model, [second, third, first]).digest == orders[0].digest


def test_changes_in_two_half_precisions_of_other_weights_are_not_added(stored, tmp_path):
    first = in_half(stored, torch.float16, GOGH, tmp_path / "a.safetensors")
    model = overpaint.load(stored / "float32")
    with torch.no_grad():
        weight(model).mul_(1 + 0.004 * torch.randn(weight(model).shape))
    second = edit.quickfix(overpaint.load(model.pipe.to(torch.bfloat16)), {"cat": "dog"})
    message = (
        r"different weights \(other base hashes\), or one is a file of an older release .*: make"
    )
    for attempt in (lambda: first + second, lambda: second + first):
        with pytest.raises(ValueError, match=message):
            attempt()
    same = in_half(stored, torch.bfloat16, {"cat": "dog"}, tmp_path / "b.safetensors")
    tensors, record = storage.pack(same.contents, gram=False)
    del record["movements"][0]["base_sample"]  # as files were before
    storage.write(tmp_path / "old.safetensors", tensors, record)
    with pytest.raises(ValueError, match=message):
        first + overpaint.Change.load(tmp_path / "old.safetensors")


def test_a_sample_tells_roundings_of_one_weight_from_other_weights():
    exact = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1)) * 1e-2
    half, brain = half_sample(exact.half()), half_sample(exact.bfloat16())
    assert len(half) == len(brain) and 60 <= len(half) <= 64
    assert of_one_weight(half, brain)
    assert not of_one_weight(brain, half) and not of_one_weight(half, half)
    assert not of_one_weight(brain, brain) and not of_one_weight((), ())
    assert not of_one_weight(half, half_sample((exact * 1.003).bfloat16()))
    assert not of_one_weight(half, brain[:-1])
    assert half_sample(exact) == () == half_sample(exact.double())
    tiny = exact * 1e-5  # below the smallest normal float16 number
    assert of_one_weight(half_sample(tiny.half()), half_sample(tiny.bfloat16())) is False


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_norm", "x"), ("base_norm", -1.0), ("base_norm", True), ("base_sample", 3), ("base_sample", ["x"]),
     ("base_sample", [1])],
)  # fmt: skip
def test_a_damaged_norm_or_sample_is_refused(tiny_sd1, tmp_path, name, value):
    tensors, record = storage.pack(edit.quickfix(tiny_sd1, GOGH).contents, gram=False)
    record["movements"][0][name] = value
    storage.write(tmp_path / "c.safetensors", tensors, record)
    with pytest.raises(ValueError, match=f"is damaged: its `{name}` is no"):
        overpaint.Change.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("shape", [(5, 2, 7), (5, 5, 7), (2, 5, 3), (4, 0, 4)])
def test_the_relative_norm_is_that_of_the_product(shape):
    out, rank, width = shape
    base, left, right = torch.randn(out, width), torch.randn(out, rank), torch.randn(rank, width)
    movement = Movement.of_weight(SITE, base, left, right)
    expected = float((left @ right).norm() / base.norm())
    assert movement.relative_norm == pytest.approx(expected, rel=1e-5)
    assert Movement.of_weight(SITE, 0 * base, left, right).relative_norm == 0.0
    assert dataclasses.replace(movement, base_norm=None).relative_norm is None


def test_two_roundings_without_the_stored_numbers_are_refused_with_the_remedy(stored):
    change = edit.quickfix(overpaint.load(stored / "float32", dtype=torch.float16), GOGH)
    live = overpaint.load(overpaint.load(stored / "float32", dtype=torch.bfloat16).pipe)
    message = "wrong base hash: .* float16 and bfloat16 round numbers differently, .* load the model in float32, or"
    with pytest.raises(ValueError, match=message):
        change.apply(live)
    other = overpaint.load(stored / "float32", dtype=torch.bfloat16)
    with torch.no_grad():
        weight(other)[3, 4] *= 1.02
    with pytest.raises(ValueError, match="wrong base hash: .* unedited, in the dtype it was made"):
        change.apply(other)


@pytest.mark.parametrize("made", HALF)
def test_an_export_of_a_change_in_the_other_half_precision_moves_the_stored_numbers(
    stored, made, tmp_path
):
    used = HALF[1 - HALF.index(made)]
    change = edit.quickfix(overpaint.load(stored / "float32", dtype=made), GOGH)
    model = overpaint.load(stored / "float32", dtype=used)
    export.folder(model, change, tmp_path / "edited")
    before, after = (weight(overpaint.load(f)) for f in (stored / "float32", tmp_path / "edited"))
    assert torch.equal(after, (before.double() + change.delta).float())


def test_hashes_of_casts_are_saved_and_old_files_load(stored, tmp_path):
    model = overpaint.load(stored / "float16")
    change = edit.quickfix(model, GOGH)
    (movement,) = change.movements
    assert movement.casts == cast_hashes(weight(model)) and len(movement.casts) == 2
    change.save(tmp_path / "c.safetensors")
    assert overpaint.Change.load(tmp_path / "c.safetensors").movements[0].casts == movement.casts
    tensors, record = storage.pack(change.contents, gram=False)
    del record["movements"][0]["casts"]  # as files were before
    storage.write(tmp_path / "old.safetensors", tensors, record)
    old = overpaint.Change.load(tmp_path / "old.safetensors")
    assert old.movements[0].casts == () and old.digest == change.digest
    check(old, overpaint.load(stored / "float16", dtype=torch.float16))
    assert edit.stack(model, [old, edit.quickfix(model, {"a cat": "a dog"})]).pairs.keys() == {
        "van gogh",
        "a cat",
    }


@pytest.mark.parametrize("casts", [None, "x", ["0" * 63], [1], ["0" * 64] * 4])
def test_hashes_of_casts_that_are_none_are_refused(tiny_sd1, tmp_path, casts):
    change = edit.quickfix(tiny_sd1, GOGH)
    tensors, record = storage.pack(change.contents, gram=False)
    record["movements"][0]["casts"] = casts
    storage.write(tmp_path / "c.safetensors", tensors, record)
    with pytest.raises(ValueError, match=r"is damaged: .*hash"):
        overpaint.Change.load(tmp_path / "c.safetensors")


def test_changes_made_in_two_dtypes_are_stacked(stored):
    single = overpaint.load(stored / "float32")
    half = overpaint.load(stored / "float32", dtype=torch.float16)
    a = edit.quickfix(single, GOGH)
    b = edit.quickfix(half, {"a cat": "a dog"})
    for joint in (a + b, edit.stack(single, [b, a]), edit.stack(half, [a, b])):
        assert joint.base_hash == a.base_hash and joint.movements[0].casts == a.movements[0].casts
        check(joint, single)
        check(joint, half)


def test_half_precision_is_rounded_once_where_float32_would_round_twice():
    """1 + 2^-11 is half a step of float16 above 1; a little more must round up, although float32 drops the little."""
    tie = torch.tensor([[2.0**-11 + 2.0**-40, 2.0**-11 - 2.0**-40, 2.0**-11]], dtype=torch.float64)
    ones, none = torch.ones(1, 3, dtype=torch.float16), torch.zeros(0, 3)
    movement = Movement(
        "text.0.mlp.fc2", "", torch.ones(1, 1), tie, none, torch.zeros(0, 1), (), None
    )
    assert movement.added_to(ones).tolist() == [[1 + 2.0**-10, 1.0, 1.0]]
    tie = torch.tensor([[2.0**-8 + 2.0**-40, 2.0**-8 - 2.0**-40, 3 * 2.0**-8]], dtype=torch.float64)
    movement = Movement(
        "text.0.mlp.fc2", "", torch.ones(1, 1), tie, none, torch.zeros(0, 1), (), None
    )
    assert movement.added_to(ones.bfloat16()).tolist() == [[1 + 2.0**-7, 1.0, 1 + 2 * 2.0**-7]]


def test_numbers_count_and_not_their_dtype():
    numbers = torch.randn(5, 7).half()
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert is_base(numbers.to(dtype), fingerprint(numbers))
        assert is_base(numbers, fingerprint(numbers.to(dtype)), cast_hashes(numbers.to(dtype)))
    assert not is_base(numbers.t(), fingerprint(numbers))
    assert not is_base(numbers + 0.1, fingerprint(numbers), cast_hashes(numbers))


def test_a_deep_copy_in_half_precision_is_restored(stored):
    model = overpaint.load(stored / "float32")
    change = edit.uce(model, GOGH)
    clone = TextToImage(copy.deepcopy(model.pipe), name="clone")
    clone.pipe.to(torch.float16)
    check(change, clone)


def test_a_file_of_the_release_before_loads(stored, tmp_path):
    """A file without hashes of casts whose protocol holds a path, written by hand."""
    model = overpaint.load(stored / "float32")
    change = edit.quickfix(model, GOGH)
    change.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["change"])
    del record["movements"][0]["casts"]
    record["protocol"]["model"] = "/home/someone/models/sd15"
    text = json.dumps(record)
    tensors = load_file(tmp_path / "new.safetensors")
    metadata = {**metadata, "change": text, "sha256": storage.checksum(text, tensors)}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    old = overpaint.Change.load(tmp_path / "old.safetensors")
    check(old, model)
    assert edit.complete(model, old).digest == old.digest
