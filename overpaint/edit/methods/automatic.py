r"""Automatic edit: preserve list, preserve weight and captions are chosen from text alone.

`quickfix` fits a concept in four captions and preserves the prompts in its argument. The automatic edit has more steps:

1. the concept's keys come from some hundred captions around it, with words of the tokenizer's vocabulary;
2. some thousand captions without it, and the empty prompt, are the background that should not move;
3. concepts that would drift by more than `bound` are added to the preserve list, with a weight that each round
   multiplies by four (`preserve_search`); the report names those that remain above the bound;
4. the weight of the background is the one with the best harmonic mean of target movement reached and drift avoided,
   measured on captions that are not fitted;
5. the MLP of the layer is fitted to the residual that the projection cannot remove (`mlp_repair`);
6. everyday captions and names outside the vocabulary are read with and without the change (`everyday_drift`).

On request (`tokens=True`) rare words of a concept are first replaced in the token embedding (`token_rows`), and the
layer is edited for the concepts that have other tokens too.

Every sum is a mean over captions, so weights do not depend on their number. Only sums over keys are stored: memory does
not grow with the captions either, and one solve is D_in x D_in.

Source: ours; the objective is that of `least_squares`, the site that of Basu et al., 2024 (Diff-QuickFix),
https://arxiv.org/abs/2310.13730, the preserved keys those of Gandikota et al., 2024 (UCE),
https://arxiv.org/abs/2308.14761.
Deviations: this is neither paper's method. Diff-QuickFix has four captions, no preserve list and no MLP step.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Literal, Unpack

from torch import Tensor

from overpaint import probes
from overpaint.edit import caption_sums as texts
from overpaint.edit import vocabulary as vocabularies
from overpaint.edit.caption_sums import TEST_CAPTIONS, Reader
from overpaint.edit.captions import align_captions, check_pairs
from overpaint.edit.change import Change
from overpaint.edit.concept_words import alias_target, check_special, contains, find_aliases
from overpaint.edit.encoders import Encoder, edited_parts, joined, unread_layer
from overpaint.edit.everyday_drift import with_collateral
from overpaint.edit.methods import layer_edit, token_rows
from overpaint.edit.provenance import notes, protocol
from overpaint.edit.weights import encoder_index, find_weight, is_embedding, text_layers
from overpaint.errors import check_seed, check_texts
from overpaint.model import TextToImage
from overpaint.model.sampling import Progress

__all__ = ["auto", "preserve_terms"]


def auto(
    model: TextToImage,
    pairs: Mapping[str, str],
    *,
    vocabulary: str | Sequence[str] | None = None,
    preserve: Sequence[str] = (),
    without: Sequence[str] = (),
    tokens: bool = False,
    layer: int | Literal["auto"] = 0,
    encoder: Encoder = "all",
    aliases: Literal["auto"] | Sequence[str] | Mapping[str, str] = "auto",
    seed: int = 0,
    collateral: bool = True,
    on_progress: Progress | None = None,
    **settings: Unpack[layer_edit.FitSettings],
) -> Change:
    """Return a change of one text layer with a preserve list chosen from text; the model is not modified.

    Args:
        model: Its text encoders are edited.
        pairs: Old concept to new; several are solved jointly. `""` erases a concept: its captions are read as the
            frames alone.
        vocabulary: Concepts that should not drift: `"icons"`, `"natural"`, or a list; by default the model's own.
        preserve: Further prompts that should not drift, treated like concepts of the vocabulary.
        without: Texts whose words are not used to fill captions, for example the words of a test.
        tokens: Also move token rows, of whole words of letters that are no frequent words or names, end none
            (`token_rules`), and occur in no preserved text, no other concept and no replacement. Every prompt with such
            a word changes. The layer is edited for concepts that have other tokens too, with the replaced rows as its
            input. To move token rows alone, use `rename`.
        layer: Text layer, from 0; or `"auto"`: each layer is edited with a quarter of the captions and without repair,
            and the one with the best result at the encoder's output is used (`layer_scan.scan`). The weights move
            during this search, and are restored bit for bit.
        encoder: `"all"` edits each text encoder with its own keys, captions and preserve weight; `"text"` and `"text2"`
            are the first and the second one of SDXL.
        aliases: Known concepts contained in an erased one that are erased with it: `"auto"` for those that mean the
            same ("van gogh" of "van gogh style", see `concept_words.find_aliases`), a list, or `()` for none. They get
            the same replacement, without "style" and the like, and become pairs of the change.
        seed: Seed of the captions.
        collateral: Measure the drift of everyday captions and names, as many as take about a second, at least four of
            each; see `edit.collateral`, which measures all.
        on_progress: Called with (done, total, label).
        **settings: `contexts`, `background`, `bound`, `preserve_weight`, `allowance`, `ridge` and `repair`, as in
            `layer_edit.Fit`.

    Returns:
        The change. Its report holds `scan` (weight, ridge, missed share, background drift), `endangered` (concept,
        weight, drift before and after) and `not_kept` (concepts that remain above the bound), as measured for the
        projection alone; `layer_missed` and `layer_drift` are measured with the repair. Where the layer was chosen,
        `layers` holds the result of each. `collateral` counts the everyday captions that move and names the worst;
        names that move are in `not_kept` too. With `tokens=True`, `tokens` names the replaced tokens for each concept,
        `token_captions` the everyday captions that hold them, `in_layer` the concepts that the layer is edited for,
        and `carried` known concepts that hold a replaced token (as "apple logo" holds "apple") and change with it.
        `aliases` holds known concepts that are erased with another one, `contained_kept` those that stay although an
        erased one contains them; both map to that concept.

    Raises:
        ValueError: A concept is empty, equals its target or is to be preserved too; a number is out of range.
        TypeError: `preserve` is one text, or a keyword is unknown.
        UnknownSite: The model has no such layer.
    """
    _check_texts(pairs, preserve)
    check_texts(without, "without")
    seed = check_seed(seed)
    fit = layer_edit.Fit(**settings)
    known = texts.known_concepts(model, vocabulary)
    erased, remaining = find_aliases(pairs, known, preserve=preserve, aliases=aliases)
    all_pairs = {**pairs, **{alias: alias_target(pairs[old]) for alias, old in erased.items()}}
    parts = edited_parts(model, encoder)
    for part in parts:
        check_special(model.tokenizers[encoder_index(model, part)], preserve)
        if layer != "auto":
            # Raises for an unknown layer, also if all tokens are replaced and no layer is edited.
            find_weight(model, f"{part}.{layer}.self_attn.out_proj")
        align_captions(model, all_pairs, ["{}"], "subject_to_end", encoder=part)
    head = protocol("auto", model, all_pairs) | {
        "aliases": erased, "preserve": list(preserve), "positions": "auto", "tokens": tokens,
        "without": sorted(without), "seed": seed,
        "vocabulary": vocabulary if isinstance(vocabulary, str | None) else list(vocabulary),
    }  # fmt: skip
    questions = [
        f"{c!r} is part of {old!r} and stays: to erase it too, pass `aliases=[{c!r}]`."
        for c, old in remaining.items()
    ]
    shared = {"aliases": erased, "contained_kept": remaining}
    changes: dict[str, Change] = {}
    for part in parts:
        request = layer_edit.Request(
            model, all_pairs, known, tuple(preserve), tuple(without), seed, part, erased
        )
        change = _edit(request, fit, layer, tokens, on_progress or layer_edit.ignore_progress)
        at = change.protocol["layer"]
        remark = ""
        if not all(is_embedding(m.site) for m in change.movements):
            remark = unread_layer(model, part, at, len(text_layers(model, part)))
        remarks = notes(model, [*all_pairs, *all_pairs.values()], *questions, remark)
        changes[part] = Change(
            change.movements, {**head, **change.protocol}, {**change.report, **shared, **remarks}
        )
    change = joined(model, changes)
    return with_collateral(model, change) if collateral else change


def _edit(
    request: layer_edit.Request,
    fit: layer_edit.Fit,
    layer: int | Literal["auto"],
    tokens: bool,
    report_progress: Progress,
) -> Change:
    """Return the change of one text encoder, with the entries of its protocol that depend on it."""
    started = time.perf_counter()
    model, pairs, part, known = request.model, request.pairs, request.part, request.known
    others = [*request.others, *request.preserve]
    exclusive: dict[str, token_rows.ExclusiveRows] = {}
    if tokens:
        exclusive = token_rows.exclusive_rows(model, pairs, others, part, aliases=request.aliases)
    rest = {o: new for o, new in pairs.items() if o not in exclusive or not exclusive[o].complete}
    rows = {token: row for concept in exclusive.values() for token, row in concept.rows.items()}
    with token_rows.rows_replaced(model, rows, part):
        if not rest:
            edited = layer_edit.no_layer(fit, layer)
        elif layer == "auto":
            edited = layer_edit.edit_best_layer(request, rest, fit, report_progress)
        else:
            edited = layer_edit.edit_layer(request, rest, fit, layer, report_progress)
    report_progress(4, 4, "done")
    settings = dataclasses.asdict(fit) | edited.protocol
    movements, report = list(edited.movements), dict(edited.report)
    if rows:
        movements.append(token_rows.movement(model, rows, part))
        report["tokens"] = {
            old: token_rows.token_names(model, e.rows, part) for old, e in exclusive.items()
        }
        everyday = probes.everyday("validation")
        report["token_captions"] = token_rows.caption_counts(model, rows, everyday, part)
        report["in_layer"] = list(rest)
        others = [concept for concept in known if concept not in pairs]
        report["carried"] = token_rows.texts_with_tokens(model, rows, others, part)
        whole = {old: 1.0 for old in pairs if old not in rest}  # all their tokens are replaced
        report["concept_movement"] = {**whole, **report.get("concept_movement", {})}
    seconds = {"seconds": {"all": round(time.perf_counter() - started, 3)}}
    return Change(tuple(movements), settings, report | seconds)


def preserve_terms(model: TextToImage, change: Change, part: str = "text") -> Tensor:
    """Return the Gram matrix of all preserve terms of a change by `auto`, read again from `model`; (D_in, D_in).

    Args:
        model: The unedited model.
        change: The change of one text encoder.
        part: That encoder.

    Raises:
        UnknownSite: The model has no such layer.
    """
    reader = Reader.at_layer(model, change.protocol["layer"], part)
    width = reader.weight.shape[1]
    total, frames = reader.weight.new_zeros(width, width), ()
    for term in change.protocol["terms"]:
        if "background" not in term:
            total += term["weight"] * reader.gram(texts.concept_captions(term["concept"], frames))
            continue
        words = vocabularies.fillers(model.tokenizer, without=term["without"])
        frames = vocabularies.frames(
            words, size=TEST_CAPTIONS, seed=term["seed"] + 1, among=term["concepts"]
        )
        background = texts.background_captions(model, term)
        total += term["weight"] * texts.background_gram(reader, background)
    return total


def _check_texts(pairs: Mapping[str, str], preserve: Sequence[str]) -> None:
    check_pairs(pairs)
    check_texts(preserve, "preserve")
    for old in pairs:
        edited = [p for p in preserve if contains(p, old)]
        if edited:
            raise ValueError(
                f"the preserved prompt {edited[0]!r} holds {old!r}, which is edited: take it off the list."
            )
