"""Damaged and hostile files of every kind: each reader raises a named error, takes little memory and writes nothing.

Valid files are changed at random: bytes (flipped, cut, inserted, numbers of headers replaced), JSON (values, keys and
nesting), and texts (delimiters, numbers, nesting). The header of a safetensors file, the size of a PNG and the record
of a change are also changed together with their checksums. `make test` runs few cases of each reader, the slow tests
10,000.
"""

import json
import os
import resource
import shutil
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save

from overpaint import files, probes, report, zoo
from overpaint.cli import show
from overpaint.edit import Change, pairs_file, storage, verdict
from overpaint.errors import OverpaintError
from overpaint.evaluate import attack_results, measures, predicted_drift
from overpaint.evaluate.results import Comparison, Paired, Scores
from overpaint.images.read import load_picture
from overpaint.match import flow
from overpaint.match.config import Config
from overpaint.match.matcher import Matcher
from overpaint.metrics import Interval
from overpaint.model import checkpoint
from overpaint.probes.questions import Question
from overpaint.scorers.judge import Judge
from overpaint.studio import uploads
from overpaint.studio.tasks import PromptSettings
from overpaint.trace import Effects, resume
from overpaint.train import card, loop

NAMED = (ValueError, OSError, OverpaintError)
MEBIBYTE = 2**20
CSV = "case_number,prompt,evaluation_seed,concept\n0,a cat in noto style,3,noto\n1,a dog in noto style,4,noto\n"
TOML = (
    '[mine]\nsource = "me"\nlicence = "CC0-1.0"\n[[mine.prompts]]\ntemplate = "a(n) {thing} in {look} style"\n'
    'concept = "{look}"\nlabel = "{look}"\nthing = ["apple", "cat"]\nlook = ["noto", "blob"]\n'
)
SET = (
    'target = ["a {concept} in {place}"]\ngeneral = ["{concept}"]\nother = ["a {concept}"]\nothers = ["a dog"]\n'
    '[slots]\nplace = ["Rome", "Oslo"]\n'
)


# ---------------------------------------------------------------- sound files, and the function that reads each


def interval(mean=0.5):
    return Interval(mean, mean - 0.1, mean + 0.1, 20)


def paired():
    return Paired(interval(), interval(0.4), interval(-0.1))


def comparison():
    scores = Scores(
        "a", "style", "openmoji", "noto", efficacy=paired(), redirection=paired(),
        generality={"unseen wordings": paired(), "held-out pairs": paired()}, others={"noto": paired()},
        specificity={"object": paired(), "style": paired()}, empty_drift=0.01, protocol={"questions": 4},
    )  # fmt: skip
    questions = tuple(Question("a cat", seed, "target", "cat", "openmoji") for seed in range(2))
    pictures = {name: torch.zeros(2, 3, 8, 8, dtype=torch.uint8) for name in ("before", "a")}
    return Comparison(
        {"a": scores}, {"style": interval(), "style held out": interval()}, questions, pictures
    )


def effects():
    rows = [
        {"site": f"text.{i}.mlp", "part": "text", "kind": "mlp", "index": i, "path": "", "role": "eos", "control": c,
         "probe": f"p{p}", "prompt": "a cat", "concept": "cat", "seed": 0, "noise": 0, "indirect_effect": i * 0.1 + p}
        for i in range(3) for p in range(4) for c in ("", "untrained")
    ]  # fmt: skip
    return Effects.of(rows, {"steps": 3})


def read_change(path):
    change = Change.load(path)
    return verdict.describe(change), show._facts(change)


def read_training(folder):
    model = torch.nn.Linear(2, 2)
    pair = loop.optimizers(model, lr=1e-3, decay=0, muon=False)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop._restore(folder / "toy.safetensors", model, pair, average, "adamw")
    return card.stages(folder, ("toy",))


class Reader:
    """A folder of sound files, the files of it that are changed, and the function that reads the folder."""

    def __init__(self, write, read, *changed, memory=64):
        self.write, self.read, self.changed, self.memory = write, read, changed, memory


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def picture(form):
    def write(folder):
        pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "a", form)

    return write


