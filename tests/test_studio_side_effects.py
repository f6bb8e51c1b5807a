"""Predicted side effects: drifts against their definition, reported figures, and their HTML."""

from dataclasses import replace

import pytest

import overpaint as op
from overpaint.studio import html, tasks
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
    rows = op.edit.rename(tiny_sd1, pairs, any_token=True)
    layer = op.edit.auto(tiny_sd1, pairs, **settings)
    still, moving = (
        predict(tiny_sd1, change, vocabulary=["a dog", "a cat"]) for change in (rows, layer)
    )
    assert "None of the 2 other concepts drifts" in html.side_effects(still)
    assert "<table" not in html.side_effects(still)
    assert "<table" in html.side_effects(moving)


def test_of_two_text_encoders_the_larger_drift_counts(tiny_xl):
    change = op.edit.quickfix(tiny_xl, {"blob style": "noto style"})
    assert {site.partition(".")[0] for site in change.sites} == {"text", "text2"}
    width = tiny_xl.text_encoder.config.hidden_size

    def movements(concept):
        captions = [f"a picture of {concept}"]
        before = tiny_xl.encode(captions)
        with change.applied(tiny_xl):
            moved = (tiny_xl.encode(captions) - before).double().square()
        first = moved[:, :-1, :width].sum()
        return float(first), float(moved.sum() - first)

    effects = predict(tiny_xl, change, vocabulary=["a dog", "an apple"])
    for one in effects.drifts:
        shares = [
            m / r for m, r in zip(movements(one.concept), movements("blob style"), strict=True)
        ]
        assert one.drift == pytest.approx(max(shares), rel=1e-4)
    only = op.edit.quickfix(tiny_xl, {"blob style": "noto style"}, encoder="text2")
    assert predict(tiny_xl, only, vocabulary=["a dog"]).drifts[0].drift > 0


def test_the_map_of_two_text_encoders_names_both(tiny_xl):
    settings = PromptSettings("a cat in blob style", "blob style", (0,), 1)
    trace_map = tasks.trace_text_encoder(tiny_xl, settings, lambda *_: None)
    text = html.heat_map(trace_map)
    assert "layer 1 MLP of encoder 1</th>" in text and "layer 2 MLP of encoder 2</th>" in text
    assert "of each, the input is the lowest row and the output the highest" in text
    *_, restored = tasks.draw_restored(tiny_xl, trace_map, 0, 0, lambda *_: None)
    assert "layer 0 attention of encoder 1" in restored.description


def test_one_sentence_of_verdict_stands_before_the_figures(tiny_sd1, quickfix_change):
    for factor in (1.0, 0.5):
        effects = predict(tiny_sd1, factor * quickfix_change, vocabulary=["a dog", "an apple"])
        page = html.side_effects(effects)
        assert page.startswith('<p class="op-verdict">This change moves 1 weight (text.0.self_attn')
        assert page.index("op-verdict") < page.index("op-tiles")
        assert f"the empty prompt moves by {100 * effects.empty_prompt:.1f} %" in page
        assert f"likely to change too: {', '.join(d.concept for d in effects.drifts)}" in page
    assert "effects on other concepts were not measured" not in effects.verdict
