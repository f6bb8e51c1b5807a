"""English: frequent words, and names of artists, persons, characters, brands, objects and places.

`benchmarks/make_english_lists.py` wrote both lists; `NOTICE` names their sources and licences.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["frequent_words", "names"]

_FOLDER = Path(__file__).parent


@functools.cache
def frequent_words() -> frozenset[str]:
    """Return the 50,000 most frequent English words and names of one word, letters alone, in lower case.

    Source: wordfreq 3.1.1 (Robyn Speer), data under CC-BY-SA-4.0, https://doi.org/10.5281/zenodo.7199437.
    """
    return frozenset((_FOLDER / "frequent-words.txt").read_text("utf-8").split())


@functools.cache
def names() -> Mapping[str, str]:
    """Return some 5,500 names that a text-to-image model may know, each with its kind.

    The kinds are `"artist"`, `"brand"`, `"character"`, `"object"`, `"person"` and `"place"`.

    Source: WordNet 3.1 (Princeton University), the npm packages superheroes, supervillains and pokemon (MIT) and
    simple-icons (CC0-1.0).
    """
    rows = (_FOLDER / "names.tsv").read_text("utf-8").splitlines()
    return MappingProxyType({name: kind for kind, _, name in (row.partition("\t") for row in rows)})
