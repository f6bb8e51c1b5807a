"""Predicted side effects: drifts against their definition, reported figures, and their HTML."""

from dataclasses import replace

import pytest

import overpaint as op
from overpaint.studio import html
from overpaint.studio.side_effects import predict
from overpaint.studio.tasks import PromptSettings


def test_drift_is_the_movement_of_text_features_relative_to_the_erased_concepts(
    tiny_sd1, quickfix_change
):
    (drift,) = predict(tiny_sd1, quickfix_change, vocabulary=["a dog"]).drifts

    def movement(concept):
        captions = [f"a picture of {concept}"]
        before = tiny_sd1.encode(captions)
        with quickfix_change.applied(tiny_sd1):
            after = tiny_sd1.encode(captions)
        return float((after - before).double().square().sum())

    assert drift.drift == pytest.approx(movement("a dog") / movement("blob style"), rel=1e-4)
    assert not drift.preserved


def test_side_effects_are_predicted_at_the_chosen_strength(studio, tiny_folder, result_of):
    key, model = studio.open_session(), op.load(tiny_folder)
    settings = PromptSettings("a cat in blob style", "blob style", (3,), 1)
    result_of(studio.edit(key, settings, "noto style", method="quickfix"))
    assert 0.9 < result_of(studio.predict(key)).reached <= 1
    session = studio.session(key)
    session.set_strength(-0.5)
    effects, half = result_of(studio.predict(key)), session.state.change
    before = model.encode([""])
    with half.applied(model):
        movement = model.encode([""]) - before
    assert effects.empty_prompt == pytest.approx(float(movement.norm() / before.norm()), rel=1e-4)
    assert effects.reached is None
    assert effects.drifts == predict(model, half).drifts
    session.set_strength(0)
    assert result_of(studio.predict(key)) is None


def test_of_a_repaired_edit_the_figure_after_the_repair_is_used(tiny_sd1, quickfix_change):
    report = {**quickfix_change.report, "missed": 0.9, "layer_missed": 0.25}
    repaired = replace(quickfix_change, report=report)
    assert predict(tiny_sd1, repaired, vocabulary=["a dog"]).reached == 0.75


def test_of_an_edit_of_the_unet_the_reason_for_no_drifts_is_given(tiny_sd1):
    effects = predict(tiny_sd1, op.edit.uce(tiny_sd1, {"blob style": "noto style"}))
    assert effects.drifts == ()
    assert effects.reason == "it moves the UNet"
    assert "is not known: it moves the UNet." in html.side_effects(effects)


def test_without_any_drift_a_sentence_is_shown_instead_of_the_table(tiny_sd1):
    settings = {"contexts": 8, "background": 8, "vocabulary": ["a dog"]}
    pairs = {"blob style": "noto style"}
    rows = op.edit.auto(tiny_sd1, pairs, **settings)
    layer = op.edit.auto(tiny_sd1, pairs, **settings, tokens=False)
    still, moving = (
        predict(tiny_sd1, change, vocabulary=["a dog", "a cat"]) for change in (rows, layer)
    )
    assert "None of the 2 other concepts drifts" in html.side_effects(still)
    assert "<table" not in html.side_effects(still)
    assert "<table" in html.side_effects(moving)
