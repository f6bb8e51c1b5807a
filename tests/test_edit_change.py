"""A change as data: applied exactly, reverted bit for bit, saved whole or not at all."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.storage import FORMAT, checksum
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage

PAIRS = {"van gogh": "painting"}
SITE = "text.0.self_attn.out_proj"


def everything(model):
    """The bytes of every tensor of the pipeline."""
    parts = (model.text_encoder, model.unet, model.vae)
    return {(i, n): fingerprint(p) for i, m in enumerate(parts) for n, p in m.named_parameters()}


def differing(before, after):
    return [name for name in before if before[name] != after[name]]


def at(change, site):
    """The same movement at another place."""
    return dataclasses.replace(
        change, movements=(dataclasses.replace(change.movements[0], site=site),)
    )


@pytest.fixture
def own(tiny_sd1):
    """A copy of the model that a test may spoil."""
    return TextToImage(copy.deepcopy(tiny_sd1.pipe), name="own")


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return edit.quickfix(tiny_sd1, PAIRS, preserve=[""])


@pytest.fixture
def saved(change, tmp_path):
    path = tmp_path / "change.safetensors"
    change.save(path)
    return path


@pytest.mark.parametrize("make", [edit.quickfix, edit.swap_embedding, edit.random_site])
def test_exactly_one_tensor_moves_and_comes_back(own, make):
    before = everything(own)
    made = make(own, PAIRS)
    made.apply(own)
    assert len(differing(before, everything(own))) == 1
    assert made.is_applied(own)
    made.revert(own)
    assert everything(own) == before and not made.is_applied(own)


def test_the_weight_moves_by_the_delta(own, change):
    before = find_weight(own, SITE).parameter.detach().clone()
    with change.applied(own) as model:
        assert model is own
        assert torch.equal(
            find_weight(own, SITE).parameter, (before.double() + change.delta).float()
        )
    assert torch.equal(find_weight(own, SITE).parameter, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_solved_in_double_and_come_back_to_the_bit(own, dtype):
    own.text_encoder.to(dtype)
    parameter, before = find_weight(own, SITE).parameter, everything(own)
    parameter.requires_grad_(False)
    made = edit.quickfix(own, PAIRS)
    assert made.left.dtype == made.right.dtype == torch.float64
    made.apply(own)
    assert find_weight(own, SITE).parameter is parameter
    assert (parameter.dtype, parameter.requires_grad) == (dtype, False)
    assert differing(before, everything(own)) == [
        name
        for name in before
        if name[0] == 0 and name[1].endswith("layers.0.self_attn.out_proj.weight")
    ]
    made.revert(own)
    assert everything(own) == before


def test_odd_bytes_come_back(own):
    """Adding and subtracting would turn -0 into 0 and lose what is far smaller than the movement."""
    own.text_encoder.half()
    with torch.no_grad():
        find_weight(own, SITE).parameter[0, :3] = torch.tensor([-0.0, 6e-8, 1.0])
    before = fingerprint(find_weight(own, SITE).parameter)
    with edit.quickfix(own, PAIRS).applied(own):
        assert fingerprint(find_weight(own, SITE).parameter) != before
    assert fingerprint(find_weight(own, SITE).parameter) == before


def test_tied_weights_stay_tied(own):
    own.text_encoder.twin = torch.nn.Embedding(1, 1)
    own.text_encoder.twin.weight = find_weight(own, "text.token_embedding").parameter
    with edit.swap_embedding(own, {"dog": "cat"}).applied(own):
        assert own.text_encoder.twin.weight is find_weight(own, "text.token_embedding").parameter
    assert own.text_encoder.twin.weight is find_weight(own, "text.token_embedding").parameter


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_the_weights_return_however_the_block_ends(own, change, error):
    before = everything(own)
    with pytest.raises(error), change.applied(own):
        assert everything(own) != before
        raise error
    assert everything(own) == before and not change.is_applied(own)


def test_the_block_takes_back_whatever_was_done_to_the_weight(own, change):
    before = everything(own)
    with change.applied(own):
        edit.quickfix(own, {"dog": "cat"}).apply(own)
        find_weight(own, SITE).parameter.data[0, 0] = 7.0
    assert everything(own) == before and not change.is_applied(own)


def test_changes_of_different_weights_revert_in_any_order(own, change):
    before = everything(own)
    other = edit.swap_embedding(own, PAIRS)
    change.apply(own)
    other.apply(own)
    change.revert(own)
    other.revert(own)
    assert everything(own) == before


def test_changes_of_one_weight_revert_last_first(own, change):
    before = everything(own)
    change.apply(own)
    later = edit.quickfix(own, {"dog": "cat"})  # made on the edited model, so that it fits on top
    later.apply(own)
    with pytest.raises(
        ValueError, match="another change was applied .* after this one: revert that"
    ):
        change.revert(own)
    later.revert(own)
    change.revert(own)
    assert everything(own) == before


def test_another_weight_is_refused_by_its_hash(own, change):
    find_weight(own, SITE).parameter.data[0, 0] += 1e-3
    before = everything(own)
    for attempt in (change.apply, lambda model: change.applied(model).__enter__()):
        with pytest.raises(
            ValueError, match=rf"wrong base hash: {SITE} of 'own' .* the model it was"
        ):
            attempt(own)
    assert everything(own) == before


def test_another_dtype_is_refused_by_its_hash(own, change):
    own.text_encoder.half()
    with pytest.raises(ValueError, match="wrong base hash: .* in the same dtype"):
        change.apply(own)


def test_applying_twice_is_refused(own, change):
    change.apply(own)
    with pytest.raises(
        ValueError, match="wrong base hash: .* revert the change applied there first"
    ):
        change.apply(own)
    change.revert(own)


def test_reverting_what_is_not_applied_is_refused(own, change):
    before = everything(own)
    with pytest.raises(
        ValueError, match="this change is not applied to text.0.* nothing to revert"
    ):
        change.revert(own)
    change.apply(own)
    clone = TextToImage(copy.deepcopy(own.pipe), name="clone")
    with pytest.raises(ValueError, match="not applied .* of 'clone'"):
        change.revert(clone)
    change.revert(own)
    assert everything(own) == before


def test_reverting_over_foreign_writes_is_refused(own, change):
    change.apply(own)
    find_weight(own, SITE).parameter.data[0, 0] = 7.0
    with pytest.raises(ValueError, match="something else wrote to it: to discard that too, load"):
        change.revert(own)


def test_a_result_that_overflows_is_refused(own):
    own.text_encoder.half()
    made = edit.quickfix(own, PAIRS)
    before = everything(own)
    with pytest.raises(ValueError, match=r"gives numbers that torch\.float16 cannot hold"):
        (made * 1e9).apply(own)
    assert everything(own) == before


def test_a_change_is_frozen(change):
    with pytest.raises(dataclasses.FrozenInstanceError):
        change.movements = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        change.movements[0].site = "text.1.self_attn.out_proj"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("text.12.self_attn.out_proj", "this model has text layers 0 to 11"),
        ("text2.0.self_attn.out_proj", "unknown text encoder 'text2': this model has 'text'"),
        ("unet.cross_attn.16.to_k", "this model has cross_attn 0 to 15"),
        ("unet.cross_attn.3", "unknown weight 'unet.cross_attn.3': an edit can"),
    ],
)
def test_unknown_sites_are_refused(own, change, site, message):
    with pytest.raises(UnknownSite, match=message):
        at(change, site).apply(own)


def test_an_adapter_is_refused(own, change):
    class Adapter(torch.nn.Linear):
        pass

    own.text_encoder.encoder.layers[0].self_attn.out_proj = Adapter(64, 64)
    with pytest.raises(UnsupportedModel, match="is a Adapter, not a plain Linear: remove adapters"):
        change.apply(own)


def test_the_hash_sees_bytes_shape_and_dtype():
    zero = torch.zeros(2, 2)
    hashes = {
        fingerprint(t)
        for t in (zero, -zero, zero[0], zero.half(), zero.bfloat16(), zero.reshape(1, 4))
    }
    assert len(hashes) == 6
    square = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(square.T) == fingerprint(square.T.contiguous()) != fingerprint(square)


def test_saved_and_loaded_is_the_same_change(own, change, saved):
    loaded = Change.load(saved)
    assert loaded.digest == change.digest
    for name in ("left", "right", "keys", "residuals"):
        assert torch.equal(getattr(loaded.movements[0], name), getattr(change.movements[0], name))
    assert loaded.movements[0].owners == change.movements[0].owners
    assert loaded.protocol == change.protocol and loaded.report == change.report
    assert (loaded.pairs, loaded.ridge, loaded.site) == (PAIRS, 0.01, SITE)
    before = everything(own)
    loaded.apply(own)
    edited = everything(own)
    change.revert(own)  # a saved copy and its original are one change
    assert everything(own) == before
    with change.applied(own):
        assert everything(own) == edited


def test_a_swap_survives_its_file(own, tmp_path):
    swap = edit.swap_embedding(own, PAIRS)
    swap.save(tmp_path / "swap.safetensors")
    loaded = Change.load(tmp_path / "swap.safetensors")
    assert loaded.digest == swap.digest and loaded.ridge is None


def test_files_are_plain_safetensors_and_nothing_is_left_beside(change, saved):
    assert set(load_file(saved)) == {"0.left", "0.right", "0.residuals", "keys.0"}
    change.save(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["change.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_half_one(change, saved, tmp_path, monkeypatch):
    before = saved.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["change.safetensors"]


def test_places_that_cannot_be_written_are_named(change, tmp_path):
    missing = tmp_path / "missing" / "c.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"cannot write the change .* exists and is writable.*c\.safe"
    ):
        change.save(missing)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="cannot write the change"):
        change.save(folder)
    with pytest.raises(ValueError, match=r"not as 'c\.pt': end the name in '\.safetensors'"):
        change.save(tmp_path / "c.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such change.*no\.safetensors"):
        Change.load(tmp_path / "no.safetensors")
    with pytest.raises(IsADirectoryError, match="a change is a file, not a folder"):
        Change.load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pkl", ".safetensors"])
def test_pickles_are_refused_unread(tmp_path, suffix):
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError, match=rf"evil\{suffix}' is (a pickle, which can run|damaged or not a safe)"
    ):
        Change.load(path)


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_truncated_files_are_refused(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"change\.safetensors' is damaged or not a safetensors file"
    ):
        Change.load(saved)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(
        ValueError, match=r"lora\.safetensors' is not a change of the format .*format is None"
    ):
        Change.load(path)


def tampered(path, *, tensors=None, movement=None, **fields):
    """Rewrite the file at `path` with other tensors or another record, and the checksum that fits them."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["change"]) | fields
        found = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    if movement:
        record["movements"][0] |= movement
        record["movements"][0] = without_nothing(record["movements"][0])
    record, found = without_nothing(record), without_nothing(found)
    text = json.dumps(record)
    metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, found)}
    save_file(found, path, metadata=metadata)


