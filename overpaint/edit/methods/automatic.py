r"""Edits that choose what to preserve, and how heavily, from text alone.

`quickfix` fits a concept in four captions and preserves what it is told to. Here

0. tokens of a concept that occur in nothing else to look after are moved in the token embedding, which moves no other
   prompt at all (`tokens`); what follows is done for the concepts that have other tokens too, with those rows in place;
1. the concept's keys come from some hundred captions around it, between words of the tokenizer's vocabulary;
2. some thousand captions without it, and the empty prompt, are the background that should not move;
3. how far other concepts would drift is known before any picture is drawn: :math:`\|\Delta H\|^2` over the layer's
   inputs :math:`H` in captions of each, in units of the movement that the edit itself asks for. Those above `bound`
   join the preserve list and weigh four times more in each round that leaves them there. What stays above is named;
4. the weight of the background is the one with the best harmonic mean of what is reached and what is spared, measured
   on captions that nothing was fitted to;
5. what the projection cannot do is left to the MLP behind it (`repair`).

Every sum is a mean over captions, so that weights do not depend on how many there are. Only sums over keys are kept:
memory does not grow with the captions either, and one solve is D_in x D_in.

Source: ours; the objective is that of `solve`, the preserved keys are those of UCE.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.edit import caption_sums as texts
from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.caption_sums import FRESH, Reader, Sums
from overpaint.edit.captions import check_pairs, plan
from overpaint.edit.change import Change
from overpaint.edit.least_squares import factorise
from overpaint.edit.methods import layer_scan, token_rows
from overpaint.edit.methods import mlp_repair as repairs
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage

__all__ = ["RIDGES", "WEIGHTS", "auto", "preserve_terms"]

Progress = Callable[[int, int, str], None]
Term = dict[str, Any]
WEIGHTS = (0.5, 1.5, 5.0, 15.0, 50.0, 150.0, 500.0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_ROUNDS = 5
_PRICE = 10.0  # a movement of the background costs as much as so many missed ones of the concept


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
    ridge: float | Literal["auto"] = 0.001,
    repair: bool = True,
    tokens: bool = True,
    layer: int | Literal["auto"] = 0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Change:
    """Change of token rows or one text layer that chooses its preserve list and weight; the model is not touched.

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
        ridge: Pull towards the old weight, in units of a caption's squared keys; positive, or `"auto"`, one of
            `RIDGES`.
        repair: Let the layer's MLP take up what its projection leaves to do: a second weight moves.
        tokens: Move those tokens of a concept in the token embedding that occur in nothing that is looked after, in no
            other concept and in no replacement; every prompt with one of them changes, and no other one. The layer is
            edited for concepts that have other tokens too, as it reads the moved rows; no weight is written to.
            `False` edits the layer alone, as the paper does. Ordinary words that no list holds are not known to be
            ordinary: name a prompt with them in `preserve`.
        layer: Text layer, from 0; or `"auto"`: each is edited from a quarter of the captions, without repair, and the
            one whose edit does most and harms least at the encoder's output is taken (`layers.scan`). The weights
            move meanwhile, and return bit for bit.
        seed: Of the captions drawn.
        on_progress: Told what is done, of how much, and of what.

    Returns:
        The change. Its report holds `scan` (weight, ridge, share missed, drift of the background), `endangered`
        (concept, weight, drift before and after) and `not_kept` (concepts that stay above the bound), as the projection
        alone leaves them; `layer_missed` and `layer_drift` say what the repair makes of it. Where the layer was chosen,
        `layers` says what an edit of each reached. `tokens` names the tokens that move, concept by concept, `in_layer`
        the concepts that the layer is edited for, and `carried` known concepts that hold a moved token (as "apple logo"
        holds "apple") and change with it.

    Raises:
        ValueError: A concept is empty, equals its target or is to be preserved too; a number is out of range.
        UnknownSite: The model has no such layer.
    """
    _check_texts(pairs, preserve)
    _check_numbers(contexts, background, bound, preserve_weight, allowance)
    _check_place(model, pairs, ridge, layer)
    began = time.perf_counter()
    tell = on_progress or (lambda done, total, what: None)
    known = texts.known_concepts(model, vocabulary)
    asked = _Asked(model, dict(pairs), known, tuple(preserve), tuple(without), seed)
    own = token_rows.own(model, pairs, [*asked.others, *preserve]) if tokens else {}
    rest = {old: new for old, new in pairs.items() if old not in own or not own[old].whole}
    rows = {token: row for found in own.values() for token, row in found.rows.items()}
    fit = _Fit(contexts, background, bound, preserve_weight, allowance, ridge, repair)
    with token_rows.placed(model, rows):
        if not rest:
            solved = _nothing_left(fit, layer)
        elif layer == "auto":
            solved = _at_best_layer(asked, rest, fit, tell)
        else:
            solved = _at_layer(asked, rest, fit, layer, tell)
    tell(4, 4, "done")
    protocol = {
        "method": "auto", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve), "positions": "auto",
        **dataclasses.asdict(fit), **solved.protocol, "tokens": tokens, "without": sorted(without), "seed": seed,
        "vocabulary": vocabulary if isinstance(vocabulary, str | None) else list(vocabulary),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    movements, report = list(solved.movements), dict(solved.report)
    if rows:
        movements.append(token_rows.movement(model, rows))
        report["tokens"] = {old: token_rows.names(model, found.rows) for old, found in own.items()}
        report["in_layer"] = list(rest)
        report["carried"] = token_rows.carried(model, rows, [c for c in known if c not in pairs])
    seconds = {"seconds": {"all": round(time.perf_counter() - began, 3)}}
    return Change(tuple(movements), protocol, report | seconds)


@dataclass(frozen=True)
class _Asked:
    """What an edit is asked for: all its pairs, and what it should look after."""

    model: TextToImage
    pairs: dict[str, str]
    known: tuple[str, ...]
    preserve: tuple[str, ...]
    without: tuple[str, ...]
    seed: int

    @property
    def banned(self) -> list[str]:
        """Texts whose words fill no caption."""
        return sorted({*self.pairs, *self.pairs.values(), *self.without})

    @property
    def others(self) -> list[str]:
        """Concepts to look after."""
        return texts.others(self.known, self.pairs)


@dataclass(frozen=True)
class _Fit:
    """How a layer is fitted; the names are those of `auto`."""

    contexts: int
    background: int
    bound: float
    preserve_weight: float | str
    allowance: float
    ridge: float | str
    repair: bool


@dataclass(frozen=True, eq=False)
class _Solved:
    """What was found at a layer: its movements, and what it adds to the change's protocol and report."""

    movements: tuple[Movement, ...]
    protocol: dict[str, Any]
    report: dict[str, Any]


