"""Change: applied exactly, reverted bit for bit, saved atomically, and files that are refused."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from parameters import fingerprints
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import overpaint
from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.storage import FORMAT, checksum
from overpaint.edit.weights import find_weight, fingerprint
from overpaint.errors import UnknownSite, UnsupportedModel
from overpaint.model import TextToImage

PAIRS = {"van gogh": "painting"}
SITE = "text.0.self_attn.out_proj"


def differing(before, after):
    return [name for name in before if before[name] != after[name]]


def moved_to(change, site):
    """Return the same movement at another weight."""
    return dataclasses.replace(
        change, movements=(dataclasses.replace(change.movements[0], site=site),)
    )


@pytest.fixture(scope="module")
def change(tiny_sd1):
    return edit.quickfix(tiny_sd1, PAIRS, preserve=[""])


@pytest.fixture
def saved(change, tmp_path):
    path = tmp_path / "change.safetensors"
    change.save(path)
    return path


@pytest.mark.parametrize("make", [edit.quickfix, edit.swap_embedding, edit.random_site])
def test_exactly_one_tensor_moves_and_is_restored(copied, make):
    before = fingerprints(copied)
    change = make(copied, PAIRS)
    change.apply(copied)
    assert len(differing(before, fingerprints(copied))) == 1
    assert change.is_applied(copied)
    change.revert(copied)
    assert fingerprints(copied) == before and not change.is_applied(copied)


def test_the_weight_moves_by_delta(copied, change):
    before = find_weight(copied, SITE).parameter.detach().clone()
    with change.applied(copied) as model:
        assert model is copied
        assert torch.equal(
            find_weight(copied, SITE).parameter, (before.double() + change.delta).float()
        )
    assert torch.equal(find_weight(copied, SITE).parameter, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_solved_in_double_and_restored_bit_for_bit(copied, dtype):
    copied.text_encoder.to(dtype)
    parameter, before = find_weight(copied, SITE).parameter, fingerprints(copied)
    parameter.requires_grad_(False)
    change = edit.quickfix(copied, PAIRS)
    assert change.left.dtype == change.right.dtype == torch.float64
    change.apply(copied)
    assert find_weight(copied, SITE).parameter is parameter
    assert (parameter.dtype, parameter.requires_grad) == (dtype, False)
    assert differing(before, fingerprints(copied)) == [
        name
        for name in before
        if name[0] == 0 and name[1].endswith("layers.0.self_attn.out_proj.weight")
    ]
    change.revert(copied)
    assert fingerprints(copied) == before


def test_negative_zero_and_tiny_numbers_are_restored(copied):
    """Adding and subtracting would turn -0 into 0 and lose numbers far smaller than the movement."""
    copied.text_encoder.half()
    with torch.no_grad():
        find_weight(copied, SITE).parameter[0, :3] = torch.tensor([-0.0, 6e-8, 1.0])
    before = fingerprint(find_weight(copied, SITE).parameter)
    with edit.quickfix(copied, PAIRS).applied(copied):
        assert fingerprint(find_weight(copied, SITE).parameter) != before
    assert fingerprint(find_weight(copied, SITE).parameter) == before


def test_tied_weights_stay_tied(copied):
    copied.text_encoder.twin = torch.nn.Embedding(1, 1)
    copied.text_encoder.twin.weight = find_weight(copied, "text.token_embedding").parameter
    with edit.swap_embedding(copied, {"dog": "cat"}).applied(copied):
        assert (
            copied.text_encoder.twin.weight is find_weight(copied, "text.token_embedding").parameter
        )
    assert copied.text_encoder.twin.weight is find_weight(copied, "text.token_embedding").parameter


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_the_weights_are_restored_after_any_exception(copied, change, error):
    before = fingerprints(copied)
    with pytest.raises(error), change.applied(copied):
        assert fingerprints(copied) != before
        raise error
    assert fingerprints(copied) == before and not change.is_applied(copied)


def test_the_block_undoes_other_changes_of_the_weight(copied, change):
    before = fingerprints(copied)
    with change.applied(copied):
        edit.quickfix(copied, {"dog": "cat"}).apply(copied)
        find_weight(copied, SITE).parameter.data[0, 0] = 7.0
    assert fingerprints(copied) == before and not change.is_applied(copied)


def test_changes_of_different_weights_revert_in_any_order(copied, change):
    before = fingerprints(copied)
    other = edit.swap_embedding(copied, PAIRS)
    change.apply(copied)
    other.apply(copied)
    change.revert(copied)
    other.revert(copied)
    assert fingerprints(copied) == before


def test_changes_of_one_weight_revert_in_reverse_order(copied, change):
    before = fingerprints(copied)
    change.apply(copied)
    later = edit.quickfix(copied, {"dog": "cat"})  # change on the edited model
    later.apply(copied)
    with pytest.raises(
        ValueError, match="another change was applied .* after this one: revert that"
    ):
        change.revert(copied)
    later.revert(copied)
    change.revert(copied)
    assert fingerprints(copied) == before


def test_a_weight_with_another_hash_is_refused(copied, change):
    find_weight(copied, SITE).parameter.data[0, 0] += 1e-3
    before = fingerprints(copied)
    for attempt in (change.apply, lambda model: change.applied(model).__enter__()):
        with pytest.raises(
            ValueError, match=rf"wrong base hash: {SITE} of 'copied' .* the model it was"
        ):
            attempt(copied)
    assert fingerprints(copied) == before


def test_another_model_in_another_dtype_is_refused(copied, change):
    copied.text_encoder.half()
    find_weight(copied, SITE).parameter.data[0, 0] += 0.5
    with pytest.raises(ValueError, match="wrong base hash: .* in the dtype it was made in or a ca"):
        change.apply(copied)


def test_applying_twice_is_refused(copied, change):
    change.apply(copied)
    with pytest.raises(
        ValueError, match="wrong base hash: .* revert the change applied there first"
    ):
        change.apply(copied)
    change.revert(copied)


def test_reverting_a_change_that_is_not_applied_is_refused(copied, change):
    before = fingerprints(copied)
    with pytest.raises(
        ValueError, match="this change is not applied to text.0.* nothing to revert"
    ):
        change.revert(copied)
    change.apply(copied)
    clone = TextToImage(copy.deepcopy(copied.pipe), name="clone")
    with pytest.raises(ValueError, match="not applied .* of 'clone'"):
        change.revert(clone)
    change.revert(copied)
    assert fingerprints(copied) == before


def test_reverting_after_another_write_is_refused(copied, change):
    change.apply(copied)
    find_weight(copied, SITE).parameter.data[0, 0] = 7.0
    with pytest.raises(
        ValueError,
        match="was modified after this change was applied: to discard that modification too, load",
    ):
        change.revert(copied)


def test_an_overflow_is_refused(copied):
    copied.text_encoder.half()
    change = edit.quickfix(copied, PAIRS)
    (movement,) = change.movements
    huge = dataclasses.replace(movement, right=movement.right * 1e9)
    before = fingerprints(copied)
    with pytest.raises(ValueError, match=r"gives numbers that torch\.float16 cannot hold"):
        dataclasses.replace(change, movements=(huge,)).apply(copied)
    assert fingerprints(copied) == before


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
def test_unknown_sites_are_refused(copied, change, site, message):
    with pytest.raises(UnknownSite, match=message):
        moved_to(change, site).apply(copied)


def test_an_adapter_is_refused(copied, change):
    class Adapter(torch.nn.Linear):
        pass

    copied.text_encoder.encoder.layers[0].self_attn.out_proj = Adapter(64, 64)
    with pytest.raises(UnsupportedModel, match="is a Adapter, not a plain Linear: remove adapters"):
        change.apply(copied)


def test_the_fingerprint_depends_on_bytes_shape_and_dtype():
    zero = torch.zeros(2, 2)
    hashes = {
        fingerprint(t)
        for t in (zero, -zero, zero[0], zero.half(), zero.bfloat16(), zero.reshape(1, 4))
    }
    assert len(hashes) == 6
    square = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(square.T) == fingerprint(square.T.contiguous()) != fingerprint(square)


def test_a_loaded_change_equals_the_saved_one(copied, change, saved):
    loaded = Change.load(saved)
    assert loaded.digest == change.digest
    for name in ("left", "right", "keys", "residuals"):
        assert torch.equal(getattr(loaded.movements[0], name), getattr(change.movements[0], name))
    assert loaded.movements[0].owners == change.movements[0].owners
    assert loaded.protocol == change.protocol and loaded.report == change.report
    assert (loaded.pairs, loaded.ridge, loaded.site) == (PAIRS, 0.01, SITE)
    before = fingerprints(copied)
    loaded.apply(copied)
    edited = fingerprints(copied)
    change.revert(copied)  # a saved copy reverts its original
    assert fingerprints(copied) == before
    with change.applied(copied):
        assert fingerprints(copied) == edited


def test_an_embedding_swap_is_saved_and_loaded(copied, tmp_path):
    swap = edit.swap_embedding(copied, PAIRS)
    swap.save(tmp_path / "swap.safetensors")
    loaded = Change.load(tmp_path / "swap.safetensors")
    assert loaded.digest == swap.digest and loaded.ridge is None


def test_files_are_plain_safetensors_and_no_draft_is_left(change, saved):
    assert set(load_file(saved)) == {"0.left", "0.right", "0.residuals", "keys.0"}
    change.save(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["change.safetensors"]


def test_a_failed_save_leaves_the_old_file_and_no_draft(change, saved, tmp_path, monkeypatch):
    before = saved.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        change.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["change.safetensors"]


def test_paths_that_cannot_be_written_are_named(change, tmp_path):
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


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such change.*no\.safetensors"):
        Change.load(tmp_path / "no.safetensors")
    with pytest.raises(IsADirectoryError, match="a change is a file, not a folder"):
        Change.load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pkl", ".safetensors"])
def test_pickles_are_not_loaded(tmp_path, suffix):
    path = tmp_path / f"pickle{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError, match=rf"pickle\{suffix}' is (a pickle, which can run|damaged or not a safe)"
    ):
        Change.load(path)


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_truncated_files_are_refused(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"change\.safetensors' is damaged or not a safetensors file"
    ):
        Change.load(saved)


def test_other_safetensors_files_are_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(
        ValueError, match=r"lora\.safetensors' is not a change of the format .*format is None"
    ):
        Change.load(path)


def rewrite(path, *, tensors=None, movement=None, **fields):
    """Rewrite the file at `path` with other tensors or another record, and a matching checksum."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["change"]) | fields
        content = {name: file.get_tensor(name) for name in file.keys()} | (tensors or {})  # noqa: SIM118
    if movement:
        record["movements"][0] |= movement
        record["movements"][0] = without_none(record["movements"][0])
    record, content = without_none(record), without_none(content)
    text = json.dumps(record)
    metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, content)}
    save_file(content, path, metadata=metadata)


