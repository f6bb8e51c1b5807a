"""The numbers of a weight as the folder of its model stores them, to recognise a model in another half precision.

A change made in float16 holds hashes of numbers that were rounded to float16. A model loaded in bfloat16 holds another
rounding of the stored numbers, which neither determine nor are determined by the first. The stored float32 numbers
determine both, so they are read from the folder where the weights in memory do not tell.
"""

from safetensors import SafetensorError, safe_open
from torch import Tensor

from overpaint.edit.weights import Weight, is_base
from overpaint.model import TextToImage

__all__ = ["is_base_of", "stored_numbers"]

_ENCODERS = ("text_encoder", "text_encoder_2")


def is_base_of(model: TextToImage, weight: Weight, base_hash: str, casts: tuple[str, ...]) -> bool:
    """Return whether `weight`, or the stored numbers that it is a cast of, are those that `base_hash` is of.

    Args:
        model: The model that holds the weight.
        weight: One of its weights.
        base_hash: As in `is_base`.
        casts: As in `is_base`.
    """
    if is_base(weight.parameter, base_hash, casts):
        return True
    stored = stored_numbers(model, weight)
    return stored is not None and is_base(stored, base_hash, casts)


def stored_numbers(model: TextToImage, weight: Weight) -> Tensor | None:
    """Return the numbers of a weight in the files of its model, on the CPU, if the weight is a cast of them.

    `None` if the model was not loaded from a folder, is stored in the dtype that it has in memory, or was changed.
    """
    if model.folder is None:
        return None
    part = "unet" if weight.encoder is None else _ENCODERS[weight.encoder]
    module, parameter = model.components()[part], weight.parameter
    names = {_plain(name) for name, other in module.named_parameters() if other is parameter}
    for path in model.folder.files_of(part):
        try:
            with safe_open(path, framework="pt") as opened:
                keys = [key for key in opened.keys() if _plain(key) in names]  # noqa: SIM118
                tensors: list[Tensor] = [opened.get_tensor(key) for key in keys]
        except (OSError, SafetensorError):
            return None
        for tensor in tensors:
            is_other = tensor.dtype != parameter.dtype and tensor.shape == parameter.shape
            same = is_other and tensor.to(parameter.dtype).equal(parameter.detach().cpu())
            return tensor if same else None
    return None


def _plain(name: str) -> str:
    """Return the name of a weight of CLIP or the UNet without the prefix that releases of transformers differ in."""
    return name.removeprefix("text_model.")
