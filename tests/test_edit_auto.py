"""Automatic edits: sums against explicit keys, predicted and bounded drift, the layer scan, bad input."""

import itertools

import pytest
import torch

from overpaint import edit
from overpaint.edit import auto, stack, vocabulary
from overpaint.edit.captions import align_captions, gather, layer_inputs
from overpaint.edit.methods import layer_scan
from overpaint.edit.methods.automatic import preserve_terms
from overpaint.edit.methods.preserve_search import RIDGES
from overpaint.edit.weights import find_weight

SITE = "text.0.self_attn.out_proj"
SMALL = {
    "repair": False,
    "collateral": False,
    "contexts": 24,
    "background": 32,
    "vocabulary": ["monet", "snoopy", "van dyck"],
}
PAIR = {"van gogh": "painting"}


@pytest.fixture(scope="module")
def change(tiny_shallow):
    return auto(tiny_shallow, PAIR, **SMALL)


def explicit(model, old, new, frames):
    """Return keys (N, D_in) and residuals (N, D_out) of all captions, one row for each key."""
    pairs = align_captions(model, {old: new}, frames, "subject_to_end")
    keys, residuals = [], []
    weight = find_weight(model, SITE).parameter.detach().double()
    for p in pairs:
        first, second = p.old, p.new
        places = [(a, b) for a, b in p.positions if a < first.eos]
        places.append((first.eos, second.eos))
        places += [(a, max(a, second.eos + 1)) for a in range(first.eos + 1, len(first.ids))]
        h = layer_inputs(model, SITE, torch.stack([first.ids, second.ids])).double()
        for a, b in places:
            keys.append(h[0, a])
            residuals.append(weight @ (h[1, b] - h[0, a]))
    return torch.stack(keys), torch.stack(residuals)


def test_the_movement_is_the_least_squares_fit_of_explicit_keys(tiny_shallow, change):
    banned = sorted({*PAIR, *PAIR.values()})
    words = vocabulary.fillers(tiny_shallow.tokenizer, without=banned)
    others = sorted({*SMALL["vocabulary"], "painting"})
    frames = vocabulary.frames(words, size=24, seed=0, among=others)
    keys, residuals = explicit(tiny_shallow, "van gogh", "painting", frames)
    system = keys.T @ keys / 24 + preserve_terms(tiny_shallow, change)
    system += change.protocol["ridge"] * torch.eye(len(system), dtype=torch.float64)
    target = torch.linalg.solve(system, keys.T @ residuals / 24).T
    assert (change.delta - target).norm() <= 1e-6 * target.norm()


def test_stored_keys_and_residuals_give_the_same_solution(change):
    m = change.movements[0]
    assert m.keys.shape[0] <= m.keys.shape[1]
    assert set(m.owners) == {0}
    delta = torch.linalg.solve(
        m.keys.T @ m.keys + m.gram + change.protocol["ridge"] * torch.eye(m.keys.shape[1]).double(),
        m.keys.T.double() @ m.residuals.double(),
    ).T
    assert (delta - change.delta).norm() <= 1e-6 * delta.norm()


def test_preserve_terms_can_be_read_again(tiny_shallow, change):
    gram = change.movements[0].gram
    assert (preserve_terms(tiny_shallow, change) - gram).norm() <= 1e-9 * gram.norm()


def test_concepts_above_the_bound_are_preserved_or_named(tiny_shallow):
    loose = auto(tiny_shallow, PAIR, **SMALL, preserve_weight=0.0, bound=1e9)
    tight = auto(tiny_shallow, PAIR, **SMALL, preserve_weight=0.0, bound=1e-3, allowance=0.9)
    assert loose.report["endangered"] == []
    watched = {row["concept"]: row for row in tight.report["endangered"]}
    assert "van dyck" in watched
    assert watched["van dyck"]["drift"] < watched["van dyck"]["drift_before"] / 2
    for concept in SMALL["vocabulary"]:
        row = watched.get(concept)
        assert row is None or row["drift"] <= 1e-3 or concept in tight.report["not_kept"]