def without_none(fields):
    return {name: value for name, value in fields.items() if value is not None or name == "gram"}


@pytest.mark.parametrize(
    ("fault", "message"),
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
def test_inconsistent_files_are_refused(saved, fault, message):
    rewrite(saved, **fault)
    with pytest.raises(
        ValueError, match=rf"change\.safetensors' is damaged: .*{message}.* Copy it"
    ):
        Change.load(saved)


def test_a_record_that_is_not_json_is_refused(saved):
    tensors = load_file(saved)
    for text in ("{", "[" * 100_000, '{"movements": NaN}', "9" * 5_000):
        metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
        save_file(tensors, saved, metadata=metadata)
        with pytest.raises(ValueError, match="its record is not JSON"):
            Change.load(saved)


def test_an_older_format_is_refused_by_name(saved):
    save_file(load_file(saved), saved, metadata={"format": "overpaint.change/1", "change": "{}"})
    with pytest.raises(
        ValueError, match=r"is of the format 'overpaint.change/1', .* make the change again"
    ):
        Change.load(saved)


@pytest.mark.parametrize(
    ("name", "digest", "weight"),
    [
        ("change_format3", "e2293637", "a0957f66"),  # rows of the token embedding
        ("change_format3_compact", "ff96c4dd", "b460ad07"),  # a text layer, as combinations
    ],
)
def test_files_of_the_previous_version_load_and_apply_to_the_same_bytes(name, digest, weight):
    """Files, weights and hashes are those of commit faee5b1, which wrote the format `overpaint.change/3`."""
    golden = Path(__file__).parent / "golden"
    saved = load_file(golden / "icons_format3_weights.safetensors")
    pipe = overpaint.load("icons").pipe
    pipe.text_encoder.resize_token_embeddings(len(saved["text.token_embedding"]))
    icons = overpaint.load(pipe)
    for site, tensor in saved.items():
        find_weight(icons, site).parameter.data.copy_(tensor)
    change = Change.load(golden / f"{name}.safetensors")
    assert change.digest.startswith(digest)
    parameter = find_weight(icons, change.site).parameter
    before = fingerprint(parameter)
    with change.applied(icons):
        assert fingerprint(parameter).startswith(weight)
    assert fingerprint(parameter) == before == change.base_hash
