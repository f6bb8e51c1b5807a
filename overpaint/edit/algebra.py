"""Add changes, scale a change, or remove a concept from it; concepts are solved jointly.

A closed-form edit depends on its keys, residuals and preserve terms alone, and all of them add up. So a change that
stores them can be solved again together with another one, without the model, and the order does not matter. Applying
one change after the other gives another, worse solution: the second is not fitted to the keys of the first.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from overpaint.edit.drift import concept_movement
from overpaint.edit.least_squares import Factors, compress, contradiction, factorise
from overpaint.edit.movement import Contents, Movement, digest
from overpaint.edit.null_space import EXACT
from overpaint.edit.scaled_report import scaled_report
from overpaint.edit.weights import is_embedding, of_one_weight
from overpaint.errors import listed

__all__ = [
    "add",
    "check_solved",
    "check_strength",
    "order",
    "preserve_settings",
    "refuse_difference",
    "remove_concept",
    "scale",
    "without",
]

STRENGTH_LIMIT = 100.0  # of the factor of `scale`, and of the product of all factors
# settings that added changes must share
_EQUAL = ("ridge", "positions", "subtract_bias", "keys", "rank", "safe")


def add(first: Contents, second: Contents) -> Contents:
    """Return `first + second`: all their concepts, solved jointly. The bytes do not depend on the order.

    A concept that both send to the same target counts once. Preserve terms that are equal count once, and those of
    different prompts add up: a prompt on both lists then counts twice, which `stack` avoids.

    The sum is solved in float64, whatever the dtypes of the models. Its base is the weight with more digits: of a
    weight and its cast the weight itself, and of a float16 and a bfloat16 one the float16 one. It is accepted where
    either of them is.

    Raises:
        ValueError: They differ in weights, ridge or positions, contradict one another, contain nothing that was solved,
            or lack their preserve terms.
    """
    first, second = sorted((first, second), key=order)
    for change in (first, second):
        _check_separable(change)
    _check_alike(first, second)
    shared = _shared_concepts(first, second)
    pairs = sorted({**first.pairs, **second.pairs}.items())
    names = [old for old, _ in pairs]
    once = preserve_settings(first) == preserve_settings(second)
    others = {m.site: m for m in second.movements}
    cache = _FactorCache(_ridge(first))
    solved: list[_Solved] = []
    for a in first.movements:
        b = others[a.site]
        parts = [(first, a, frozenset[str]()), (second, b, shared)]
        keys, residuals, owners = _sorted_keys(parts, names)
        gram = _joint_gram(first, second, a, b, once=once)
        solved.append(_solved(_joint_base(a, b), residuals, owners, cache.factorised(keys, gram)))
    movements = tuple(one.movement for one in solved)
    _check_contradictions(movements, pairs)
    protocol = _joint_protocol(first, second, dict(pairs))
    return Contents(movements, protocol, _summary(solved, protocol))


def scale(change: Contents, factor: float) -> Contents:
    """Return `change` with `factor` times its movement, and the report of that; its residuals are scaled too.

    Raises:
        ValueError: `factor`, or the strength of a concept that results, is not finite or beyond 100.
    """
    check_strength(factor)
    left = float(factor != 0)  # at 0 the left factor is zero, and no row moves
    movements = [
        dataclasses.replace(m, left=m.left * left, right=m.right * factor, residual_data=m.residuals * factor)
        for m in change.movements
    ]  # fmt: skip
    before = change.protocol.get("strength", {})
    strength = {old: before.get(old, 1.0) * factor for old in change.pairs}
    for total in strength.values():
        check_strength(total)
    strength = {old: value for old, value in strength.items() if value != 1.0}
    protocol = {k: v for k, v in change.protocol.items() if k != "strength"}
    if strength:
        protocol["strength"] = strength
    report = scaled_report(change.report, factor, change.protocol)
    return Contents(tuple(movements), protocol, report)


def check_strength(factor: float) -> None:
    """Raise unless a change may be scaled by `factor`.

    Raises:
        ValueError: It is not finite, or beyond `STRENGTH_LIMIT` in either direction.
    """
    if not math.isfinite(factor):
        raise ValueError(
            f"a change can be scaled by a finite number only, got {factor!r}: 1 is the change as it was made."
        )
    if abs(factor) > STRENGTH_LIMIT:
        raise ValueError(
            f"a change can be scaled from -{STRENGTH_LIMIT:g} to {STRENGTH_LIMIT:g}, got {factor!r}: 1 is the change "
            "as it was made, and beyond 2 few models draw anything useful."
        )


def without(change: Contents, concept: str) -> Contents:
    """Return `change` without `concept` and its aliases, solved again for the others; preserved prompts remain.

    Raises:
        ValueError: The change has no such concept or no other, contains nothing that was solved, or lacks its preserve
            terms.
    """
    pairs, aliases = remove_concept(change.pairs, change.protocol.get("aliases", {}), concept)
    removed = frozenset(change.pairs) - frozenset(pairs)
    _check_complete(change)
    names = sorted(pairs)
    cache = _FactorCache(_ridge(change))
    solved: list[_Solved] = []
    for m in change.movements:
        keys, residuals, owners = _sorted_keys([(change, m, removed)], names)
        solved.append(_solved(m, residuals, owners, cache.factorised(keys, m.gram)))
    protocol = {**change.protocol, "pairs": {name: pairs[name] for name in names}}
    if "aliases" in protocol:
        protocol["aliases"] = aliases
    strength = protocol.pop("strength", {})
    if others := {old: value for old, value in strength.items() if old not in removed}:
        protocol["strength"] = others
    movements = tuple(one.movement for one in solved)
    return Contents(movements, protocol, _summary(solved, protocol))


def remove_concept(
    pairs: Mapping[str, str], aliases: Mapping[str, str], concept: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Return `pairs` and `aliases` without `concept` and without the aliases that are erased because of it.

    Args:
        pairs: Old concept to new, with the aliases.
        aliases: Alias to the concept that it is erased with.
        concept: The concept, or one alias.

    Raises:
        ValueError: The concept is not among them, or no other would be left.
    """
    if concept not in pairs:
        known = listed(map(repr, pairs))
        raise ValueError(
            f"this change has no concept {concept!r}: it has {known}. Name one of them."
        )
    removed = {concept, *(alias for alias, of in aliases.items() if of == concept)}
    rest = {old: new for old, new in pairs.items() if old not in removed}
    if not rest:
        raise ValueError(
            f"{concept!r} is the only concept of this change, nothing would be left of it: use the unedited model."
        )
    return rest, {alias: of for alias, of in aliases.items() if alias not in removed}


