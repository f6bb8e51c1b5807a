"""Automatic preserve lists: sums against explicit keys, drift that is predicted and then bounded, bad input."""

import itertools

import pytest
import torch

from overpaint import edit
from overpaint.edit import auto as make
from overpaint.edit import stack as op_stack
from overpaint.edit import vocabulary
from overpaint.edit.captions import gather, layer_inputs, plan
from overpaint.edit.methods import layer_scan
from overpaint.edit.methods.automatic import RIDGES, preserve_terms
from overpaint.edit.weights import find_weight

SITE = "text.0.self_attn.out_proj"
SMALL = {
    "tokens": False,
    "repair": False,
    "contexts": 24,
    "background": 32,
    "vocabulary": ["monet", "snoopy", "van dyck"],
}
PAIR = {"van gogh": "painting"}


@pytest.fixture(scope="module")
def change(tiny_double):
    return make(tiny_double, PAIR, **SMALL)


def explicit(model, old, new, frames):
    """Return keys and residuals of all captions, one row a key, each caption's weight in them."""
    found = plan(model, {old: new}, frames, "subject_to_end")
    keys, residuals = [], []
    weight = find_weight(model, SITE).parameter.detach().double()
    for p in found:
        first, second = p.old, p.new
        places = [(a, b) for a, b in p.positions if a < first.eos]
        places.append((first.eos, second.eos))
        places += [(a, max(a, second.eos + 1)) for a in range(first.eos + 1, len(first.ids))]
        h = layer_inputs(model, SITE, torch.stack([first.ids, second.ids])).double()
        for a, b in places:
            keys.append(h[0, a])
            residuals.append(weight @ (h[1, b] - h[0, a]))
    return torch.stack(keys), torch.stack(residuals)


def test_the_movement_is_the_least_squares_fit_of_explicit_keys(tiny_double, change):
    banned = sorted({*PAIR, *PAIR.values()})
    words = vocabulary.fillers(tiny_double.tokenizer, without=banned)
    others = sorted({*SMALL["vocabulary"], "painting"})
    frames = vocabulary.frames(words, size=24, seed=0, among=others)
    keys, residuals = explicit(tiny_double, "van gogh", "painting", frames)
    system = keys.T @ keys / 24 + preserve_terms(tiny_double, change)
    system += change.protocol["ridge"] * torch.eye(len(system), dtype=torch.float64)
    wanted = torch.linalg.solve(system, keys.T @ residuals / 24).T
    assert (change.delta - wanted).norm() <= 1e-6 * wanted.norm()


def test_rows_have_the_sums_they_stand_for(change):
    m = change.movements[0]
    assert m.keys.shape[0] <= m.keys.shape[1]
    assert set(m.owners) == {0}
    delta = torch.linalg.solve(
        m.keys.T @ m.keys + m.gram + change.protocol["ridge"] * torch.eye(m.keys.shape[1]).double(),
        m.keys.T.double() @ m.residuals.double(),
    ).T
    assert (delta - change.delta).norm() <= 1e-6 * delta.norm()


def test_what_is_preserved_can_be_read_again(tiny_double, change):
    gram = change.movements[0].gram
    assert (preserve_terms(tiny_double, change) - gram).norm() <= 1e-9 * gram.norm()


def test_what_drifts_too_far_is_kept_or_named(tiny_double):
    loose = make(tiny_double, PAIR, **SMALL, preserve_weight=0.0, bound=1e9)
    tight = make(tiny_double, PAIR, **SMALL, preserve_weight=0.0, bound=1e-3, allowance=0.9)
    assert loose.report["endangered"] == []
    watched = {row["concept"]: row for row in tight.report["endangered"]}
    assert "van dyck" in watched
    assert watched["van dyck"]["drift"] < watched["van dyck"]["drift_before"] / 2
    for concept in SMALL["vocabulary"]:
        row = watched.get(concept)
        assert row is None or row["drift"] <= 1e-3 or concept in tight.report["not_kept"]


