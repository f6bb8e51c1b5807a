"""Rules for the tokens whose rows of the token embedding may move without moving everyday prompts.

A row is read by every prompt that holds its token. A token may move if it is a whole word of the concept, consists of
letters, is no frequent word or name, and ends no frequent word or name that the tokenizer splits.
"""

import functools
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any

from overpaint import probes

__all__ = ["obstacles", "spelling", "texts_with", "token_ids"]

_END = "</w>"  # the end of a word in a CLIP tokenizer's tokens


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of `text` without those that begin and end a prompt."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def spelling(tokenizer: Any, token: int) -> str:
    """Return the letters of a token without the mark of a word's end, which copies of a tokenizer may leave there."""
    return str(tokenizer.decode([token])).strip().removesuffix(_END)


def texts_with(tokenizer: Any, tokens: Collection[int], texts: Iterable[str]) -> list[str]:
    """Return the texts that hold one of `tokens`."""
    spelled = [spelling(tokenizer, token).lower() for token in tokens]
    # Only texts with these letters are tokenised; part of a letter is decoded as U+FFFD.
    every = any("\ufffd" in word for word in spelled)
    candidates = [t for t in texts if every or any(word in _composed(t) for word in spelled)]
    chosen = set(tokens)
    return [text for text in candidates if not chosen.isdisjoint(token_ids(tokenizer, text))]


def obstacles(tokenizer: Any, concept: str) -> dict[int, str]:
    """Return, for each token of `concept`, the reason why its row may not move; an empty string if it may.

    Args:
        tokenizer: A `CLIPTokenizer`, whose tokens at the end of a word end in `</w>`.
        concept: The concept that the tokens are read from.
    """
    ids = token_ids(tokenizer, concept)
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    reasons: dict[int, str] = {}
    for i, (token, name) in enumerate(zip(ids, names, strict=True)):
        whole = name.endswith(_END) and (i == 0 or names[i - 1].endswith(_END))
        reasons[token] = reasons.get(token) or _reason(tokenizer, token, whole)
    return reasons


def _reason(tokenizer: Any, token: int, whole: bool) -> str:
    word = spelling(tokenizer, token).lower()
    if len(word) < 2 or not word.isalpha():
        return "a digit, a letter or a mark"
    if not whole:
        return "a piece of a longer word"
    frequent = probes.frequent_words()
    if word in frequent:
        return "a frequent word"
    for longer in _known_words(frequent):
        if (
            longer.endswith(word)
            and longer != word
            and token_ids(tokenizer, longer)[-1:] == [token]
        ):
            return f"the end of {longer!r}"
    return ""


@functools.cache
def _known_words(frequent: frozenset[str]) -> tuple[str, ...]:
    """Return the frequent words and the words of all names, in lower case."""
    names = (word for name in probes.names() for word in name.lower().split())
    return tuple(sorted({*frequent, *names}))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()