def order(change: Contents) -> tuple[str, str]:
    """Return a sorting key, so that a sum does not depend on the order of its terms."""
    return digest(change.movements), str(sorted(change.pairs.items()))


def preserve_settings(change: Contents) -> tuple[frozenset[str], float]:
    """Return the preserved prompts and their weight; no prompts and 0 if the weight is 0.

    For a change by `auto`, these are its terms as JSON and 1. The weight of exact preservation is infinite.
    """
    if terms := change.protocol.get("terms"):
        return frozenset(json.dumps(term, sort_keys=True) for term in terms), 1.0
    weight = change.protocol.get("preserve_weight") or 0.0
    weight = math.inf if weight == EXACT else float(weight)
    prompts = frozenset(change.protocol.get("preserve", []))
    return (prompts, weight) if prompts and weight > 0 else (frozenset(), 0.0)


def check_solved(change: Contents) -> None:
    """Raise unless every movement of `change` was solved from keys.

    Raises:
        ValueError: A movement was made in another way.
    """
    if change.ridge is None or not all(len(m.keys) for m in change.movements):
        raise ValueError(
            f"only changes that were solved can be added or stacked, this one is by {change.protocol.get('method')!r}: "
            "apply it on its own."
        )


def refuse_difference(names: str) -> NoReturn:
    """Raise a `ValueError` about changes that differ in the settings `names`."""
    raise ValueError(f"these changes differ in {names}: make them again with the same settings.")


def _ridge(change: Contents) -> float:
    ridge = change.ridge
    assert ridge is not None
    return ridge


def _check_separable(change: Contents) -> None:
    rows = "terms" in change.protocol and any(map(is_embedding, change.sites))
    several = "encoders" in change.protocol  # each encoder has its own settings
    if rows or several or change.protocol.get("repair"):
        raise ValueError(
            "the movements of a change by `auto` depend on all its concepts: add it with `edit.stack(model, [a, b])`, "
            "remove a concept with `edit.stack(model, [a], without=['...'])`."
        )


def _check_complete(change: Contents) -> None:
    """Raise unless the preserve terms of `change` are in memory."""
    _check_separable(change)
    check_solved(change)
    prompts, weight = preserve_settings(change)
    # exact preservation has no terms: it is in the keys
    if prompts and math.isfinite(weight) and any(m.gram is None for m in change.movements):
        raise ValueError(
            "this change preserves prompts but lacks their terms, which are saved only with `gram=True`: use "
            "`edit.stack(model, [a, b])` to add it, or `edit.complete(model, change)` first."
        )


