"""Changes of several concepts: added, scaled, and taken apart again, each time by one joint solve.

A closed-form edit depends on its keys, residuals and preserve terms alone, and all of them add up. So a change that
keeps them can be solved again with those of another, without the model, and the order does not matter. Applying one
change after another is another, worse solution: the second forgets what the first was fitted to.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit.change import Change, Movement
from overpaint.edit.least_squares import Factors, compress, contradiction, factorise
from overpaint.edit.methods.automatic import Progress, auto, preserve_terms
from overpaint.edit.methods.cross_attention import preserved_keys
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.weights import EMBEDDING, fingerprint, weights_at
from overpaint.model import TextToImage

__all__ = ["add", "complete", "scale", "stack", "without"]

_AGREE = ("ridge", "positions", "subtract_bias")
_AUTOMATIC = (
    "vocabulary",
    "contexts",
    "background",
    "bound",
    "allowance",
    "ridge",
    "layer",
    "repair",
    "tokens",
    "seed",
)


def add(first: Change, second: Change) -> Change:
    """Return `first + second`: all their concepts, solved jointly. The order changes no byte.

    A concept that both send to the same target counts once. Preserve terms that are equal count once, and those of
    different prompts add up: a prompt on both lists then counts twice, which `stack` avoids.

    Raises:
        ValueError: They differ in weights, ridge or positions, contradict one another, hold nothing that was solved, or
            lack their preserve terms.
    """
    first, second = sorted((first, second), key=_order)
    for change in (first, second):
        _check_separable(change)
    _check_alike(first, second)
    shared = _shared(first, second)
    pairs = sorted({**first.pairs, **second.pairs}.items())
    names = [old for old, _ in pairs]
    once = _preserved(first) == _preserved(second)
    others = {m.site: m for m in second.movements}
    shared_factors = _SharedFactors(_ridge(first))
    movements: list[Movement] = []
    reports: list[dict[str, Any]] = []
    for a in first.movements:
        b = others[a.site]
        parts = [(first, a, frozenset[str]()), (second, b, shared)]
        keys, residuals, owners = _sorted_keys(parts, names)
        gram = _joint_gram(first, second, a, b, once=once)
        moved, told = _solved(a, keys, residuals, owners, shared_factors.of(keys, gram))
        movements.append(moved)
        reports.append(told)
    _check_contradictions(movements, pairs)
    protocol = _joint_protocol(first, second, dict(pairs))
    return Change(tuple(movements), protocol, _summary(reports))


def scale(change: Change, factor: float) -> Change:
    """Return `change` with `factor` times its movement; its concepts then ask for that much of their targets.

    Raises:
        ValueError: `factor` is not finite.
    """
    if not math.isfinite(factor):
        raise ValueError(
            f"a change can be scaled by a finite number only, got {factor!r}: 1 is the change as it was made."
        )
    left = float(factor != 0)  # at 0 no row moves at all
    movements = [
        dataclasses.replace(m, left=m.left * left, right=m.right * factor, residuals=m.residuals * factor)
        for m in change.movements
    ]  # fmt: skip
    before = change.protocol.get("strength", {})
    strength = {old: before.get(old, 1.0) * factor for old in change.pairs}
    strength = {old: value for old, value in strength.items() if value != 1.0}
    protocol = {k: v for k, v in change.protocol.items() if k != "strength"}
    if strength:
        protocol["strength"] = strength
    return Change(tuple(movements), protocol, change.report)


def without(change: Change, concept: str) -> Change:
    """Return `change` without `concept`, solved again for the others; what was preserved still is.

    Raises:
        ValueError: The change has no such concept or no other, holds nothing that was solved, or lacks its preserve
            terms.
    """
    pairs = change.pairs
    _remove(pairs, concept)
    _check_solved(change)
    names = sorted(pairs)
    shared_factors = _SharedFactors(_ridge(change))
    movements: list[Movement] = []
    reports: list[dict[str, Any]] = []
    for m in change.movements:
        keys, residuals, owners = _sorted_keys([(change, m, frozenset({concept}))], names)
        moved, told = _solved(m, keys, residuals, owners, shared_factors.of(keys, m.gram))
        movements.append(moved)
        reports.append(told)
    protocol = {**change.protocol, "pairs": {name: pairs[name] for name in names}}
    strength = protocol.pop("strength", {})
    if kept := {old: value for old, value in strength.items() if old != concept}:
        protocol["strength"] = kept
    return Change(tuple(movements), protocol, _summary(reports))


_without = without  # `stack` has an argument of that name


def _remove(pairs: dict[str, str], concept: str) -> None:
    if concept not in pairs:
        known = ", ".join(map(repr, pairs)) or "none"
        raise ValueError(
            f"this change has no concept {concept!r}: it has {known}. Name one of them."
        )
    if len(pairs) == 1:
        raise ValueError(
            f"{concept!r} is the only concept of this change, nothing would be left of it: use the unedited model."
        )
    del pairs[concept]


def complete(
    change: Change, model: TextToImage, *, preserve: Sequence[str] | None = None
) -> Change:
    """Return `change` with its preserve terms at hand, read anew from `model`; it moves what it did before.

    Args:
        change: Made by `quickfix`, `uce` or `auto`.
        model: The unedited model that it was made for.
        preserve: Prompts to preserve from the next solve on, instead of those of the change.

    Raises:
        ValueError: The model's weight is another, or the change was made in another way.
    """
    if "terms" in change.protocol:
        return _complete_auto(change, model)
    prompts = list(change.protocol.get("preserve", []) if preserve is None else preserve)
    if not prompts:
        return change
    _check_bases(change, model)
    grams: dict[str, Tensor | None] = {}
    movements: list[Movement] = []
    for m in change.movements:
        source = m.site if m.site.startswith("text") else "unet"  # where its keys are read
        if source not in grams:
            kept = preserved_keys(model, change.protocol.get("method"), m.site, prompts)
            grams[source] = preserve_gram(kept, change.protocol["preserve_weight"])
        movements.append(dataclasses.replace(m, gram=grams[source]))
    protocol = {**change.protocol, "preserve": prompts}
    return Change(tuple(movements), protocol, change.report)


def _complete_auto(change: Change, model: TextToImage) -> Change:
    _check_bases(change, model)
    solved = [m for m in change.movements if m.site != EMBEDDING]
    if all(m.gram is not None for m in solved):
        return change
    if change.protocol.get("repair"):  # its inputs depend on the first movement: make both again
        settings = {
            name: change.protocol.get(name, False)
            for name in (*_AUTOMATIC, "preserve", "preserve_weight", "without")
        }
        grams = {m.site: m.gram for m in auto(model, change.pairs, **settings).movements}
    else:
        grams = {m.site: preserve_terms(model, change) for m in solved}
    whole = [dataclasses.replace(m, gram=grams.get(m.site)) for m in change.movements]
    return dataclasses.replace(change, movements=tuple(whole))


def stack(
    model: TextToImage,
    changes: Sequence[Change],
    *,
    without: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Change:
    """One change of several: their pairs and all their preserved prompts, solved jointly. The order does not matter.

    Args:
        model: The unedited model that all of them were made for; the preserved prompts are read from it again.
        changes: Made with the same ridge, positions and preserve weight, of the same weights.
        without: Old concepts to leave out.
        on_progress: Told what is done, of how much, and of what; changes by `auto` alone take that long.

    Raises:
        ValueError: Settings or base weights differ, one concept has two new ones, there is nothing to stack, or nothing
            would be left.
    """
    if not changes:
        raise ValueError("nothing to stack: give at least one change.")
    automatic = ["terms" in change.protocol for change in changes]
    if any(automatic) and not all(automatic):
        _differ("method")
    for change in changes:
        if not any(automatic):
            _check_method(change)
        _check_bases(change, model)
    if any(automatic):
        return _stacked_auto(model, changes, without, on_progress)
    preserve = sorted({prompt for c in changes for prompt in c.protocol.get("preserve", [])})
    weights = {c.protocol["preserve_weight"] for c in changes if _preserved(c)[0]}
    if len(weights) > 1:
        _differ("preserve_weight")
    if weights:
        common = {"preserve_weight": weights.pop()}
        changes = [dataclasses.replace(c, protocol={**c.protocol, **common}) for c in changes]
        changes = [complete(c, model, preserve=preserve) for c in changes]
    whole = functools.reduce(add, sorted(changes, key=_order))
    return functools.reduce(_without, without, whole)


def _order(change: Change) -> tuple[str, str]:
    return change.digest, str(sorted(change.pairs.items()))


def _ridge(change: Change) -> float:
    ridge = change.ridge
    assert ridge is not None
    return ridge


def _preserved(change: Change) -> tuple[frozenset[str], float]:
    """Return what a change preserves and how heavily; nothing at all if it weighs nothing.

    What `auto` preserves is told by its terms, as JSON.
    """
    if terms := change.protocol.get("terms"):
        return frozenset(json.dumps(term, sort_keys=True) for term in terms), 1.0
    weight = float(change.protocol.get("preserve_weight") or 0.0)
    prompts = frozenset(change.protocol.get("preserve", []))
    return (prompts, weight) if prompts and weight > 0 else (frozenset(), 0.0)


def _check_bases(change: Change, model: TextToImage) -> None:
    for m, parameter in zip(change.movements, weights_at(model, change.sites), strict=True):
        base = fingerprint(parameter)
        if base != m.base_hash:
            raise ValueError(
                f"wrong base hash: {m.site} of {model.name!r} is {base[:12]}, not the weight that the change was made "
                "for. Revert what is applied, or use the model it was made for."
            )


def _check_method(change: Change) -> None:
    if change.ridge is None or not all(len(m.keys) for m in change.movements):
        raise ValueError(
            f"only changes that were solved can be added or stacked, this one is by {change.protocol.get('method')!r}: "
            "apply it on its own."
        )


def _check_separable(change: Change) -> None:
    rows = "terms" in change.protocol and EMBEDDING in change.sites
    if rows or change.protocol.get("repair"):
        raise ValueError(
            "what a change by `auto` moves depends on all its concepts: add it with `edit.stack(model, [a, b])`, "
            "take one out with `edit.stack(model, [a], without=['...'])`."
        )


def _check_solved(change: Change) -> None:
    _check_separable(change)
    _check_method(change)
    if _preserved(change)[0] and any(m.gram is None for m in change.movements):
        raise ValueError(
            "this change preserves prompts but lacks their terms, which are not saved unless asked for: use "
            "`edit.stack(model, [a, b])` to add it, or `change.complete(model)` first."
        )


def _check_alike(first: Change, second: Change) -> None:
    if set(first.sites) != set(second.sites):
        raise ValueError(
            f"these changes move different weights, {', '.join(first.sites[:3])} and {', '.join(second.sites[:3])}: "
            "apply one after the other."
        )
    bases = {m.site: m.base_hash for m in first.movements}
    if any(bases[m.site] != m.base_hash for m in second.movements):
        raise ValueError(
            "these changes were made for different weights (other base hashes): make both on the same unedited model."
        )
    for change in (first, second):
        _check_method(change)
    names = [n for n in _AGREE if first.protocol.get(n) != second.protocol.get(n)]
    kept = [_preserved(change) for change in (first, second)]
    if kept[0][0] and kept[1][0] and kept[0][1] != kept[1][1]:
        names.append("preserve_weight")
    if names:
        _differ(", ".join(names))


def _differ(names: str) -> None:
    raise ValueError(f"these changes differ in {names}: make them again with the same settings.")


def _shared(first: Change, second: Change) -> frozenset[str]:
    """Return the concepts that both have; refuse those they treat differently."""
    strength = [change.protocol.get("strength", {}) for change in (first, second)]
    both = sorted(first.pairs.keys() & second.pairs.keys())
    for old in both:
        targets = sorted((first.pairs[old], second.pairs[old]))
        if targets[0] != targets[1]:
            raise ValueError(
                f"contradictory pairs: {old!r} → {targets[0]!r} and {old!r} → {targets[1]!r}. Keep one of them."
            )
        if strength[0].get(old, 1.0) != strength[1].get(old, 1.0):
            raise ValueError(
                f"contradictory pairs: {old!r} → {targets[0]!r} has two strengths. Take it out of one change with "
                f"`without({old!r})`."
            )
    if both and first.protocol.get("frames") != second.protocol.get("frames"):
        _differ("frames")
    return frozenset(both)


def _sorted_keys(
    parts: Sequence[tuple[Change, Movement, frozenset[str]]], names: Sequence[str]
) -> tuple[Tensor, Tensor, list[int]]:
    """Return keys, residuals and owners of some movements of one weight, in the order of the concepts `names`.

    Each part is a change, its movement, and the concepts to leave out.
    """
    keys: list[Tensor] = []
    residuals: list[Tensor] = []
    owners: list[int] = []
    for place, name in enumerate(names):
        for change, movement, out in parts:
            own = list(change.pairs)
            if name not in own or name in out:
                continue
            rows = [i for i, owner in enumerate(movement.owners) if own[owner] == name]
            keys.append(movement.keys[rows].double())
            residuals.append(movement.residuals[rows].double())
            owners += [place] * len(rows)
    return torch.cat(keys), torch.cat(residuals), owners


def _joint_gram(
    first: Change, second: Change, a: Movement, b: Movement, *, once: bool
) -> Tensor | None:
    if once and (a.gram is None) != (b.gram is None):
        return b.gram if a.gram is None else a.gram
    for change in (first, second):
        _check_solved(change)
    if once or b.gram is None:
        return a.gram
    return b.gram if a.gram is None else a.gram + b.gram


@dataclass(frozen=True, eq=False)
class _Factorised:
    """Keys and preserve terms with their factors, and the keys times the right factor."""

    keys: Tensor
    gram: Tensor | None
    factors: Factors
    turned: Tensor


class _SharedFactors:
    """Factorisations made so far: weights that read the same keys share one."""

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge
        self._known: list[_Factorised] = []

    def of(self, keys: Tensor, gram: Tensor | None) -> _Factorised:
        for known in self._known:
            if torch.equal(known.keys, keys) and _same(known.gram, gram):
                return known
        factors = factorise(keys, ridge=self._ridge, gram=gram, method="auto")
        self._known.append(_Factorised(keys, gram, factors, keys @ factors.right.T))
        return self._known[-1]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _solved(
    movement: Movement,
    keys: Tensor,
    residuals: Tensor,
    owners: Sequence[int],
    shared: _Factorised,
) -> tuple[Movement, dict[str, Any]]:
    """Return the movement of one weight, solved again, and what the solve measured."""
    solution = shared.factors.solve(residuals)
    left, right = compress(solution.left, solution.right, orthonormal=solution.orthonormal)
    moved = dataclasses.replace(
        movement, left=left, right=right, keys=shared.keys, residuals=residuals, owners=tuple(owners), gram=shared.gram
    )  # fmt: skip
    missed = float((residuals - shared.turned @ solution.left.T).norm())
    return moved, {
        "keys": len(keys),
        "rank": left.shape[1],
        "delta_norm": float(solution.left.norm()),  # the rows of the right factor are orthonormal
        "condition_number": solution.condition_number,
        "effective_rank": solution.effective_rank,
        "residual_left": missed / max(float(residuals.norm()), 1e-300),
    }


def _summary(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report of one solve, or the worst of several."""
    return {name: max(report[name] for report in reports) for name in reports[0]}


