"""A CLIP with linear classification heads on its image tower.

The judge `icons-judge` ships with the package. It was not used to train `icons`, so its labels for the pictures of that
model are independent of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overpaint import zoo
from overpaint.files import from_json, user_path
from overpaint.probes.text import warn_of_cuts
from overpaint.scorers.protocols import Scorable

__all__ = ["Judge", "load"]


class Judge:
    """A CLIP with classification heads: labels of pictures, CLIP scores and features.

    Its weights are frozen. Probabilities, features and scores are differentiable with respect to the pictures.

    Attributes:
        name: Name or folder that it was loaded from.
        labels: Labels of each head, by kind: `object`, `style`, `color`.
        card: Figures, sources and licences of `card.json`.
    """

    def __init__(self, folder: Path, *, name: str, device: str | torch.device = "cpu") -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import CLIPModel, CLIPTokenizer

        for file in ("model.safetensors", "heads.safetensors", "labels.json"):
            if not (folder / file).is_file():
                raise ValueError(
                    f"{str(folder)!r} is not a judge: it has no {file}. Name a folder that `overpaint train "
                    "icons-judge` wrote, or 'icons-judge'."
                )
        self.name = name
        card = folder / "card.json"
        try:
            self.labels = _parse_labels(from_json((folder / "labels.json").read_bytes()))
            self.card: dict[str, Any] = dict(from_json(card.read_bytes())) if card.is_file() else {}
            _check_shapes(folder)
            model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
            )
            heads = load_file(folder / "heads.safetensors")
            _check_heads(heads, self.labels, int(model.config.projection_dim))
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (
            ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, SafetensorError,
        ) as error:  # fmt: skip
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"the judge in {str(folder)!r} is damaged ({reason}): get the folder again, or train it again with "
                "`overpaint train icons-judge`."
            ) from error
        self._clip = model.to(device).eval().requires_grad_(False)
        self._heads = {name: tensor.float().to(device) for name, tensor in heads.items()}
        self._device = device
        self._warned: set[str] = set()  # texts whose cut words were named in a warning

    @property
    def size(self) -> int:
        """Side of the square pictures that it reads, in pixels."""
        return int(self._clip.config.vision_config.image_size)

    def classify(self, images: Tensor, kind: str) -> Tensor:
        """Return the probability of each of `labels[kind]`.

        Args:
            images: RGB in [0, 1], shape (B, 3, 64, 64).
            kind: `"object"`, `"style"` or `"color"`.

        Returns:
            Probabilities, float32 on the CPU, shape (B, K); rows add up to 1.

        Raises:
            ValueError: The judge has no head for this kind.
        """
        if kind not in self.labels:
            raise ValueError(
                f"{self.name} has no head for {kind!r}: choose one of {', '.join(self.labels)}."
            )
        weight, bias = self._heads[f"{kind}.weight"], self._heads[f"{kind}.bias"]
        return F.linear(self._embed(images), weight, bias).softmax(1).cpu()

    def predict(self, images: Tensor, kind: str) -> list[str]:
        """Return the most probable of `labels[kind]` for each of `images`, (B, 3, 64, 64) in [0, 1]."""
        return [self.labels[kind][i] for i in self.classify(images, kind).argmax(1)]

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit CLIP features of `images`, (B, 3, 64, 64) in [0, 1]; shape (B, D)."""
        return F.normalize(self._embed(images), dim=1).cpu()

    def layers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer of the image tower, (B, P, D), for `images` (B, 3, 64, 64) in [0, 1]."""
        pixels = images.to(self._device, torch.float32) * 2 - 1
        output = self._clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        return tuple(layer.cpu() for layer in output.hidden_states[1:])

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit CLIP features of `prompts`, shape (N, D)."""
        ids = self._tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).input_ids
        if ids.shape[1] == self._tokenizer.model_max_length:
            warn_of_cuts(self._tokenizer, prompts, self._warned, reader=self.name)
        pooled = self._clip.text_model(input_ids=ids.to(self._device)).pooler_output
        return F.normalize(self._clip.text_projection(pooled), dim=1).cpu()

    def clip_score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the raw cosine of each image with its prompt, in [-1, 1], shape (B,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(1)

    def score(self, images: Tensor, probes: Sequence[Scorable]) -> Tensor:
        """Return the score of each image for the concept of its probe.

        It is the probability of the concept under the head of the probe's kind; if no head has a label for the concept,
        it is the raw cosine of image and prompt.

        Args:
            images: RGB in [0, 1], shape (N, 3, 64, 64).
            probes: One probe for each image.

        Returns:
            Scores, shape (N,).
        """
        result = self.clip_score(images, [p.prompt for p in probes])
        for kind, names in self.labels.items():
            rows = [
                (i, label)
                for i, p in enumerate(probes)
                if (label := _label(p, kind, names)) is not None
            ]
            if rows:
                index = torch.tensor([i for i, _ in rows])
                chosen = torch.tensor([names.index(label) for _, label in rows])
                result[index] = self.classify(images[index], kind)[torch.arange(len(rows)), chosen]
        return result

    def _embed(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device, torch.float32) * 2 - 1
        return self._clip.visual_projection(
            self._clip.vision_model(pixel_values=pixels).pooler_output
        )


def load(source: str | Path = "icons-judge", *, device: str | torch.device = "cpu") -> Judge:
    """Load a judge by zoo name or from a folder; `icons-judge` reads pictures of 64x64 pixels.

    Raises:
        ValueError: There is no such judge, or the folder holds no judge.
    """
    folder = zoo.folder(str(source)) if str(source) in zoo.names() else user_path(source, "source")
    if not folder.is_dir():
        raise ValueError(f"unknown judge {str(source)!r}: name a folder, or 'icons-judge'.")
    return Judge(folder, name=str(source), device=device)


def _parse_labels(content: Any) -> dict[str, tuple[str, ...]]:
    labels: dict[str, tuple[str, ...]] = {kind: tuple(names) for kind, names in content.items()}
    if not all(names and all(isinstance(n, str) for n in names) for names in labels.values()):
        raise TypeError("labels.json holds other values than lists of texts")
    return labels


def _check_shapes(folder: Path) -> None:
    """Raise unless the weights have the shapes of the configuration, before memory is taken for them."""
    from safetensors import safe_open
    from transformers import CLIPConfig, CLIPModel

    config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for part in (config.text_config, config.vision_config):
        if not 1 <= part.num_hidden_layers <= len(shapes):
            raise ValueError(f"config.json names {part.num_hidden_layers} layers")
    with torch.device("meta"):
        expected = {n: list(p.shape) for n, p in CLIPModel(config).named_parameters()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if wrong:
        raise ValueError(f"the weight {wrong[0]!r} is missing or has another shape")


def _check_heads(heads: Any, labels: dict[str, tuple[str, ...]], width: int) -> None:
    """Raise unless there is a weight and a bias of the right shape for each kind of label."""
    for kind, names in labels.items():
        shapes = [tuple(heads[f"{kind}.{part}"].shape) for part in ("weight", "bias")]
        if shapes != [(len(names), width), (len(names),)]:
            raise ValueError(f"the head of {kind!r} has the shapes {shapes}")


def _label(probe: Scorable, kind: str, names: Sequence[str]) -> str | None:
    """Return the label of the head `kind` for the probe's concept; `None` if the head has no such label."""
    if probe.kind != kind and not (
        kind == "object" and probe.kind in ("action", "fact", "trademark")
    ):
        return None
    label = probe.label.lower()
    for candidate in (label, f"person {label}", f"flag of {label}", f"{label} logo"):
        if candidate in names:
            return candidate
    return None