def _check_alike(first: Contents, second: Contents) -> None:
    if set(first.sites) != set(second.sites):
        raise ValueError(
            f"these changes move different weights, {', '.join(first.sites[:3])} and {', '.join(second.sites[:3])}: "
            "apply one after the other."
        )
    bases = {m.site: m for m in first.movements}
    if not all(_have_same_base(bases[m.site], m) for m in second.movements):
        raise ValueError(
            "these changes were made for different weights (other base hashes), or one is a file of an older release "
            "made in another half precision: make both on the same unedited model."
        )
    for change in (first, second):
        check_solved(change)
    names = [n for n in _EQUAL if first.protocol.get(n) != second.protocol.get(n)]
    preserved = [preserve_settings(change) for change in (first, second)]
    if preserved[0][0] and preserved[1][0] and preserved[0][1] != preserved[1][1]:
        names.append("preserve_weight")
    if math.inf in (preserved[0][1], preserved[1][1]) and preserved[0][0] != preserved[1][0]:
        names.append("preserve, which they hold exactly")
    if names:
        refuse_difference(", ".join(names))


def _have_same_base(a: Movement, b: Movement) -> bool:
    """Return whether two movements start from one weight, one from a cast of the other's, or both from casts of one."""
    if a.base_hash in (b.base_hash, *b.casts) or b.base_hash in a.casts:
        return True
    first, second = a.base_sample, b.base_sample
    return of_one_weight(first, second) or of_one_weight(second, first)


def _joint_base(a: Movement, b: Movement) -> Movement:
    """Return the movement whose base has more digits; one in float16 also accepts the bfloat16 base of the other."""
    if a.base_hash in (b.base_hash, *b.casts):
        return b if a.base_hash != b.base_hash else a
    if b.base_hash in a.casts:
        return a
    half, brain = (a, b) if of_one_weight(a.base_sample, b.base_sample) else (b, a)
    return dataclasses.replace(half, casts=(*half.casts, brain.base_hash))


def _shared_concepts(first: Contents, second: Contents) -> frozenset[str]:
    """Return the concepts of both changes; raise if the two treat one of them differently."""
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
                f"contradictory pairs: {old!r} → {targets[0]!r} has two strengths. Remove it from one change with "
                f"`without({old!r})`."
            )
    if both and first.protocol.get("frames") != second.protocol.get("frames"):
        refuse_difference("frames")
    return frozenset(both)


def _sorted_keys(
    parts: Sequence[tuple[Contents, Movement, frozenset[str]]], names: Sequence[str]
) -> tuple[Tensor, Tensor, list[int]]:
    """Return keys, residuals and owners of some movements of one weight, in the order of the concepts `names`.

    Each part is a change, its movement, and the concepts to leave out.
    """
    keys: list[Tensor] = []
    residuals: list[Tensor] = []
    owners: list[int] = []
    for place, name in enumerate(names):
        for change, movement, left_out in parts:
            concepts = list(change.pairs)
            if name not in concepts or name in left_out:
                continue
            rows = [i for i, owner in enumerate(movement.owners) if concepts[owner] == name]
            keys.append(movement.keys[rows].double())
            residuals.append(movement.residuals[rows].double())
            owners += [place] * len(rows)
    return torch.cat(keys), torch.cat(residuals), owners


def _joint_gram(
    first: Contents, second: Contents, a: Movement, b: Movement, *, once: bool
) -> Tensor | None:
    if once and (a.gram is None) != (b.gram is None):
        return b.gram if a.gram is None else a.gram
    for change in (first, second):
        _check_complete(change)
    if once or b.gram is None:
        return a.gram
    return b.gram if a.gram is None else a.gram + b.gram


@dataclass(frozen=True, eq=False)
class _Factorised:
    """Keys and preserve terms with their factors, and the keys times the right factor."""

    keys: Tensor
    gram: Tensor | None
    factors: Factors
    projected: Tensor


class _FactorCache:
    """Factorisations computed so far: weights with the same keys share one."""

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge
        self._entries: list[_Factorised] = []

    def factorised(self, keys: Tensor, gram: Tensor | None) -> _Factorised:
        for entry in self._entries:
            if torch.equal(entry.keys, keys) and _same(entry.gram, gram):
                return entry
        factors = factorise(keys, ridge=self._ridge, gram=gram, method="auto")
        self._entries.append(_Factorised(keys, gram, factors, keys @ factors.right.T))
        return self._entries[-1]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@dataclass(frozen=True, eq=False)
