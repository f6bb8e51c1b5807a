"""Captions of everyday English, to count how many an edit touches."""

from pathlib import Path
from typing import Literal

__all__ = ["everyday"]


def everyday(part: Literal["validation", "test"] = "validation") -> tuple[str, ...]:
    """Return 5,000 captions without an object of the icon world.

    Half are example sentences of WordNet 3.1 (Princeton University, WordNet licence), half are frames of the captions
    that `icons` is trained on, about nouns of WordNet. `benchmarks/make_everyday_captions.py` wrote them.

    Args:
        part: `"validation"`, which edits may be tuned on, or `"test"`. No caption is in both.

    Raises:
        ValueError: There is no such part.
    """
    if part not in ("validation", "test"):
        raise ValueError(
            f"`part` must be 'validation' or 'test', got {part!r}. Leave it out for 'validation'."
        )
    path = Path(__file__).with_name(f"everyday-{part}.txt")
    return tuple(path.read_text("utf-8").splitlines())
