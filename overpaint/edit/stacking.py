"""Functions on changes that read the model again: stack several, and restore preserve terms that files leave out.

The operators of `Change` work without the model. The functions here call the methods that made the changes, so this
module imports all of these methods.
"""

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor

from overpaint.edit import algebra
from overpaint.edit.change import Change
from overpaint.edit.encoders import Encoder, joined, separated
from overpaint.edit.everyday_drift import with_collateral
from overpaint.edit.methods.automatic import auto, preserve_terms
from overpaint.edit.methods.cross_attention import preserved_keys
from overpaint.edit.methods.quickfix import preserve_gram
from overpaint.edit.movement import Movement
from overpaint.edit.null_space import EXACT
from overpaint.edit.stored_weights import is_base_of
from overpaint.edit.weights import find_weights, fingerprint, is_embedding
from overpaint.errors import check_texts
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = ["complete", "stack"]

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


def stack(
    model: TextToImage,
    changes: Sequence[Change],
    *,
    without: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Change:
    """Return one change of several: their pairs and preserved prompts, solved jointly. The order does not matter.

    Args:
        model: The unedited model that all of them were made for; the preserved prompts are read from it again.
        changes: Made with the same ridge, positions and preserve weight, of the same weights.
        without: Old concepts to leave out.
        on_progress: Called with (done, total, label), for changes by `auto`, which take long.

    Raises:
        ValueError: Settings or base weights differ, one concept has two new ones, there is nothing to stack, or nothing
            would be left.
        TypeError: `changes` is one change, or `without` is one text.
    """
    if isinstance(changes, Change):
        raise TypeError("`changes` must be a list of changes, got one: write [change].")
    if not changes:
        raise ValueError("nothing to stack: give at least one change.")
    check_texts(without, "without")
    automatic = ["terms" in change.protocol for change in changes]
    if any(automatic) and not all(automatic):
        algebra.refuse_difference("method")
    for change in changes:
        if not any(automatic):
            algebra.check_solved(change.contents)
        _check_bases(model, change)
    if any(automatic):
        return _stacked_auto(model, changes, without, on_progress)
    preserve = sorted({prompt for c in changes for prompt in c.protocol.get("preserve", [])})
    weights = {
        c.protocol["preserve_weight"] for c in changes if algebra.preserve_settings(c.contents)[0]
    }
    if len(weights) > 1:
        algebra.refuse_difference("preserve_weight")
    if weights and EXACT not in weights:
        common = {"preserve_weight": weights.pop()}
        changes = [dataclasses.replace(c, protocol={**c.protocol, **common}) for c in changes]
        changes = [complete(model, c, preserve=preserve) for c in changes]
    joint = functools.reduce(Change.__add__, sorted(changes, key=_order))
    return functools.reduce(Change.without, without, joint)


def complete(
    model: TextToImage, change: Change, *, preserve: Sequence[str] | None = None
) -> Change:
    """Return `change` with its preserve terms computed again from `model`; its movement is the same.

    Args:
        model: The unedited model that the change was made for.
        change: Made by `quickfix`, `uce` or `auto`.
        preserve: Prompts to preserve from the next solve on, instead of those of the change.

    Raises:
        ValueError: The model's weight is another, or the change was made in another way.
    """
    if "terms" in change.protocol:
        return _complete_auto(model, change)
    prompts = list(change.protocol.get("preserve", []) if preserve is None else preserve)
    if not prompts or change.protocol.get("preserve_weight") == EXACT:
        return change  # exact preservation has no terms: it is in the keys
    _check_bases(model, change)
    grams: dict[str, Tensor | None] = {}
    movements: list[Movement] = []
    for m in change.movements:
        # all weights of the UNet share their keys
        source = m.site if m.site.startswith("text") else "unet"
        if source not in grams:
            keys = preserved_keys(model, change.protocol, m.site, prompts)
            grams[source] = preserve_gram(keys, change.protocol["preserve_weight"])
        movements.append(dataclasses.replace(m, gram=grams[source]))
    protocol = {**change.protocol, "preserve": prompts}
    return Change(tuple(movements), protocol, change.report)


def _complete_auto(model: TextToImage, change: Change) -> Change:
    _check_bases(model, change)
    if all(m.gram is not None for m in change.movements if not is_embedding(m.site)):
        return change
    parts = separated(change)
    complete = {part: _with_terms(model, part, of_part) for part, of_part in parts.items()}
    grams = {m.site: m.gram for of_part in complete.values() for m in of_part.movements}
    movements = [dataclasses.replace(m, gram=grams[m.site]) for m in change.movements]
    return dataclasses.replace(change, movements=tuple(movements))


def _with_terms(model: TextToImage, part: str, change: Change) -> Change:
    """Return the change of one text encoder by `auto` with its preserve terms."""
    if change.protocol.get("repair"):  # its inputs depend on the first movement: compute both again
        settings = {
            name: change.protocol.get(name, False)
            for name in (*_AUTOMATIC, "preserve", "preserve_weight", "without")
        }
        aliases = change.protocol.get("aliases", {})
        pairs = {old: new for old, new in change.pairs.items() if old not in aliases}
        again = auto(
            model, pairs, **settings, encoder=_named(part), aliases=aliases, collateral=False
        )
        grams = {m.site: m.gram for m in again.movements}
    else:
        solved = [m.site for m in change.movements if not is_embedding(m.site)]
        grams = {site: preserve_terms(model, change, part) for site in solved}
    movements = [dataclasses.replace(m, gram=grams.get(m.site)) for m in change.movements]
    return dataclasses.replace(change, movements=tuple(movements))


def _stacked_auto(
    model: TextToImage,
    changes: Sequence[Change],
    without: Sequence[str],
    on_progress: Progress | None,
) -> Change:
    """Return one change by `auto` of all concepts, computed again, because its captions depend on all concepts."""
    pairs: dict[str, str] = {}
    aliases: dict[str, str] = {}
    explicit: set[str] = set()
    for change in sorted(changes, key=_order):
        aliases |= change.protocol.get("aliases", {})
        explicit |= change.pairs.keys() - change.protocol.get("aliases", {}).keys()
        for old, new in change.pairs.items():
            if pairs.setdefault(old, new) != new:
                targets = " and ".join(f"{old!r} → {t!r}" for t in sorted((pairs[old], new)))
                raise ValueError(f"contradictory pairs: {targets}. Keep one of them.")
    aliases = {alias: of for alias, of in aliases.items() if alias not in explicit}
    by_encoder = [separated(change) for change in changes]
    if any(parts.keys() != by_encoder[0].keys() for parts in by_encoder):
        algebra.refuse_difference("encoder")
    for concept in without:
        pairs, aliases = algebra.remove_concept(pairs, aliases, concept)
    pairs = {old: new for old, new in sorted(pairs.items()) if old not in aliases}
    stacked = {
        part: _stacked_part(model, [p[part] for p in by_encoder], pairs, aliases, part, on_progress)
        for part in by_encoder[0]
    }
    change = joined(model, stacked)
    measured = any("collateral" in one.report for one in changes)
    return with_collateral(model, change) if measured else change


def _stacked_part(
    model: TextToImage,
    changes: Sequence[Change],
    pairs: dict[str, str],
    aliases: dict[str, str],
    part: str,
    on_progress: Progress | None,
) -> Change:
    """Return the change of one text encoder by `auto` of all `pairs` and `aliases`, with the settings of `changes`."""
    solved = [change for change in changes if change.protocol["terms"]] or list(changes)
    settings = [{n: change.protocol.get(n, False) for n in _AUTOMATIC} for change in solved]
    if unlike := [n for n in _AUTOMATIC if any(s[n] != settings[0][n] for s in settings)]:
        algebra.refuse_difference(", ".join(unlike))
    if any(change.protocol.get("strength") for change in changes):
        raise ValueError(
            "a change by `auto` that was scaled cannot be stacked: stack the changes as they were made, then scale."
        )
    both = {n: sorted({t for c in changes for t in c.protocol[n]}) for n in ("preserve", "without")}
    return auto(
        model,
        pairs,
        **both,
        **settings[0],
        encoder=_named(part),
        aliases=aliases,
        collateral=False,
        on_progress=on_progress,
    )


def _named(part: str) -> Encoder:
    return "text" if part == "text" else "text2"


def _order(change: Change) -> tuple[str, str]:
    return algebra.order(change.contents)


def _check_bases(model: TextToImage, change: Change) -> None:
    for m, weight in zip(change.movements, find_weights(model, change.sites), strict=True):
        if not is_base_of(model, weight, m.base_hash, m.casts):
            base = fingerprint(weight.parameter)
            raise ValueError(
                f"wrong base hash: {m.site} of {model.name!r} is {base[:12]}, not the weight that the change was made "
                "for. Revert what is applied, or use the model it was made for."
            )