def test_a_reported_drift_is_what_the_layer_does(tiny_double):
    found = make(tiny_double, PAIR, **SMALL, preserve_weight=0.0, bound=1e-3, allowance=0.9)
    row = next(r for r in found.report["endangered"] if r["concept"] == "van dyck")
    words = vocabulary.fillers(tiny_double.tokenizer, without=["van gogh", "painting"])
    others = sorted({*SMALL["vocabulary"], "painting"})
    frames = vocabulary.frames(words, size=64, seed=1, among=others)[:8]
    captions = [frame.replace("{}", "van dyck") for frame in frames]
    moved = layer_inputs(tiny_double, SITE, tiny_double.tokenize(captions)).double() @ found.delta.T
    fitted = vocabulary.frames(words, size=24, seed=0, among=others)
    _, residuals = explicit(tiny_double, "van gogh", "painting", fitted)
    wanted = float(residuals.square().sum()) / 24
    assert row["drift"] == pytest.approx(float(moved.square().sum()) / 8 / wanted, rel=1e-6)


def test_a_heavier_weight_misses_more_and_drifts_less(change):
    scan = change.report["scan"]
    assert [row["chosen"] for row in scan].count(True) == 1
    for lighter, heavier in itertools.pairwise(scan):
        assert heavier["drift"] < lighter["drift"]
        assert heavier["missed"] > lighter["missed"] - 1e-3


def test_the_same_arguments_make_the_same_change(tiny_double, change):
    assert make(tiny_double, PAIR, **SMALL).digest == change.digest
    assert make(tiny_double, PAIR, **SMALL, seed=1).digest != change.digest


def test_it_is_undone_bit_for_bit(tiny_double, change):
    before = find_weight(tiny_double, SITE).parameter.detach().clone()
    with change.applied(tiny_double):
        assert not torch.equal(find_weight(tiny_double, SITE).parameter, before)
    assert torch.equal(find_weight(tiny_double, SITE).parameter, before)


def test_where_a_known_concept_begins_the_edit_waits_for_the_last_token(tiny_double):
    from overpaint.edit.caption_sums import placed

    (whole,) = plan(tiny_double, PAIR, ["{}"], "subject_to_end")
    free, bound = placed(whole, "van gogh", []), placed(whole, "van gogh", ["van"])
    assert free.positions[0][0] == free.old.first
    assert bound.positions[0][0] == bound.old.last
    assert free.old.first < free.old.last


def test_gather_reads_the_places_of_a_pair(tiny_double):
    (p,) = plan(tiny_double, PAIR, ["{}"], "subject_to_end")
    h = layer_inputs(tiny_double, SITE, torch.stack([p.old.ids, p.new.ids]))
    keys, values = gather(h, [p])
    assert torch.equal(keys, h[0, [a for a, _ in p.positions]])
    assert torch.equal(values, h[1, [b for _, b in p.positions]])


def test_frames_are_drawn_by_seed_and_hold_one_place(tiny_double):
    words = vocabulary.fillers(tiny_double.tokenizer, without=["an apple"])
    assert "apple" not in words and words == tuple(sorted(words))
    frames = vocabulary.frames(words, size=40, seed=3)
    assert frames == vocabulary.frames(words, size=40, seed=3)
    assert frames != vocabulary.frames(words, size=40, seed=4)
    assert all(frame.count("{}") == 1 for frame in frames)
    assert {"twemoji style"} <= set(vocabulary.concepts("icons"))


@pytest.mark.parametrize(
    ("pairs", "options", "said"),
    [
        ({}, {}, "name at least one concept"),
        ({"van gogh": " "}, {}, "name it in words"),
        ({"van gogh": "van gogh"}, {}, "equals its target"),
        (PAIR, {"preserve": ["a van gogh picture"]}, "take it off the list"),
        (PAIR, {"contexts": 1}, "at least 8 captions"),
        (PAIR, {"bound": 0.0}, "positive and finite"),
        (PAIR, {"preserve_weight": -1.0}, "a number from 0"),
        (PAIR, {"vocabulary": "klingon"}, "unknown vocabulary"),
    ],
)
def test_bad_input_is_refused(tiny_double, pairs, options, said):
    with pytest.raises(ValueError, match=said):
        make(tiny_double, pairs, **{**SMALL, **options})


def test_one_text_is_no_list(tiny_double):
    with pytest.raises(TypeError, match="write"):
        make(tiny_double, PAIR, preserve="monet")


