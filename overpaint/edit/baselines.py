"""Two edits to compare against: swapping token embeddings, and the same solve at a place that should not matter."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from overpaint.edit.captions import Positions
from overpaint.edit.change import Change, Movement
from overpaint.edit.quickfix import FRAMES, quickfix
from overpaint.edit.weights import PROJECTIONS, fingerprint, text_layers, weight_at
from overpaint.model import TextToImage

__all__ = ["random_site", "swap_embedding"]


def swap_embedding(model: TextToImage, pairs: Mapping[str, str]) -> Change:
    """Change that copies the new concept's token embeddings over those of the old concept.

    What both begin or end with ("style") is left out; the other tokens are matched in order. Where the old concept has
    more, the last new one is repeated; where it has fewer, its last token gets the mean of the new ones left over. All
    other prompts with one of the old tokens change too, which is the weakness of this baseline.

    Args:
        model: Its text encoder must be a CLIP; it is not touched.
        pairs: Old concept to new.

    Raises:
        ValueError: A concept is empty, or one token would get two embeddings.

    Source: asked for by the reviewers of Basu et al., 2024, https://openreview.net/forum?id=Qmw9ne6SOQ.
    """
    if not pairs:
        raise ValueError(
            "`pairs` is empty: name at least one concept and its replacement, {'van gogh': 'painting'}."
        )
    site = "text.token_embedding"
    parameter = weight_at(model, site)
    weight = parameter.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight at {site} holds NaN or infinity: load an undamaged model.")
    rows: dict[int, Tensor] = {}
    for old, new in pairs.items():
        for token, row in _matched(weight, _tokens(model, old), _tokens(model, new)):
            if not torch.equal(rows.setdefault(token, row), row):
                name = model.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(
                    f"contradictory pairs: the token {name!r} would get two embeddings, one of them from {old!r} → "
                    f"{new!r}. Swap these concepts one at a time, or use `quickfix`."
                )
    tokens = [token for token, row in rows.items() if not torch.equal(row, weight[token])]
    left = torch.zeros(len(weight), len(tokens), dtype=torch.float64)
    left[tokens, range(len(tokens))] = 1.0
    moved = [rows[token] - weight[token] for token in tokens]
    right = torch.stack(moved) if moved else weight.new_zeros(0, weight.shape[1])
    width = weight.shape[1]
    movement = Movement(
        site=site,
        base_hash=fingerprint(parameter),
        left=left,
        right=right,
        keys=torch.zeros(0, width),
        residuals=torch.zeros(0, len(weight)),
        owners=(),
        gram=None,
    )
    protocol = {"method": "swap_embedding", "model": model.name, "pairs": dict(pairs)}
    report = {"tokens": len(tokens), "rank": len(tokens), "delta_norm": float(right.norm())}
    return Change((movement,), protocol, report)


def random_site(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    seed: int = 0,
    preserve: Sequence[str] = (),
    preserve_weight: float = 0.1,
    ridge: float = 0.01,
    positions: Positions = "from_subject_to_end",
    frames: Sequence[str] = FRAMES,
) -> Change:
    """`quickfix` with the same arguments at a layer after the first and a projection, both drawn by `seed`.

    It meets its own targets as well as the real edit does; that the pictures nevertheless stay shows that the place
    matters and not the size of the movement.

    Raises:
        ValueError: The model has one text layer only, or as `quickfix`.
    """
    last = len(text_layers(model)) - 1
    if last < 1:
        raise ValueError(
            "a random site needs a second text layer: this model has one. Compare with `swap_embedding`."
        )
    generator = torch.Generator().manual_seed(seed)
    layer = int(torch.randint(1, last + 1, (1,), generator=generator))
    projection = PROJECTIONS[int(torch.randint(len(PROJECTIONS), (1,), generator=generator))]
    change = quickfix(
        model,
        pairs,
        preserve=preserve,
        preserve_weight=preserve_weight,
        ridge=ridge,
        positions=positions,
        frames=frames,
        layer=layer,
        projection=projection,
    )
    return dataclasses.replace(
        change, protocol={**change.protocol, "method": "random_site", "seed": seed}
    )


def _tokens(model: TextToImage, concept: str) -> list[int]:
    tokens = model.tokenizer(concept, add_special_tokens=False, verbose=False).input_ids
    if not tokens:
        raise ValueError(f"the concept {concept!r} is empty: name it in words.")
    return tokens


def _matched(weight: Tensor, old: Sequence[int], new: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return each old token with the row it gets, shape (D,)."""
    while min(len(old), len(new)) > 1 and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    while min(len(old), len(new)) > 1 and old[0] == new[0]:
        old, new = old[1:], new[1:]
    sources = [new[min(i, len(new) - 1)] for i in range(len(old))]
    rows = [weight[source] for source in sources]
    if len(new) > len(old):
        rows[-1] = weight[list(new[len(old) - 1 :])].mean(0)
    return list(zip(old, rows, strict=True))
