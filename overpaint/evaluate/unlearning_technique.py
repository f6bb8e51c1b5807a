"""An edit as a technique of the benchmark `eval-unlearn`, under the name `overpaint`.

The benchmark finds the class by the entry point `overpaint` of the group `eval_unlearn.techniques`, calls it with the
technique's `config` of a JSON file as keywords, and then calls `generate` with the prompts of each metric. This module
does not import `eval-unlearn`.

Source: eval-unlearn 1.1.2, https://pypi.org/project/eval-unlearn/.
"""

from collections.abc import Sequence

import torch
from PIL.Image import Image

from overpaint import edit
from overpaint.edit import Change
from overpaint.errors import check_one_text, check_seed, check_texts, later_seed, listed
from overpaint.model import TextToImage, load

__all__ = ["METHODS", "UnlearningTechnique"]

METHODS = ("auto", "quickfix", "rename", "uce")
"""Methods that the configuration can name."""


class UnlearningTechnique:
    """A model with an edit applied to it.

    Attributes:
        model: The edited model.
        change: The edit.
    """

    def __init__(
        self,
        *,
        erase_concept: str,
        replace: str = "",
        model: str = "CompVis/stable-diffusion-v1-4",
        method: str = "auto",
        preserve: Sequence[str] = (),
        change: str | None = None,
        any_token: bool = False,
        device: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        """Load the model and make and apply the edit.

        Args:
            erase_concept: The concept to erase.
            replace: Its replacement; nothing if empty.
            model: A zoo name, a folder or a hub id; by default the model of the benchmark's own techniques.
            method: One of `METHODS`, with its default settings.
            preserve: Prompts that should not change; `rename` takes none.
            change: A change file, which is applied instead of a new edit.
            any_token: With `rename`: also move rows of frequent words.
            device: Device of the model; by default CUDA if there is one, else the CPU.
            num_inference_steps: Denoising steps of each picture.
            guidance_scale: Weight of the prompt; by default the model's.
            seed: Seed of the first picture where `generate` is called without one; the next pictures count up.

        Raises:
            ValueError: The concept is empty, the method is unknown or does not take a setting, or the change file
                erases another concept or comes with settings of a new edit; or as `overpaint.load` and the method
                raise.
            TypeError: A setting is unknown.
            FileNotFoundError: There is no such change file.
        """
        check_one_text(
            erase_concept, "erase_concept", "name one concept, or give a change file of several"
        )
        check_texts(preserve, "preserve")
        if not erase_concept.strip():
            raise ValueError("`erase_concept` is empty: name the concept to erase, as in 'van gogh'.")  # fmt: skip
        _check_method(method, preserve, any_token)
        if change is not None and (replace or preserve or any_token or method != "auto"):
            raise ValueError(
                "`change` is an edit that was made before, and `replace`, `method`, `preserve` and `any_token` make "
                "a new one: leave those out, or leave `change` out."
            )
        stored = None if change is None else _stored(change, erase_concept)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: TextToImage = load(model, device=device or default)
        self.change = stored or _made(
            self.model, {erase_concept: replace}, method, preserve, any_token
        )
        self.change.apply(self.model)
        self._steps = num_inference_steps
        self._guidance_scale = guidance_scale
        self._next_seed = check_seed(seed)

    def generate(
        self,
        prompts: Sequence[str],
        seed: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image]:
        """Return a picture of the edited model for each prompt.

        Args:
            prompts: The prompts.
            seed: Seed of the first picture; those of the others count up. Without it, seeds count up from the
                configured one over all calls.
            num_inference_steps: Denoising steps; by default those of the configuration.
            guidance_scale: Weight of the prompt; by default that of the configuration.

        Raises:
            ValueError: A setting is out of range.
        """
        if not prompts:
            return []
        first = self._next_seed if seed is None else check_seed(seed)
        if seed is None:
            self._next_seed = later_seed(first, len(prompts))
        pictures = self.model.generate(
            list(prompts),
            seed=[later_seed(first, i) for i in range(len(prompts))],
            steps=self._steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=self._guidance_scale if guidance_scale is None else guidance_scale,
        )
        return pictures.pil()


def _check_method(method: str, preserve: Sequence[str], any_token: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if any_token and method != "rename":
        raise ValueError(
            "`any_token` is a setting of `rename`: leave it out, or choose `rename` as the method."
        )
    if method == "rename" and preserve:
        raise ValueError(
            "`rename` takes no preserve list, as it moves only prompts with its tokens: leave `preserve` out, "
            "or choose another method."
        )


def _stored(path: str, concept: str) -> Change:
    """Return the change of a file, or raise `ValueError` if it erases another concept."""
    change = Change.load(path)
    if concept not in change.pairs:
        raise ValueError(
            f"the change file erases {listed(change.pairs)}, not {concept!r}: name one of its concepts as "
            "`erase_concept`, or give the file of this concept."
        )
    return change


def _made(
    model: TextToImage, pairs: dict[str, str], method: str, preserve: Sequence[str], any_token: bool
) -> Change:
    if method == "rename":
        return edit.rename(model, pairs, any_token=any_token, collateral=False)
    if method == "auto":
        return edit.auto(model, pairs, preserve=preserve, collateral=False)
    if method == "quickfix":
        return edit.quickfix(model, pairs, preserve=preserve)
    return edit.uce(model, pairs, preserve=preserve)
