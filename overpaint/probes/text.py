"""Whole-word search and articles in English prompts."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from string import Formatter

__all__ = ["MOST", "article", "combinations", "fill_articles", "fill_slots", "word_pattern"]


MOST = 100_000  # prompts of one file


def combinations(slots: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield each combination of one word from every slot; the last slot changes fastest.

    Raises:
        ValueError: There are more than 100,000.
    """
    count = math.prod(len(words) for words in slots.values())
    if count > MOST:
        raise ValueError(
            f"the slots of one template have more than {MOST} combinations: remove some words"
        )
    for words in product(*slots.values()):
        yield dict(zip(slots, words, strict=True))


def fill_slots(template: str, words: Mapping[str, str]) -> str:
    """Return a template with each `{name}` replaced by the word of that name.

    Raises:
        ValueError: A slot has another form, no word, or one that is no text.
    """
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if form or conversion or not isinstance(words.get(name), str):
            raise ValueError(f"the slot {{{name}}} of {template[:80]!r} has no words, or a format")
    return template.format(**words)


def word_pattern(text: str) -> str:
    """Return a regular expression that matches `text` as whole words, with any white space between them."""
    spaced = r"\s+".join(map(re.escape, text.split()))
    return rf"(?<!\w){spaced}(?!\w)"


def fill_articles(text: str) -> str:
    """Replace each `a(n)` by `an` before a vowel and by `a` elsewhere."""
    return re.sub(r"\ba\(n\)(?= [aeiou])", "an", text, flags=re.IGNORECASE).replace("a(n)", "a")


def article(noun: str) -> str:
    """Return `an` for a noun that begins with a vowel, otherwise `a`."""
    return "an" if noun[:1] in "aeiou" else "a"