def without_nothing(fields):
    return {name: value for name, value in fields.items() if value is not None or name == "gram"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"report": None}, "its record has other fields than a change"),
        ({"extra": 1}, "its record has other fields than a change"),
        ({"protocol": 3}, "its `protocol` is of the wrong type"),
        ({"movements": []}, "its movements have other fields"),
        ({"movements": [3]}, "its movements have other fields"),
        ({"movement": {"site": None}}, "its movements have other fields"),
        ({"movement": {"site": 3}}, "its `site` is of the wrong type"),
        ({"movement": {"keys": True}}, "its `keys` is of the wrong type"),
        ({"movement": {"keys": 1}}, "a movement names keys that are not in the file"),
        ({"movement": {"site": "unet.0"}}, "its site or hash is not one that overpaint writes"),
        ({"movement": {"base_hash": "12"}}, "its site or hash is not one that overpaint writes"),
        ({"movement": {"gram": 0}}, "its tensors are not those of a change"),
        ({"owners": [[[0, 3]]]}, "its tensors do not fit one another"),
        ({"owners": [[[1, 291]]]}, "its owners are not concepts of the change"),
        ({"owners": [[[0, -291]]]}, "its owners are not concepts of the change"),
        ({"owners": [[[0, 291.0]]]}, "its owners are not concepts of the change"),
        ({"owners": [7]}, "its owners are not concepts of the change"),
        ({"protocol": {"pairs": ["van gogh"]}}, "its protocol is of the wrong type"),
        ({"protocol": {"pairs": {"van gogh": 1}}}, "its protocol is of the wrong type"),
        ({"protocol": {"preserve": "a cat"}}, "its protocol is of the wrong type"),
        ({"protocol": {"ridge": "0.01"}}, "its protocol is of the wrong type"),
        ({"protocol": {"strength": {"van gogh": True}}}, "its protocol is of the wrong type"),
        ({"tensors": {"0.left": None}}, "its tensors are not those of a change"),
        ({"tensors": {"more": torch.zeros(1, 1)}}, "its tensors are not those of a change"),
        ({"tensors": {"more": torch.zeros(1)}}, "wrong dtype or shape"),
        ({"tensors": {"0.left": torch.zeros(64, 1).double()}}, "its tensors do not fit one another"),
        ({"tensors": {"keys.0": torch.zeros(1, 64)}}, "its tensors do not fit one another"),
        ({"tensors": {"0.right": torch.zeros(64, 64).int()}}, "wrong dtype or shape"),
        ({"tensors": {"0.right": torch.full((64, 64), math.nan).double()}}, "it contains NaN or infinity"),
    ],
)  # fmt: skip
def test_files_whose_content_does_not_hold_together_are_refused(saved, spoil, message):
    tampered(saved, **spoil)
    with pytest.raises(
        ValueError, match=rf"change\.safetensors' is damaged: .*{message}.* Copy it"
    ):
        Change.load(saved)


def test_a_record_that_is_no_json_is_refused(saved):
    tensors = load_file(saved)
    for text in ("{", "[" * 100_000, '{"movements": NaN}', "9" * 5_000):
        metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
        save_file(tensors, saved, metadata=metadata)
        with pytest.raises(ValueError, match="its record is not JSON"):
            Change.load(saved)


def test_a_file_of_the_format_before_is_named(saved):
    save_file(load_file(saved), saved, metadata={"format": "overpaint.change/1", "change": "{}"})
    with pytest.raises(
        ValueError, match=r"is of the format 'overpaint.change/1', .* make the change again"
    ):
        Change.load(saved)
