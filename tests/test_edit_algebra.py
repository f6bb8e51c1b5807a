"""Sums, multiples and parts of changes, stacks and completed changes, and changes that cannot be added."""

import dataclasses
import itertools
import math

import pytest
import torch

from overpaint import edit
from overpaint.edit import Change
from overpaint.edit.weights import find_weight

GOGH, SNOOPY, R2D2 = {"van gogh": "painting"}, {"snoopy": "dog"}, {"r2d2": "robot"}
PRESERVED = ["", "a cat", "monet"]


def close(a, b, *, to=1e-8):
    """Return whether the movements of two changes are equal up to a relative error."""
    return float((a.delta - b.delta).norm()) <= to * float(b.delta.norm())


def bytes_of(change):
    return [t.numpy().tobytes() for m in change.movements for t in (m.left, m.right, m.residuals)]


@pytest.fixture(scope="module")
def gogh(tiny_sd1):
    return edit.quickfix(tiny_sd1, GOGH, preserve=PRESERVED)


@pytest.fixture(scope="module")
def snoopy(tiny_sd1):
    return edit.quickfix(tiny_sd1, SNOOPY, preserve=PRESERVED)


@pytest.fixture(scope="module")
def r2d2(tiny_sd1):
    return edit.quickfix(tiny_sd1, R2D2, preserve=PRESERVED)


@pytest.fixture(scope="module")
def both(tiny_sd1):
    return edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=PRESERVED)


def test_a_sum_is_the_joint_solve_with_equal_bytes_in_either_order(gogh, snoopy, both):
    total = gogh + snoopy
    assert close(total, both)
    assert bytes_of(total) == bytes_of(snoopy + gogh)
    assert total.protocol == (snoopy + gogh).protocol
    assert total.pairs == GOGH | SNOOPY
    assert not close(total, dataclasses.replace(gogh, movements=_sum(gogh, snoopy)), to=0.1)


def _sum(a, b):
    """Return the plain sum of both movements, which misses the targets of both."""
    left, right = torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right])
    return (dataclasses.replace(a.movements[0], left=left, right=right),)


def test_addition_is_associative_and_commutative(gogh, snoopy, r2d2):
    totals = [
        bytes_of(sum(order[1:], order[0])) for order in itertools.permutations([gogh, snoopy, r2d2])
    ]
    assert totals.count(totals[0]) == 6
    assert bytes_of(gogh + (snoopy + r2d2)) == totals[0]


def test_a_shared_concept_counts_once(gogh, both):
    assert close(gogh + gogh, gogh)
    assert close(gogh + both, both)
    assert len((gogh + both).keys) == len(both.keys)


def test_equal_preserve_terms_count_once_and_others_add_up(tiny_sd1, gogh, both):
    plain = edit.quickfix(tiny_sd1, SNOOPY)
    assert close(gogh + plain, both)
    other = edit.quickfix(tiny_sd1, SNOOPY, preserve=["a dog"])
    assert close(
        gogh + other, edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=[*PRESERVED, "a dog"])
    )
    assert (gogh + other).protocol["preserve"] == sorted([*PRESERVED, "a dog"])
    one = edit.quickfix(tiny_sd1, SNOOPY, preserve_weight=0.0, preserve=["a dog"])
    assert close(gogh + one, both)
    assert (gogh + one).protocol["preserve"] == sorted(PRESERVED)


def test_changes_that_preserve_nothing_stack_whatever_their_method_or_weight(tiny_sd1, gogh):
    other = [edit.loco(tiny_sd1, pairs, layers=[7]) for pairs in (GOGH, SNOOPY)]
    assert edit.stack(tiny_sd1, other).pairs == GOGH | SNOOPY
    plain = edit.quickfix(tiny_sd1, SNOOPY, preserve_weight=7.0)
    assert close(
        edit.stack(tiny_sd1, [gogh, plain]),
        edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=PRESERVED),
    )


def test_a_preserved_prompt_on_both_lists_counts_once_in_a_stack(tiny_sd1, gogh):
    other = edit.quickfix(tiny_sd1, SNOOPY, preserve=["", "a dog"])
    joint = edit.quickfix(tiny_sd1, GOGH | SNOOPY, preserve=[*PRESERVED, "a dog"])
    assert close(edit.stack(tiny_sd1, [other, gogh]), joint)
    assert not close(other + gogh, joint, to=1e-4)


def test_removing_a_concept_undoes_the_sum(gogh, snoopy, both):
    assert close((gogh + snoopy).without("snoopy"), gogh)
    assert close(both.without("van gogh"), snoopy)
    left = both.without("van gogh")
    assert (left.pairs, set(left.movements[0].owners)) == (SNOOPY, {0})
    assert left.protocol["preserve"] == PRESERVED


