r"""Collateral damage of a change: how many everyday captions and well-known names it moves, from text alone.

The drift of a text :math:`p` is :math:`\|E'(p) - E(p)\| / \|E(p) - E(\text{""})\|` over all positions, with the state
:math:`E` that the UNet reads, before and after the change. Guidance follows the difference of a prompt to the empty
prompt, so this is the relative change of the UNet's condition. For a change of a text encoder the state is the
encoder's output; for a change of cross-attention it is the output of the moved keys and values.

No weight is written: the movements are added to the outputs of the modules while the texts are read.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint import probes
from overpaint.edit.captions import encoder_features
from overpaint.edit.change import Change
from overpaint.edit.concept_words import GENERIC, core, words
from overpaint.edit.movement import Movement
from overpaint.edit.token_rules import texts_with
from overpaint.edit.vocabulary import PLAIN
from overpaint.edit.weights import encoder_index, find_weight, is_embedding
from overpaint.errors import CutPromptWarning, check_texts
from overpaint.model import TextToImage, hooks
from overpaint.model.offload import run_device
from overpaint.model.sampling import Progress
from overpaint.model.sites import TEXT_PARTS

__all__ = ["Collateral", "collateral", "quick_limit", "with_collateral"]

_FRAME = "a picture of {}"
_BATCH = 32
_WORST = 10
_LISTED = 100  # names in a record
_QUICK = {"cpu": 3e10, "cuda": 3e12}  # operations of a quick measurement, about a second


@dataclass(frozen=True)
class Collateral:
    """Drift of everyday captions and of names that a change was not made for.

    Attributes:
        max_drift: Drift above which a text counts as moved.
        captions: Drift of each measured caption, the largest first.
        names: Drift of each measured name, the largest first.
        total: Number of captions and number of names that could be measured.
    """

    max_drift: float
    captions: Mapping[str, float]
    names: Mapping[str, float]
    total: tuple[int, int]

    def __repr__(self) -> str:
        return (
            f"<Collateral: {self.moved} of {len(self.captions)} everyday captions and {len(self.endangered)} of "
            f"{len(self.names)} names move by more than {self.max_drift:g}>"
        )

    @property
    def moved(self) -> int:
        """Number of measured captions that move by more than `max_drift`."""
        return sum(drift > self.max_drift for drift in self.captions.values())

    @property
    def worst(self) -> dict[str, float]:
        """The ten captions that move most, without those that do not move."""
        return {c: drift for c, drift in list(self.captions.items())[:_WORST] if drift > 0}

    @property
    def endangered(self) -> dict[str, float]:
        """The names that move by more than `max_drift`."""
        return {name: drift for name, drift in self.names.items() if drift > self.max_drift}

    def record(self) -> dict[str, Any]:
        """Return the figures ready for JSON; of the endangered names the hundred that move most."""
        kinds = probes.names()
        return {
            "max_drift": self.max_drift,
            "captions": self.total[0],
            "captions_measured": len(self.captions),
            "captions_moved": self.moved,
            "worst": [{"caption": c, "drift": drift} for c, drift in self.worst.items()],
            "names": self.total[1],
            "names_measured": len(self.names),
            "names_moved": len(self.endangered),
            "endangered": [
                {"concept": name, "kind": kinds.get(name, ""), "drift": drift}
                for name, drift in list(self.endangered.items())[:_LISTED]
            ],
        }


def collateral(
    model: TextToImage,
    change: Change,
    *,
    max_drift: float = 0.1,
    limit: int | None = None,
    captions: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> Collateral:
    """Return how far a change moves 5,000 everyday captions and some 5,500 names; nothing is drawn.

    Texts that hold an erased concept are left out. Where only token rows move, a text without these tokens has drift 0
    and is not read. Otherwise the text encoder reads each text twice, with and without the change: on a CPU and an
    encoder of SD-1.4's size about half a second a text, so set `limit` there.

    Args:
        model: The unedited model; it is not modified.
        change: A change of text encoders, or of keys and values of the UNet's cross-attention.
        max_drift: Drift above which a text counts as moved, as a share of the text's distance from the empty prompt.
        limit: Read at most so many captions and so many names: first those that share a word with an erased concept,
            then others drawn at random with a fixed seed. By default all are read.
        captions: Captions to measure; by default `probes.everyday("validation")`.
        names: Names to measure; by default all of `probes.names()`.
        on_progress: Called with (done, total, label).

    Raises:
        TypeError: `captions` or `names` is one text.
        ValueError: The change is applied to `model`, moves weights that read no text, or a number is out of range.
        UnknownSite: The model lacks a weight of the change.
    """
    if not 0 < max_drift < float("inf"):
        raise ValueError(
            f"`max_drift` must be positive, got {max_drift!r}: 0.1 is a tenth of the distance."
        )
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 text, got {limit!r}.")
    if change.movements and change.is_applied(model):
        raise ValueError(
            "the change is applied to this model: `revert` it, then measure what it moves."
        )
    check_texts(captions or (), "captions")
    check_texts(names or (), "names")
    ruler = _Ruler.of(model, change)
    everyday = _unrelated(probes.everyday("validation") if captions is None else captions, change)
    known = _unrelated([*probes.names()] if names is None else names, change)
    framed = {name: _FRAME.format(name) for name in known}
    chosen = _chosen(everyday, change, limit, ruler)
    chosen_names = _chosen(known, change, limit, ruler)
    texts = list(dict.fromkeys([*chosen, *(framed[n] for n in chosen_names)]))
    drifts = ruler.drifts(texts, on_progress)
    return Collateral(
        max_drift,
        _sorted({c: drifts[c] for c in chosen}),
        _sorted({n: drifts[framed[n]] for n in chosen_names}),
        (len(everyday), len(known)),
    )


def quick_limit(model: TextToImage) -> int:
    """Return the number of captions, and of names, that a measurement reads in about a second; at least four."""
    operations = 0.0
    for encoder in model.text_encoders:
        rows = encoder.get_input_embeddings().weight.numel()
        weights = sum(p.numel() for p in encoder.parameters()) - rows
        operations += 4.0 * weights * encoder.config.max_position_embeddings
    kind = run_device(model.text_encoders[0]).type
    return max(4, int(_QUICK.get(kind, _QUICK["cuda"]) / operations / 2))


def with_collateral(model: TextToImage, change: Change, *, limit: int | None = None) -> Change:
    """Return `change` with the entry `collateral` in its report, and the endangered names in `not_kept`.

    A change of weights that read the picture is returned as it is.

    Args:
        model: The unedited model.
        change: As in `collateral`.
        limit: As in `collateral`; by default `quick_limit` of the model.
    """
    if _picture_sites(change):
        return change
    measured = collateral(model, change, limit=quick_limit(model) if limit is None else limit)
    names = [str(name) for name in change.report.get("not_kept", [])]
    names += [name for name in list(measured.endangered)[:_LISTED] if name not in names]
    report = {**change.report, "not_kept": names, "collateral": measured.record()}
    return Change(change.movements, change.protocol, report)


def _picture_sites(change: Change) -> list[str]:
    """Return the moved weights of the UNet that read the picture."""
    unet = (m.site for m in change.movements if not m.site.startswith("text"))
    return [site for site in unet if not site.endswith((".to_k", ".to_v"))]


@dataclass(frozen=True, eq=False)
class _Ruler:
    """Measures the drift of texts under some movements of a model.

    Attributes:
        model: The unedited model.
        text: Movements of text encoders.
        unet: Movements of keys and values.
    """

    model: TextToImage
    text: tuple[Movement, ...]
    unet: tuple[Movement, ...]

    @classmethod
    def of(cls, model: TextToImage, change: Change) -> "_Ruler":
        text = tuple(m for m in change.movements if m.site.startswith("text"))
        unet = tuple(m for m in change.movements if not m.site.startswith("text"))
        if other := _picture_sites(change):
            raise ValueError(
                f"{other[0]} reads the picture, not the prompt, so no text shows what moves: compare pictures with "
                "`overpaint evaluate`."
            )
        return cls(model, text, unet)

    def may_move(self, texts: Sequence[str]) -> set[str]:
        """Return the texts that the movements can move: all, or those with a token whose row moves."""
        if self.unet or not all(is_embedding(m.site) for m in self.text):
            return set(texts)
        moving: set[str] = set()
        for m in self.text:
            tokens = m.left.abs().amax(1).nonzero().flatten().tolist() if m.left.numel() else []
            index = encoder_index(self.model, m.site.partition(".")[0])
            moving |= set(texts_with(self.model.tokenizers[index], tokens, texts))
        return moving

    def drifts(self, texts: Sequence[str], on_progress: Progress | None) -> dict[str, float]:
        """Return the drift of each text; the largest where several encoders move."""
        drifts = dict.fromkeys(texts, 0.0)
        moving = self.may_move(texts)
        read = [text for text in texts if text in moving]
        for start in range(0, len(read), _BATCH):
            if on_progress is not None:
                on_progress(start, len(read), "reading everyday texts")
            batch = read[start : start + _BATCH]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CutPromptWarning)  # a cut caption is a caption too
                rows = [*self._in_encoders(batch), *self._in_unet(batch)]
            for measured in rows:
                for text, drift in zip(batch, measured.tolist(), strict=True):
                    drifts[text] = max(drifts[text], drift)
        return drifts

    def _in_encoders(self, texts: Sequence[str]) -> Iterator[Tensor]:
        for part in TEXT_PARTS[: len(self.model.text_encoders)]:
            movements = [m for m in self.text if m.site.startswith(f"{part}.")]
            if not movements:
                continue
            before = self._features(part, ["", *texts])
            with _moved(self.model, movements):
                after = self._features(part, texts)
            yield _ratios(after - before[1:], before[1:] - before[:1])

    def _in_unet(self, texts: Sequence[str]) -> Iterator[Tensor]:
        if not self.unet:
            return
        features = self.model.encode(["", *texts]).double().cpu()
        if len(self.model.text_encoders) > 1:
            features = features[:, :-1]  # without the row of the pooled output
        distance = features[1:] - features[:1]
        moved, reference = torch.zeros(len(texts)).double(), torch.zeros(len(texts)).double()
        for movement in self.unet:
            weight = find_weight(self.model, movement.site).parameter.detach().cpu().double()
            delta = movement.left.double() @ movement.right.double()
            moved += (features[1:] @ delta.T).flatten(1).square().sum(1)
            reference += (distance @ weight.T).flatten(1).square().sum(1)
        yield _quotient(moved, reference)

    def _features(self, part: str, texts: Sequence[str]) -> Tensor:
        index = encoder_index(self.model, part)
        device = run_device(self.model.text_encoders[index])
        ids = self.model.tokenize(texts, encoder=index).to(device)
        with torch.no_grad():
            return encoder_features(self.model, index, ids).double().cpu()


@contextmanager
def _moved(model: TextToImage, movements: Sequence[Movement]) -> Iterator[None]:
    """Add movements of text encoders to the outputs of their modules while the block runs; no weight is written."""
    inputs: dict[Module, Tensor] = {}

    def recorder(module: Module) -> Any:
        def store(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            inputs[module] = args[0] if args else kwargs["input"]
            return args, kwargs

        return store

    def adder(module: Module, movement: Movement) -> Any:
        embedding = is_embedding(movement.site)

        def add(output: Tensor) -> Tensor:
            read = inputs[module]
            left, right = movement.left, movement.right
            if embedding:
                return output + (left[read.cpu()].double() @ right.double()).to(output)
            wide = read.float() if read.dtype.itemsize < 4 else read
            return output + ((wide @ right.to(wide).T) @ left.to(wide).T).to(output)

        return add

    modules = {find_weight(model, m.site).module: m for m in movements}
    with (
        hooks.patch_inputs({module: recorder(module) for module in modules}),
        hooks.patch({module: adder(module, m) for module, m in modules.items()}),
    ):
        yield


def _ratios(moved: Tensor, distance: Tensor) -> Tensor:
    return _quotient(moved.flatten(1).square().sum(1), distance.flatten(1).square().sum(1))


def _quotient(moved: Tensor, reference: Tensor) -> Tensor:
    """Return the root of the quotient; 0 for a text that equals the empty prompt."""
    return torch.where(reference > 0, moved / reference.clamp(min=1e-300), torch.zeros(())).sqrt()


def _unrelated(texts: Sequence[str], change: Change) -> list[str]:
    """Return the texts without an erased concept; generic words at its ends ("style") do not count."""
    erased = [f" {' '.join(core(old))} " for old in change.pairs]
    spelled = ((text, f" {' '.join(words(text))} ") for text in texts)
    return [text for text, spelling in spelled if not any(old in spelling for old in erased)]


def _chosen(texts: Sequence[str], change: Change, limit: int | None, ruler: _Ruler) -> list[str]:
    """Return the texts to measure: at most `limit` that may move, and all that cannot move."""
    if limit is None or limit >= len(texts):
        return list(texts)
    moving = ruler.may_move(texts)
    common = {w for text in (*PLAIN, *GENERIC) for w in words(text)}
    concept = {w for old in change.pairs for w in words(old)} - common
    candidates = [text for text in texts if text in moving]
    random.Random(0).shuffle(candidates)
    candidates.sort(key=lambda text: concept.isdisjoint(words(text)))
    chosen = set(candidates[:limit])
    return [text for text in texts if text in chosen or text not in moving]


def _sorted(drifts: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(drifts.items(), key=lambda row: (-row[1], row[0])))
