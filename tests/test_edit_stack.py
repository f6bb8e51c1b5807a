"""Changes that add, scale and come apart: laws of the joint solve, and what cannot be added."""

import dataclasses
import itertools
import math

import pytest
import torch

from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.weights import find_weight

GOGH, SNOOPY, R2D2 = {"van gogh": "painting"}, {"snoopy": "dog"}, {"r2d2": "robot"}
KEPT = ["", "a cat", "monet"]


def near(a, b, *, to=1e-8):
    return float((a.delta - b.delta).norm()) <= to * float(b.delta.norm())


def bytes_of(change):
    return [t.numpy().tobytes() for m in change.movements for t in (m.left, m.right, m.residuals)]


@pytest.fixture(scope="module")
def gogh(tiny_sd1):
    return edit.quickfix(tiny_sd1, GOGH, preserve=KEPT)


@pytest.fixture(scope="module")
def snoopy(tiny_sd1):
    return edit.quickfix(tiny_sd1, SNOOPY, preserve=KEPT)


@pytest.fixture(scope="module")
def r2d2(tiny_sd1):
    return edit.quickfix(tiny_sd1, R2D2, preserve=KEPT)


@pytest.fixture(scope="module")
def both(tiny_sd1):
    return edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=KEPT)


def test_a_sum_is_the_joint_solve_in_either_order_to_the_byte(gogh, snoopy, both):
    total = gogh + snoopy
    assert near(total, both)
    assert bytes_of(total) == bytes_of(snoopy + gogh)
    assert total.protocol == (snoopy + gogh).protocol
    assert total.pairs == GOGH | SNOOPY
    assert not near(total, dataclasses.replace(gogh, movements=_sum(gogh, snoopy)), to=0.1)


def _sum(a, b):
    """The naive sum, which each of the two spoils for the other."""
    left, right = torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right])
    return (dataclasses.replace(a.movements[0], left=left, right=right),)


def test_three_sums_are_one_however_they_are_bracketed(gogh, snoopy, r2d2):
    totals = [
        bytes_of(sum(order[1:], order[0])) for order in itertools.permutations([gogh, snoopy, r2d2])
    ]
    assert totals.count(totals[0]) == 6
    assert bytes_of(gogh + (snoopy + r2d2)) == totals[0]


def test_a_concept_that_both_have_counts_once(gogh, both):
    assert near(gogh + gogh, gogh)
    assert near(gogh + both, both)
    assert len((gogh + both).keys) == len(both.keys)


def test_equal_preserve_terms_count_once_and_others_add_up(tiny_sd1, gogh, both):
    plain = edit.quickfix(tiny_sd1, SNOOPY)
    assert near(gogh + plain, both)
    other = edit.quickfix(tiny_sd1, SNOOPY, preserve=["a dog"])
    assert near(gogh + other, edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=[*KEPT, "a dog"]))
    assert (gogh + other).protocol["preserve"] == sorted([*KEPT, "a dog"])
    one = edit.quickfix(tiny_sd1, SNOOPY, preserve_weight=0.0, preserve=["a dog"])
    assert near(gogh + one, both)
    assert (gogh + one).protocol["preserve"] == sorted(KEPT)


def test_changes_that_preserve_nothing_stack_whatever_their_method_or_weight(tiny_sd1, gogh):
    other = [edit.loco(tiny_sd1, pairs, layers=[7]) for pairs in (GOGH, SNOOPY)]
    assert edit.stack(tiny_sd1, other).pairs == GOGH | SNOOPY
    plain = edit.quickfix(tiny_sd1, SNOOPY, preserve_weight=7.0)
    assert near(
        edit.stack(tiny_sd1, [gogh, plain]), edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=KEPT)
    )


def test_a_preserved_prompt_on_both_lists_counts_once_in_a_stack(tiny_sd1, gogh):
    other = edit.quickfix(tiny_sd1, SNOOPY, preserve=["", "a dog"])
    joint = edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=[*KEPT, "a dog"])
    assert near(edit.stack(tiny_sd1, [other, gogh]), joint)
    assert not near(other + gogh, joint, to=1e-4)


def test_taking_a_concept_out_again_undoes_the_sum(gogh, snoopy, both):
    assert near((gogh + snoopy).without("snoopy"), gogh)
    assert near(both.without("van gogh"), snoopy)
    left = both.without("van gogh")
    assert (left.pairs, set(left.movements[0].owners)) == (SNOOPY, {0})
    assert left.protocol["preserve"] == KEPT


def test_scaling_is_a_dial(tiny_sd1, gogh):
    half = 0.5 * gogh
    assert torch.allclose(half.delta, 0.5 * gogh.delta, atol=1e-12)
    assert half.digest == (gogh * 0.5).digest != gogh.digest
    assert bytes_of(half * 2) == bytes_of(gogh)
    assert "strength" not in (half * 2).protocol
    before = find_weight(tiny_sd1, gogh.site).parameter.detach().clone()
    with (gogh * 0).applied(tiny_sd1):
        assert torch.equal(find_weight(tiny_sd1, gogh.site).parameter, before)
    with (-1 * gogh).applied(tiny_sd1):
        assert torch.equal(
            find_weight(tiny_sd1, gogh.site).parameter, (before.double() - gogh.delta).float()
        )


def test_a_scaled_change_asks_for_that_much_when_it_is_solved_again(gogh, snoopy, both):
    assert near(0.5 * gogh + 0.5 * snoopy, 0.5 * both)
    mixed = 0.5 * gogh + snoopy
    assert mixed.protocol["strength"] == {"van gogh": 0.5}
    assert near(mixed.without("snoopy"), 0.5 * gogh)
    assert "strength" not in mixed.without("van gogh").protocol


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_dial_goes_to_finite_numbers_only(gogh, factor):
    with pytest.raises(ValueError, match="can be scaled by a finite number only, got .* 1 is the"):
        factor * gogh


