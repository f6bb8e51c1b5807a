r"""Words of concepts as CLIP reads them: comparison, special tokens, unknown words, and aliases of an erased concept.

CLIP's tokenizer composes characters (Unicode NFC), writes them in lower case, and splits at white space and
punctuation. Two texts with the same words are the same text to the model.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from overpaint import probes
from overpaint.errors import check_texts
from overpaint.model.token_spans import check_text

__all__ = [
    "GENERIC",
    "alias_target",
    "check_special",
    "contains",
    "core",
    "find_aliases",
    "unknown_words",
    "words",
]

_WORD = re.compile(r"\w+|[^\w\s]")
_LINKS = frozenset(["a", "an", "the", "in", "of", "by", "from", "as", "'", "’", "s", "-"])
_MANNER = frozenset(
    [
        *(
            "art",
            "artwork",
            "artworks",
            "drawing",
            "drawings",
            "drawn",
            "illustration",
            "illustrations",
        ),
        *(
            "image",
            "images",
            "painted",
            "painting",
            "paintings",
            "photo",
            "photograph",
            "photographs",
            "photos",
        ),
        *(
            "picture",
            "pictures",
            "portrait",
            "portraits",
            "style",
            "styled",
            "styles",
            "work",
            "works",
        ),
    ]
)
GENERIC = tuple(sorted(_LINKS | _MANNER))  # words that say how a concept is shown, not which
_NAMES = ("style", "trademark")  # kinds of probes whose concepts a style can be named after


def words(text: str) -> tuple[str, ...]:
    """Return the words and the punctuation of `text`, composed and in lower case."""
    return tuple(_WORD.findall(unicodedata.normalize("NFC", text).lower()))


def contains(text: str, concept: str) -> bool:
    """Return whether `text` contains the words of `concept` one after the other."""
    whole, part = words(text), words(concept)
    return bool(part) and any(
        whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1)
    )


def core(concept: str) -> tuple[str, ...]:
    """Return the words of `concept` without generic words at its ends: "monet" for "in the style of monet".

    Generic words are articles, prepositions and words for pictures and styles. If all words are generic, all are
    returned.
    """
    return _stripped(words(concept), _LINKS | _MANNER) or words(concept)


def alias_target(new: str) -> str:
    """Return the replacement of an alias: the replacement of its concept, without generic words at its ends.

    For example, if "van gogh style" becomes "noto style", its alias "van gogh" becomes "noto".
    """
    spans = [m.span() for m in _WORD.finditer(new)]
    generic = [unicodedata.normalize("NFC", new[a:b]).lower() in _LINKS | _MANNER for a, b in spans]
    if all(generic):
        return new.strip()
    first, last = generic.index(False), len(generic) - 1 - generic[::-1].index(False)
    return new[spans[first][0] : spans[last][1]]


def find_aliases(
    pairs: Mapping[str, str],
    known: Iterable[str],
    *,
    preserve: Sequence[str] = (),
    aliases: str | Sequence[str] | Mapping[str, str] = "auto",
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the known concepts that erased concepts contain: the aliases to erase too, and the concepts to preserve.

    The rule: a known concept is an alias of an erased one if it equals the erased one without articles at the ends
    ("cat" and "a cat"), or without articles, prepositions and words for pictures and styles at the ends ("van gogh" and
    "van gogh style", "monet" and "in the style of monet"). There are two exceptions. A thing is no alias of a style
    with its name ("apple" and "apple style"); things are the concepts of the probes that are neither styles nor
    trademarks. A concept that is also a replacement, or is part of a preserved prompt, is no alias.

    All other words change the meaning: "apple" is no alias of "apple logo", "france" none of "flag of france" and
    "mouse" none of "mickey mouse".

    Args:
        pairs: Old concept to new.
        known: Concepts that should not drift.
        preserve: Prompts that should not drift.
        aliases: `"auto"` for the rule; a list of concepts to erase too, in place of the rule; or a dictionary from each
            of them to the erased concept that it is an alias of.

    Returns:
        Two dictionaries from a contained concept to the erased one that contains it.

    Raises:
        TypeError: `aliases` is another text than "auto".
        ValueError: An alias is empty, is preserved or a replacement, or belongs to none or several of the concepts.
    """
    if isinstance(aliases, str) and aliases != "auto":
        raise TypeError(
            "`aliases` is 'auto' or a list of concepts: write ['...'] around a single one."
        )
    if not isinstance(aliases, str):
        check_texts(aliases, "aliases")
    fixed = {words(text) for text in (*preserve, *pairs.values(), *pairs)}
    fixed |= {core(new) for new in pairs.values()}
    contained = {
        c: old for old in pairs for c in known if words(c) not in fixed and contains(old, c)
    }
    required = {c for c in contained if any(contains(prompt, c) for prompt in preserve)}
    if isinstance(aliases, str):
        erased = {c: old for c, old in contained.items() if c not in required and _is_alias(c, old)}
    else:
        owners = aliases if isinstance(aliases, Mapping) else {}
        erased = {alias: _owner(alias, pairs, fixed, owners.get(alias)) for alias in aliases}
    texts = {words(c) for c in erased}
    return erased, {c: old for c, old in contained.items() if words(c) not in texts}


