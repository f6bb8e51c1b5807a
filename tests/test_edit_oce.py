"""OCE on worked examples, against scipy's Procrustes solution, and on the tiny pipelines."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from overpaint import edit
from overpaint.edit.methods.oce import _rotation, orthogonal, subspace_term
from overpaint.edit.weights import find_weight
from overpaint.model.token_spans import find_span

PAIRS = {"van gogh": "painting"}
CAPTIONS = ("a cat on a tree", "a dog", "a red house", "a photo of a bird", "an apple")


def exact(model, site):
    return find_weight(model, site).parameter.detach().double()


def feature(model, text, word):
    row = model.encode([text])[0]
    return row[find_span(model.tokenizer, text, word).last].double()


def plane(degrees):
    """Return a unit vector of the plane of the first two axes, at an angle to the first, which is the anchor."""
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)


def energy(plane_energy):
    """Return the second moment of everyday outputs: little in the plane, one along a preserved axis."""
    return torch.diag(torch.tensor([plane_energy, plane_energy, 1.0], dtype=torch.float64))


def test_an_erased_direction_with_little_energy_turns_to_the_opposite_of_what_its_anchor_lacks():
    anchor, erased, preserved = plane(0), plane(60), torch.tensor([0.0, 0.0, 1.0]).double()
    turn = orthogonal(subspace_term(erased, anchor) + energy(1e-3))
    after = turn @ erased[0]
    assert torch.allclose(after, -plane(90)[0], atol=1e-2)  # no part along the anchor
    assert float(after @ erased[0]) == pytest.approx(-math.sin(math.radians(60)), abs=1e-2)
    assert torch.allclose(turn @ preserved, preserved, atol=1e-12)
    alone = orthogonal(subspace_term(plane(90), anchor) + energy(1e-3))
    assert torch.allclose(alone @ plane(90)[0], -plane(90)[0])  # orthogonal to the anchor
    assert torch.allclose(alone @ anchor[0], anchor[0])


@pytest.mark.parametrize("share", [1.0, 3.0, 10.0])
def test_an_erased_direction_with_much_energy_turns_towards_its_anchor(share):
    """The polar factor of [[s, 0], [-sin cos, s - sin^2]] is a rotation by this angle."""
    turn = orthogonal(subspace_term(plane(60), plane(0)) + energy(share))
    cosine, sine = 0.5, math.sqrt(0.75)
    angle = math.degrees(math.atan2(sine * cosine, 2 * share - sine**2))
    assert torch.allclose(turn @ plane(60)[0], plane(60 - angle)[0], atol=1e-12)
    assert 0 < angle < 60


def test_the_vector_form_is_scipys_procrustes_solution():
    generator = torch.Generator().manual_seed(0)
    erased, anchors, rest = (torch.randn(n, 6, generator=generator).double() for n in (3, 3, 9))
    turn = orthogonal(2.0 * anchors.T @ erased + rest.T @ rest)
    a = torch.cat([erased * 2**0.5, rest]).numpy()
    b = torch.cat([anchors * 2**0.5, rest]).numpy()
    expected, _ = scipy.linalg.orthogonal_procrustes(a, b)
    assert np.allclose(turn.numpy(), expected.T, atol=1e-12)


@pytest.mark.parametrize("form", ["subspace", "vector"])
@pytest.mark.parametrize(("out", "width"), [(5, 9), (9, 5), (6, 6)])
def test_the_rotation_in_the_range_of_the_weight_equals_that_of_all_outputs(
    tiny_sd1, form, out, width
):
    """The slow solution decomposes the whole D_out x D_out matrix, plus a little of the identity outside the range."""
    generator = torch.Generator().manual_seed(out)
    weight, keys, sources, rest = (
        torch.randn(n, m, generator=generator).double()
        for n, m in ((out, width), (2, width), (2, width), (20, width))
    )

    class Edit:
        pass

    Edit.keys, Edit.sources = keys, sources
    still = rest.T @ rest / 20
    left, right = _rotation(weight, Edit, still, 0.7, form)
    ce, ca = weight @ keys.T, weight @ sources.T
    if form == "vector":
        term = ca @ ce.T
    else:
        r, ra = (scipy.linalg.orth(c.numpy()) for c in (ce, ca))
        term = -(torch.eye(out).double() - torch.from_numpy(ra @ ra.T)) @ torch.from_numpy(r @ r.T)
    null = torch.from_numpy(scipy.linalg.null_space(weight.T.numpy()))
    u, _, vh = np.linalg.svd((0.7 * term + weight @ still @ weight.T + null @ null.T).numpy())
    expected = torch.from_numpy(u @ vh) @ weight
    assert torch.allclose(weight + left @ right, expected, atol=1e-10)


@pytest.mark.parametrize(("form", "keys"), [("subspace", "last"), ("vector", "last_to_pads")])
def test_every_weight_follows_from_the_formula(tiny_sd1, form, keys):
    change = edit.oce(
        tiny_sd1, PAIRS, preserve=["monet"], preserve_weight=0.5, erase_weight=2.0, ridge=0.1, keys=keys, form=form,
        captions=CAPTIONS, layers=[1, 9],
    )  # fmt: skip

    def rows(text):
        word = text.split()[-1]
        place = find_span(tiny_sd1.tokenizer, text, word).last
        every = tiny_sd1.encode([text])[0].double()
        return every[place : place + 1] if keys == "last" else every[place:]

    old, new, kept = rows("van gogh"), rows("painting"), rows("monet")
    if keys == "last_to_pads":  # "van gogh" is a token longer, so its last pad has no counterpart
        new = new[[min(i, len(new) - 1) for i in range(len(old))]]
    everyday = torch.cat([rows(text) for text in CAPTIONS])
    still = (
        everyday.T @ everyday / len(everyday) + 0.5 * kept.T @ kept + 0.1 * torch.eye(64).double()
    )
    for m in change.movements:
        w = exact(tiny_sd1, m.site)
        r, ra = (
            torch.from_numpy(scipy.linalg.orth((w @ c.T).numpy(), rcond=1e-6)) for c in (old, new)
        )
        term = -(torch.eye(len(w)).double() - ra @ ra.T) @ r @ r.T
        if form == "vector":
            term = (w @ new.T) @ (w @ old.T).T
        u, _, vh = torch.linalg.svd(2.0 * term + w @ still @ w.T)
        assert float((w + m.delta - u @ vh @ w).norm()) < 1e-4 * float((u @ vh @ w - w).norm())


def test_lengths_and_angles_of_outputs_stay(tiny_sd1):
    change = edit.oce(tiny_sd1, PAIRS, captions=CAPTIONS, layers=[2])
    for m in change.movements:
        w = exact(tiny_sd1, m.site)
        after = w + m.delta
        assert torch.allclose(after.T @ after, w.T @ w, atol=1e-6)
        assert float(m.delta.norm()) > 0.1 * float(w.norm())
    assert change.report["captions"] == 5 and change.protocol["captions"] == 5


def test_preserved_concepts_move_less_as_their_weight_grows_and_none_at_a_large_ridge(tiny_sd1):
    options = {"captions": CAPTIONS, "layers": [0, 5]}
    drifts = [
        edit.oce(tiny_sd1, PAIRS, preserve=["monet"], preserve_weight=a, **options).report["preserve_drift"]
        for a in (0.0, 1.0, 100.0)
    ]  # fmt: skip
    assert drifts[0] > drifts[1] > drifts[2] and drifts[2] < 0.05 * drifts[0]
    still = edit.oce(tiny_sd1, PAIRS, ridge=1e9, **options)
    assert still.report["relative_delta_norm"] < 1e-6


def test_all_everyday_captions_are_read_by_default(tiny_sd1, monkeypatch):
    monkeypatch.setattr("overpaint.probes.everyday", lambda part: CAPTIONS * 20)
    progress = []
    change = edit.oce(tiny_sd1, PAIRS, layers=[0], on_progress=lambda *call: progress.append(call))
    assert change.report["captions"] == 100
    assert progress == [(64, 100, "reading captions"), (100, 100, "reading captions")]
    cut = " ".join(["tree"] * 75)
    long = [edit.oce(tiny_sd1, PAIRS, layers=[0], captions=[c]) for c in (cut, f"{cut} dog")]
    assert long[0].digest == long[1].digest  # the last token that is read is the same


def test_keys_that_leave_nothing_to_erase_are_refused(tiny_sd1):
    with pytest.raises(
        ValueError, match="span those of the old ones, 32 numbers each, so nothing is"
    ):
        edit.oce(tiny_sd1, PAIRS, keys="last_to_pads", captions=(), layers=[1])


def test_bad_arguments_are_refused(tiny_sd1):
    for name, value, message in (
        ("ridge", 0.0, "`ridge` must be positive and finite, got 0.0"),
        ("erase_weight", 0.0, "`erase_weight` must be positive"),
        ("preserve_weight", -1.0, "`preserve_weight` must be 0 or more"),
        ("preserve_weight", "exact", "`preserve_weight` must be 0 or more and finite, got 'exact'"),
        ("form", "matrix", "`form` must be 'subspace' or 'vector', got 'matrix'. Leave it out"),
        ("keys", "first", "`keys` must be 'last' or 'last_to_pads', got 'first'"),
        ("preserve", ["van gogh"], "has the same key as .* take it off the `preserve` list"),
    ):
        with pytest.raises(ValueError, match=message):
            edit.oce(tiny_sd1, PAIRS, captions=(), **{name: value})
    with pytest.raises(TypeError, match="`captions` must be a list of texts"):
        edit.oce(tiny_sd1, PAIRS, captions="a cat")
    change = edit.oce(tiny_sd1, PAIRS, captions=(), layers=[0])
    with pytest.raises(ValueError, match="only changes that were solved can be added"):
        change + change