def test_the_reported_drift_equals_that_of_the_layer_outputs(tiny_shallow):
    edited = auto(tiny_shallow, PAIR, **SMALL, preserve_weight=0.0, bound=1e-3, allowance=0.9)
    row = next(r for r in edited.report["endangered"] if r["concept"] == "van dyck")
    words = vocabulary.fillers(tiny_shallow.tokenizer, without=["van gogh", "painting"])
    others = sorted({*SMALL["vocabulary"], "painting"})
    frames = vocabulary.frames(words, size=64, seed=1, among=others)[:8]
    captions = [frame.replace("{}", "van dyck") for frame in frames]
    moved = (
        layer_inputs(tiny_shallow, SITE, tiny_shallow.tokenize(captions)).double() @ edited.delta.T
    )
    fitted = vocabulary.frames(words, size=24, seed=0, among=others)
    _, residuals = explicit(tiny_shallow, "van gogh", "painting", fitted)
    target = float(residuals.square().sum()) / 24
    assert row["drift"] == pytest.approx(float(moved.square().sum()) / 8 / target, rel=1e-6)


def test_a_larger_preserve_weight_misses_more_and_drifts_less(change):
    scan = change.report["scan"]
    assert [row["chosen"] for row in scan].count(True) == 1
    for lighter, heavier in itertools.pairwise(scan):
        assert heavier["drift"] < lighter["drift"]
        assert heavier["missed"] > lighter["missed"] - 1e-3


def test_the_same_arguments_make_the_same_change(tiny_shallow, change):
    assert auto(tiny_shallow, PAIR, **SMALL).digest == change.digest
    assert auto(tiny_shallow, PAIR, **SMALL, seed=1).digest != change.digest


def test_the_weight_is_restored_bit_for_bit(tiny_shallow, change):
    before = find_weight(tiny_shallow, SITE).parameter.detach().clone()
    with change.applied(tiny_shallow):
        assert not torch.equal(find_weight(tiny_shallow, SITE).parameter, before)
    assert torch.equal(find_weight(tiny_shallow, SITE).parameter, before)


def test_keys_start_at_the_last_token_where_a_known_concept_is_a_prefix(tiny_shallow):
    from overpaint.edit.caption_sums import extended_pair

    (whole,) = align_captions(tiny_shallow, PAIR, ["{}"], "subject_to_end")
    free, bound = extended_pair(whole, "van gogh", []), extended_pair(whole, "van gogh", ["van"])
    assert free.positions[0][0] == free.old.first
    assert bound.positions[0][0] == bound.old.last
    assert free.old.first < free.old.last


def test_gather_returns_keys_and_sources_at_the_positions_of_a_pair(tiny_shallow):
    (p,) = align_captions(tiny_shallow, PAIR, ["{}"], "subject_to_end")
    h = layer_inputs(tiny_shallow, SITE, torch.stack([p.old.ids, p.new.ids]))
    keys, values = gather(h, [p])
    assert torch.equal(keys, h[0, [a for a, _ in p.positions]])
    assert torch.equal(values, h[1, [b for _, b in p.positions]])


