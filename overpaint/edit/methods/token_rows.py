r"""Rows of the token embedding: the first matrix that a prompt meets, and the only one that keeps words apart.

The embedding reads one-hot keys, so the regularised least squares of `solve` falls apart there into one problem a row:
a token's row goes to :math:`(n v + a m w) / (n + a m)`, with :math:`v` the row wanted by the `n` captions of the
concept and :math:`w` its own, wanted by the `m` captions to keep that hold the token. Where no caption to keep does,
:math:`m` is 0 and the row is moved whole; no prompt without the token moves at all, not on average but exactly. That
case is the one used here: a row half way between two words is neither.

Source: ours; that token embeddings should be compared with, was asked by the reviewers of Basu et al., 2024,
https://openreview.net/forum?id=Qmw9ne6SOQ.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import vocabulary
from overpaint.edit.movement import Movement
from overpaint.edit.weights import EMBEDDING, find_weight, fingerprint
from overpaint.model import TextToImage, hooks

__all__ = ["Own", "carried", "movement", "names", "own", "placed", "wanted"]

Rows = dict[int, Tensor]  # a token's number and the row it gets, (D,)


@dataclass(frozen=True, eq=False)
class Own:
    """The tokens of a concept that occur nowhere else.

    Attributes:
        rows: Each token with the row that it gets, float64 (D,).
        whole: Whether these are all tokens in which the concept differs from its replacement.
    """

    rows: Rows
    whole: bool


def wanted(model: TextToImage, pairs: Mapping[str, str]) -> dict[str, Rows]:
    """Return, of each old concept, its tokens and what their rows would become, float64.

    What both concepts begin or end with ("style") is left out; the other tokens are matched in order. Where the old
    concept has more, the last new one is repeated; where it has fewer, its last token gets the mean of the new ones
    left over.

    Raises:
        ValueError: A concept is empty, a token would get two rows, or the weight holds NaN.
    """
    weight = _weight(model)
    found = {old: _rows(model, weight, old, new) for old, new in pairs.items()}
    for old, rows in found.items():
        if rows is None:
            raise ValueError(
                f"contradictory pairs: a token of {old!r} stands in it twice and would get two embeddings. Swap it in "
                "other words, or use `quickfix`."
            )
    return {old: rows for old, rows in found.items() if rows is not None}


def own(model: TextToImage, pairs: Mapping[str, str], kept: Sequence[str]) -> dict[str, Own]:
    """Return what `wanted` does of the tokens that occur nowhere else; nothing of a concept without such tokens.

    Elsewhere is: a text of `kept`, the small words of the captions that edits are fitted on, another concept of
    `pairs`, or a replacement. A concept with tokens that are no word (marks, ends, pads, single bytes) has none of its
    own, nor one whose replacement is edited itself.
    """
    weight = _weight(model)
    plain = " ".join(vocabulary.PLAIN)
    shared = {token for text in (*kept, *pairs.values(), plain) for token in _read(model, text)}
    spoken = {old: set(_read(model, old)) for old in pairs}
    found: dict[str, Own] = {}
    for old, new in pairs.items():
        rows = _moving(weight, _rows(model, weight, old, new) or {})
        others = set[int]().union(*(spoken[name] for name in pairs if name != old))
        sources = _apart(_read(model, old), _read(model, new))[1]
        if others & set(sources) or not all(_is_word(model, t) for t in (*rows, *sources)):
            continue
        alone = {token: row for token, row in rows.items() if token not in shared | others}
        if alone:
            found[old] = Own(alone, len(alone) == len(rows))
    return found


def carried(model: TextToImage, rows: Mapping[int, Tensor], texts: Sequence[str]) -> list[str]:
    """Return the texts that hold one of the tokens and so are changed too."""
    return [text for text in texts if not rows.keys().isdisjoint(_read(model, text))]


def movement(model: TextToImage, rows: Mapping[int, Tensor]) -> Movement:
    """Return the movement of the embedding that gives each token its row; the model is not touched."""
    parameter = find_weight(model, EMBEDDING).parameter
    weight = parameter.detach().to("cpu", torch.float64)
    tokens = sorted(_moving(weight, rows))
    left = torch.zeros(len(weight), len(tokens), dtype=torch.float64)
    left[tokens, range(len(tokens))] = 1.0
    moved = [rows[token] - weight[token] for token in tokens]
    right = torch.stack(moved) if moved else weight.new_zeros(0, weight.shape[1])
    keys, residuals = torch.zeros(0, weight.shape[1]), torch.zeros(0, len(weight))
    return Movement(EMBEDDING, fingerprint(parameter), left, right, keys, residuals, (), None)


@contextmanager
def placed(model: TextToImage, rows: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the model read `rows` in place of its own tokens' while the block runs.

    What the embedding returns is patched and no weight is written to: another model that shares the weight reads what
    it did, and a weight that is kept elsewhere stays there.
    """
    if not rows:
        yield
        return
    module = model.text_encoder.get_input_embeddings()
    tokens = torch.tensor(sorted(rows))
    table = torch.stack([rows[token] for token in sorted(rows)])
    asked: list[Tensor] = []  # the tokens of the call at hand

    def hear(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        asked[:] = [args[0] if args else kwargs["input"]]
        return args, kwargs

    def read(found: Tensor) -> Tensor:
        ids = asked[0].to("cpu")
        place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        moved = (tokens[place] == ids)[..., None].to(found.device)
        return torch.where(moved, table[place].to(found), found)

    with hooks.patch_inputs({module: hear}), hooks.patch({module: read}):
        yield


def names(model: TextToImage, rows: Mapping[int, Tensor]) -> list[str]:
    """Return the tokens as the tokenizer spells them, `</w>` at the end of a word."""
    return [str(name) for name in model.tokenizer.convert_ids_to_tokens(list(rows))]


def _moving(weight: Tensor, rows: Mapping[int, Tensor]) -> Rows:
    return {token: row for token, row in rows.items() if not torch.equal(row, weight[token])}


def _weight(model: TextToImage) -> Tensor:
    weight = find_weight(model, EMBEDDING).parameter.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"the weight at {EMBEDDING} holds NaN or infinity: load an undamaged model."
        )
    return weight


