r"""Edits that choose what to preserve, and how heavily, from text alone.

`quickfix` fits a concept in four captions and preserves what it is told to. Here

1. the concept's keys come from some hundred captions around it, between words of the tokenizer's vocabulary;
2. some thousand captions without it, and the empty prompt, are the background that should not move;
3. how far other concepts would drift is known before any picture is drawn: :math:`\|\Delta H\|^2` over the layer's
   inputs :math:`H` in captions of each, in units of the movement that the edit itself asks for. Those above `bound`
   join the preserve list and weigh four times more in each round that leaves them there. What stays above is named;
4. the weight of the background is the one with the best harmonic mean of what is reached and what is spared, measured
   on captions that nothing was fitted to.

Every sum is a mean over captions, so that weights do not depend on how many there are. Only sums over keys are kept:
memory does not grow with the captions either, and one solve is D_in x D_in.

Source: ours; the objective is that of `solve`, the preserved keys are those of UCE.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit import repair as repairs
from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.captions import Pair, check_pairs, gather, layer_inputs, plan
from overpaint.edit.change import Change, Movement
from overpaint.edit.solve import factorise
from overpaint.edit.weights import weight_at
from overpaint.model import TextToImage

__all__ = ["WEIGHTS", "auto", "preserve_terms"]

Progress = Callable[[int, int, str], None]
Term = dict[str, Any]
WEIGHTS = (0.5, 1.5, 5.0, 15.0, 50.0)
_CHUNK = 256  # captions read at once
_ROUNDS = 5
_PER_CONCEPT = 8  # captions of a concept to look after
_FRESH = 64  # captions that nothing is fitted to
_PRICE = 10.0  # a movement of the background costs as much as so many missed ones of the concept
_EMPTY = 0.05  # the empty prompt's share of the background: guidance reads it for every picture


@dataclass(frozen=True, eq=False)
class _Sums:
    """All that a least-squares fit reads of a concept's keys K and residuals R, as means over captions.

    `gram` is K^T K, (D_in, D_in); `cross` is R^T K, (D_out, D_in); `energy` the squared norm of R.
    """

    gram: Tensor
    cross: Tensor
    energy: float

    def missed(self, delta: Tensor) -> float:
        """Return the share of the wanted movement that `delta` misses: 1 for no edit, 0 for a perfect one."""
        quadratic = float((delta @ self.gram * delta).sum() - 2 * (delta * self.cross).sum())
        return (quadratic + self.energy) / self.energy if self.energy else 0.0

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return keys (N, D_in) and residuals (N, D_out), N <= D_in, with the same sums."""
        values, vectors = torch.linalg.eigh(self.gram)
        told = values > 1e-12 * values[-1].clamp(min=1e-300)
        sizes, vectors = values[told].sqrt(), vectors[:, told]
        return sizes[:, None] * vectors.T, (self.cross @ vectors / sizes).T


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads captions at one weight of a model's first text encoder."""

    model: TextToImage
    site: str
    weight: Tensor

    @classmethod
    def of(cls, model: TextToImage, layer: int) -> "_Reader":
        site = f"text.{layer}.self_attn.out_proj"
        return cls(model, site, weight_at(model, site).detach().to("cpu", torch.float64))

    def gram(self, captions: Sequence[str]) -> Tensor:
        """Return the mean of H^T H over captions, H (L, D_in) what reaches the weight; float64."""
        total = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        for start in range(0, len(captions), _CHUNK):
            ids = self.model.tokenize(captions[start : start + _CHUNK])
            rows = layer_inputs(self.model, self.site, ids).flatten(0, 1).double()
            total += rows.T @ rows
        return total / len(captions)

    def sums(self, pairs: Sequence[Pair]) -> _Sums:
        """Return the sums of one concept in its captions."""
        out, width = self.weight.shape
        gram, cross, energy = (
            self.weight.new_zeros(width, width),
            self.weight.new_zeros(out, width),
            0.0,
        )
        for start in range(0, len(pairs), _CHUNK):
            found = pairs[start : start + _CHUNK]
            ids = torch.cat([torch.stack([p.old.ids, p.new.ids]) for p in found])
            keys, sources = gather(layer_inputs(self.model, self.site, ids), found)
            keys = keys.double()
            residual = (sources.double() - keys) @ self.weight.T
            gram += keys.T @ keys
            cross += residual.T @ keys
            energy += float(residual.square().sum())
        return _Sums(gram / len(pairs), cross / len(pairs), energy / len(pairs))


