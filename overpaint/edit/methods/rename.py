"""Rename a concept: its tokens get the rows of the token embedding that belong to its replacement.

The text encoder then reads the old words as the new ones, as if the prompt had been rewritten. What the model knows of
the concept stays: the old rows, or another wording, bring it back. A prompt filter has the same effect on the same
prompts.

Source: ours, the one-hot case of `least_squares`; see `token_rows`.
Deviations: none, the method is ours.
"""

import time
from collections.abc import Mapping
from typing import Any

from overpaint import probes
from overpaint.edit.captions import check_pairs
from overpaint.edit.change import Change
from overpaint.edit.encoders import Encoder, edited_parts, joined
from overpaint.edit.everyday_drift import with_collateral
from overpaint.edit.methods import token_rows
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.token_rules import obstacles
from overpaint.edit.weights import encoder_index
from overpaint.model import TextToImage

__all__ = ["rename"]


def rename(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    any_token: bool = False,
    encoder: Encoder = "all",
    collateral: bool = True,
) -> Change:
    """Return the change of token rows that makes the text encoders read old words as new ones.

    Every prompt with a moved token changes, whatever it is about; no other prompt does. Tokens are matched as in
    `token_rows.target_rows`. By default only such tokens move that everyday prompts do not hold: whole words of
    letters that are no frequent words or names and end none (`token_rules`).

    Args:
        model: Its text encoders must be CLIPs; it is not modified.
        pairs: Old concept to new; for `""` the tokens get the row of the end of text.
        any_token: Move every token in which the concepts differ, frequent words and pieces of words too.
        encoder: As in `quickfix`.
        collateral: Measure everyday captions and names that hold the tokens, as many as take about a second.

    Returns:
        The change of the token embedding of each encoder. Its report holds `tokens` (for each concept the moved
        tokens), `unmoved` (for each concept the other tokens, with the reason), `token_captions` (for each moved token
        how many of 5,000 everyday captions hold it, and examples), and `collateral`, as in `edit.collateral`.

    Raises:
        ValueError: A concept has no token that may move, is empty, or one token would get two rows.
        UnknownSite: The model has no such encoder.
    """
    check_pairs(pairs)
    parts = edited_parts(model, encoder)
    change = joined(model, {part: _renamed(model, pairs, part, any_token) for part in parts})
    return with_collateral(model, change) if collateral else change


def _renamed(model: TextToImage, pairs: Mapping[str, str], part: str, any_token: bool) -> Change:
    """Return the change of the token embedding of one encoder."""
    started = time.perf_counter()
    targets = token_rows.target_rows(model, pairs, part)
    every = {old: dict(rows) for old, rows in targets.items()}
    unmoved: dict[str, dict[str, str]] = {}
    if not any_token:
        unmoved = {old: _unmoved(model, old, rows, part) for old, rows in targets.items()}
    rows = token_rows.joint_rows(model, targets, pairs, part)
    movement = token_rows.movement(model, rows, part)
    remarks = [
        f"{old!r} is renamed in part: {', '.join(map(repr, tokens))} stay, since other prompts hold them."
        for old, tokens in unmoved.items()
        if tokens
    ]
    report: dict[str, Any] = {
        "tokens": {old: token_rows.token_names(model, r, part) for old, r in targets.items()},
        "unmoved": {old: tokens for old, tokens in unmoved.items() if tokens},
        "token_captions": token_rows.caption_counts(
            model, rows, probes.everyday("validation"), part
        ),
        "rank": movement.left.shape[1],
        "delta_norm": float(movement.right.norm()),
        "concept_movement": token_rows.row_movement(model, targets, every, part),
        "seconds": {"all": round(time.perf_counter() - started, 3)},
    }
    report |= notes(model, [*pairs, *pairs.values()], *remarks)
    head = protocol("rename", model, pairs) | {"any_token": any_token}
    return Change((movement,), head, report)


def _unmoved(model: TextToImage, old: str, rows: token_rows.Rows, part: str) -> dict[str, str]:
    """Take the tokens that may not move out of `rows`; return them with the reasons.

    Raises:
        ValueError: No token is left.
    """
    reasons = obstacles(model.tokenizers[encoder_index(model, part)], old)
    barred = {token: reasons[token] for token in rows if reasons[token]}
    names = token_rows.token_names(model, {token: rows[token] for token in barred}, part)
    listed = {name: reasons[token] for name, token in zip(names, barred, strict=True)}
    if len(barred) == len(rows):
        why = ", ".join(f"{n.removesuffix('</w>')!r} is {reason}" for n, reason in listed.items())
        raise ValueError(
            f"{old!r} has no token of its own ({why}), so other prompts would change with it: use `edit.auto`, or "
            "`any_token=True` to move them all the same."
        )
    for token in barred:
        del rows[token]
    return listed