def write_sweep(folder):
    resume.sweep(folder, {"steps": 1}, ["u"], lambda _: effects().table.to_pylist())


def write_training(folder):
    model = torch.nn.Linear(2, 2)
    schedule = loop.Schedule(1, 1e-3, 1, muon=False, ema_decay=0.9)
    loop.fit(
        model, lambda _: model.weight.square().sum(), schedule, stage="toy", folder=Path(folder)
    )


def write_matcher(folder):
    Matcher.build(Config(image=64, grid=8, channels=(16,), sr_grid=16, sr_channels=(16,))).save(
        folder
    )


def write_results(folder):
    comparison().save(folder)
    row = measures.Measure("target", "psnr", interval(), interval(), interval())
    measures.Measures("mine", "old", "new", (row,), {"seed": 3}).save(folder)
    attempt = attack_results.Attempt("plain", "x", interval(), interval())
    protocol = {"steps": 5, "score": "share"}
    attack_results.Attack("old", *(interval(),) * 3, (attempt,), protocol).save(folder)
    predicted_drift.save({"a": {"noto": 0.1}}, folder)
    effects().save(folder / "text.parquet")
    run = {"title": "t", "method": "a", "commands": ["x"], "protocol": {"Seed": 1}}
    files.write_json(folder / "run.json", run)
    files.write_json(folder / "summary.json", {"target_after": 0.4, "edit_seconds": 1.5})


def write_change(folder):
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.left": (4, 2), "0.right": (2, 3), "0.residuals": (1, 4), "keys.0": (1, 3)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}  # fmt: skip
    movement = {"site": "text.0.self_attn.q_proj", "base_hash": "0" * 64, "keys": 0, "gram": None}
    record = {
        "movements": [movement],
        "owners": [[[0, 1]]],
        "protocol": {"pairs": {"a": "b"}, "versions": {"torch": "2"}, "strength": {"a": 0.5}, "preserve": ["c"]},
        "report": {"endangered": [{"concept": "d"}], "not_kept": ["e"], "empty_prompt_drift": 0.1},
    }  # fmt: skip
    storage.write(folder / "c.safetensors", tensors, record)


def write_drawn(folder):
    choices = PromptSettings("a cat", "cat", (0, 1), 8)
    uploads.save_picture(Image.new("RGB", (16, 16)), choices, "icons", folder / "a.png")


def write_judge(folder):
    for path in zoo.folder("icons-judge").iterdir():
        if path.name in ("model.safetensors", "tokenizer.json"):
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)


def write_card(folder):
    shutil.copy(zoo.folder("icons") / "card.json", folder)