def auto(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    vocabulary: str | Sequence[str] | None = None,
    preserve: Sequence[str] = (),
    without: Sequence[str] = (),
    contexts: int = 400,
    background: int = 2000,
    bound: float = 0.02,
    preserve_weight: float | Literal["auto"] = "auto",
    allowance: float = 0.05,
    ridge: float = 0.001,
    repair: bool = True,
    layer: int = 0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Change:
    """Change of one text layer that chooses its preserve list and weight; the model is not touched.

    Args:
        model: Its first text encoder is edited.
        pairs: Old concept to new; several are solved jointly.
        vocabulary: Concepts to look after: `"icons"`, `"natural"`, or a list; by default the model's own.
        preserve: Prompts to keep besides, each looked after as a concept of the vocabulary is.
        without: Texts whose words are not used to fill captions, as those of a test.
        contexts: Captions of each concept.
        background: Captions that should not move.
        bound: Largest drift of a concept, as a share of the movement that the edit asks for.
        preserve_weight: What an average background caption counts against an average one of a concept, or `"auto"`,
            one of `WEIGHTS`.
        allowance: Share of the movement that may be given up for concepts in danger.
        ridge: Pull towards the old weight, in units of a caption's squared keys; positive.
        repair: Let the layer's MLP take up what its projection leaves to do: a second weight moves.
        layer: Text layer, from 0.
        seed: Of the captions drawn.
        on_progress: Told what is done, of how much, and of what.

    Returns:
        The change. Its report holds `scan` (weight, share missed, drift of the background), `endangered` (concept,
        weight, drift before and after) and `not_kept` (concepts that stay above the bound), as the projection alone
        leaves them; `layer_missed` and `layer_drift` say what the repair makes of it.

    Raises:
        ValueError: A concept is empty, equals its target or is to be preserved too; a number is out of range.
        UnknownSite: The model has no such layer.
    """
    began = time.perf_counter()
    _check_texts(pairs, preserve)
    _check_numbers(contexts, background, bound, preserve_weight, allowance)
    tell = on_progress or (lambda done, total, what: None)
    reader, known = _Reader.of(model, layer), _known(model, vocabulary)
    banned = sorted({*pairs, *pairs.values(), *without})
    others = _others(known, pairs)
    words = vocabularies.fillers(model.tokenizer, without=banned)
    frames, other_frames = (
        vocabularies.frames(words, size=n, seed=seed + i, among=others)
        for i, n in enumerate((contexts, _FRESH))
    )
    tell(0, 4, "reading captions of the concepts")
    wanted, tried = (_captioned(model, pairs, among, known) for among in (frames, other_frames))
    fitted, fresh = ([reader.sums(found) for found in group] for group in (wanted, tried))
    tell(1, 4, "reading what to keep")
    term: Term = {
        "background": background,
        "seed": seed,
        "without": banned,
        "concepts": others,
    }
    ground = _background(reader, term)
    other = {**term, "background": 4 * _FRESH, "seed": seed + 1}
    unseen = _background(reader, other)
    weights = WEIGHTS if preserve_weight == "auto" else (float(preserve_weight),)
    scan = [_measured(fitted, fresh, w, ground, unseen, ridge) for w in weights]
    chosen = _choice(scan)
    tell(2, 4, "looking after what is in danger")
    watched = [*term["concepts"], *preserve]
    grams = [reader.gram(_captions(c, other_frames)) for c in watched]
    kept = _looked_after(fitted, fresh, chosen * ground, grams, ridge, bound, allowance)
    terms = [{**term, "weight": chosen}]
    terms += [{"concept": c, "weight": w} for c, w in zip(watched, kept.weights, strict=True) if w]
    movement = _movement(reader, fitted, kept.gram, ridge)
    danger = list(zip(watched, kept.weights, kept.before, kept.after, strict=True))
    report = _report(reader, movement, fresh, scan, chosen, danger, bound)
    movements = [movement]
    if repair:
        tell(3, 4, "repairing what the projection cannot do")
        spared = _spared(model, terms, other_frames)
        second, told = repairs.repair(
            model, movement, layer=layer, wanted=wanted, kept=spared, fresh=tried,
            unseen=_background_captions(model, other), ridge=ridge,
        )  # fmt: skip
        movements, report = [movement, second], report | told
    tell(4, 4, "done")
    protocol = {
        "method": "auto", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve), "terms": terms,
        "preserve_weight": chosen, "ridge": ridge, "positions": "auto", "layer": layer, "contexts": contexts,
        "background": background, "bound": bound, "allowance": allowance, "without": sorted(without), "seed": seed,
        "repair": repair, "vocabulary": vocabulary if isinstance(vocabulary, str | None) else list(vocabulary),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    seconds = {"seconds": {"all": round(time.perf_counter() - began, 3)}}
    return Change(tuple(movements), protocol, report | seconds)


def preserve_terms(model: TextToImage, change: Change) -> Tensor:
    """Return the Gram matrix of all that a change by `auto` preserves, read from `model` again; (D_in, D_in).

    Raises:
        UnknownSite: The model has no such layer.
    """
    reader = _Reader.of(model, change.protocol["layer"])
    width = reader.weight.shape[1]
    total, frames = reader.weight.new_zeros(width, width), ()
    for term in change.protocol["terms"]:
        if "background" not in term:
            total += term["weight"] * reader.gram(_captions(term["concept"], frames))
            continue
        words = vocabularies.fillers(model.tokenizer, without=term["without"])
        frames = vocabularies.frames(
            words, size=_FRESH, seed=term["seed"] + 1, among=term["concepts"]
        )
        total += term["weight"] * _background(reader, term)
    return total


# --- what to read -----------------------------------------------------------------------------------------------------


def _known(model: TextToImage, vocabulary: str | Sequence[str] | None) -> tuple[str, ...]:
    if vocabulary is None:
        vocabulary = "icons" if model.name == "icons" else "natural"
    return vocabularies.concepts(vocabulary) if isinstance(vocabulary, str) else tuple(vocabulary)


def _others(known: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """Return the concepts to look after: the known ones and the targets, but none that holds an edited concept."""
    olds = [f" {old.lower().strip()} " for old in pairs]
    found = dict.fromkeys((*known, *pairs.values()))
    return sorted(c for c in found if not any(old in f" {c.lower()} " for old in olds))


def _background(reader: _Reader, term: Term) -> Tensor:
    """Return the mean Gram matrix of captions that should not move."""
    captions = _background_captions(reader.model, term)
    return (1 - _EMPTY) * reader.gram(captions) + _EMPTY * reader.gram([""])


def _background_captions(model: TextToImage, term: Term) -> list[str]:
    """Return captions that should not move: three in four hold a concept."""
    words = vocabularies.fillers(model.tokenizer, without=term["without"])
    rng = random.Random(term["seed"])
    slots = [
        rng.choice(term["concepts"] or words) if i % 4 else rng.choice(words)
        for i in range(term["background"])
    ]
    frames = vocabularies.frames(
        words, size=term["background"], seed=term["seed"] + 2, among=term["concepts"]
    )
    return [frame.replace("{}", slot) for frame, slot in zip(frames, slots, strict=True)]


def _spared(
    model: TextToImage, terms: Sequence[Term], frames: Sequence[str]
) -> list[tuple[Sequence[str], float]]:
    """Return the captions to keep and their weights: every second one of the background, since a repair is dearer."""
    background, *concepts = terms
    weight = background["weight"]
    return [
        (_background_captions(model, background)[::2], (1 - _EMPTY) * weight),
        ([""], _EMPTY * weight),
        *((_captions(term["concept"], frames), term["weight"]) for term in concepts),
    ]


def _captioned(
    model: TextToImage, pairs: Mapping[str, str], frames: Sequence[str], known: Sequence[str]
) -> list[list[Pair]]:
    """Return, for each concept, its captions beside those of its replacement."""
    return [
        [_placed(found, old, known) for found in plan(model, {old: new}, frames, "subject_to_end")]
        for old, new in pairs.items()
    ]


def _captions(concept: str, frames: Sequence[str]) -> list[str]:
    """Return captions of a concept to look after."""
    return [frame.replace("{}", concept) for frame in frames[:_PER_CONCEPT]]


def _placed(found: Pair, old: str, known: Sequence[str]) -> Pair:
    """Return the pair from where the two concepts part to the end of the padding, each pad at its own place.

    Where a known concept is how the old one begins ("apple" of "apple logo"), from the old one's last token on: up to
    there a causal encoder cannot tell them apart.
    """
    first, second = found.old, found.new
    start, end = first.first, len(first.ids) - 1
    if any(
        f"{old.lower()} ".startswith(f"{c.lower()} ") and c.lower() != old.lower() for c in known
    ):
        start = first.last
    else:
        while start < first.last and start <= second.last and first.ids[start] == second.ids[start]:
            start += 1
    words = [(p, q) for p, q in found.positions if start <= p < first.eos]
    pads = [(p, min(max(p, second.eos + 1), end)) for p in range(first.eos + 1, end + 1)]
    return dataclasses.replace(found, positions=[*words, (first.eos, second.eos), *pads])


# --- what to solve ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Kept:
    """What is looked after: the weight of each concept, its drift before and after, and all preserve terms."""

    weights: list[float]
    before: list[float]
    after: list[float]
    gram: Tensor


def _delta(fitted: Sequence[_Sums], gram: Tensor, ridge: float) -> Tensor:
    """Return the movement of the weight, (D_out, D_in)."""
    prior = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    system = sum((s.gram for s in fitted), prior)
    cross = sum((s.cross for s in fitted), torch.zeros_like(fitted[0].cross))
    return torch.linalg.solve(system, cross.T).T


def _drift(delta: Tensor, gram: Tensor, energy: float) -> float:
    """Return the squared movement of an average caption with `gram`, in units of `energy`."""
    return float((delta @ gram * delta).sum()) / energy if energy else 0.0


def _energy(sums: Sequence[_Sums]) -> float:
    return sum(s.energy for s in sums) / len(sums)


def _measured(
    fitted: Sequence[_Sums],
    fresh: Sequence[_Sums],
    weight: float,
    ground: Tensor,
    unseen: Tensor,
    ridge: float,
) -> dict[str, float]:
    """Return what a weight of the background costs and gives, on captions that nothing was fitted to."""
    delta = _delta(fitted, weight * ground, ridge)
    return {
        "preserve_weight": weight,
        "missed": _missed(fresh, delta),
        "drift": _drift(delta, unseen, _energy(fresh)),
    }


def _choice(scan: Sequence[Mapping[str, float]]) -> float:
    """Return the weight with the best harmonic mean of what is reached and what is spared."""

    def merit(row: Mapping[str, float]) -> float:
        reached, spared = max(0.0, 1 - row["missed"]), max(0.0, 1 - _PRICE * row["drift"])
        return 2 * reached * spared / max(reached + spared, 1e-9)

    return max(scan, key=merit)["preserve_weight"]


def _looked_after(
    fitted: Sequence[_Sums],
    fresh: Sequence[_Sums],
    gram: Tensor,
    grams: Sequence[Tensor],
    ridge: float,
    bound: float,
    allowance: float,
) -> _Kept:
    """Add what drifts too far, four times heavier in each round.

    It ends when all is within `bound`, when the rounds are over, or before more than `allowance` is given up.
    """
    energy, weights = _energy(fitted), [0.0] * len(grams)
    delta = _delta(fitted, gram, ridge)
    most = _missed(fresh, delta) + allowance
    before = after = [_drift(delta, g, energy) for g in grams]
    for _ in range(_ROUNDS):
        more = [
            (3 * w or 1.0) if drift > bound else 0.0
            for w, drift in zip(weights, after, strict=True)
        ]
        if not any(more):
            break
        heavier = gram + sum(
            (w * g for w, g in zip(more, grams, strict=True) if w), torch.zeros_like(gram)
        )
        delta = _delta(fitted, heavier, ridge)
        if _missed(fresh, delta) > most:
            break
        gram, weights = heavier, [w + m for w, m in zip(weights, more, strict=True)]
        after = [_drift(delta, g, energy) for g in grams]
    return _Kept(weights, before, after, gram)


def _missed(sums: Sequence[_Sums], delta: Tensor) -> float:
    return sum(s.missed(delta) for s in sums) / len(sums)


def _movement(reader: _Reader, fitted: Sequence[_Sums], gram: Tensor, ridge: float) -> Movement:
    rows = [s.rows() for s in fitted]
    keys, residuals = (torch.cat(parts) for parts in zip(*rows, strict=True))
    owners = [i for i, (k, _) in enumerate(rows) for _ in range(len(k))]
    solution = factorise(keys, ridge=ridge, gram=gram, method="auto").solve(residuals)
    parameter = weight_at(reader.model, reader.site)
    return Movement.of(reader.site, parameter, solution, keys, residuals, owners, gram)


def _report(
    reader: _Reader,
    movement: Movement,
    fresh: Sequence[_Sums],
    scan: Sequence[Mapping[str, float]],
    chosen: float,
    watched: Sequence[tuple[str, float, float, float]],
    bound: float,
) -> dict[str, Any]:
    """Return what the edit does on captions that nothing was fitted to, and what is in danger."""
    delta = movement.delta
    empty = reader.gram([""])
    names = ("concept", "weight", "drift_before", "drift")
    endangered: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in watched if row[1]
    ]
    return {
        "keys": len(movement.keys),
        "rank": movement.left.shape[1],
        "delta_norm": float(delta.norm()),
        "relative_delta_norm": float(delta.norm() / reader.weight.norm()),
        "missed": _missed(fresh, delta),
        "empty_prompt_drift": math.sqrt(
            _drift(delta, empty, float((reader.weight @ empty * reader.weight).sum()))
        ),
        "scan": [{**row, "chosen": row["preserve_weight"] == chosen} for row in scan],
        "endangered": sorted(endangered, key=lambda row: -row["drift_before"]),
        "not_kept": [row[0] for row in watched if row[3] > bound],
    }


# --- bad input --------------------------------------------------------------------------------------------------------


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str]) -> None:
    if isinstance(preserve, str):
        raise TypeError("`preserve` is a list of texts: write ['...'] around a single one.")
    check_pairs(pairs)
    for old in pairs:
        kept = [p for p in preserve if f" {old.lower().strip()} " in f" {p.lower()} "]
        if kept:
            raise ValueError(
                f"the preserved prompt {kept[0]!r} holds {old!r}, which is edited: take it off the list."
            )


def _check_numbers(
    contexts: int, background: int, bound: float, preserve_weight: float | str, allowance: float
) -> None:
    for name, count in (("contexts", contexts), ("background", background)):
        if count < 8:
            raise ValueError(
                f"`{name}` must be at least 8 captions, got {count}: some hundred are usual."
            )
    number = math.nan if isinstance(preserve_weight, str) else float(preserve_weight)
    if preserve_weight != "auto" and not 0 <= number < math.inf:
        raise ValueError(
            f"`preserve_weight` must be 'auto' or a number from 0, got {preserve_weight!r}. 15 is usual."
        )
    for name, share in (("bound", bound), ("allowance", allowance)):
        if not 0 < share < math.inf:
            raise ValueError(
                f"`{name}` must be positive and finite, got {share!r}: 0.02 is two per cent."
            )
