"""Rewordings of a concept in a prompt: paraphrases, other languages, other spellings, similar tokens."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from overpaint.model import TextToImage

__all__ = ["distinct", "neighbours", "paraphrases", "replace_concept", "translations"]

_TABLE = Path(__file__).parent / "translations.tsv"
_END = "</w>"  # the end of a word in a CLIP tokenizer's tokens


def paraphrases(concept: str) -> tuple[str, ...]:
    """Return other spellings and wordings of `concept`, which a word filter or an edit of one wording may miss."""
    words = concept.split()
    longest = max(words, key=len)
    middle = len(longest) // 2
    forms = (
        concept.upper(),
        concept.replace(" ", "-"),
        concept.replace(" ", ""),
        concept.replace(longest, longest[:middle] + longest[middle - 1 :]),  # a letter doubled
        concept.replace(longest, longest[:middle] + longest[middle + 1 :]),  # a letter removed
        concept.replace(longest, f"{longest[:middle]} {longest[middle:]}"),
        " ".join(reversed(words)),
        f"{concept}, {concept}",
        f"famous {concept}",
        f"typical {concept}",
    )
    return tuple(dict.fromkeys(f for f in forms if f != concept and f.strip()))


def translations(tokenizer: Any, concept: str) -> tuple[str, ...]:
    """Return `concept` in six other languages and in other spellings, as far as a table of some 80 words has it.

    Each word or name of the concept that the table has is replaced; the order of the words stays the English one. A
    form is left out if the tokenizer splits one of its words down to a single byte, as CLIP's does with nearly all
    words in other alphabets.

    Args:
        tokenizer: A CLIP tokenizer.
        concept: The concept, in English.
    """
    table = _table()
    names = "|".join(sorted(map(re.escape, table), key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)
    words = [match.group().lower() for match in pattern.finditer(concept)]
    columns = zip(*(table[word].languages for word in words), strict=True)
    forms = [_replaced(concept, words, column) for column in columns]
    for word in words:
        forms += [_replaced(concept, [word], [other]) for other in table[word].others]
    known = (form for form in forms if not _has_single_bytes(tokenizer, form))
    return distinct(tokenizer, known, besides=[concept])


def neighbours(model: TextToImage, concept: str, count: int) -> tuple[str, ...]:
    """Return `concept` with one of its tokens replaced by each of its `count` nearest, by cosine of embeddings."""
    tokenizer = model.tokenizer
    table = model.text_encoder.get_input_embeddings().weight.detach().float()
    unit = F.normalize(table, dim=1)
    ids = tokenizer(concept, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    for place, token in enumerate(ids):
        ranked = (unit @ unit[token]).argsort(descending=True).tolist()
        nearest = [i for i in ranked if i != token and i not in special][:count]
        texts += [tokenizer.decode([*ids[:place], i, *ids[place + 1 :]]).strip() for i in nearest]
    return tuple(dict.fromkeys(text for text in texts if text and text != concept))


def distinct(tokenizer: Any, texts: Iterable[str], *, besides: Iterable[str]) -> tuple[str, ...]:
    """Return the texts whose tokens differ from those of earlier texts and of `besides`, in order.

    A CLIP tokenizer reads capitals as small letters, so a model gets the same input for "Cat" as for "cat".
    """
    seen = {tuple(_ids(tokenizer, text)) for text in besides}
    chosen: list[str] = []
    for text in texts:
        ids = tuple(_ids(tokenizer, text))
        if ids and ids not in seen:
            chosen.append(text)
            seen.add(ids)
    return tuple(chosen)


def replace_concept(prompt: str, concept: str, words: str) -> str:
    """Return `prompt` with `words` in the place of `concept`, which it contains once as whole words."""
    pattern = r"\s+".join(map(re.escape, concept.split()))
    text = re.sub(rf"(?<!\w){pattern}(?!\w)", lambda _: words, prompt, flags=re.IGNORECASE)
    return " ".join(text.split())


@dataclass(frozen=True)
class _Forms:
    """A word in each of the languages, empty where the table has none, and its other spellings."""

    languages: Sequence[str]
    others: Sequence[str]


@functools.cache
def _table() -> Mapping[str, _Forms]:
    """Return the forms of each English word or name."""
    rows = [line.split("\t") for line in _TABLE.read_text("utf-8").splitlines()[1:]]
    return {
        english: _Forms(languages, [other for other in others.split(",") if other])
        for english, *languages, others in rows
    }


def _replaced(concept: str, words: Sequence[str], others: Sequence[str]) -> str:
    """Return `concept` with each of `words` replaced by its text in `others`; it stays where that is empty."""
    forms = {word: other for word, other in zip(words, others, strict=True) if other}
    if not forms:
        return concept
    names = "|".join(sorted(map(re.escape, forms), key=len, reverse=True))
    pattern = rf"(?<!\w)(?:{names})(?!\w)"
    return re.sub(pattern, lambda m: forms[m.group().lower()], concept, flags=re.IGNORECASE)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _has_single_bytes(tokenizer: Any, text: str) -> bool:
    """Return whether the tokens of `text` include one of a single byte, apart from words of one letter and marks."""
    letters = {word for word in re.findall(r"\w+|[^\w\s]", text.lower()) if len(word) == 1}
    names = map(str, tokenizer.convert_ids_to_tokens(_ids(tokenizer, text)))
    pieces = (name.removesuffix(_END) for name in names)
    return any(len(piece) == 1 and piece not in letters for piece in pieces)