READERS = {
    "change": Reader(write_change, lambda f: read_change(f / "c.safetensors"), "c.safetensors"),
    "flow": Reader(
        lambda f: flow.write_flo(f / "a.flo", torch.rand(2, 8, 9)), lambda f: flow.read_flo(f / "a.flo"), "a.flo"
    ),
    "effects": Reader(
        lambda f: effects().save(f / "e.parquet"), lambda f: Effects.load(f / "e.parquet"), "e.parquet"
    ),
    "sweep": Reader(write_sweep, resume.read, "protocol.json", "*.parquet"),
    "probes.csv": Reader(
        text("a.csv", CSV), lambda f: probes.load_file(f / "a.csv", kind="style"), "a.csv"
    ),
    "probes.toml": Reader(
        text("a.toml", TOML), lambda f: probes.load_file(f / "a.toml", kind="style"), "a.toml"
    ),
    "set.csv": Reader(
        text("a.csv", CSV), lambda f: probes.load_set(f / "a.csv", erase="noto"), "a.csv"
    ),
    "set.toml": Reader(
        text("a.toml", SET), lambda f: probes.load_set(f / "a.toml", erase="a cat"), "a.toml"
    ),
    "set.txt": Reader(
        text("a.txt", "a cat\na dog\n"), lambda f: probes.load_set(f / "a.txt", erase="cat"), "a.txt"
    ),
    "pairs.csv": Reader(
        text("a.csv", 'erase,replace\n"a cat",a dog\nvan gogh,\n'),
        lambda f: pairs_file.load_pairs(f / "a.csv"),
        "a.csv",
    ),
    **{
        form: Reader(picture(form), lambda f: load_picture(f / "a", "image"), "a", memory=2048)
        for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
    },
    "drawn": Reader(write_drawn, lambda f: uploads.load_origin(f / "a.png"), "a.png"),
    "settings": Reader(
        text("overpaint.json", '{"guidance_scale": 7.5, "held_out": [["a", "b"]]}'),
        lambda f: checkpoint._settings(f / "overpaint.json"), "overpaint.json",
    ),
    "model_index": Reader(
        text("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}'),
        lambda f: checkpoint._kind(f / "model_index.json", source="x"), "model_index.json",
    ),
    "matcher": Reader(write_matcher, Matcher.load, "config.json", "coarse.safetensors", memory=256),
    "judge": Reader(
        write_judge, lambda f: Judge(f, name="x"), "labels.json", "card.json", "heads.safetensors",
        memory=256,
    ),
    "comparison": Reader(write_results, Comparison.load, "comparison.json", "gallery.safetensors"),
    "measures": Reader(write_results, measures.Measures.load, "measures.json"),
    "attack": Reader(write_results, attack_results.Attack.load, "attack.json"),
    "drift": Reader(write_results, predicted_drift.load, "drift.json"),
    "page": Reader(
        write_results, lambda f: report.save(f, out=f.parent / "out" / "page.html"), "*.json", memory=256
    ),
    "training": Reader(write_training, read_training, "toy.safetensors"),
    "card": Reader(write_card, card.history, "card.json"),
}  # fmt: skip


# ---------------------------------------------------------------- changes

FORMS = ("<H", ">H", "<I", ">I", "<Q", ">Q")
NUMBERS = (0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (
    '"', ",", "\n", "\r", "\0", "\ufeff", "\u2028", "[" * 3000, "{" * 3000, "9" * 5000, "1e999", "NaN", "-1", "=", "#",
    '"' * 3, "{concept:>999999999}", "{concept.__class__}", "{look!r:>99}", "{0}", "{", "a = " + "[" * 2000,
    "x" * 200_000, "a" + ".a" * 5000 + " = 1\n", 'place = ["a", "b", "c", "d"]\n', "é" * 5, "'", "inf",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a",
    "\0", "é" * 9, "x" * 100_000, [], {}, [[]], [None], ["a"], [0] * 1000, {"a": "b"}, {"": None}, [[0, 2**40]],
    [[0, 1]] * 100, {"concept": 3}, {"mean": None, "low": None, "high": None, "n": 10**30},
)  # fmt: skip


def change_bytes(draw, data):
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        place = draw(st.sampled_from([place, place % 64, max(0, len(data) - 1 - place % 600)]))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "number", "repeat", "remove"]))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=9))
        elif kind == "number":
            form = draw(st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
            value = draw(st.sampled_from(NUMBERS))
            width = struct.calcsize(form)
            data[place : place + width] = struct.pack(form, value % 2 ** (8 * width))
        elif kind == "repeat":
            part = data[place : place + draw(st.integers(1, 40))]
            data[place:place] = part * draw(st.sampled_from([1, 100]))
        else:
            del data[place : place + draw(st.integers(1, 40))]
    return bytes(data)


def change_text(draw, content):
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        word = draw(st.sampled_from(WORDS))
        content = content[:place] + word + content[place + draw(st.sampled_from([0, 0, 1, 5])) :]
    return content.encode()


def nodes(value, path=()):
    yield path
    items = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield from nodes(child, (*path, key))


def change_value(draw, value):
    """Return JSON in which some values are replaced, removed, renamed, repeated or nested."""
    for _ in range(draw(st.integers(1, 3))):
        paths = list(nodes(value))
        *above, last = ("top", *draw(st.sampled_from(paths)))
        holder = root = {"top": value}
        for key in above:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "repeat", "nest"]))
        if kind == "replace":
            holder[last] = draw(st.sampled_from(VALUES))
        elif kind == "remove" and above:
            del holder[last]
        elif kind == "rename" and isinstance(holder, dict) and above:
            holder[draw(st.sampled_from(["", "a", "n", "name"]))] = holder.pop(last)
        elif kind == "repeat":
            holder[last] = [holder[last]] * draw(st.sampled_from([0, 2, 300]))
        elif kind == "nest":
            for _ in range(draw(st.sampled_from([1, 60, 150]))):
                holder[last] = [holder[last]]
        value = root["top"]
        value = json.loads(json.dumps(value))  # so that no two places hold one object
    return value


