"""Where a concept stands in a tokenised prompt.

Spans are found by character and mapped to tokens with the tokenizer's own offsets. Searching the decoded tokens
instead breaks with CLIP, whose decoder changes spaces and case, and "the token before the first end of text" is the
full stop in "van gogh.".
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from overpaint.errors import UnsupportedModel

__all__ = ["Span", "end_of_text", "find_span", "span_at"]


@dataclass(frozen=True)
class Span:
    """Token positions `start` to `end - 1` of the padded ids; position 0 is the begin-of-text token."""

    start: int
    end: int

    @property
    def last(self) -> int:
        """The last token of the concept, where a causal encoder has read all of it."""
        return self.end - 1

    @property
    def positions(self) -> range:
        """Every position of the span, in order."""
        return range(self.start, self.end)

    def __len__(self) -> int:
        return self.end - self.start


def find_span(tokenizer: Any, prompt: str, concept: str) -> Span:
    """Tokens of `concept` in `prompt`, as positions in the padded ids.

    The concept must stand as whole words: "cat" is not found in "cats" or "cathedral". Case and the width of white
    space do not matter, as they do not to CLIP.

    Args:
        tokenizer: A fast CLIP tokenizer; its `model_max_length` is the token limit L.
        prompt: The whole caption.
        concept: The words to find; they must occur exactly once.

    Returns:
        The span, within 1 to L - 2.

    Raises:
        ValueError: The concept is empty, absent, there twice, or cut off by the token limit.
    """
    words = concept.split()
    if not words:
        raise ValueError(
            "the concept is empty: name the words of the prompt that carry it, as in 'van gogh'."
        )
    pattern = r"\s+".join(re.escape(word) for word in words)
    matches = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, flags=re.IGNORECASE))
    if not matches:
        raise ValueError(
            f"concept {concept!r} is not in the prompt {prompt!r}: write it there in the same words, or name words "
            "that are there."
        )
    if len(matches) > 1:
        raise ValueError(
            f"concept {concept!r} stands {len(matches)} times in the prompt {prompt!r}, so its place is not clear: "
            "reword the prompt until it stands once."
        )
    return span_at(tokenizer, prompt, matches[0].start(), matches[0].end())


def span_at(tokenizer: Any, prompt: str, start: int, end: int) -> Span:
    """Tokens that hold the characters `start` to `end - 1` of `prompt`, as positions in the padded ids.

    Args:
        tokenizer: A fast CLIP tokenizer.
        prompt: The whole caption.
        start: First character of the concept.
        end: One past its last character.

    Raises:
        ValueError: No token holds these characters, or the token limit cuts them off.
        UnsupportedModel: The tokenizer cannot tell the characters of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} does not tell which characters a token holds: load the fast tokenizer of the "
            "same model, for example with `transformers.CLIPTokenizerFast`."
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)
    held = [
        position
        for position, (first, past) in enumerate(encoded["offset_mapping"])
        if first < past and first < end and past > start
    ]
    if not held:
        raise ValueError(
            f"no token of the prompt {prompt!r} holds {prompt[start:end]!r}: the tokenizer drops these characters; "
            "name the concept in letters that it knows."
        )
    limit = int(tokenizer.model_max_length)
    if held[-1] >= limit - 1:
        raise ValueError(
            f"concept {prompt[start:end]!r} ends at token {held[-1]} and is cut off by the limit of {limit} tokens: "
            "shorten the prompt, or put the concept first."
        )
    return Span(held[0], held[-1] + 1)


def end_of_text(tokenizer: Any, ids: Tensor) -> int:
    """Position of the first end-of-text token in `ids`, shape (L,).

    SD-1.x pads with that same token and SD-2.x with another, so only the first one ends the prompt in both.

    Raises:
        ValueError: `ids` holds no end-of-text token.
    """
    found = (ids == tokenizer.eos_token_id).nonzero()
    if len(found) == 0:
        raise ValueError(
            f"no end-of-text token ({tokenizer.eos_token_id}) in the ids: pass ids that the model's own tokenizer made."
        )
    return int(found[0, 0])
