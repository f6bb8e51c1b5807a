"""Two small classifiers that `quality_scene_text` trains: of fonts, on clean renders; and of real and generated lines.

Both see only what the benchmark draws. The font classifier reads the opacity of letters, so that colors and backgrounds
do not matter; half of its training pictures are blurred and noisy, as written letters are. Its features serve as the
distance of two fonts. The classifier of real and generated lines is trained on one half of the cases and tested on the
other, both ways; KID is computed on its features and says nothing about other features, least of all FID's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from overpaint.metrics import Interval, kid
from overpaint.scene_text.line import Line
from overpaint.train import lettering_words
from overpaint.train.lettering_fonts import Face
from overpaint.train.lettering_glyphs import Word, draw_word

__all__ = ["Fonts", "Naturalness", "area_under_curve", "naturalness", "render", "train_fonts"]


class _Network(nn.Module):
    """Five convolutions, mean and maximum over positions, and a linear classifier."""

    def __init__(self, channels: int, classes: int, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 2)):  # fmt: skip
            conv = nn.Conv2d(channels, size, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(size, momentum=0.2), nn.ReLU()]
            channels = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features, (B, D), of pictures (B, C, H, W)."""
        maps = self.body(x)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, classes)."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Fonts:
    """A classifier of fonts.

    Attributes:
        network: The network.
        names: Names of the faces, in the order of the logits.
        accuracy: Share of held-out clean words whose face it recognises.
        n: Number of these words.
    """

    network: nn.Module
    names: tuple[str, ...]
    accuracy: float
    n: int

    @torch.no_grad()
    def ranks(self, opacities: np.ndarray, faces: Sequence[str]) -> list[int]:
        """Return the rank of the true face for each picture, 0 for the first.

        Args:
            opacities: Opacity of letters, float32 (N, H, W).
            faces: Names of the true faces.
        """
        logits = torch.cat([self.network(part) for part in _parts(opacities)])
        order = logits.argsort(1, descending=True)
        numbers = torch.tensor([self.names.index(face) for face in faces])
        return (order == numbers[:, None]).int().argmax(1).tolist()

    @torch.no_grad()
    def embed(self, opacities: np.ndarray) -> np.ndarray:
        """Return features of length 1, (N, D), of opacities (N, H, W)."""
        network: _Network = self.network  # type: ignore[assignment]
        features = torch.cat([network.features(part) for part in _parts(opacities)])
        return F.normalize(features, dim=1).double().numpy()


