"""The types of scorers, and the check that a scorer can read the pictures of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from overpaint.files import public_name

__all__ = [
    "Classifier",
    "Draws",
    "FeatureScorer",
    "Scorable",
    "Scorer",
    "check_size",
    "scorer_name",
]

Scorer = Callable[[Tensor, Sequence[Any]], Tensor]
"""Called with images (N, 3, H, W) in [0, 1] and one probe for each; returns scores, shape (N,)."""


class Scorable(Protocol):
    """The attributes of a probe that a scorer reads."""

    @property
    def kind(self) -> str:
        """Kind of the concept: `style`, `object`, `color`, `action`, ..."""
        ...

    @property
    def label(self) -> str:
        """Label of the concept."""
        ...

    @property
    def prompt(self) -> str:
        """Prompt of the picture."""
        ...


class Classifier(Protocol):
    """A scorer that recognises labels, as `evaluate.compare` needs it."""

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """Labels that it recognises, by kind: `style`, `object`, `color`."""
        ...

    def classify(self, images: Tensor, kind: str) -> Tensor:
        """Return the probability of each of `labels[kind]`, shape (B, K), for `images` (B, 3, H, W) in [0, 1]."""
        ...


class FeatureScorer(Protocol):
    """A scorer with image and text features, as `evaluate.measure` and `evaluate.attack` need it.

    `Judge` and `Clip` are such scorers. A scorer with `labels` and `classify` is also used as a `Classifier`.
    """

    name: str

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit features of `images` (B, 3, H, W) in [0, 1], shape (B, D)."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit features of `prompts`, shape (N, D)."""
        ...

    def layers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer of the image tower for `images`, each of shape (B, P, D)."""
        ...


class Draws(Protocol):
    """The attributes of a model that `check_size` reads."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures, in pixels."""
        ...


def scorer_name(scorer: Any) -> str:
    """Return the name of a scorer: its `name`, or that of the object of a method, or the name of a function.

    For a scorer from a folder it is the folder's name without its path, and for `None` it is `"none"`.
    """
    if scorer is None:
        return "none"
    name = getattr(_owner(scorer), "name", None)
    return public_name(name or getattr(scorer, "__qualname__", type(scorer).__name__))


def check_size(scorer: Any, model: Draws) -> None:
    """Raise if `scorer` reads pictures of one size only and `model` draws another.

    Args:
        scorer: A judge, a CLIP, a method of one, or a function. Its `size` is the side of the square pictures that it
            reads, in pixels; without that attribute it reads any size. `None` passes.
        model: Draws the pictures.

    Raises:
        ValueError: The sizes differ.
    """
    side = getattr(_owner(scorer), "size", None)
    if side is not None and tuple(model.size) != (side, side):
        height, width = model.size
        raise ValueError(
            f"{scorer_name(scorer)} reads pictures of {side}x{side} pixels, and {model.name} draws {width}x{height}: "
            "pass another `scorer`, for example a CLIP, which reads any size; on the command line `overpaint trace "
            "MODEL --scorer CLIP`, or `overpaint evaluate MODEL CHANGE --set PROMPTS --scorer CLIP`."
        )


def _owner(scorer: Any) -> Any:
    """Return the object that a method belongs to, else `scorer` itself."""
    return getattr(scorer, "__self__", scorer)
