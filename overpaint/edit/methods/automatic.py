r"""Automatic edit: preserve list, preserve weight and captions are chosen from text alone.

`quickfix` fits a concept in four captions and preserves the prompts it is given. Here

0. tokens of a concept that occur in no other known text are replaced in the token embedding, which moves no other
   prompt (`token_rows`); the next steps are for the concepts that have other tokens too, with those rows in place;
1. the concept's keys come from some hundred captions around it, with words of the tokenizer's vocabulary;
2. some thousand captions without it, and the empty prompt, are the background that should not move;
3. concepts that would drift by more than `bound` join the preserve list, with a weight that grows fourfold in each
   round (`preserve_search`); the report names those that stay above the bound;
4. the weight of the background is the one with the best harmonic mean of target movement reached and drift avoided,
   measured on captions that are not fitted;
5. the residual that the projection cannot remove is fitted by the MLP behind it (`mlp_repair`).

Every sum is a mean over captions, so weights do not depend on their number. Only sums over keys are stored: memory does
not grow with the captions either, and one solve is D_in x D_in.

Source: ours; the objective is that of `least_squares`, the site that of Basu et al., 2024 (Diff-QuickFix),
https://arxiv.org/abs/2310.13730, the preserved keys those of Gandikota et al., 2024 (UCE),
https://arxiv.org/abs/2308.14761.
Deviations: this is neither paper's method. Diff-QuickFix has four captions, no preserve list and no MLP step.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from overpaint.edit import caption_sums as texts
from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.caption_sums import FRESH, Reader, Sums
from overpaint.edit.captions import align_captions, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.drift import weight_drift
from overpaint.edit.least_squares import factorise
from overpaint.edit.methods import layer_scan, mlp_repair, preserve_search, token_rows
from overpaint.edit.methods.preserve_search import RIDGES
from overpaint.edit.movement import Movement
from overpaint.edit.weights import find_weight
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = ["Fit", "FitSettings", "auto", "preserve_terms"]

Term = dict[str, Any]


class FitSettings(TypedDict, total=False):
    """Keyword arguments of `auto` that set the fit of a layer; `Fit` describes them and has the defaults."""

    contexts: int
    background: int
    bound: float
    preserve_weight: float | Literal["auto"]
    allowance: float
    ridge: float | Literal["auto"]
    repair: bool


@dataclass(frozen=True)
class Fit:
    """Settings of the fit of a layer in `auto`.

    Attributes:
        contexts: Number of captions of each edited concept.
        background: Number of captions that should not move.
        bound: Largest squared drift of a concept, relative to the target movement of the edit.
        preserve_weight: Weight of an average background caption against an average caption of a concept, or `"auto"`,
            one of `preserve_search.WEIGHTS`.
        allowance: Share of the target movement that may be missed in favour of preserved concepts.
        ridge: Pull towards the old weight, in units of a caption's squared keys; positive, or `"auto"`, one of
            `preserve_search.RIDGES`.
        repair: Fit the layer's MLP to the residual that its projection cannot remove: a second weight moves.

    Raises:
        ValueError: A setting is out of range.
    """

    contexts: int = 400
    background: int = 2000
    bound: float = 0.02
    preserve_weight: float | str = "auto"
    allowance: float = 0.05
    ridge: float | str = 0.001
    repair: bool = True

    def __post_init__(self) -> None:
        for name, count in (("contexts", self.contexts), ("background", self.background)):
            if count < 8:
                raise ValueError(
                    f"`{name}` must be at least 8 captions, got {count}: some hundred are usual."
                )
        weight, ridge = self.preserve_weight, self.ridge
        if weight != "auto" and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise ValueError(
                f"`preserve_weight` must be 'auto' or a number from 0, got {weight!r}. 15 is usual."
            )
        for name, share in (("bound", self.bound), ("allowance", self.allowance)):
            if not 0 < share < math.inf:
                raise ValueError(
                    f"`{name}` must be positive and finite, got {share!r}: 0.02 is two per cent."
                )
        if ridge != "auto" and not (isinstance(ridge, int | float) and 0 < ridge < math.inf):
            raise ValueError(f"`ridge` must be 'auto' or positive and finite, got {ridge!r}.")


def auto(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    vocabulary: str | Sequence[str] | None = None,
    preserve: Sequence[str] = (),
    without: Sequence[str] = (),
    tokens: bool = True,
    layer: int | Literal["auto"] = 0,
    seed: int = 0,
    on_progress: Progress | None = None,
    **settings: Unpack[FitSettings],
) -> Change:
    """Return a change of token rows or one text layer with a chosen preserve list; the model is not modified.

    Args:
        model: Its first text encoder is edited.
        pairs: Old concept to new; several are solved jointly.
        vocabulary: Concepts that should not drift: `"icons"`, `"natural"`, or a list; by default the model's own.
        preserve: Further prompts that should not drift, treated like concepts of the vocabulary.
        without: Texts whose words are not used to fill captions, as those of a test.
        tokens: Replace those tokens of a concept in the token embedding that occur in no preserved text, no other
            concept and no replacement; every prompt with one of them changes, and no other prompt. The layer is edited
            for concepts that have other tokens too, with the replaced rows as its input. `False` edits the layer alone.
            Ordinary words that are on no list are not recognised: name a prompt with them in `preserve`.
        layer: Text layer, from 0; or `"auto"`: each layer is edited with a quarter of the captions and without repair,
            and the one with the best result at the encoder's output is used (`layer_scan.scan`). The weights move
            meanwhile, and are restored bit for bit.
        seed: Seed of the captions.
        on_progress: Called with (done, total, label).
        **settings: `contexts`, `background`, `bound`, `preserve_weight`, `allowance`, `ridge` and `repair`, as in
            `Fit`.

    Returns:
        The change. Its report holds `scan` (weight, ridge, missed share, background drift), `endangered` (concept,
        weight, drift before and after) and `not_kept` (concepts that stay above the bound), as measured for the
        projection alone; `layer_missed` and `layer_drift` are measured with the repair. Where the layer was chosen,
        `layers` holds the result of each. `tokens` names the replaced tokens for each concept, `in_layer` the concepts
        that the layer is edited for, and `carried` known concepts that hold a replaced token (as "apple logo" holds
        "apple") and change with it.

    Raises:
        ValueError: A concept is empty, equals its target or is to be preserved too; a number is out of range.
        TypeError: `preserve` is one text, or a keyword is unknown.
        UnknownSite: The model has no such layer.
    """
    _check_texts(pairs, preserve)
    fit = Fit(**settings)
    if layer != "auto":
        find_weight(
            model, f"text.{layer}.self_attn.out_proj"
        )  # raises, also where no layer is edited
    align_captions(model, dict(pairs), ["{}"], "subject_to_end")
    started = time.perf_counter()
    report_progress = on_progress or _ignore
    known = texts.known_concepts(model, vocabulary)
    request = _Request(model, dict(pairs), known, tuple(preserve), tuple(without), seed)
    exclusive = token_rows.exclusive_rows(model, pairs, [*request.others, *preserve]) if tokens else {}  # fmt: skip
    rest = {o: new for o, new in pairs.items() if o not in exclusive or not exclusive[o].complete}
    rows = {token: row for concept in exclusive.values() for token, row in concept.rows.items()}
    with token_rows.rows_replaced(model, rows):
        if not rest:
            edited = _no_layer(fit, layer)
        elif layer == "auto":
            edited = _edit_best_layer(request, rest, fit, report_progress)
        else:
            edited = _edit_layer(request, rest, fit, layer, report_progress)
    report_progress(4, 4, "done")
    protocol = {
        "method": "auto", "model": model.name, "pairs": dict(pairs), "preserve": list(preserve), "positions": "auto",
        **dataclasses.asdict(fit), **edited.protocol, "tokens": tokens, "without": sorted(without), "seed": seed,
        "vocabulary": vocabulary if isinstance(vocabulary, str | None) else list(vocabulary),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    movements, report = list(edited.movements), dict(edited.report)
    if rows:
        movements.append(token_rows.movement(model, rows))
        report["tokens"] = {old: token_rows.token_names(model, e.rows) for old, e in exclusive.items()}  # fmt: skip
        report["in_layer"] = list(rest)
        others = [concept for concept in known if concept not in pairs]
        report["carried"] = token_rows.texts_with_tokens(model, rows, others)
    seconds = {"seconds": {"all": round(time.perf_counter() - started, 3)}}
    return Change(tuple(movements), protocol, report | seconds)


def preserve_terms(model: TextToImage, change: Change) -> Tensor:
    """Return the Gram matrix of all preserve terms of a change by `auto`, read again from `model`; (D_in, D_in).

    Raises:
        UnknownSite: The model has no such layer.
    """
    reader = Reader.at_layer(model, change.protocol["layer"])
    width = reader.weight.shape[1]
    total, frames = reader.weight.new_zeros(width, width), ()
    for term in change.protocol["terms"]:
        if "background" not in term:
            total += term["weight"] * reader.gram(texts.concept_captions(term["concept"], frames))
            continue
        words = vocabularies.fillers(model.tokenizer, without=term["without"])
        frames = vocabularies.frames(
            words, size=FRESH, seed=term["seed"] + 1, among=term["concepts"]
        )
        total += term["weight"] * texts.background_gram(reader, term)
    return total


# --- one layer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """Arguments of `auto` about texts: the pairs, and everything that should not drift."""

    model: TextToImage
    pairs: dict[str, str]
    known: tuple[str, ...]
    preserve: tuple[str, ...]
    without: tuple[str, ...]
    seed: int

    @property
    def banned(self) -> list[str]:
        """Texts whose words are not used to fill captions."""
        return sorted({*self.pairs, *self.pairs.values(), *self.without})

    @property
    def others(self) -> list[str]:
        """Concepts that should not drift."""
        return texts.other_concepts(self.known, self.pairs)

    def frames(self, size: int, seed: int) -> tuple[str, ...]:
        """Return `size` frames whose words are drawn by `seed`, counted from that of the request."""
        words = vocabularies.fillers(self.model.tokenizer, without=self.banned)
        return vocabularies.frames(words, size=size, seed=self.seed + seed, among=self.others)

    def term(self, background: int, seed: int) -> Term:
        """Return the preserve term of `background` captions, without its weight."""
        return {
            "background": background, "seed": self.seed + seed, "without": self.banned, "concepts": self.others
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _LayerEdit:
    """Movements of a layer, and the entries that it adds to the change's protocol and report."""

    movements: tuple[Movement, ...]
    protocol: dict[str, Any]
    report: dict[str, Any]


