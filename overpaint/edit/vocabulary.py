"""Captions to fit an edit on, and captions to keep: what else a model may be asked.

The frames are ours. Between their words stand words of the tokenizer's own vocabulary, so that an edit learns its
concept among any words and not among a few. The concepts that may be in danger are those of the probes.
"""

import random
import re
from collections.abc import Collection, Sequence
from typing import Any

from overpaint import probes

__all__ = ["PLAIN", "concepts", "fillers", "frames"]

# `{}` is where a concept goes, `w` stands for a word.
_FRAMES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "a w in {}",
    "a w, {}",
    "w w in {}",
    "a picture of a w, {}",
    "a drawing of a w in {}",
    "w {}",
    "{} w",
    "{}, w w",
    "{} with a w",
    "{} on a w background",
    "a w w in {} on a w background",
    "a w, {} and a w",
    "w w w, {}",
    "the w of {}",
)
_SLOT = re.compile(r"\bw\b")
_SMALL = "a an and as at background by drawing for from in is it no of on or photo picture the to two with without"
PLAIN = tuple(_SMALL.split())  # words that are no concept's own, those of the frames among them


def fillers(tokenizer: Any, *, without: Collection[str] = ()) -> tuple[str, ...]:
    """Return the word ends of a CLIP tokenizer's vocabulary, three letters or more, in alphabetical order.

    Args:
        tokenizer: A `CLIPTokenizer`, whose tokens at the end of a word end in `</w>`.
        without: Texts whose words are left out.

    Raises:
        ValueError: No word is left.
    """
    banned = {word for text in without for word in text.lower().split()}
    ends = [t.removesuffix("</w>") for t in tokenizer.get_vocab() if t.endswith("</w>")]
    found = [t for t in ends if len(t) > 2 and t.isascii() and t.isalpha() and t not in banned]
    if not found:
        raise ValueError(
            "the tokenizer's vocabulary has no whole words to fill captions with: use a CLIP tokenizer, or "
            "`edit.quickfix` with `frames` and `preserve` of your own."
        )
    return tuple(sorted(found))


def frames(
    words: Sequence[str], *, size: int, seed: int = 0, among: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return `size` frames, `{}` the place of a concept: the plain ones first, then with words drawn by `seed`.

    Args:
        words: To fill them with.
        size: How many.
        seed: Of the frames and words drawn.
        among: Concepts that fill every second place: what a model was trained on moves a layer more than other words.
    """
    rng = random.Random(seed)

    def word(_: object) -> str:
        return rng.choice(among) if among and rng.random() < 0.5 else rng.choice(words)

    plain = [frame for frame in _FRAMES if not _SLOT.search(frame)][:size]
    drawn = [rng.choice(_FRAMES[len(plain) :]) for _ in range(size - len(plain))]
    return (*plain, *(_SLOT.sub(word, frame) for frame in drawn))


def concepts(vocabulary: str) -> tuple[str, ...]:
    """Return what the probes of a vocabulary name: styles, objects, people, colors, facts, trademarks.

    Raises:
        ValueError: No such vocabulary.
    """
    if vocabulary not in probes.VOCABULARIES:
        raise ValueError(
            f"unknown vocabulary {vocabulary!r}: choose one of {', '.join(probes.VOCABULARIES)}, or list concepts."
        )
    found: list[str] = []
    for kind in probes.KINDS:
        try:
            table = probes.load(kind, vocabulary=vocabulary)
        except ValueError:  # a kind that this vocabulary cannot say
            continue
        found += [probe.concept for probe in table]
    return tuple(dict.fromkeys(found))