def test_frames_depend_on_the_seed_and_have_one_slot(tiny_shallow):
    words = vocabulary.fillers(tiny_shallow.tokenizer, without=["an apple"])
    assert "apple" not in words and words == tuple(sorted(words))
    frames = vocabulary.frames(words, size=40, seed=3)
    assert frames == vocabulary.frames(words, size=40, seed=3)
    assert frames != vocabulary.frames(words, size=40, seed=4)
    assert all(frame.count("{}") == 1 for frame in frames)
    assert {"twemoji style"} <= set(vocabulary.concepts("icons"))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({}, {}, "name at least one concept"),
        ({" ": "van gogh"}, {}, "name it in words"),
        ({"van gogh": "<|endoftext|>"}, {}, "holds the special token"),
        (PAIR, {"preserve": ["a cat <|endoftext|>"]}, "holds the special token"),
        (PAIR, {"aliases": [""]}, "an alias is empty"),
        (PAIR, {"aliases": ["dog"], "preserve": ["dog"]}, "the alias 'dog' is also preserved"),
        ({**PAIR, "cat": "owl"}, {"aliases": ["dog"]}, "belongs to 0 of the erased concepts"),
        ({"van gogh": "van gogh"}, {}, "equals its target"),
        (PAIR, {"preserve": ["a van gogh picture"]}, "take it off the list"),
        (PAIR, {"contexts": 1}, "at least 8 captions"),
        (PAIR, {"bound": 0.0}, "positive and finite"),
        (PAIR, {"preserve_weight": -1.0}, "a number from 0"),
        (PAIR, {"vocabulary": "klingon"}, "unknown vocabulary"),
    ],
)
def test_bad_input_is_refused(tiny_shallow, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        auto(tiny_shallow, pairs, **{**SMALL, **options})


def test_one_text_in_place_of_a_list_is_refused(tiny_shallow):
    with pytest.raises(TypeError, match="write"):
        auto(tiny_shallow, PAIR, preserve="monet")


def test_the_plot_of_the_scan_marks_the_chosen_weight(tiny_shallow, change, tmp_path):
    from overpaint.edit import plot, quickfix

    drawing = plot(change, tmp_path / "scan.svg")
    chosen = next(row for row in change.report["scan"] if row["chosen"])
    assert f"{chosen['preserve_weight']:g} (chosen)" in drawing.svg().decode()
    assert (tmp_path / "scan.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="make it with `edit.auto`"):
        plot(quickfix(tiny_shallow, PAIR))


def test_a_saved_change_is_completed_and_added_in_either_order(tiny_shallow, change, tmp_path):
    other = auto(tiny_shallow, {"monet": "dog"}, **{**SMALL, "vocabulary": ["snoopy"]})
    change.save(tmp_path / "a.safetensors")
    loaded = type(change).load(tmp_path / "a.safetensors")
    assert loaded.movements[0].gram is None
    with pytest.raises(ValueError, match="edit.stack"):
        loaded + other
    whole = edit.complete(tiny_shallow, loaded)
    gram = change.movements[0].gram
    assert (whole.movements[0].gram - gram).norm() <= 1e-9 * gram.norm()
    both = whole + other
    assert both.digest == (other + whole).digest
    again = edit.complete(tiny_shallow, both).movements[0].gram
    assert (again - both.movements[0].gram).norm() <= 1e-9 * again.norm()
    assert set(both.pairs) == {"van gogh", "monet"}


def test_a_stack_equals_one_change_of_all_concepts(tiny_shallow, change):
    other = auto(tiny_shallow, {"monet": "dog"}, **SMALL)
    both = {"van gogh": "painting", "monet": "dog"}
    edited = stack(tiny_shallow, [other, change])
    assert edited.digest == stack(tiny_shallow, [change, other]).digest
    assert edited.digest == auto(tiny_shallow, dict(sorted(both.items())), **SMALL).digest
    against = auto(tiny_shallow, {"monet": "cat"}, **SMALL)
    with pytest.raises(ValueError, match="contradictory"):
        stack(tiny_shallow, [other, against])


def test_the_chosen_layer_is_in_the_report_and_edited_as_if_it_was_given(tiny_shallow):
    edited = auto(tiny_shallow, PAIR, **{**SMALL, "contexts": 32}, layer="auto")
    rows = edited.report["layers"]
    assert [row["layer"] for row in rows] == list(range(4))
    (best,) = (row for row in rows if row["chosen"])
    assert edited.protocol["layer"] == best["layer"]
    assert edited.site == f"text.{best['layer']}.self_attn.out_proj"
    assert (
        edited.digest
        == auto(tiny_shallow, PAIR, **{**SMALL, "contexts": 32}, layer=best["layer"]).digest
    )


def test_missed_and_drift_of_a_layer_equal_those_at_the_encoders_output(tiny_shallow, change):
    (pair,) = align_captions(tiny_shallow, PAIR, ["a cat by {}"], "last_subject")
    ids = torch.stack([pair.old.ids, pair.new.ids])

    def last(ids):
        with torch.no_grad():
            return tiny_shallow.text_encoder(ids)[0]

    rows = layer_scan.scan(tiny_shallow, lambda _: change, pairs=[pair], test_captions=["a dog"])
    ((a, b),) = pair.positions
    before, other = last(ids), last(tiny_shallow.tokenize(["a dog"]))
    with change.applied(tiny_shallow):
        after, moved = last(ids), last(tiny_shallow.tokenize(["a dog"]))
    target = float((before[1, b] - before[0, a]).square().sum())
    assert rows[0]["missed"] == pytest.approx(
        float((before[1, b] - after[0, a]).square().sum()) / target, rel=1e-4
    )
    assert rows[0]["drift"] == pytest.approx(
        float((moved - other).square().sum()) / target, rel=1e-4
    )


def test_a_chosen_ridge_is_one_of_those_scanned(tiny_shallow):
    edited = auto(tiny_shallow, PAIR, **SMALL, ridge="auto")
    rows = edited.report["scan"]
    assert {row["ridge"] for row in rows} == set(RIDGES)
    (best,) = (row for row in rows if row["chosen"])
    assert (edited.ridge, edited.protocol["preserve_weight"]) == (
        best["ridge"],
        best["preserve_weight"],
    )
