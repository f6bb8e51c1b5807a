"""Frames, filler words and concepts for the captions that an edit fits or preserves.

The frames are ours. They are filled with words of the tokenizer's vocabulary, so that an edit is fitted among many
different words. The concepts that should not drift are those of the probes.
"""

import random
import re
from collections.abc import Collection, Sequence
from typing import Any

from overpaint import probes
from overpaint.errors import check_seed

__all__ = ["PLAIN", "concepts", "fillers", "frames"]

# `{}` is replaced by a concept, `w` by a word.
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
PLAIN = tuple(_SMALL.split())  # words that belong to no concept, including those of the frames


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
    words = [t for t in ends if len(t) > 2 and t.isascii() and t.isalpha() and t not in banned]
    if not words:
        raise ValueError(
            "the tokenizer's vocabulary has no whole words to fill captions with: use a CLIP tokenizer, or "
            "`edit.quickfix` with `frames` and `preserve` of your own."
        )
    return tuple(sorted(words))


def frames(
    words: Sequence[str], *, size: int, seed: int = 0, among: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return `size` frames with `{}` for a concept: first those without other words, then randomly filled ones.

    Args:
        words: Words to fill frames with.
        size: Number of frames.
        seed: Seed of the random choice of frames and words.
        among: Concepts that fill about every second gap, because words of the training data have larger movements.
    """
    rng = random.Random(check_seed(seed))

    def word(_: object) -> str:
        return rng.choice(among) if among and rng.random() < 0.5 else rng.choice(words)

    plain = [frame for frame in _FRAMES if not _SLOT.search(frame)][:size]
    drawn = [rng.choice(_FRAMES[len(plain) :]) for _ in range(size - len(plain))]
    return (*plain, *(_SLOT.sub(word, frame) for frame in drawn))


def concepts(vocabulary: str) -> tuple[str, ...]:
    """Return the concepts of a vocabulary's probes: styles, objects, people, colors, facts, trademarks.

    Raises:
        ValueError: There is no such vocabulary.
    """
    if vocabulary not in probes.VOCABULARIES:
        raise ValueError(
            f"unknown vocabulary {vocabulary!r}: choose one of {', '.join(probes.VOCABULARIES)}, or list concepts."
        )
    names: list[str] = []
    for kind in probes.KINDS:
        try:
            table = probes.load(kind, vocabulary=vocabulary)
        except ValueError:  # a kind that this vocabulary lacks
            continue
        names += [probe.concept for probe in table]
    return tuple(dict.fromkeys(names))