def _nothing_left(fit: _Fit, layer: int | str) -> _Solved:
    """Return the empty solution, for when the token embedding does it all; what was left to choose stays open."""
    settings = {
        "terms": [],
        "layer": 0 if layer == "auto" else layer,
        "ridge": RIDGES[1] if isinstance(fit.ridge, str) else fit.ridge,
        "preserve_weight": 0.0 if isinstance(fit.preserve_weight, str) else fit.preserve_weight,
    }
    return _Solved((), settings, {"endangered": [], "not_kept": []})


def _at_layer(
    asked: _Asked, pairs: Mapping[str, str], fit: _Fit, layer: int, tell: Progress
) -> _Solved:
    """Return the edit of one layer for some of the pairs."""
    model, banned, others = asked.model, asked.banned, asked.others
    reader = Reader.of(model, layer)
    words = vocabularies.fillers(model.tokenizer, without=banned)
    frames, other_frames = (
        vocabularies.frames(words, size=n, seed=asked.seed + i, among=others)
        for i, n in enumerate((fit.contexts, FRESH))
    )
    tell(0, 4, "reading captions of the concepts")
    wanted, tried = (texts.captioned(model, pairs, f, asked.known) for f in (frames, other_frames))
    fitted, fresh = ([reader.sums(found) for found in group] for group in (wanted, tried))
    tell(1, 4, "reading what to keep")
    term: Term = {
        "background": fit.background, "seed": asked.seed, "without": banned, "concepts": others
    }  # fmt: skip
    ground = texts.background(reader, term)
    other = {**term, "background": 4 * FRESH, "seed": asked.seed + 1}
    unseen = texts.background(reader, other)
    scan = _scan(fitted, fresh, ground, unseen, fit.preserve_weight, fit.ridge)
    chosen, pull = _choice(scan)
    tell(2, 4, "looking after what is in danger")
    watched = [*others, *asked.preserve]
    grams = [reader.gram(texts.captions_of(c, other_frames)) for c in watched]
    kept = _looked_after(fitted, fresh, chosen * ground, grams, pull, fit.bound, fit.allowance)
    terms = [{**term, "weight": chosen}]
    terms += [{"concept": c, "weight": w} for c, w in zip(watched, kept.weights, strict=True) if w]
    owners = [list(asked.pairs).index(old) for old in pairs]
    movement = _movement(reader, fitted, owners, kept.gram, pull)
    danger = list(zip(watched, kept.weights, kept.before, kept.after, strict=True))
    movements, report = (movement,), _report(reader, movement, fresh, scan, danger, fit.bound)
    if fit.repair:
        tell(3, 4, "repairing what the projection cannot do")
        second, told = repairs.repair(
            model, movement, layer=layer, wanted=wanted, kept=texts.spared(model, terms, other_frames), fresh=tried,
            unseen=texts.background_captions(model, other), ridge=pull,
        )  # fmt: skip
        movements, report = (movement, second), report | told
    found = {"terms": terms, "preserve_weight": chosen, "ridge": pull, "layer": layer}
    return _Solved(movements, found, report)