def _check_contradictions(movements: Sequence[Movement], pairs: Sequence[tuple[str, str]]) -> None:
    for m in movements:
        found = contradiction(m.keys, m.residuals)
        if found is not None:
            (a, b), (c, d) = (pairs[m.owners[row]] for row in found)
            raise ValueError(
                f"contradictory pairs: {a!r} → {b!r} and {c!r} → {d!r} give one key two targets. Keep one of them, or "
                "edit fewer `positions`."
            )


def _joint_protocol(first: Change, second: Change, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of both; where they differ without harm, those of the first in a fixed order."""
    kept = [_preserved(change) for change in (first, second)]
    protocol = {**second.protocol, **first.protocol, "pairs": dict(pairs)}
    if "terms" in protocol:
        protocol["terms"] = _all_terms(first, second)
        protocol["preserve"] = sorted({p for c in (first, second) for p in c.protocol["preserve"]})
    else:
        protocol["preserve"] = sorted(kept[0][0] | kept[1][0])
        protocol["preserve_weight"] = max(kept[0][1], kept[1][1])
    frames = [change.protocol.get("frames") for change in (first, second)]
    if frames[0] != frames[1]:
        protocol["frames"] = sorted({frame for found in frames for frame in found or []})
    strength = {**first.protocol.get("strength", {}), **second.protocol.get("strength", {})}
    if strength:
        protocol["strength"] = dict(sorted(strength.items()))
    return protocol


def _all_terms(first: Change, second: Change) -> list[dict[str, Any]]:
    """Return the preserve terms of two changes by `auto`, equal ones once."""
    terms = list(first.protocol["terms"])
    if second.protocol["terms"] != terms:
        terms += second.protocol["terms"]
    return terms


def _stacked_auto(
    model: TextToImage, changes: Sequence[Change], less: Sequence[str], tell: Progress | None
) -> Change:
    """Return one change by `auto` of all concepts: what is in danger depends on all of them."""
    pairs: dict[str, str] = {}
    for change in sorted(changes, key=_order):
        for old, new in change.pairs.items():
            if pairs.setdefault(old, new) != new:
                targets = " and ".join(f"{old!r} → {t!r}" for t in sorted((pairs[old], new)))
                raise ValueError(f"contradictory pairs: {targets}. Keep one of them.")
    solved = [change for change in changes if change.protocol["terms"]] or list(changes)
    settings = [{n: change.protocol.get(n, False) for n in _AUTOMATIC} for change in solved]
    if unlike := [n for n in _AUTOMATIC if any(s[n] != settings[0][n] for s in settings)]:
        _differ(", ".join(unlike))
    if any(change.protocol.get("strength") for change in changes):
        raise ValueError(
            "a change by `auto` that was scaled cannot be stacked: stack the changes as they were made, then scale."
        )
    for concept in less:
        _remove(pairs, concept)
    both = {n: sorted({t for c in changes for t in c.protocol[n]}) for n in ("preserve", "without")}
    return auto(model, dict(sorted(pairs.items())), **both, **settings[0], on_progress=tell)
