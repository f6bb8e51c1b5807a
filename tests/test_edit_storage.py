"""Damaged and random change files: each is refused with a message that names the file."""

import contextlib
import json
import random
import resource
import struct
import tracemalloc

import pytest
import torch

from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.storage import FORMAT, checksum

HEADER = struct.Struct("<Q")


@pytest.fixture(scope="module")
def sound(tiny_sd1, tmp_path_factory):
    """The bytes of a small change file."""
    path = tmp_path_factory.mktemp("sound") / "c.safetensors"
    change = edit.quickfix(tiny_sd1, {"van gogh": "painting"}, preserve=[""]).compact(rank=2)
    change.save(path, gram=True)
    assert Change.load(path).digest == change.digest
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    """Return a function that loads bytes as a change."""

    def read(content):
        path = tmp_path / "c.safetensors"
        path.write_bytes(content)
        return Change.load(path)

    return read


def refused(load, content):
    with pytest.raises(
        ValueError, match=r"c\.safetensors' (is damaged|is not a change|is of the f)"
    ):
        load(content)


def with_header(header, body=b"", length=None):
    """Return a file with any header and any claimed length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return HEADER.pack(len(text) if length is None else length) + text + body


def test_every_truncation_is_refused(load, sound):
    cuts = {*range(0, 200), *random.Random(0).sample(range(len(sound)), 200), len(sound) - 1}
    for cut in sorted(cuts):
        refused(load, sound[:cut])
    refused(load, sound + b"\0")


def test_every_flipped_bit_is_detected(load, sound):
    rng = random.Random(0)
    (size,) = HEADER.unpack(sound[:8])
    places = [*range(8), *rng.sample(range(8, 8 + size), 300)]
    places += rng.sample(range(8 + size, len(sound)), 150)
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.randrange(8)
        refused(load, bytes(damaged))


def test_random_bytes_and_swapped_blocks_are_refused(load, sound):
    rng = random.Random(0)
    for _ in range(100):
        refused(load, rng.randbytes(rng.randrange(400)))
        a, b = sorted(rng.sample(range(len(sound)), 2))
        swapped = sound[:a] + sound[b:] + sound[a:b]
        if swapped != sound:
            refused(load, swapped)


@pytest.mark.parametrize("length", [1 << 30, 1 << 40, (1 << 64) - 1, 100_000_001])
def test_a_header_longer_than_the_file_allocates_no_memory(load, sound, length):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(load, with_header(sound[8:], length=length))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets", "body"),
    [
        ("F64", [1 << 40, 1 << 40], [0, 8], 8),
        ("F64", [1 << 62, 4], [0, 0], 0),
        ("F64", [0, 1 << 62], [0, 0], 0),
        ("F64", [0, (1 << 64) - 1], [0, 0], 0),
        ("F64", [-1, 1], [0, 8], 8),
        ("F64", [1.0, 1], [0, 8], 8),
        ("F64", "1", [0, 8], 8),
        ("F64", [], [0, 8], 8),
        ("F64", [1], [0, 8], 8),
        ("F64", [1] * 1000, [0, 8], 8),
        ("F64", [1, 1], [8, 0], 8),
        ("F64", [1, 1], [0, 1 << 60], 8),
        ("F64", [1, 1], [0, 8], 16),
        ("I64", [1, 1], [0, 8], 8),
        ("BOOL", [1, 8], [0, 8], 8),
        ("BF16", [1, 4], [0, 8], 8),
        ("F8_E4M3", [1, 8], [0, 8], 8),
        ("F4", [1, 16], [0, 8], 8),
        ("C64", [1, 1], [0, 8], 8),
        ("F128", [1, 1], [0, 8], 8),
        (7, [1, 1], [0, 8], 8),
    ],
)
def test_wrong_shapes_dtypes_and_offsets_are_refused(load, dtype, shape, offsets, body):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    metadata = {"format": FORMAT, "change": "{}"}
    refused(load, with_header({"__metadata__": metadata, "0.left": entry}, b"\0" * body))


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"null", b"[]", b"7", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000,
        {"__metadata__": 7}, {"__metadata__": {"format": 7}}, {"__metadata__": None}, {"0.left": None},
        {"0.left": {}}, {}, {"__metadata__": {"format": FORMAT}},
        {"__metadata__": {"format": FORMAT, "change": "{}"}},
    ],
)  # fmt: skip
def test_headers_of_other_types_are_refused(load, header):
    refused(load, with_header(header))


SHAPES = {"0.left": (4, 2), "0.right": (2, 3), "0.residuals": (1, 4), "keys.0": (1, 3)}


@pytest.mark.parametrize("seed", range(8))
def test_random_records_with_a_matching_checksum_are_refused_or_sound(load, seed):
    """A record with a matching checksum is loaded or refused as damaged; there is no other error."""
    from safetensors.torch import save

    rng = random.Random(seed)
    values = [None, True, 0, -1, 1, 1e308, 10**40, "", "text.0.self_attn.q_proj", "0" * 64, [], {}, [[0, 1]],
              [[[0, 1]]], {"pairs": {"a": "b"}}, {"a": 1}, ["a"], [7], [[[0, 10**30]]]]  # fmt: skip
    tensors = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    sound = 0
    for _ in range(60):
        movement = {
            "site": "text.0.self_attn.q_proj",
            "base_hash": "0" * 64,
            "keys": 0,
            "gram": None,
        }
        record = {
            "movements": [movement],
            "owners": [[[0, 1]]],
            "protocol": {"pairs": {"a": "b"}},
            "report": {},
        }
        for _ in range(rng.randrange(3)):
            place = rng.choice([record, movement, record["protocol"]])
            if isinstance(place, dict):
                place[rng.choice([*place, "pairs", "ridge", "preserve"])] = rng.choice(values)
        text = json.dumps(record)
        metadata = {"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
        try:
            load(save(tensors, metadata=metadata))
            sound += 1
        except ValueError as error:
            assert "is damaged" in str(error)
    assert sound < 60


def peak(function, *arguments):
    """Return the largest number of bytes that Python and torch hold while the function runs; a refusal is no error."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            function(*arguments)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return max(held, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def change_file(tensors, record):
    from safetensors.torch import save

    text = json.dumps(record)
    return save(
        tensors, metadata={"format": FORMAT, "change": text, "sha256": checksum(text, tensors)}
    )


