"""Read and replace tensors in a safetensors file; its header (names, order, dtypes, metadata) does not change."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["replace_tensors", "tensors"]


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and numbers of each tensor of a file, one at a time, on the CPU."""
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def replace_tensors(path: Path, values: dict[str, Callable[[], Tensor]]) -> None:
    """Write new numbers over tensors of a file, in place.

    Args:
        path: The file.
        values: For each tensor to replace, a function that returns its new value, of the stored shape and dtype.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        for name, value in values.items():
            start, end = header[name]["data_offsets"]
            content = value().detach().cpu().contiguous()
            numbers = content.reshape(-1).view(torch.uint8).numpy()
            assert len(numbers) == end - start, name
            file.seek(8 + size + start)
            file.write(numbers.data)