def _at_best_layer(asked: _Asked, pairs: Mapping[str, str], fit: _Fit, tell: Progress) -> _Solved:
    """Return the edit at the layer whose quick edit does best at the encoder's output."""
    model, others = asked.model, asked.others
    few = {name: max(8, getattr(fit, name) // 4) for name in ("contexts", "background")}
    quick = dataclasses.replace(fit, repair=False, **few)
    words = vocabularies.fillers(model.tokenizer, without=asked.banned)
    frames = vocabularies.frames(words, size=FRESH, seed=asked.seed + 1, among=others)
    term: Term = {
        "background": 2 * FRESH, "seed": asked.seed + 1, "without": asked.banned, "concepts": others
    }  # fmt: skip

    def make(layer: int) -> Change:
        solved = _at_layer(asked, pairs, quick, layer, lambda done, total, what: None)
        return Change(solved.movements, {"pairs": asked.pairs}, solved.report)

    rows = layer_scan.scan(
        model,
        make,
        pairs=[p for found in texts.captioned(model, pairs, frames, asked.known) for p in found],
        unseen=texts.background_captions(model, term),
        on_progress=tell,
    )
    best = max(rows, key=_merit)
    solved = _at_layer(asked, pairs, fit, int(best["layer"]), tell)
    told = [{**row, "chosen": row is best} for row in rows]
    return dataclasses.replace(solved, report={**solved.report, "layers": told})


def preserve_terms(model: TextToImage, change: Change) -> Tensor:
    """Return the Gram matrix of all that a change by `auto` preserves, read from `model` again; (D_in, D_in).

    Raises:
        UnknownSite: The model has no such layer.
    """
    reader = Reader.of(model, change.protocol["layer"])
    width = reader.weight.shape[1]
    total, frames = reader.weight.new_zeros(width, width), ()
    for term in change.protocol["terms"]:
        if "background" not in term:
            total += term["weight"] * reader.gram(texts.captions_of(term["concept"], frames))
            continue
        words = vocabularies.fillers(model.tokenizer, without=term["without"])
        frames = vocabularies.frames(
            words, size=FRESH, seed=term["seed"] + 1, among=term["concepts"]
        )
        total += term["weight"] * texts.background(reader, term)
    return total


# --- what to solve ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Kept:
    """What is looked after: the weight of each concept, its drift before and after, and all preserve terms."""

    weights: list[float]
    before: list[float]
    after: list[float]
    gram: Tensor


def _delta(fitted: Sequence[Sums], gram: Tensor, ridge: float) -> Tensor:
    """Return the movement of the weight, (D_out, D_in)."""
    prior = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    system = sum((s.gram for s in fitted), prior)
    cross = sum((s.cross for s in fitted), torch.zeros_like(fitted[0].cross))
    return torch.linalg.solve(system, cross.T).T


def _drift(delta: Tensor, gram: Tensor, energy: float) -> float:
    """Return the squared movement of an average caption with `gram`, in units of `energy`."""
    return float((delta @ gram * delta).sum()) / energy if energy else 0.0


def _energy(sums: Sequence[Sums]) -> float:
    return sum(s.energy for s in sums) / len(sums)


def _scan(
    fitted: Sequence[Sums],
    fresh: Sequence[Sums],
    ground: Tensor,
    unseen: Tensor,
    weight: float | str,
    ridge: float | str,
) -> list[dict[str, float]]:
    """Return what weights of the background and ridges cost and give, on captions that nothing was fitted to."""
    rows: list[dict[str, float]] = []
    for pull in RIDGES if isinstance(ridge, str) else (float(ridge),):
        for w in WEIGHTS if isinstance(weight, str) else (float(weight),):
            delta = _delta(fitted, w * ground, pull)
            missed, drift = _missed(fresh, delta), _drift(delta, unseen, _energy(fresh))
            rows.append({"preserve_weight": w, "ridge": pull, "missed": missed, "drift": drift})
    return rows


def _choice(scan: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Return the weight and the ridge with the most merit."""
    best = max(scan, key=_merit)
    return best["preserve_weight"], best["ridge"]


def _merit(row: Mapping[str, float]) -> float:
    """Return the harmonic mean of what is reached and what is spared."""
    reached, spared = max(0.0, 1 - row["missed"]), max(0.0, 1 - _PRICE * row["drift"])
    return 2 * reached * spared / max(reached + spared, 1e-9)


def _looked_after(
    fitted: Sequence[Sums],
    fresh: Sequence[Sums],
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


def _missed(sums: Sequence[Sums], delta: Tensor) -> float:
    return sum(s.missed(delta) for s in sums) / len(sums)


def _movement(
    reader: Reader, fitted: Sequence[Sums], places: Sequence[int], gram: Tensor, ridge: float
) -> Movement:
    rows = [s.rows() for s in fitted]
    keys, residuals = (torch.cat(parts) for parts in zip(*rows, strict=True))
    owners = [place for place, (k, _) in zip(places, rows, strict=True) for _ in range(len(k))]
    solution = factorise(keys, ridge=ridge, gram=gram, method="auto").solve(residuals)
    parameter = find_weight(reader.model, reader.site).parameter
    return Movement.from_solution(reader.site, parameter, solution, keys, residuals, owners, gram)


def _report(
    reader: Reader,
    movement: Movement,
    fresh: Sequence[Sums],
    scan: Sequence[Mapping[str, float]],
    watched: Sequence[tuple[str, float, float, float]],
    bound: float,
) -> dict[str, Any]:
    """Return what the edit does on captions that nothing was fitted to, and what is in danger."""
    delta, best = movement.delta, _choice(scan)
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
        "scan": [{**row, "chosen": (row["preserve_weight"], row["ridge"]) == best} for row in scan],
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


def _check_place(
    model: TextToImage, pairs: Mapping[str, str], ridge: float | str, layer: int | str
) -> None:
    """Refuse what the layer would refuse, also where the token embedding does it all."""
    if layer != "auto":
        find_weight(model, f"text.{layer}.self_attn.out_proj")
    if ridge != "auto" and not (isinstance(ridge, int | float) and 0 < ridge < math.inf):
        raise ValueError(f"`ridge` must be 'auto' or positive and finite, got {ridge!r}.")
    plan(model, dict(pairs), ["{}"], "subject_to_end")


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
