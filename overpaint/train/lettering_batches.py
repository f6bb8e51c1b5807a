"""Batches of lettering samples as tensors, and the words read in what a model wrote."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from overpaint.scene_text.diffusion import Batch, Guidance
from overpaint.scene_text.layout import Edges
from overpaint.scene_text.lettering import Lettering
from overpaint.scene_text.network import Network, Place
from overpaint.scorers.text_reader import TextReader, similarity
from overpaint.train.lettering_scenes import Sample

__all__ = ["batch", "boxes", "images", "place", "read_words", "reading"]


def batch(network: Network, samples: Sequence[Sample], device: str = "cpu") -> Batch:
    """Return samples as the batch of a training step."""
    length = network.config.text_length
    left, right = (
        np.zeros((len(samples), length), np.float32),
        np.zeros((len(samples), length), np.float32),
    )
    for row, sample in enumerate(samples):
        count = min(len(sample.text), length)
        left[row, :count], right[row, :count] = sample.edges[:count], sample.edges[1 : count + 1]
    valid = torch.from_numpy((right > left).astype(np.float32))
    edges = Edges(
        torch.from_numpy(left).to(device), torch.from_numpy(right).to(device), valid.to(device)
    )
    mask = torch.from_numpy(np.stack([s.mask for s in samples])).float()[:, None]
    where = place(samples)
    return Batch(
        (images(samples) * 2 - 1).to(device), mask.to(device),
        network.texts([s.text for s in samples], [s.instruction for s in samples]),
        Place(*(v.to(device) for v in (where.start, where.end, where.capital, where.baseline))), edges,
    )  # fmt: skip


def images(samples: Sequence[Sample]) -> Tensor:
    """Return the pictures of samples, RGB in [0, 1], (B, 3, H, W)."""
    return torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255


def place(samples: Sequence[Sample]) -> Place:
    """Return where the words of samples stand."""
    rows = [(s.edges[0], s.edges[-1], s.capital, s.baseline) for s in samples]
    return Place(*torch.tensor(np.array(rows, np.float32)).unbind(1))


def boxes(samples: Sequence[Sample]) -> list[tuple[int, int, int, int]]:
    """Return the boxes that are read: from a pixel left to a pixel right of the word, and the whole line in height."""
    return [
        (
            max(0, int(s.edges[0]) - 1),
            2,
            min(s.image.shape[1], int(s.edges[-1]) + 2),
            s.image.shape[0] - 2,
        )
        for s in samples
    ]


def reading(texts: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    """Return the share of words that were read, case-sensitive and not, and the mean of 1 - NED in lower case."""
    pairs = [(text, word.replace(" ", "")) for text, word in zip(texts, words, strict=True)]
    return {
        "words": float(np.mean([a == b for a, b in pairs])),
        "words_any_case": float(np.mean([a.lower() == b.lower() for a, b in pairs])),
        "similarity": float(np.mean([similarity(a.lower(), b.lower()) for a, b in pairs])),
    }


def read_words(
    model: Lettering,
    samples: Sequence[Sample],
    reader: TextReader,
    *,
    steps: int = 20,
    rows: int = 32,
) -> tuple[dict[str, float], Tensor]:
    """Return what is read in the words that a model wrote, one picture each without guidance, and the pictures.

    Args:
        model: The model.
        samples: Lines with words that it is to write again.
        reader: Reads them.
        steps: Denoising steps.
        rows: Lines in a batch.
    """
    written = []
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        mask = torch.from_numpy(np.stack([s.mask for s in part]))
        words, instructions = [s.text for s in part], [s.instruction for s in part]
        written.append(
            model.write(
                images(part), mask, words, instructions, place(part), steps=steps, guidance=Guidance(), seed=start
            )
        )  # fmt: skip
    pictures = torch.cat(written)
    texts = reader.read_boxes(pictures, boxes(samples), margin=2)
    return reading(texts, [s.text for s in samples]), pictures
