r"""Edit rows of the token embedding: the first matrix that reads a prompt, and the only one that separates all tokens.

The inputs of the embedding are one-hot, so the regularised least squares of `least_squares` splits into one problem for
each row: a token's row becomes :math:`(n v + a m w) / (n + a m)`, with :math:`v` the target row in the `n` captions of
the concept and :math:`w` the present row, which is the target in the `m` preserved captions with that token. Where no
preserved caption holds the token, :math:`m` is 0 and the row is replaced as a whole; prompts without the token do not
move at all. Only that case is used here, since a row between two words means neither.

Source: ours; the reviewers of Basu et al., 2024, requested a comparison with token embeddings,
https://openreview.net/forum?id=Qmw9ne6SOQ.
Deviations: none, the method is ours.
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

__all__ = [
    "ExclusiveRows",
    "exclusive_rows",
    "edited_words",
    "movement",
    "rows_replaced",
    "target_rows",
    "texts_with_tokens",
    "token_names",
]

Rows = dict[int, Tensor]  # token id to its new row, (D,)


@dataclass(frozen=True, eq=False)
class ExclusiveRows:
    """Tokens of one concept that occur in no other text.

    Attributes:
        rows: For each token its new row, float64, shape (D,).
        complete: These are all tokens in which the concept differs from its replacement.
    """

    rows: Rows
    complete: bool


def target_rows(model: TextToImage, pairs: Mapping[str, str]) -> dict[str, Rows]:
    """Return, for each old concept, its tokens and their target rows, float64.

    Tokens that both concepts begin or end with ("style") are left out; the others are matched in order. Where the old
    concept has more tokens, the last new one is repeated; where it has fewer, its last token gets the mean of the
    remaining new ones.

    Raises:
        ValueError: A concept is empty, a token would get two rows, or the weight holds NaN.
    """
    weight = _embedding(model)
    targets = {old: _rows(model, weight, old, new) for old, new in pairs.items()}
    for old, rows in targets.items():
        if rows is None:
            raise ValueError(
                f"contradictory pairs: a token of {old!r} stands in it twice and would get two embeddings. Swap it in "
                "other words, or use `quickfix`."
            )
    return {old: rows for old, rows in targets.items() if rows is not None}


def exclusive_rows(
    model: TextToImage, pairs: Mapping[str, str], preserve: Sequence[str]
) -> dict[str, ExclusiveRows]:
    """Return the target rows of tokens that occur in no other text; a concept without such tokens is left out.

    Other texts are those of `preserve`, the function words of the captions that edits are fitted on, the other concepts
    of `pairs`, and all replacements. A concept is also left out if it or its replacement holds a token that is not a
    word (punctuation, end of text, padding, a single byte), or if another pair edits a token of its replacement.
    """
    weight = _embedding(model)
    function_words = " ".join(vocabulary.PLAIN)
    shared = {
        token
        for text in (*preserve, *pairs.values(), function_words)
        for token in _read(model, text)
    }
    tokens = {old: set(_read(model, old)) for old in pairs}
    exclusive: dict[str, ExclusiveRows] = {}
    for old, new in pairs.items():
        rows = _moving(weight, _rows(model, weight, old, new) or {})
        others = set[int]().union(*(tokens[name] for name in pairs if name != old))
        sources = _without_common(_read(model, old), _read(model, new))[1]
        if others & set(sources) or not all(_is_word(model, t) for t in (*rows, *sources)):
            continue
        alone = {token: row for token, row in rows.items() if token not in shared | others}
        if alone:
            exclusive[old] = ExclusiveRows(alone, len(alone) == len(rows))
    return exclusive


def texts_with_tokens(
    model: TextToImage, rows: Mapping[int, Tensor], texts: Sequence[str]
) -> list[str]:
    """Return the texts that hold a token of `rows`; their features change too."""
    return [text for text in texts if not rows.keys().isdisjoint(_read(model, text))]


def movement(model: TextToImage, rows: Mapping[int, Tensor]) -> Movement:
    """Return the movement of the embedding that sets the rows of tokens; the model is not modified."""
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
def rows_replaced(model: TextToImage, rows: Mapping[int, Tensor]) -> Iterator[None]:
    """Replace the embedding's outputs at the tokens of `rows` while the block runs.

    The output of the module is patched and no weight is written: another model that shares the weight is not affected,
    and the method works for an offloaded weight.
    """
    if not rows:
        yield
        return
    module = model.text_encoder.get_input_embeddings()
    tokens = torch.tensor(sorted(rows))
    table = torch.stack([rows[token] for token in sorted(rows)])
    current: list[Tensor] = []  # token ids of the current call

    def store_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        current[:] = [args[0] if args else kwargs["input"]]
        return args, kwargs

    def replace(output: Tensor) -> Tensor:
        ids = current[0].to("cpu")
        place = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        replaced = (tokens[place] == ids)[..., None].to(output.device)
        return torch.where(replaced, table[place].to(output), output)

    with hooks.patch_inputs({module: store_ids}), hooks.patch({module: replace}):
        yield


def token_names(model: TextToImage, rows: Mapping[int, Tensor]) -> list[str]:
    """Return the tokens of `rows` as the tokenizer spells them, with `</w>` at the end of a word."""
    return [str(name) for name in model.tokenizer.convert_ids_to_tokens(list(rows))]


def edited_words(report: Mapping[str, Any]) -> list[str]:
    """Return the words whose rows of the token embedding a change moves, in the order of its report.

    Args:
        report: Of a change. Its `tokens` map each concept to tokens as the tokenizer spells them. Entries of another
            type, as the number of tokens that other methods report, are ignored.
    """
    tokens = report.get("tokens")
    rows = tokens.values() if isinstance(tokens, Mapping) else ()
    names = [name for row in rows if isinstance(row, list) for name in row]
    return [name.removesuffix("</w>") for name in names if isinstance(name, str)]


def _moving(weight: Tensor, rows: Mapping[int, Tensor]) -> Rows:
    return {token: row for token, row in rows.items() if not torch.equal(row, weight[token])}


def _embedding(model: TextToImage) -> Tensor:
    weight = find_weight(model, EMBEDDING).parameter.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"the weight at {EMBEDDING} holds NaN or infinity: load an undamaged model."
        )
    return weight


def _rows(model: TextToImage, weight: Tensor, old: str, new: str) -> Rows | None:
    """Return the tokens of a concept and their target rows; `None` if one token would get two rows."""
    rows: Rows = {}
    for token, row in _matched(weight, _tokens(model, old), _tokens(model, new)):
        if not torch.equal(rows.setdefault(token, row), row):
            return None
    return rows


def _is_word(model: TextToImage, token: int) -> bool:
    special = {*model.tokenizer.all_special_ids, model.tokenizer.pad_token_id}
    if token in special:
        return False
    # One byte of a letter, which many letters share, is decoded as U+FFFD, which is not alphanumeric.
    return any(c.isalnum() for c in model.tokenizer.decode([token]))


def _read(model: TextToImage, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _tokens(model: TextToImage, concept: str) -> list[int]:
    tokens = _read(model, concept)
    if not tokens:
        raise ValueError(f"the concept {concept!r} is empty: name it in words.")
    return tokens


def _matched(weight: Tensor, old: Sequence[int], new: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return each old token with its target row, shape (D,)."""
    old, new = _without_common(old, new)
    sources = [new[min(i, len(new) - 1)] for i in range(len(old))]
    rows = [weight[source] for source in sources]
    if len(new) > len(old):
        rows[-1] = weight[list(new[len(old) - 1 :])].mean(0)
    return list(zip(old, rows, strict=True))


def _without_common(old: Sequence[int], new: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return both without their common first and last tokens; at least one token of each remains."""
    while min(len(old), len(new)) > 1 and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    while min(len(old), len(new)) > 1 and old[0] == new[0]:
        old, new = old[1:], new[1:]
    return old, new