def check_special(tokenizer: Any, texts: Iterable[str]) -> None:
    """Raise if a text holds a token that begins or ends a prompt.

    Raises:
        ValueError: A text holds one, or is not Unicode text.
    """
    special = [str(t) for t in (tokenizer.bos_token, tokenizer.eos_token) if t]
    for text in texts:
        check_text(text)
        inside = [token for token in special if token.lower() in text.lower()]
        if inside:
            raise ValueError(
                f"{text!r} holds the special token {inside[0]!r}, which begins or ends every prompt: name the concept "
                "in words."
            )


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Return the words of `texts` for which the tokenizer has no larger pieces than letters or bytes.

    A word of letters is unknown if it has at least two tokens and more than one token for every two letters. Such a
    word is rare in training data, so an edit of it may have no effect.
    """
    distinct = dict.fromkeys(w for text in texts for w in words(text) if w.isalpha())
    return [word for word in distinct if _is_unknown(tokenizer, word)]


def _is_unknown(tokenizer: Any, word: str) -> bool:
    count = len(tokenizer(word, add_special_tokens=False, verbose=False).input_ids)
    return count > max(1, len(word) / 2)


def _is_alias(concept: str, old: str) -> bool:
    part, whole = words(concept), words(old)
    if part == _stripped(whole, _LINKS):
        return True
    return part == core(old) and part not in _things()


def _owner(
    alias: str, pairs: Mapping[str, str], fixed: set[tuple[str, ...]], owner: str | None
) -> str:
    """Return the erased concept that a listed alias belongs to: `owner`, or the only one that contains it."""
    if not words(alias):
        raise ValueError("an alias is empty: write the words of the concept to erase too.")
    if words(alias) in fixed:
        raise ValueError(
            f"the alias {alias!r} is also preserved, a replacement or erased already: take it off one of the lists."
        )
    owners = list(pairs) if len(pairs) == 1 else [old for old in pairs if contains(old, alias)]
    if owner is not None:
        owners = [old for old in pairs if old == owner]
    if len(owners) != 1:
        raise ValueError(
            f"the alias {alias!r} belongs to {len(owners)} of the erased concepts, not to one: give it as a pair with "
            "its own replacement."
        )
    return owners[0]


def _stripped(text: tuple[str, ...], generic: frozenset[str]) -> tuple[str, ...]:
    first, last = 0, len(text)
    while first < last and text[first] in generic:
        first += 1
    while first < last and text[last - 1] in generic:
        last -= 1
    return text[first:last]


@functools.cache
def _things() -> frozenset[tuple[str, ...]]:
    """Return the words of all concepts of the probes that are neither styles nor trademarks."""
    things: set[tuple[str, ...]] = set()
    for vocabulary in probes.VOCABULARIES:
        for kind in probes.KINDS:
            if kind in _NAMES:
                continue
            try:
                table = probes.load(kind, vocabulary=vocabulary)
            except ValueError:  # a kind that this vocabulary lacks
                continue
            things |= {words(probe.concept) for probe in table}
    return frozenset(things)
