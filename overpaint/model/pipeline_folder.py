"""A pipeline folder whose parts are loaded when they are first used.

The pipeline object exists from the start, with its tokenizers, its scheduler and the structure of each part on the meta
device. `part` replaces a structure by the loaded part.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from overpaint.errors import UnsupportedModel
from overpaint.model.checks import check_finite
from overpaint.model.quiet import quiet

__all__ = ["PipelineFolder", "stored_dtype"]

_LOCK = threading.RLock()  # one lock for the module, because an object with a lock cannot be copied
_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class PipelineFolder:
    """A diffusers pipeline of a folder, or a text encoder alone.

    Attributes:
        folder: The folder.
        device: Device of the parts.
        dtype: Dtype of the parts; as in their files if `None`.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        files: Mapping[str, Sequence[Path]],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """Store `pipe`, whose parts are on the meta device, and the weight `files` of each part."""
        self._pipe = pipe
        self._files = dict(files)
        self._pending = set(files)
        self.folder = folder
        self.device = device
        self.dtype = dtype

    @property
    def structure(self) -> Any:
        """The pipeline; the weights of parts that are not loaded are on the meta device."""
        return self._pipe

    @property
    def is_encoder(self) -> bool:
        """True if the folder is that of a text encoder alone."""
        return not hasattr(self._pipe, "unet")

    def whole(self) -> Any:
        """Return the pipeline with all parts loaded."""
        for part in tuple(self._files):
            self.part(part)
        return self._pipe

    def part(self, name: str) -> Any:
        """Return a part of the pipeline, which is loaded at the first call.

        Raises:
            UnsupportedModel: Its files cannot be read, or hold numbers that are not finite.
        """
        with _LOCK:
            if name in self._pending:
                self._load(name)
                self._pending.remove(name)
        return getattr(self._pipe, name)

    def is_loaded(self, name: str) -> bool:
        """Return whether a part is loaded."""
        return name not in self._pending

    def files_of(self, name: str) -> Sequence[Path]:
        """Return the weight files of a part; none if the folder has no such part."""
        return self._files.get(name, ())

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a part is loaded."""
        return self.dtype or stored_dtype(self._files[name])

    def _load(self, name: str) -> None:
        structure, files = getattr(self._pipe, name), self._files[name]
        variant = "fp16" if all(".fp16." in file.name for file in files) else None
        try:
            with quiet():
                module = type(structure).from_pretrained(
                    str(files[0].parent), torch_dtype=self.dtype_of(name), variant=variant,
                    use_safetensors=True, local_files_only=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise unreadable(str(files[0].parent), error) from error
        check_finite(module, name)
        if name == "unet":  # the pipeline corrects the size in old settings
            module.register_to_config(sample_size=structure.config.sample_size)
        setattr(self._pipe, name, module.to(self.device))


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """Return the dtype of the first tensor of floating-point numbers in `files`; float32 if there is none."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                dtype = _DTYPES.get(opened.get_slice(key).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


def unreadable(source: str, error: Exception) -> UnsupportedModel:
    """Return the error for files that diffusers or transformers cannot read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UnsupportedModel(
        f"{source!r} could not be read as a Stable Diffusion pipeline: {reason} Get the folder again."
    )