def _ignore(done: int, total: int, label: str) -> None:
    """Ignore the progress."""


def _no_layer(fit: Fit, layer: int | str) -> _LayerEdit:
    """Return an edit without movements, for concepts whose tokens are all replaced; settings to choose get defaults."""
    settings = {
        "terms": [],
        "layer": 0 if layer == "auto" else layer,
        "ridge": RIDGES[1] if isinstance(fit.ridge, str) else fit.ridge,
        "preserve_weight": 0.0 if isinstance(fit.preserve_weight, str) else fit.preserve_weight,
    }
    return _LayerEdit((), settings, {"endangered": [], "not_kept": []})


def _edit_layer(
    request: _Request, pairs: Mapping[str, str], fit: Fit, layer: int, on_progress: Progress
) -> _LayerEdit:
    """Return the edit of one layer for some of the pairs."""
    model = request.model
    reader = Reader.at_layer(model, layer)
    frames, fresh_frames = request.frames(fit.contexts, 0), request.frames(FRESH, 1)
    on_progress(0, 4, "reading captions of the concepts")
    captions, fresh_captions = (
        texts.extended_pairs(model, pairs, f, request.known) for f in (frames, fresh_frames)
    )
    fitted, fresh = ([reader.sums(c) for c in group] for group in (captions, fresh_captions))
    on_progress(1, 4, "reading background captions")
    term, unseen_term = request.term(fit.background, 0), request.term(4 * FRESH, 1)
    background, unseen = (
        texts.background_gram(reader, term),
        texts.background_gram(reader, unseen_term),
    )
    scan = preserve_search.background_scan(
        fitted, fresh, background, unseen, preserve_weight=fit.preserve_weight, ridge=fit.ridge
    )
    weight, ridge = preserve_search.best_row(scan)
    on_progress(2, 4, "preserving concepts that drift")
    concepts = [*request.others, *request.preserve]
    preserved = preserve_search.preserve_concepts(
        fitted, fresh, weight * background, [reader.gram(texts.concept_captions(c, fresh_frames)) for c in concepts],
        ridge=ridge, bound=fit.bound, allowance=fit.allowance,
    )  # fmt: skip
    terms = [{**term, "weight": weight}]
    terms += [{"concept": c, "weight": w} for c, w in zip(concepts, preserved.weights, strict=True) if w]  # fmt: skip
    owners = [list(request.pairs).index(old) for old in pairs]
    movement = _movement(reader, fitted, owners, preserved.gram, ridge)
    drifts = list(zip(concepts, preserved.weights, preserved.before, preserved.after, strict=True))
    movements, report = (movement,), _report(reader, movement, fresh, scan, drifts, fit.bound)
    if fit.repair:
        on_progress(3, 4, "fitting the MLP")
        second, layer_report = mlp_repair.repair(
            model, movement, layer=layer, pairs=captions, preserve=texts.preserved_captions(model, terms, fresh_frames),
            fresh=fresh_captions, unseen=texts.background_captions(model, unseen_term), ridge=ridge,
        )  # fmt: skip
        movements, report = (movement, second), report | layer_report
    settings = {"terms": terms, "preserve_weight": weight, "ridge": ridge, "layer": layer}
    return _LayerEdit(movements, settings, report)