def _rows(model: TextToImage, weight: Tensor, old: str, new: str) -> Rows | None:
    """Return the tokens of a concept and their new rows; `None` if one would get two."""
    rows: Rows = {}
    for token, row in _matched(weight, _tokens(model, old), _tokens(model, new)):
        if not torch.equal(rows.setdefault(token, row), row):
            return None
    return rows


def _is_word(model: TextToImage, token: int) -> bool:
    special = {*model.tokenizer.all_special_ids, model.tokenizer.pad_token_id}
    if token in special:
        return False
    # A byte of a letter, which many letters share, reads as U+FFFD: no word either.
    return any(c.isalnum() for c in model.tokenizer.decode([token]))


def _read(model: TextToImage, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _tokens(model: TextToImage, concept: str) -> list[int]:
    tokens = _read(model, concept)
    if not tokens:
        raise ValueError(f"the concept {concept!r} is empty: name it in words.")
    return tokens


def _matched(weight: Tensor, old: Sequence[int], new: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return each old token with the row it gets, shape (D,)."""
    old, new = _apart(old, new)
    sources = [new[min(i, len(new) - 1)] for i in range(len(old))]
    rows = [weight[source] for source in sources]
    if len(new) > len(old):
        rows[-1] = weight[list(new[len(old) - 1 :])].mean(0)
    return list(zip(old, rows, strict=True))


def _apart(old: Sequence[int], new: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return both without what they begin or end with in common, as long as something is left."""
    while min(len(old), len(new)) > 1 and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    while min(len(old), len(new)) > 1 and old[0] == new[0]:
        old, new = old[1:], new[1:]
    return old, new