def test_the_scan_is_drawn_with_the_chosen_weight(tiny_double, change, tmp_path):
    from overpaint.edit import plot, quickfix

    drawing = plot(change, tmp_path / "scan.svg")
    chosen = next(row for row in change.report["scan"] if row["chosen"])
    assert f"{chosen['preserve_weight']:g} (chosen)" in drawing.svg().decode()
    assert (tmp_path / "scan.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="make it with `edit.auto`"):
        plot(quickfix(tiny_double, PAIR))


def test_a_saved_change_is_completed_and_added_in_either_order(tiny_double, change, tmp_path):
    other = make(tiny_double, {"monet": "dog"}, **{**SMALL, "vocabulary": ["snoopy"]})
    change.save(tmp_path / "a.safetensors")
    loaded = type(change).load(tmp_path / "a.safetensors")
    assert loaded.movements[0].gram is None
    with pytest.raises(ValueError, match="edit.stack"):
        loaded + other
    whole = edit.complete(tiny_double, loaded)
    gram = change.movements[0].gram
    assert (whole.movements[0].gram - gram).norm() <= 1e-9 * gram.norm()
    both = whole + other
    assert both.digest == (other + whole).digest
    again = edit.complete(tiny_double, both).movements[0].gram
    assert (again - both.movements[0].gram).norm() <= 1e-9 * again.norm()
    assert set(both.pairs) == {"van gogh", "monet"}


def test_stacked_changes_are_one_change_of_all_concepts(tiny_double, change):
    other = make(tiny_double, {"monet": "dog"}, **SMALL)
    both = {"van gogh": "painting", "monet": "dog"}
    found = op_stack(tiny_double, [other, change])
    assert found.digest == op_stack(tiny_double, [change, other]).digest
    assert found.digest == make(tiny_double, dict(sorted(both.items())), **SMALL).digest
    against = make(tiny_double, {"monet": "cat"}, **SMALL)
    with pytest.raises(ValueError, match="contradictory"):
        op_stack(tiny_double, [other, against])


def test_the_layer_is_the_one_that_does_most_and_harms_least_at_the_end(tiny_double):
    found = make(tiny_double, PAIR, **{**SMALL, "contexts": 32}, layer="auto")
    rows = found.report["layers"]
    assert [row["layer"] for row in rows] == list(range(12))
    (best,) = (row for row in rows if row["chosen"])
    assert found.protocol["layer"] == best["layer"]
    assert found.site == f"text.{best['layer']}.self_attn.out_proj"
    assert (
        found.digest
        == make(tiny_double, PAIR, **{**SMALL, "contexts": 32}, layer=best["layer"]).digest
    )


def test_what_a_layer_is_said_to_miss_is_what_the_encoder_gives(tiny_double, change):
    (found,) = plan(tiny_double, PAIR, ["a cat by {}"], "last_subject")
    ids = torch.stack([found.old.ids, found.new.ids])

    def last(ids):
        with torch.no_grad():
            return tiny_double.text_encoder(ids)[0]

    rows = layer_scan.scan(tiny_double, lambda _: change, pairs=[found], unseen=["a dog"])
    ((a, b),) = found.positions
    before, other = last(ids), last(tiny_double.tokenize(["a dog"]))
    with change.applied(tiny_double):
        after, moved = last(ids), last(tiny_double.tokenize(["a dog"]))
    asked = float((before[1, b] - before[0, a]).square().sum())
    assert rows[0]["missed"] == pytest.approx(
        float((before[1, b] - after[0, a]).square().sum()) / asked, rel=1e-4
    )
    assert rows[0]["drift"] == pytest.approx(
        float((moved - other).square().sum()) / asked, rel=1e-4
    )


def test_a_scanned_ridge_is_one_of_those_tried(tiny_double):
    found = make(tiny_double, PAIR, **SMALL, ridge="auto")
    rows = found.report["scan"]
    assert {row["ridge"] for row in rows} == set(RIDGES)
    (best,) = (row for row in rows if row["chosen"])
    assert (found.ridge, found.protocol["preserve_weight"]) == (
        best["ridge"],
        best["preserve_weight"],
    )
