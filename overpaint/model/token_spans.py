"""Token positions of a concept in a prompt.

The concept is searched in the characters of the prompt and mapped to tokens with the tokenizer's offsets. A search in
the decoded tokens fails, because CLIP's decoder changes spaces and case. The token before the first end-of-text token
is not always the concept's: in "van gogh." it is the full stop.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from overpaint.errors import UnsupportedModel, check_one_text

__all__ = ["Span", "check_text", "end_of_text", "find_span", "span_at"]


@dataclass(frozen=True)
class Span:
    """Token positions `start` to `end - 1` in the padded ids; position 0 is the begin-of-text token."""

    start: int
    end: int

    @property
    def last(self) -> int:
        """Position of the last token; in a causal encoder its features depend on the whole concept."""
        return self.end - 1

    @property
    def positions(self) -> range:
        """All positions of the span, in order."""
        return range(self.start, self.end)

    def __len__(self) -> int:
        return self.end - self.start


def find_span(tokenizer: Any, prompt: str, concept: str) -> Span:
    """Return the positions of the tokens of `concept` in the padded ids of `prompt`.

    Only whole words match: "cat" does not match "cats" or "cathedral". Case, the amount of white space and the Unicode
    form of a letter (one character, or a letter and its accent) are ignored, as the tokenizer ignores them.

    Args:
        tokenizer: A fast CLIP tokenizer; its `model_max_length` is the token limit L.
        prompt: The whole caption.
        concept: The words to search; they must occur exactly once.

    Returns:
        The span, within 1 to L - 2.

    Raises:
        ValueError: The concept is empty, absent, occurs twice, or is cut off by the token limit.
    """
    check_text(prompt, concept)
    words = concept.split()
    if not words:
        raise ValueError(
            "the concept is empty: name the words of the prompt that carry it, as in 'van gogh'."
        )
    pattern = r"\s+".join(re.escape(_normalised(tokenizer, word)) for word in words)
    text, places = _with_places(tokenizer, prompt)
    matches = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", text, flags=re.IGNORECASE))
    if not matches:
        raise ValueError(
            f"concept {concept!r} is not in the prompt {prompt!r}: write it there in the same words, or name words "
            "that are there."
        )
    if len(matches) > 1:
        raise ValueError(
            f"concept {concept!r} occurs {len(matches)} times in the prompt {prompt!r}, so its position is ambiguous: "
            "reword the prompt so that it occurs once."
        )
    return span_at(tokenizer, prompt, places[matches[0].start()], places[matches[0].end()])


def _normalised(tokenizer: Any, text: str) -> str:
    """Return `text` as the tokenizer normalises it before it splits words."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normalizer.normalize_str(text) if normalizer is not None else text


def _with_places(tokenizer: Any, prompt: str) -> tuple[str, list[int]]:
    """Return `prompt` normalised, and for each character of it and for its end, the index in `prompt`.

    Each letter is normalised together with the accents that follow it.
    """
    starts = [i for i, c in enumerate(prompt) if i == 0 or not unicodedata.combining(c)]
    parts: list[str] = []
    places: list[int] = []
    for start, end in itertools.pairwise([*starts, len(prompt)]):
        part = prompt[start:end]
        # white space stays as it is: a normaliser may join it with its neighbours
        parts.append(part if part.isspace() else _normalised(tokenizer, part))
        places += [start] * len(parts[-1])
    return "".join(parts), [*places, len(prompt)]


def span_at(tokenizer: Any, prompt: str, start: int, end: int) -> Span:
    """Return the positions of the tokens with the characters `start` to `end - 1` of `prompt` in its padded ids.

    Args:
        tokenizer: A fast CLIP tokenizer.
        prompt: The whole caption.
        start: First character of the concept.
        end: One past its last character.

    Raises:
        ValueError: No token contains these characters, or the token limit cuts them off.
        UnsupportedModel: The tokenizer does not return the characters of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} does not return the characters of a token: load the fast tokenizer of the "
            "same model, for example with `transformers.CLIPTokenizerFast`."
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    positions = [
        position
        for position, (first, past) in enumerate(encoded["offset_mapping"])
        if first < past and first < end and past > start
    ]
    if not positions:
        raise ValueError(
            f"no token of the prompt {prompt!r} contains {prompt[start:end]!r}: the tokenizer drops these characters; "
            "write the concept with letters of its vocabulary."
        )
    limit = int(tokenizer.model_max_length)
    if positions[-1] >= limit - 1:
        raise ValueError(
            f"concept {prompt[start:end]!r} ends at token {positions[-1]} and is cut off by the limit of {limit} "
            "tokens: shorten the prompt, or put the concept first."
        )
    return Span(positions[0], positions[-1] + 1)


def check_text(*texts: str) -> None:
    """Raise if a text is no text, or holds half a surrogate pair, which no tokenizer reads.

    The shell passes bytes that are not UTF-8 as such halves.

    Raises:
        TypeError: A text is a list or anything else.
        ValueError: A text holds one.
    """
    for text in texts:
        check_one_text(text, "a prompt or concept", "name one after the other")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{text!r} is not text in UTF-8: write it again, or copy it as UTF-8.")


def end_of_text(tokenizer: Any, ids: Tensor) -> int:
    """Return the position of the first end-of-text token in `ids`, shape (L,).

    SD-1.x pads with the end-of-text token and SD-2.x with another, so that only the first one ends the prompt in both.

    Raises:
        ValueError: `ids` contains no end-of-text token.
    """
    ends = (ids == tokenizer.eos_token_id).nonzero()
    if len(ends) == 0:
        raise ValueError(
            f"no end-of-text token ({tokenizer.eos_token_id}) in the ids: pass ids of the model's own tokenizer."
        )
    return int(ends[0, 0])
