"""Whole-word search and articles in English prompts, and the words that a tokenizer cuts off."""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from string import Formatter
from typing import Any

from overpaint.errors import CutPromptWarning

__all__ = [
    "MOST",
    "article",
    "combinations",
    "cut_words",
    "fill_articles",
    "fill_slots",
    "warn_of_cuts",
    "word_pattern",
]

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


def cut_words(tokenizer: Any, prompt: str, *, limit: int | None = None) -> str:
    """Return the words of `prompt` that the token limit cuts off, fully or in part; `""` if all fit.

    Args:
        tokenizer: A CLIP tokenizer.
        prompt: The whole prompt.
        limit: Number of tokens that are read, with the begin and the end of text; by default the tokenizer's.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        return ""  # no Unicode text, which no tokenizer reads
    limit = int(tokenizer.model_max_length) if limit is None else limit
    is_fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=is_fast)
    if len(encoded.input_ids) <= limit:
        return ""
    if not is_fast:
        return str(tokenizer.decode(encoded.input_ids[limit - 1 : -1])).strip()
    start = encoded["offset_mapping"][limit - 1][0]
    return prompt[len(prompt[:start].rpartition(" ")[0]) :].strip() if start else prompt


def warn_of_cuts(
    tokenizer: Any,
    prompts: Sequence[str],
    warned: set[str],
    *,
    reader: str = "the text encoder",
    limit: int | None = None,
) -> None:
    """Warn once of each prompt whose last words are cut off, and add it to `warned`.

    Args:
        tokenizer: As in `cut_words`.
        prompts: The prompts.
        warned: Prompts that were warned of before.
        reader: Name of the model that reads the prompts, for the message.
        limit: As in `cut_words`.
    """
    limit = int(tokenizer.model_max_length) if limit is None else limit
    for prompt in dict.fromkeys(prompts):
        if prompt in warned or not (cut := cut_words(tokenizer, prompt, limit=limit)):
            continue
        warned.add(prompt)
        warnings.warn(
            f"{_shortened(prompt)!r} is longer than the {limit - 2} tokens that {reader} reads: {_shortened(cut)!r} is "
            "cut off and has no effect. Shorten the prompt, or put these words first.",
            CutPromptWarning,
            stacklevel=3,
        )


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