@pytest.mark.parametrize("other", ["0.5", None, True, 2j, [1]])
def test_what_is_no_number_does_not_multiply_or_add(gogh, other):
    with pytest.raises(TypeError, match="unsupported operand|multiply sequence by non-int"):
        gogh * other
    with pytest.raises(TypeError, match="unsupported operand"):
        gogh + other


def test_a_saved_change_lacks_its_preserve_terms_unless_asked(tiny_sd1, gogh, snoopy, tmp_path):
    gogh.save(tmp_path / "small.safetensors")
    gogh.save(tmp_path / "large.safetensors", gram=True)
    small, large = (Change.load(tmp_path / f"{n}.safetensors") for n in ("small", "large"))
    assert (tmp_path / "small.safetensors").stat().st_size + 64 * 64 * 8 <= (
        tmp_path / "large.safetensors"
    ).stat().st_size
    assert bytes_of(large + snoopy) == bytes_of(gogh + snoopy) == bytes_of(small + snoopy)
    plain = edit.quickfix(tiny_sd1, SNOOPY)
    for attempt in (lambda: small + plain, lambda: (large + plain) + small.without("van gogh")):
        with pytest.raises(ValueError, match=r"lacks their terms.*stack\(model|only concept"):
            attempt()
    assert near(edit.complete(tiny_sd1, small) + plain, gogh + plain)
    assert near(edit.stack(tiny_sd1, [small, plain]), gogh + plain)
    both = small + snoopy
    both.save(tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"`edit\.complete\(model, change\)` first"):
        Change.load(tmp_path / "both.safetensors").without("snoopy")


def test_completing_needs_the_model_it_was_made_for(tiny_sd1, tiny_xl, gogh):
    lost = dataclasses.replace(gogh, movements=(dataclasses.replace(gogh.movements[0], gram=None),))
    assert torch.allclose(edit.complete(tiny_sd1, lost).movements[0].gram, gogh.movements[0].gram)
    assert edit.complete(tiny_sd1, edit.quickfix(tiny_sd1, GOGH)).movements[0].gram is None
    with pytest.raises(ValueError, match="wrong base hash: .* or use the model it was made for"):
        edit.complete(tiny_xl, lost)
    foreign = dataclasses.replace(lost, protocol={**lost.protocol, "method": "hand"})
    with pytest.raises(ValueError, match="made by 'hand' cannot be read again: save it with `gram"):
        edit.complete(tiny_sd1, foreign)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"pairs": SNOOPY, "ridge": 0.1}, "these changes differ in ridge: make them again"),
        ({"pairs": SNOOPY, "positions": "last_subject"}, "these changes differ in positions"),
        ({"pairs": SNOOPY, "preserve": KEPT, "preserve_weight": 1.0}, "differ in preserve_weight"),
        ({"pairs": GOGH, "frames": [""]}, "these changes differ in frames"),
        ({"pairs": SNOOPY, "layer": 1}, "move different weights, text.* and text.*: apply one"),
        (
            {"pairs": {"van gogh": "photo"}},
            "contradictory pairs: 'van gogh' → 'painting' and .*Keep",
        ),
        (
            {"pairs": {"Van Gogh": "photo"}},
            "contradictory pairs: .* give one key two targets. Keep",
        ),
    ],
)
def test_what_does_not_belong_together_is_not_added(tiny_sd1, gogh, other, message):
    pairs = other.pop("pairs")
    made = edit.quickfix(tiny_sd1, pairs, **other)
    for attempt in (lambda: gogh + made, lambda: made + gogh):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_changes_of_other_weights_or_by_no_solve_are_not_added(tiny_sd1, gogh):
    with pytest.raises(
        ValueError, match="contradictory pairs: 'van gogh' → 'painting' has two str"
    ):
        gogh + 0.5 * gogh
    with gogh.applied(tiny_sd1):
        later = edit.quickfix(tiny_sd1, SNOOPY)
    with pytest.raises(ValueError, match=r"different weights \(other base hashes\): make both"):
        gogh + later
    swap = edit.swap_embedding(tiny_sd1, SNOOPY)
    with pytest.raises(ValueError, match="only changes that were solved can be added"):
        swap + swap


def test_a_concept_that_is_not_there_or_alone_is_not_taken_out(gogh, both):
    with pytest.raises(
        ValueError, match="has no concept 'monet': it has 'van gogh', 'snoopy'. Name"
    ):
        both.without("monet")
    with pytest.raises(ValueError, match="'van gogh' is the only concept of this change"):
        gogh.without("van gogh")


def test_changes_of_the_cross_attention_add_up_and_are_completed_too(tiny_sd1, tmp_path):
    options = {"preserve": ["monet", "a cat"], "frames": ["", "art by "], "layers": [0, 3]}
    parts = [edit.uce(tiny_sd1, pairs, **options) for pairs in (GOGH, SNOOPY)]
    joint, total = edit.uce(tiny_sd1, GOGH | SNOOPY, **options), parts[0] + parts[1]
    assert bytes_of(total) == bytes_of(parts[1] + parts[0])
    parts[0].save(tmp_path / "part.safetensors")
    stacked = edit.stack(tiny_sd1, [Change.load(tmp_path / "part.safetensors"), parts[1]])
    for made in (total, stacked):
        assert len(made.movements) == 4
        for a, b in zip(made.movements, joint.movements, strict=True):
            assert a.site == b.site and near(a, b, to=1e-4)
    alone = total.without("snoopy")
    for a, b in zip(alone.movements, parts[0].movements, strict=True):
        assert near(a, b, to=1e-4)
