"""Words that `lettering` is trained on, and the tenth of all strings that is held out.

A string is held out by its SHA-256 in lower case, so that no case variant of a held-out word is drawn in training, and
random strings are split by the same rule.
"""

import functools
import hashlib
import re

import numpy as np

from overpaint.probes import english

__all__ = ["CHARACTERS", "draw", "draw_case", "draw_measured", "is_held_out", "words"]

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Parts of words that are not to be shown to everybody.
_COARSE = re.compile(
    r"rape|nigg|slut|whor|bitch|fuck|shit|nazi|porn|sex|milf|pedo|cunt|cock|dick|tits|anal|satan|fag"
)
_MARKS = "!?.,-&'%$:/#+"
# Shares of 1 to 12 letters; words of 2 to 8 are what the model is measured on.
_LENGTHS = np.array([2, 10, 12, 13, 13, 13, 12, 11, 5, 4, 3, 2], float)
_LENGTHS /= _LENGTHS.sum()


def is_held_out(text: str) -> bool:
    """Return whether `text` is in the tenth of all strings that is never drawn in training."""
    return hashlib.sha256(text.lower().encode()).digest()[0] % 10 == 0


@functools.cache
def words(length: int, *, held_out: bool) -> tuple[str, ...]:
    """Return the frequent English words of a length, in lower case and alphabetical order, of one split."""
    every = (
        w
        for w in english.frequent_words()
        if len(w) == length and w.isascii() and not _COARSE.search(w)
    )
    return tuple(sorted(word for word in every if is_held_out(word) == held_out))


def draw(
    rng: np.random.Generator, *, held_out: bool = False, is_plain: bool = False, longest: int = 12
) -> str:
    """Return a random string of one split.

    Half are words, since a model that sees only words learns to complete them instead of reading each letter. The
    others are random letters, random letters and digits, or words and strings with a mark of punctuation or a space.

    Args:
        rng: Source of the draws.
        held_out: `True` for the held-out tenth.
        is_plain: `True` for lower-case words of 2 to 8 letters and strings of such letters.
        longest: Largest number of characters.
    """
    while True:
        shares = _LENGTHS[:longest].copy()
        if is_plain:
            shares[0] = shares[8:] = 0
        length = int(rng.choice(len(shares), p=shares / shares.sum())) + 1
        text = _string(rng, length, held_out, is_plain)
        if is_held_out(text) == held_out:
            return text


def draw_measured(rng: np.random.Generator, length: int, *, held_out: bool = True) -> str:
    """Return a random English word of a length, in lower case: what the share of words read is measured on.

    Args:
        rng: Source of the draws.
        length: Number of letters, 2 to 8.
        held_out: `True` for the held-out tenth.
    """
    choices = words(length, held_out=held_out)
    return choices[rng.integers(len(choices))]


def draw_case(rng: np.random.Generator, text: str) -> str:
    """Return `text` in lower case (4 of 10), capitalised (3), in capitals (2) or with random capitals (1)."""
    kind = rng.random()
    if kind < 0.4:
        return text
    if kind < 0.7:
        return text[:1].upper() + text[1:]
    if kind < 0.9:
        return text.upper()
    return "".join(c.upper() if rng.random() < 0.5 else c for c in text)


def _string(rng: np.random.Generator, length: int, held_out: bool, is_plain: bool) -> str:
    kind = rng.random()
    choices = words(length, held_out=held_out)
    if kind < 0.5 and choices:
        return choices[rng.integers(len(choices))]
    letters = CHARACTERS[:26] if is_plain or kind < 0.78 else CHARACTERS
    text = "".join(letters[i] for i in rng.integers(len(letters), size=length))
    if is_plain or length < 3 or kind < 0.9:
        return text
    mark = " " if rng.random() < 0.25 else _MARKS[rng.integers(len(_MARKS))]
    place = int(rng.integers(1, length)) if mark in "-&'/:." else length - 1
    place = int(rng.integers(1, length - 1)) if mark == " " else place
    base = words(length - 1, held_out=held_out) if rng.random() < 0.7 else ()
    stem = base[rng.integers(len(base))] if base else text[:-1]
    return stem[:place] + mark + stem[place:]