def train_fonts(
    faces: Sequence[Face], *, samples: int, seed: int = 0, batch: int = 64, line: Line | None = None
) -> Fonts:
    """Return a classifier of `faces`.

    Args:
        faces: The faces.
        samples: Words to train on, which are none of the held-out tenth.
        seed: Seed of weights and words.
        batch: Words in a step.
        line: Sizes of the line.
    """
    line = line or Line()
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(1, len(faces))
    steps = max(1, samples // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for _ in range(steps):
        labels = rng.integers(len(faces), size=batch)
        drawn = np.stack([render(rng, faces[i], line) for i in labels])
        loss = F.cross_entropy(network(_roughened(rng, drawn)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    count = min(2000, max(100, 4 * len(faces)))
    labels = rng.integers(len(faces), size=count)
    held_out = np.stack([render(rng, faces[i], line, held_out=True) for i in labels])
    names = tuple(face.name for face in faces)
    fonts = Fonts(network, names, 0.0, count)
    ranks = fonts.ranks(held_out, [names[i] for i in labels])
    return Fonts(network, names, float(np.mean(np.array(ranks) == 0)), count)


def render(
    rng: np.random.Generator, face: Face, line: Line, *, text: str = "", held_out: bool = False
) -> np.ndarray:
    """Return the opacity of a word in a face, float32 (H, W).

    Args:
        rng: Draws the word and its place.
        face: The face.
        line: Sizes of the line.
        text: The word; by default a random one of 3 to 10 characters.
        held_out: Draw a word of the held-out tenth.
    """
    while len(text) < 3 and not (text and held_out):
        text = lettering_words.draw_case(
            rng, lettering_words.draw(rng, held_out=held_out, longest=10)
        )
    capital = line.baseline - line.capital
    word = Word.lay_out(face, text, capital=capital)
    room = line.width - 2.0 * line.margin
    stretch = min(1.0, room / word.width)
    x = line.margin + rng.random() * (room - word.width * stretch)
    return draw_word(word, line, x=x, baseline=line.baseline, stretch=stretch, bend=np.eye(3)).cover


def _roughened(rng: np.random.Generator, opacities: np.ndarray) -> Tensor:
    """Return opacities (B, 1, H, W), half of them blurred and noisy."""
    result = []
    for opacity in opacities:
        if rng.random() < 0.5:
            if rng.random() < 0.5:
                opacity = cv2.GaussianBlur(opacity, (0, 0), rng.uniform(0.3, 0.8))
            noise = rng.normal(0, rng.uniform(0, 0.15), opacity.shape)
            opacity = np.clip(opacity + noise * (rng.random() + opacity), 0, 1)
        result.append(opacity.astype(np.float32))
    return torch.from_numpy(np.stack(result))[:, None]


def _parts(pictures: np.ndarray, size: int = 128) -> list[Tensor]:
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).float()[:, None]
    return list(tensor.split(size))


@dataclass(frozen=True)
class Naturalness:
    """How well real and generated lines are told apart: the area under the ROC curve, 0.5 for not at all, and KID."""

    auc: Interval
    kid: float
    kid_real: float


def naturalness(
    real: np.ndarray, generated: np.ndarray, *, epochs: int = 8, seed: int = 0
) -> Naturalness:
    """Return how well a small network tells real from generated lines of the same cases.

    Args:
        real: True lines, RGB uint8 (N, H, W, 3), N at least 8.
        generated: Written lines of the same cases, in the same order.
        epochs: Passes over one half of the cases.
        seed: Seed of weights and order.
    """
    half = np.arange(len(real)) % 2 == 0
    scores = np.zeros((2, len(real)))
    distances, between = [], []
    for part in (half, ~half):
        network = _train_pair(real[part], generated[part], epochs, seed)
        with torch.no_grad():
            pairs = [_colors(real[~part]), _colors(generated[~part])]
            features = [network.features(x) for x in pairs]
            for row, values in enumerate(features):
                scores[row, ~part] = network.head(values)[:, 0].numpy()
        rows = [F.normalize(x, dim=1).double().numpy() * np.sqrt(x.shape[1]) for x in features]
        first = np.arange(len(rows[0])) % 2 == 0  # two sets without a common case
        distances.append(kid(rows[0][first], rows[1][~first], resamples=0).value)
        between.append(kid(rows[0][first], rows[0][~first], resamples=0).value)
    return Naturalness(
        _auc_interval(scores, seed), float(np.mean(distances)), float(np.mean(between))
    )


def area_under_curve(negative: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of pairs in which `positive` has the higher score; ties count half."""
    ranks = rankdata(np.concatenate([negative, positive]))
    n, m = len(negative), len(positive)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def _auc_interval(scores: np.ndarray, seed: int) -> Interval:
    """Return the area over cases, with a bootstrap interval; the two halves are never compared with each other."""
    halves = [np.arange(scores.shape[1])[start::2] for start in (0, 1)]
    rng = np.random.default_rng(seed)

    def area(chosen: list[np.ndarray]) -> float:
        return float(np.mean([area_under_curve(scores[0, i], scores[1, i]) for i in chosen]))

    draws = [area([rng.choice(i, len(i)) for i in halves]) for _ in range(1000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(area(halves), float(low), float(high), scores.shape[1])


def _train_pair(real: np.ndarray, generated: np.ndarray, epochs: int, seed: int) -> "_Network":
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(3, 1)
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.cat([_colors(real), _colors(generated)])
    labels = torch.cat([torch.zeros(len(real)), torch.ones(len(generated))])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(32):
            loss = F.binary_cross_entropy_with_logits(network(pictures[rows])[:, 0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def _colors(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
