"""Instructions that name word, font and color, and their tokens.

The templates are those of DiffSTE's public code. An instruction in other words is used as it is. Two fonts joined by
the separate word `and` are a mix, whose template leaves word and color out. The public code finds `and` inside
`GochiHand` too, and cuts the letters of a suffix from the end of any name; here neither happens.

Source: Ji et al., 2023 (DiffSTE), https://arxiv.org/abs/2304.05568; `prepare_style_chars` of its code.
Deviations: `and` must be a word of its own; a file suffix is removed as a whole.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Tokenizer", "compose", "font_name", "is_mix", "pieces_of_names"]

_SUFFIXES = (".woff2", ".woff", ".ttf", ".otf")


def compose(text: str, font: str | None = None, color: str | None = None) -> str:
    """Return the instruction of DiffSTE for a word, and its font and color if given.

    >>> compose("wizards", "Courgette", "red")
    'Write "wizards" in font: Courgette and color: red'
    >>> compose("wizards", "Allura and Mohave", "red")
    'in font: Allura and Mohave'
    """
    font = font_name(font) if font else None
    if font and is_mix(font):
        return f"in font: {font}"
    parts = [f"font: {font}"] if font else []
    if color:
        parts.append(f"color: {color}")
    return f'Write "{text}"' + (f" in {' and '.join(parts)}" if parts else "")


def font_name(name: str) -> str:
    """Return the name of a font without file suffix and without anything in square brackets.

    >>> font_name("Podkova[wght].ttf"), font_name("BadScript.ttf")
    ('Podkova', 'BadScript')
    """
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return re.sub(r"\[[^\]]*\]", "", name).strip()


def is_mix(font: str) -> bool:
    """Return whether a name is of two fonts, `A and B`.

    >>> is_mix("Allura and Mohave"), is_mix("GochiHand")
    (True, False)
    """
    return re.search(r"\S\s+and\s+\S", font) is not None


def pieces_of_names(names: Iterable[str]) -> set[str]:
    """Return the lower-case parts of names that are joined by capitals, digits, hyphens or spaces.

    >>> sorted(pieces_of_names(["PlayfairDisplay-BoldItalic", "sky blue"]))
    ['blue', 'bold', 'display', 'italic', 'playfair', 'sky']
    """
    parts = (re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name) for name in names)
    return {part.lower() for words in parts for part in words}


class Tokenizer:
    """Tokens of instructions: listed pieces where they fit, single characters otherwise.

    The text is read in lower case, as CLIP's is. From left to right the longest listed piece is taken. Text between
    double quotes is always split into characters, so that a word to write is never read as a color or a font. Number 0
    is the padding, number 1 an unlisted character.
    """

    def __init__(self, pieces: Sequence[str], length: int) -> None:
        """Number the pieces; all printable ASCII characters are added.

        Args:
            pieces: Lower-case parts of words, with more than one character each.
            length: Tokens of an instruction; longer ones are cut.
        """
        characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
        entries = list(dict.fromkeys([*characters, *pieces]))
        self.pieces = tuple(pieces)
        self.length = length
        self.numbers = {entry: number for number, entry in enumerate(entries, start=2)}
        self._longest = max(map(len, entries))

    def __len__(self) -> int:
        """Return the number of tokens, padding and unlisted character included."""
        return len(self.numbers) + 2

    def split(self, text: str) -> list[str]:
        """Return the pieces of `text`, without spaces."""
        result: list[str] = []
        for index, part in enumerate(re.split(r'(")', text.lower())):
            quoted = index % 4 == 2  # parts are: outside, quote, inside, quote, outside, ...
            for word in part.split():
                result.extend(word if quoted else self._longest_pieces(word))
        return result

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the numbers of the tokens of each text, int64 (B, L), padded with 0; the rest of a text is cut."""
        tokens = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in enumerate(texts):
            numbers = [self.numbers.get(piece, 1) for piece in self.split(text)][: self.length]
            tokens[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return tokens

    def _longest_pieces(self, word: str) -> list[str]:
        result, start = [], 0
        while start < len(word):
            end = min(len(word), start + self._longest)
            while end > start + 1 and word[start:end] not in self.numbers:
                end -= 1
            result.append(word[start:end])
            start = end
        return result