def test_a_multiple_moves_that_much_as_far(tiny_sd1, gogh):
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


def test_a_multiple_has_scaled_targets_when_it_is_solved_again(gogh, snoopy, both):
    assert close(0.5 * gogh + 0.5 * snoopy, 0.5 * both)
    mixed = 0.5 * gogh + snoopy
    assert mixed.protocol["strength"] == {"van gogh": 0.5}
    assert close(mixed.without("snoopy"), 0.5 * gogh)
    assert "strength" not in mixed.without("van gogh").protocol


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_not_finite_is_refused(gogh, factor):
    with pytest.raises(ValueError, match="can be scaled by a finite number only, got .* 1 is the"):
        factor * gogh


@pytest.mark.parametrize("factor", [1e300, -100.5, 101])
def test_a_factor_that_is_too_large_is_refused(gogh, factor):
    with pytest.raises(
        ValueError, match="can be scaled from -100 to 100, got .*1 is the change as"
    ):
        factor * gogh
    with pytest.raises(ValueError, match="can be scaled from -100 to 100, got"):
        50 * (50 * gogh)


@pytest.mark.parametrize("other", ["0.5", None, True, 2j, [1]])
def test_other_types_do_not_multiply_or_add(gogh, other):
    with pytest.raises(TypeError, match="unsupported operand|multiply sequence by non-int"):
        gogh * other
    with pytest.raises(TypeError, match="unsupported operand"):
        gogh + other


def test_a_file_has_preserve_terms_only_with_gram(tiny_sd1, gogh, snoopy, tmp_path):
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
    assert close(edit.complete(tiny_sd1, small) + plain, gogh + plain)
    assert close(edit.stack(tiny_sd1, [small, plain]), gogh + plain)
    both = small + snoopy
    both.save(tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"`edit\.complete\(model, change\)` first"):
        Change.load(tmp_path / "both.safetensors").without("snoopy")


def test_completing_another_models_change_is_refused(tiny_sd1, tiny_xl, gogh):
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
        (
            {"pairs": SNOOPY, "preserve": PRESERVED, "preserve_weight": 1.0},
            "differ in preserve_weight",
        ),
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
def test_changes_with_other_settings_are_not_added(tiny_sd1, gogh, other, message):
    pairs = other.pop("pairs")
    change = edit.quickfix(tiny_sd1, pairs, **other)
    for attempt in (lambda: gogh + change, lambda: change + gogh):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_changes_of_other_weights_or_without_keys_are_not_added(tiny_sd1, gogh):
    with pytest.raises(
        ValueError, match="contradictory pairs: 'van gogh' → 'painting' has two str"
    ):
        gogh + 0.5 * gogh
    with gogh.applied(tiny_sd1):
        later = edit.quickfix(tiny_sd1, SNOOPY)
    with pytest.raises(
        ValueError, match=r"different weights \(other base hashes\), or one is .*: make both"
    ):
        gogh + later
    swap = edit.swap_embedding(tiny_sd1, SNOOPY)
    with pytest.raises(ValueError, match="only changes that were solved can be added"):
        swap + swap


def test_a_missing_or_only_concept_is_not_removed(gogh, both):
    with pytest.raises(
        ValueError, match="has no concept 'monet': it has 'van gogh', 'snoopy'. Name"
    ):
        both.without("monet")
    with pytest.raises(ValueError, match="'van gogh' is the only concept of this change"):
        gogh.without("van gogh")


def test_changes_of_cross_attention_are_added_and_completed(tiny_sd1, tmp_path):
    options = {"preserve": ["monet", "a cat"], "frames": ["", "art by "], "layers": [0, 3]}
    parts = [edit.uce(tiny_sd1, pairs, **options) for pairs in (GOGH, SNOOPY)]
    joint, total = edit.uce(tiny_sd1, GOGH | SNOOPY, **options), parts[0] + parts[1]
    assert bytes_of(total) == bytes_of(parts[1] + parts[0])
    parts[0].save(tmp_path / "part.safetensors")
    stacked = edit.stack(tiny_sd1, [Change.load(tmp_path / "part.safetensors"), parts[1]])
    for change in (total, stacked):
        assert len(change.movements) == 4
        for a, b in zip(change.movements, joint.movements, strict=True):
            assert a.site == b.site and close(a, b, to=1e-4)
    alone = total.without("snoopy")
    for a, b in zip(alone.movements, parts[0].movements, strict=True):
        assert close(a, b, to=1e-4)
