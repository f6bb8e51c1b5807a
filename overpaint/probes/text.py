"""Whole-word search and articles in English prompts."""

import re

__all__ = ["article", "fill_articles", "word_pattern"]


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