def _edit_best_layer(
    request: _Request, pairs: Mapping[str, str], fit: Fit, on_progress: Progress
) -> _LayerEdit:
    """Return the edit of the layer whose quick edit has the best result at the encoder's output."""
    model = request.model
    quick = dataclasses.replace(
        fit, repair=False, contexts=max(8, fit.contexts // 4), background=max(8, fit.background // 4)
    )  # fmt: skip
    captions = texts.extended_pairs(model, pairs, request.frames(FRESH, 1), request.known)

    def edit_layer(layer: int) -> Change:
        edited = _edit_layer(request, pairs, quick, layer, _ignore)
        return Change(edited.movements, {"pairs": request.pairs}, edited.report)

    rows = layer_scan.scan(
        model,
        edit_layer,
        pairs=[pair for concept in captions for pair in concept],
        unseen=texts.background_captions(model, request.term(2 * FRESH, 1)),
        on_progress=on_progress,
    )
    best = max(rows, key=preserve_search.merit)
    edited = _edit_layer(request, pairs, fit, int(best["layer"]), on_progress)
    layers = [{**row, "chosen": row is best} for row in rows]
    return dataclasses.replace(edited, report={**edited.report, "layers": layers})


def _movement(
    reader: Reader, fitted: Sequence[Sums], owners: Sequence[int], gram: Tensor, ridge: float
) -> Movement:
    """Return the movement solved from keys and residuals with the given sums; `owners` are those of the sums."""
    rows = [s.equivalent_rows() for s in fitted]
    keys, residuals = (torch.cat(parts) for parts in zip(*rows, strict=True))
    key_owners = [o for o, (k, _) in zip(owners, rows, strict=True) for _ in range(len(k))]
    solution = factorise(keys, ridge=ridge, gram=gram, method="auto").solve(residuals)
    parameter = find_weight(reader.model, reader.site).parameter
    return Movement.from_solution(
        reader.site, parameter, solution, keys, residuals, key_owners, gram
    )


def _report(
    reader: Reader,
    movement: Movement,
    fresh: Sequence[Sums],
    scan: Sequence[Mapping[str, float]],
    drifts: Sequence[tuple[str, float, float, float]],
    bound: float,
) -> dict[str, Any]:
    """Return measurements on captions that are not fitted, and the concepts that drift.

    `drifts` holds for each concept its name, preserve weight, and drift before and after.
    """
    delta, best = movement.delta, preserve_search.best_row(scan)
    names = ("concept", "weight", "drift_before", "drift")
    endangered: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in drifts if row[1]
    ]
    return {
        "keys": len(movement.keys),
        "rank": movement.left.shape[1],
        "delta_norm": weight_drift(delta),
        "relative_delta_norm": weight_drift(delta, relative_to=reader.weight),
        "missed": preserve_search.mean_missed(fresh, delta),
        "empty_prompt_drift": weight_drift(
            delta, gram=reader.gram([""]), relative_to=reader.weight
        ),
        "scan": [{**row, "chosen": (row["preserve_weight"], row["ridge"]) == best} for row in scan],
        "endangered": sorted(endangered, key=lambda row: -row["drift_before"]),
        "not_kept": [row[0] for row in drifts if row[3] > bound],
    }


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str]) -> None:
    if isinstance(preserve, str):
        raise TypeError("`preserve` is a list of texts: write ['...'] around a single one.")
    check_pairs(pairs)
    for old in pairs:
        edited = [p for p in preserve if f" {old.lower().strip()} " in f" {p.lower()} "]
        if edited:
            raise ValueError(
                f"the preserved prompt {edited[0]!r} holds {old!r}, which is edited: take it off the list."
            )
