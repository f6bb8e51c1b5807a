"""Drift of everyday captions and names: against features of the edited model, limits, and bad input."""

import pytest
import torch

from overpaint import edit, probes
from overpaint.edit import everyday_drift
from overpaint.edit.methods import token_rows
from overpaint.edit.weights import find_weight
from overpaint.model.hooks import record

PAIR = {"red cat": "dog"}
CAPTIONS = ("a red house", "a man on a beach", "a red cat", "nothing of it")
NAMES = {"Red Dwarf": "character", "Blue Note": "brand", "Red Cat": "brand"}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """Four captions and three names instead of thousands."""
    monkeypatch.setattr(probes, "everyday", lambda part: CAPTIONS)
    monkeypatch.setattr(probes, "names", lambda: NAMES)


METHODS = {
    "quickfix": edit.quickfix,
    "swap_embedding": edit.swap_embedding,
    "uce": edit.uce,
    "auto": lambda model, pairs: edit.auto(
        model, pairs, contexts=8, background=8, vocabulary=["monet"], collateral=False
    ),
}


def drift(model, change, text):
    """Return the drift of a text, from the state that the UNet reads in the edited model."""
    before, empty = model.encode([text]).double(), model.encode([""]).double()
    if not change.sites[0].startswith("unet"):
        with change.applied(model):
            after = model.encode([text]).double()
        return float((after - before).norm() / (before - empty).norm())
    moved = reference = 0.0
    for movement in change.movements:
        weight = find_weight(model, movement.site).parameter.detach().double()
        moved += float((before @ movement.delta.T).square().sum())
        reference += float(((before - empty) @ weight.T).square().sum())
    return (moved / reference) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_drift_is_that_of_the_edited_model(tiny_sd1, method):
    change = METHODS[method](tiny_sd1, PAIR)
    measured = edit.collateral(tiny_sd1, change)
    assert set(measured.captions) == {c for c in CAPTIONS if c != "a red cat"}
    assert set(measured.names) == {"Red Dwarf", "Blue Note"}
    for text, value in measured.captions.items():
        assert value == pytest.approx(drift(tiny_sd1, change, text), rel=1e-3, abs=1e-5)
    for name, value in measured.names.items():
        expected = drift(tiny_sd1, change, f"a picture of {name}")
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_larger_drift_of_two_encoders_counts(tiny_xl):
    first, second, both = (
        edit.collateral(tiny_xl, edit.quickfix(tiny_xl, PAIR, encoder=e)).captions
        for e in ("text", "text2", "all")
    )
    for caption, value in both.items():
        assert value == pytest.approx(max(first[caption], second[caption]))


def test_the_model_is_not_modified_and_no_hook_is_left(tiny_sd1):
    change = edit.quickfix(tiny_sd1, PAIR)
    (site,) = change.sites
    module = find_weight(tiny_sd1, site).module
    before = module.weight.detach().clone()
    edit.collateral(tiny_sd1, change)
    assert torch.equal(module.weight, before)
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_texts_without_a_moved_token_have_no_drift_and_are_not_read(tiny_sd1):
    change = edit.swap_embedding(tiny_sd1, {"red": "blue"})
    ruler = everyday_drift._Ruler.of(tiny_sd1, change)
    assert ruler.may_move(["a red house", "a house", "reddish"]) == {"a red house"}
    with record([tiny_sd1.text_encoder.get_input_embeddings()]) as outputs:
        assert ruler.drifts(["a house"], None) == {"a house": 0.0}
    assert outputs == [[]]
    rows = {token: None for token in tiny_sd1.tokenizer("red", add_special_tokens=False).input_ids}
    assert token_rows.texts_with_tokens(tiny_sd1, rows, ["A RED house", "a house"]) == [
        "A RED house"
    ]


def test_a_limit_reads_texts_with_a_word_of_the_concept_first(tiny_sd1):
    measured = edit.collateral(tiny_sd1, edit.quickfix(tiny_sd1, PAIR), limit=1)
    assert set(measured.captions) == {"a red house"}
    assert set(measured.names) == {"Red Dwarf"}
    assert measured.total == (3, 2)


def test_the_record_counts_and_names_what_moves(tiny_sd1):
    change = edit.swap_embedding(tiny_sd1, {"red cat": "dog"})
    measured = edit.collateral(tiny_sd1, change, max_drift=1e-6)
    assert (measured.moved, list(measured.worst)) == (1, ["a red house"])
    record = measured.record()
    assert record["endangered"][0]["concept"] == "Red Dwarf"
    assert record["endangered"][0]["kind"] == "character"
    assert (record["captions_measured"], record["names_measured"], record["names_moved"]) == (
        3,
        2,
        1,
    )
    assert "1 of 3 everyday captions and 1 of 2 names move by more than 1e-06" in repr(measured)


def test_reports_hold_the_record_and_name_endangered_names(tiny_sd1):
    change = everyday_drift.with_collateral(tiny_sd1, edit.swap_embedding(tiny_sd1, PAIR))
    assert change.report["not_kept"] == ["Red Dwarf"]
    assert change.report["collateral"]["captions_moved"] == 1
    automatic = edit.auto(tiny_sd1, PAIR, contexts=8, background=8, vocabulary=["monet"])
    assert automatic.report["collateral"]["captions_measured"] == 3


def test_captions_that_the_encoder_cuts_are_measured_without_a_warning(tiny_sd1, monkeypatch):
    long = "a red house " * 40
    monkeypatch.setattr(probes, "everyday", lambda part: (long,))
    assert edit.collateral(tiny_sd1, edit.quickfix(tiny_sd1, PAIR)).captions[long] > 0


def test_progress_is_reported(tiny_sd1):
    labels = []
    change = edit.quickfix(tiny_sd1, PAIR)
    edit.collateral(tiny_sd1, change, on_progress=lambda *row: labels.append(row))
    assert labels == [(0, 5, "reading everyday texts")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": 0}, "`max_drift` must be positive"),
        ({"limit": 0}, "`limit` must be at least 1"),
    ],
)
def test_bad_numbers_are_refused(tiny_sd1, options, message):
    with pytest.raises(ValueError, match=message):
        edit.collateral(tiny_sd1, edit.quickfix(tiny_sd1, PAIR), **options)


def test_an_applied_change_and_weights_that_read_no_text_are_refused(copied):
    change = edit.quickfix(copied, PAIR)
    with change.applied(copied), pytest.raises(ValueError, match="is applied to this model"):
        edit.collateral(copied, change)
    site = "unet.cross_attn.0.to_q"
    weight = find_weight(copied, site).parameter
    factors = torch.zeros(len(weight), 1), torch.zeros(1, weight.shape[1])
    moved = edit.Movement.of_weight(site, weight, *factors)
    with pytest.raises(ValueError, match="reads the picture, not the prompt"):
        edit.collateral(copied, edit.Change((moved,), {"pairs": PAIR}, {}))


def test_given_captions_and_names_are_measured_instead(tiny_sd1):
    change = edit.quickfix(tiny_sd1, PAIR)
    found = edit.collateral(
        tiny_sd1, change, captions=["a red box", "a red cat"], names=["Red Sea"]
    )
    assert set(found.captions) == {"a red box"} and set(found.names) == {"Red Sea"}
    assert found.captions["a red box"] == pytest.approx(
        drift(tiny_sd1, change, "a red box"), rel=1e-4
    )
    none = edit.collateral(tiny_sd1, change, captions=["a red box"], names=())
    assert none.names == {} and none.total == (1, 0)
    with pytest.raises(TypeError, match="captions"):
        edit.collateral(tiny_sd1, change, captions="a red box")
