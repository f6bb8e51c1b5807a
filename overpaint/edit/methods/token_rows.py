r"""Edit rows of the token embedding: the first matrix that reads a prompt, and the only one that separates all tokens.

The inputs of the embedding are one-hot, so the regularised least squares of `least_squares` splits into one problem for
each row: a token's row becomes :math:`(n v + a m w) / (n + a m)`, with :math:`v` the target row in the `n` captions of
the concept and :math:`w` the present row, which is the target in the `m` preserved captions with that token. Where no
preserved caption holds the token, :math:`m` is 0 and the row is replaced as a whole; prompts without the token do not
move at all. Only that case is used here, because a row between the rows of two words has the meaning of neither.

Source: ours; the reviewers of Basu et al., 2024, requested a comparison with token embeddings,
https://openreview.net/forum?id=Qmw9ne6SOQ.
Deviations: none, the method is ours.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint.edit import vocabulary
from overpaint.edit.concept_words import GENERIC, check_special
from overpaint.edit.movement import Movement
from overpaint.edit.token_rules import obstacles, texts_with, token_ids
from overpaint.edit.weights import encoder_index, find_weight
from overpaint.model import TextToImage, hooks

__all__ = [
    "ExclusiveRows",
    "caption_counts",
    "edited_words",
    "exclusive_rows",
    "joint_rows",
    "movement",
    "row_movement",
    "rows_replaced",
    "target_rows",
    "texts_with_tokens",
    "token_names",
]

Rows = dict[int, Tensor]  # token id to its new row, (D,)


@dataclass(frozen=True, eq=False)
class ExclusiveRows:
    """Tokens of one concept that may move alone.

    Attributes:
        rows: For each token its new row, float64, shape (D,).
        complete: These are all tokens in which the concept differs from its replacement.
    """

    rows: Rows
    complete: bool


def target_rows(
    model: TextToImage, pairs: Mapping[str, str], part: str = "text"
) -> dict[str, Rows]:
    """Return, for each old concept, its tokens and their target rows in the embedding of the encoder `part`, float64.

    Tokens that both concepts begin or end with ("style") are left out; the others are matched in order. Where the old
    concept has more tokens, the last new one is repeated; where it has fewer, its last token gets the mean of the
    remaining new ones. The target of an empty new concept is the row of the end of text, which is no word.

    Raises:
        ValueError: An old concept is empty, a concept holds a special token, a token would get two rows, or the
            weight holds NaN.
    """
    table = _Table.of(model, part)
    targets = {old: table.rows(old, new) for old, new in pairs.items()}
    for old, rows in targets.items():
        if rows is None:
            raise ValueError(
                f"contradictory pairs: {old!r} contains one token twice, which would get two embeddings. Write it in "
                "other words, or use `quickfix`."
            )
    return {old: rows for old, rows in targets.items() if rows is not None}


def joint_rows(
    model: TextToImage, targets: Mapping[str, Rows], pairs: Mapping[str, str], part: str = "text"
) -> Rows:
    """Return the rows of all concepts in one table.

    Args:
        model: Its tokenizer spells tokens in messages.
        targets: For each old concept its tokens and their rows, as `target_rows` returns them.
        pairs: Old concept to new.
        part: The text encoder.

    Raises:
        ValueError: Two concepts give one token two different rows.
    """
    joint: Rows = {}
    for old, rows in targets.items():
        for token, row in rows.items():
            if not torch.equal(joint.setdefault(token, row), row):
                (name,) = token_names(model, {token: row}, part)
                raise ValueError(
                    f"contradictory pairs: the token {name!r} would get two embeddings, one of them from {old!r} → "
                    f"{pairs[old]!r}. Move these concepts one at a time, or use `quickfix`."
                )
    return joint


def row_movement(
    model: TextToImage, rows: Mapping[str, Rows], targets: Mapping[str, Rows], part: str = "text"
) -> dict[str, float]:
    """Return the `concept_movement` of a report: for each old concept, the rows that move among its target rows.

    Args:
        model: Not changed.
        rows: For each old concept the rows that move.
        targets: For each old concept all rows in which it differs from its replacement.
        part: The text encoder.
    """
    weight = _Table.of(model, part).weight
    squares = {
        old: {token: float((row - weight[token]).square().sum()) for token, row in own.items()}
        for old, own in targets.items()
    }
    return {
        old: (sum(own[token] for token in rows[old]) / sum(own.values())) ** 0.5
        for old, own in squares.items()
        if sum(own.values())
    }


def exclusive_rows(
    model: TextToImage,
    pairs: Mapping[str, str],
    preserve: Sequence[str],
    part: str = "text",
    *,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, ExclusiveRows]:
    """Return the target rows of tokens that may move alone; a concept without such tokens is left out.

    Such a token passes the rules of `token_rules.obstacles` and occurs in no other text. Other texts are those of
    `preserve`, the function words of the captions that edits are fitted on, words for styles and pictures ("style"),
    the other concepts of `pairs`, and all replacements. A concept is also left out if it or its replacement holds a
    token that is not a word (punctuation, end of text, padding, a single byte), or if another pair edits a token of
    its replacement.

    Args:
        model: Not changed.
        pairs: Old concept to new, with the aliases.
        preserve: Texts whose tokens do not change.
        part: The text encoder.
        aliases: Alias to its concept. A token that both have is exclusive if both give it the same row.
    """
    origin = {old: (aliases or {}).get(old, old) for old in pairs}
    table = _Table.of(model, part)
    function_words = " ".join((*vocabulary.PLAIN, *GENERIC))
    shared = {
        token for text in (*preserve, *pairs.values(), function_words) for token in table.read(text)
    }
    tokens = {old: set(table.read(old)) for old in pairs}
    moving = {old: _moving(table.weight, table.rows(old, new) or {}) for old, new in pairs.items()}
    exclusive: dict[str, ExclusiveRows] = {}
    for old, new in pairs.items():
        rows = moving[old]
        others = set[int]().union(
            *(tokens[name] for name in pairs if origin[name] != origin[old]),
            *(_unlike(rows, moving[n], tokens[n]) for n in pairs if origin[n] == origin[old]),
        )
        sources = _without_common(table.read(old), table.read(new))[1]
        if others & set(sources) or not all(table.is_word(t) for t in (*rows, *sources)):
            continue
        barred = obstacles(table.tokenizer, old)
        alone = {t: row for t, row in rows.items() if t not in shared | others and not barred[t]}
        if alone:
            exclusive[old] = ExclusiveRows(alone, len(alone) == len(rows))
    return exclusive


def texts_with_tokens(
    model: TextToImage, rows: Mapping[int, Tensor], texts: Sequence[str], part: str = "text"
) -> list[str]:
    """Return the texts that hold a token of `rows`; their features change too."""
    return texts_with(model.tokenizers[encoder_index(model, part)], rows.keys(), texts)


def caption_counts(
    model: TextToImage, rows: Mapping[int, Tensor], captions: Sequence[str], part: str = "text"
) -> list[dict[str, Any]]:
    """Return for each token of `rows` how many captions hold it, and the first ten of them, ready for JSON."""
    counts: list[dict[str, Any]] = []
    for token, name in zip(rows, token_names(model, rows, part), strict=True):
        holding = texts_with_tokens(model, {token: rows[token]}, captions, part)
        counts.append({"token": name, "captions": len(holding), "examples": holding[:10]})
    return counts


def movement(model: TextToImage, rows: Mapping[int, Tensor], part: str = "text") -> Movement:
    """Return the movement of the encoder's embedding that sets the rows of tokens; the model is not modified."""
    site = f"{part}.token_embedding"
    parameter = find_weight(model, site).parameter
    weight = parameter.detach().to("cpu", torch.float64)
    tokens = sorted(_moving(weight, rows))
    left = torch.zeros(len(weight), len(tokens), dtype=torch.float64)
    left[tokens, range(len(tokens))] = 1.0
    moved = [rows[token] - weight[token] for token in tokens]
    right = torch.stack(moved) if moved else weight.new_zeros(0, weight.shape[1])
    return Movement.of_weight(site, parameter, left, right)


