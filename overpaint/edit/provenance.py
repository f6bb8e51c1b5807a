"""Provenance of a change: the model's name, versions of libraries, and notes for the user."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from overpaint.edit.concept_words import unknown_words
from overpaint.files import public_name
from overpaint.model import TextToImage

__all__ = ["notes", "protocol"]


def protocol(
    method: str, model: TextToImage, pairs: Mapping[str, str], *, unet: bool = False
) -> dict[str, Any]:
    """Return the entries of a change's protocol that all methods share.

    Args:
        method: Name of the method.
        model: The model that the change is made for.
        pairs: Old concept to new.
        unet: The UNet is edited: add the version of diffusers.
    """
    libraries = ("torch", "transformers", "diffusers") if unet else ("torch", "transformers")
    skip = {"clip_skip": model.clip_skip} if model.clip_skip else {}
    return {
        "method": method,
        "model": public_name(model.name),  # no local path
        "pairs": dict(pairs),
        **skip,
        "versions": {name: version(name) for name in libraries},
    }


def notes(model: TextToImage, concepts: Sequence[str], *more: str) -> dict[str, list[str]]:
    """Return the entry `notes` of a report, with remarks on unknown words and `more`; an empty dict without remarks.

    Args:
        model: Its first tokenizer splits the words.
        concepts: Texts that are edited, and their replacements.
        more: Further remarks.
    """
    remarks = [
        f"the tokenizer splits {word!r} almost into single letters: the word is rare in training data, so the edit "
        "may have no effect. Check the spelling."
        for word in unknown_words(model.tokenizer, concepts)
    ]
    remarks += [remark for remark in more if remark]
    return {"notes": remarks} if remarks else {}