class _Solved:
    """The movement of one weight, solved again.

    Attributes:
        movement: The movement.
        report: Measurements of the solve.
        moved: Squared norm of the movement of each key's output, shape (N,).
        requested: Squared norm of each key's residual, shape (N,).
    """

    movement: Movement
    report: dict[str, Any]
    moved: Tensor
    requested: Tensor


def _solved(
    movement: Movement, residuals: Tensor, owners: Sequence[int], shared: _Factorised
) -> _Solved:
    """Return the movement of one weight, solved again for other residuals."""
    solution = shared.factors.solve(residuals)
    left, right = compress(solution.left, solution.right, orthonormal=solution.orthonormal)
    solved = dataclasses.replace(
        movement, left=left, right=right, keys=shared.keys, residual_data=residuals, owners=tuple(owners),
        gram=shared.gram,
    )  # fmt: skip
    outputs = shared.projected @ solution.left.T
    report = {
        "keys": len(shared.keys),
        "rank": left.shape[1],
        "delta_norm": float(solution.left.norm()),  # the rows of the right factor are orthonormal
        "condition_number": solution.condition_number,
        "effective_rank": solution.effective_rank,
        "residual_left": float((residuals - outputs).norm()) / max(float(residuals.norm()), 1e-300),
    }
    return _Solved(solved, report, outputs.square().sum(1), residuals.square().sum(1))


def _summary(solved: Sequence[_Solved], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of a solve of several weights: the largest values, and the movement of each concept."""
    reports = [one.report for one in solved]
    report = {name: max(r[name] for r in reports) for name in reports[0]}
    if "terms" in protocol:
        return report  # the residuals of `auto` are sums, which do not hold the whole requested movement
    moved, requested = (
        torch.cat(parts)
        for parts in zip(*((one.moved, one.requested) for one in solved), strict=True)
    )
    owners = [owner for one in solved for owner in one.movement.owners]
    shares = concept_movement(moved, requested, owners, list(protocol["pairs"]))
    strength = protocol.get("strength", {})  # a scaled change has scaled residuals
    shares = {old: share * abs(strength.get(old, 1.0)) for old, share in shares.items()}
    return {**report, "concept_movement": shares}


def _check_contradictions(movements: Sequence[Movement], pairs: Sequence[tuple[str, str]]) -> None:
    for m in movements:
        rows = contradiction(m.keys, m.residuals)
        if rows is not None:
            (a, b), (c, d) = (pairs[m.owners[row]] for row in rows)
            raise ValueError(
                f"contradictory pairs: {a!r} → {b!r} and {c!r} → {d!r} give one key two targets. Keep one of them, or "
                "edit fewer `positions`."
            )


def _joint_protocol(first: Contents, second: Contents, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of both; where they may differ, those of `first`, since the order is fixed."""
    preserved = [preserve_settings(change) for change in (first, second)]
    protocol = {**second.protocol, **first.protocol, "pairs": dict(pairs)}
    if "terms" in protocol:
        protocol["terms"] = _all_terms(first, second)
        protocol["preserve"] = sorted({p for c in (first, second) for p in c.protocol["preserve"]})
    else:
        protocol["preserve"] = sorted(preserved[0][0] | preserved[1][0])
        weight = max(preserved[0][1], preserved[1][1])
        protocol["preserve_weight"] = weight if math.isfinite(weight) else EXACT
    frames = [change.protocol.get("frames") for change in (first, second)]
    if frames[0] != frames[1]:
        protocol["frames"] = sorted({frame for part in frames for frame in part or []})
    aliases = {**second.protocol.get("aliases", {}), **first.protocol.get("aliases", {})}
    if aliases:
        protocol["aliases"] = dict(sorted(aliases.items()))
    strength = {**first.protocol.get("strength", {}), **second.protocol.get("strength", {})}
    if strength:
        protocol["strength"] = dict(sorted(strength.items()))
    return protocol


def _all_terms(first: Contents, second: Contents) -> list[dict[str, Any]]:
    """Return the preserve terms of two changes by `auto`; equal lists count once."""
    terms = list(first.protocol["terms"])
    if second.protocol["terms"] != terms:
        terms += second.protocol["terms"]
    return terms