@contextmanager
def rows_replaced(
    model: TextToImage, rows: Mapping[int, Tensor], part: str = "text"
) -> Iterator[None]:
    """Replace the embedding's outputs at the tokens of `rows` while the block runs.

    The output of the module is patched and no weight is written: another model that shares the weight is not affected,
    and the method works for an offloaded weight.
    """
    if not rows:
        yield
        return
    module = model.text_encoders[encoder_index(model, part)].get_input_embeddings()
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


def token_names(model: TextToImage, rows: Mapping[int, Tensor], part: str = "text") -> list[str]:
    """Return the tokens of `rows` as the tokenizer spells them, with `</w>` at the end of a word."""
    tokenizer = model.tokenizers[encoder_index(model, part)]
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(rows))]


def edited_words(report: Mapping[str, Any]) -> list[str]:
    """Return the words whose rows of the token embedding a change moves, in the order of its report.

    Args:
        report: Report of a change. Its `tokens` map each concept to tokens as the tokenizer spells them. Entries of
            another type, as the number of tokens that other methods report, are ignored.
    """
    tokens = report.get("tokens")
    rows = tokens.values() if isinstance(tokens, Mapping) else ()
    names = [name for row in rows if isinstance(row, list) for name in row]
    return list(dict.fromkeys(n.removesuffix("</w>") for n in names if isinstance(n, str)))


def _unlike(rows: Rows, others: Rows, tokens: Collection[int]) -> set[int]:
    """Return those of `tokens` that `others` does not move to the same row as `rows`."""
    return {t for t in tokens if t in rows and not (t in others and others[t].equal(rows[t]))}


def _moving(weight: Tensor, rows: Mapping[int, Tensor]) -> Rows:
    return {token: row for token, row in rows.items() if not torch.equal(row, weight[token])}


@dataclass(frozen=True, eq=False)
class _Table:
    """The token embedding of one text encoder, and the tokenizer that numbers its rows."""

    weight: Tensor
    tokenizer: Any

    @classmethod
    def of(cls, model: TextToImage, part: str) -> "_Table":
        """Return the table of the encoder `part`.

        Raises:
            ValueError: The weight holds NaN.
        """
        site = f"{part}.token_embedding"
        weight = find_weight(model, site).parameter.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"the weight at {site} holds NaN or infinity: load an undamaged model."
            )
        return cls(weight, model.tokenizers[encoder_index(model, part)])

    def read(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def rows(self, old: str, new: str) -> Rows | None:
        """Return the tokens of a concept and their target rows; `None` if one token would get two rows."""
        check_special(self.tokenizer, [old, new])
        tokens = self.read(old)
        if not tokens:
            raise ValueError(f"the concept {old!r} is empty: name it in words.")
        targets = self.read(new) or [int(self.tokenizer.eos_token_id)]
        rows: Rows = {}
        for token, row in _matched(self.weight, tokens, targets):
            if not torch.equal(rows.setdefault(token, row), row):
                return None
        return rows

    def is_word(self, token: int) -> bool:
        if token in {*self.tokenizer.all_special_ids, self.tokenizer.pad_token_id}:
            return False
        # One byte of a letter, which many letters share, is decoded as U+FFFD, which is not alphanumeric.
        return any(c.isalnum() for c in self.tokenizer.decode([token]))


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