def record_of(count, *, sites=("text.0.self_attn.q_proj",), protocol=None):
    movements = [{"site": s, "base_hash": "0" * 64, "keys": 0, "gram": None} for s in sites]
    pairs = {"pairs": {"a": "b"}} if protocol is None else protocol
    return {"movements": movements, "owners": [[[0, count]]], "protocol": pairs, "report": {}}


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float16)


MANY = 20_000_000
BOMBS = {
    "owners of keys without columns": (
        {"0.left": zeros(4, 1), "0.right": zeros(1, 0), "0.combinations": zeros(MANY, 0), "keys.0": zeros(MANY, 0)},
        record_of(MANY),
    ),
    "owners of keys that no movement uses": (
        {"0.left": zeros(4, 1), "0.right": zeros(1, 3), "0.residuals": zeros(1, 4), "keys.0": zeros(1, 3),
         "keys.1": zeros(MANY, 0)},
        {**record_of(1), "owners": [[[0, 1]], [[0, MANY]]]},
    ),
    "residuals of rank zero": (
        {"0.left": zeros(MANY, 0), "0.right": zeros(0, 3), "0.combinations": zeros(9, 0), "keys.0": zeros(9, 3)},
        record_of(9),
    ),
    "rows of a token embedding": (
        {"0.left": zeros(200, 200), "0.rows": torch.arange(200.0, dtype=torch.float64)[None],
         "0.right": zeros(200, 1), "0.residuals": zeros(0, 2**18), "keys.0": zeros(0, 1)},
        record_of(0, sites=("text.token_embedding",)),
    ),
    "one set of keys for many movements": (
        {"keys.0": zeros(50_000, 1)}
        | {f"{i}.left": zeros(4, 0) for i in range(300)} | {f"{i}.right": zeros(0, 1) for i in range(300)}
        | {f"{i}.combinations": zeros(50_000, 0) for i in range(300)},
        record_of(50_000, sites=[f"text.{i}.self_attn.q_proj" for i in range(300)]),
    ),
    "a weight larger than any": (
        {"0.left": zeros(2**30, 0), "0.right": zeros(0, 2**30), "0.residuals": zeros(0, 2**30),
         "keys.0": zeros(0, 2**30)},
        record_of(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(load, name):
    content = change_file(*BOMBS[name])
    refused(load, content)
    assert peak(load, content) < 50e6 + 40 * len(content)


@pytest.mark.parametrize(
    "protocol",
    [
        json.loads('{"a":' * 70 + "1" + "}" * 70),
        {"pairs": {"a": "b"}, "strength": {"a": 1e300}},
        {"pairs": {"a": "b"}, "ridge": 10**400},
    ],
)
def test_nested_records_and_numbers_without_bounds_are_refused(load, protocol):
    shapes = {"0.left": (4, 1), "0.right": (1, 3), "0.residuals": (1, 4), "keys.0": (1, 3)}
    tensors = {name: zeros(*shape) for name, shape in shapes.items()}
    load(change_file(tensors, record_of(1)))  # the same file without the fault
    refused(load, change_file(tensors, record_of(1, protocol=protocol)))


def test_a_report_with_a_number_that_is_no_float_is_refused(load):
    shapes = {"0.left": (4, 1), "0.right": (1, 3), "0.residuals": (1, 4), "keys.0": (1, 3)}
    tensors = {name: zeros(*shape) for name, shape in shapes.items()}
    refused(load, change_file(tensors, {**record_of(1), "report": {"empty_prompt_drift": 10**400}}))
