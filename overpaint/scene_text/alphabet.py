"""The 95 characters of DiffSTE's character encoder and their numbers.

Source: the character tokenizer of UCSB-NLP-Chang/DiffSTE, https://arxiv.org/abs/2304.05568: printable ASCII,
case-sensitive; number 0 is space, padding and unknown character at once.
"""

import string
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CHARACTERS", "CutTextWarning", "check", "encode", "unknown"]

CHARACTERS = (
    " " + string.digits + string.ascii_lowercase + string.ascii_uppercase + string.punctuation
)
_NUMBERS = {character: number for number, character in enumerate(CHARACTERS)}


class CutTextWarning(UserWarning):
    """A text is longer than the character encoder holds, so that its last characters are dropped."""


def encode(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the characters of each text, padded with 0, and the number of characters.

    Unknown characters become 0. A text longer than `length` is cut with a warning.

    Args:
        texts: B texts.
        length: Characters that the encoder holds, L.

    Returns:
        Numbers, int64 (B, L), and counts, int64 (B,).
    """
    numbers = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        if len(text) > length:
            warnings.warn(
                f"the text {text!r} has {len(text)} characters, and the encoder holds {length}: the rest is dropped. "
                "Write it in parts.",
                CutTextWarning,
                stacklevel=2,
            )
        cut = [_NUMBERS.get(character, 0) for character in text[:length]]
        numbers[row, : len(cut)] = torch.tensor(cut, dtype=torch.int64)
    counts = torch.tensor([min(len(text), length) for text in texts], dtype=torch.int64)
    return numbers, counts


def unknown(text: str) -> list[str]:
    """Return the characters of `text` that are not in the alphabet, in order, each once."""
    return list(dict.fromkeys(character for character in text if character not in _NUMBERS))


def check(text: str, length: int) -> None:
    """Raise unless `text` can be written.

    Args:
        text: Text to write.
        length: Characters that the encoder holds.

    Raises:
        ValueError: The text is empty, blank, too long, or has characters outside the alphabet.
    """
    if not text.strip():
        raise ValueError(
            f"`text` must have at least one visible character, got {text!r}: name the word to write."
        )
    if strange := unknown(text):
        raise ValueError(
            f"`text` may hold the letters A-Z, a-z, digits, spaces and ASCII punctuation, got {text!r} with "
            f"{', '.join(map(repr, strange))}: replace them."
        )
    if len(text) > length:
        raise ValueError(
            f"`text` may have {length} characters, got {text!r} with {len(text)}: write it in parts, one region for "
            "each."
        )