def change_header(draw, data):
    """Return a safetensors file with another header, and of a change with another record and the right checksum."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    record = header.get("__metadata__", {}).get("change")
    if record is not None and draw(st.booleans()):
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(data)
            file.flush()
            tensors = load_file(file.name)
        changed = json.dumps(change_value(draw, json.loads(record)))
        digest = storage.checksum(changed, tensors)
        return save(
            tensors, metadata={"format": storage.FORMAT, "change": changed, "sha256": digest}
        )
    new = json.dumps(change_value(draw, header)).encode()
    return struct.pack("<Q", len(new)) + new + data[8 + size :]


def change_size(draw, data):
    """Return a PNG with another size in its header and the right checksum of it."""
    sides = [draw(st.sampled_from(NUMBERS[:9])) for _ in range(2)]
    chunk = b"IHDR" + struct.pack(">II", *sides) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@st.composite
def damage(draw, data, suffix):
    """Return changed content of a file."""
    if suffix == ".json" and draw(st.integers(0, 3)):
        return json.dumps(change_value(draw, json.loads(data))).encode()
    if suffix == ".safetensors" and draw(st.booleans()):
        return change_header(draw, data)
    if suffix in (".csv", ".toml", ".txt") and draw(st.integers(0, 3)):
        return change_text(draw, data.decode())
    if data[:4] == b"\x89PNG" and draw(st.integers(0, 3)) == 0:
        return change_size(draw, data)
    return change_bytes(draw, bytearray(data))


# ---------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def sound(request, tmp_path_factory):
    """A reader, its folder of sound files, and the files of it that are changed."""
    reader = READERS[request.param]
    folder = tmp_path_factory.mktemp("fuzz") / "in"
    folder.mkdir()
    (folder.parent / "out").mkdir()
    reader.write(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.read(folder)
    changed = sorted({p for pattern in reader.changed for p in folder.glob(pattern)})
    assert changed
    return reader, folder, {path: path.read_bytes() for path in changed}


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def listing(folder):
    return sorted(str(p) for p in folder.rglob("*") if p.suffix != ".lock")


def check(sound, data):
    reader, folder, contents = sound
    path = data.draw(st.sampled_from(list(contents)), label="file")
    content = data.draw(damage(contents[path], path.suffix))
    path.write_bytes(content)
    names, before = listing(folder), peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the damage
            reader.read(folder)
    except NAMED as error:
        assert str(error)
    finally:
        path.write_bytes(contents[path])
    assert listing(folder) == names
    assert set(os.listdir(folder.parent)) == {"in", "out"}
    assert peak() - before < reader.memory * MEBIBYTE + 64 * len(content)


COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}
CASES = int(os.environ.get("OVERPAINT_FUZZ_CASES", "10000"))  # of the slow tests


SLOW = (
    "judge",
    "page",
    "matcher",
)  # readers that take a second, or memory that varies from run to run


@pytest.mark.parametrize("sound", [name for name in READERS if name not in SLOW], indirect=True)
@settings(max_examples=60, derandomize=True, **COMMON)
@given(data=st.data())
def test_a_damaged_file_raises_a_named_error(sound, data):
    check(sound, data)


@pytest.mark.parametrize("sound", SLOW, indirect=True)
@settings(max_examples=8, derandomize=True, **COMMON)
@given(data=st.data())
def test_a_damaged_folder_raises_a_named_error(sound, data):
    check(sound, data)


@pytest.mark.slow
@pytest.mark.parametrize("sound", READERS, indirect=True)
@settings(max_examples=CASES, **COMMON)
@given(data=st.data())
def test_many_damaged_files_raise_named_errors(sound, data):
    check(sound, data)
