"""The computations of the studio: settings, trace maps, edits."""

import pytest

import overpaint as op
from overpaint.studio import tasks
from overpaint.studio.scheduler import Stopped
from overpaint.studio.tasks import PromptSettings


def ignore(*_):
    return None


def test_a_cell_of_the_map_is_the_effect_that_tracing_measures(tiny_sd1):
    settings = PromptSettings("a cat in blob style", "blob style", (0,), 2)
    trace_map = tasks.trace_text_encoder(tiny_sd1, settings, ignore)
    probe = op.probes.Probe("studio", "concept", settings.prompt, "blob style")
    effects = op.trace.text_encoder(tiny_sd1, [probe], controls="none", generate=False)
    table = {(r["site"], r["position"]): r["embed_recovery"] for r in effects.table.to_pylist()}
    row, column = trace_map.best
    position = trace_map.columns[column][1]
    assert trace_map.values[row][column] == pytest.approx(table[trace_map.sites[row], position])
    pictures = tasks.draw_restored(tiny_sd1, trace_map, row, column, ignore)
    assert [picture.title for picture in pictures] == ["clean", "corrupted", "restored"]
    assert len({picture.image.tobytes() for picture in pictures}) == 3
    with pytest.raises(ValueError, match=r"no cell \(99, 0\)"):
        tasks.draw_restored(tiny_sd1, trace_map, 99, 0, ignore)


def test_stacking_automatic_edits_can_be_stopped_between_its_steps(tiny_sd1):
    few = {"contexts": 8, "background": 8, "vocabulary": ["a dog"], "tokens": False}
    pairs = ({"blob style": "noto style"}, {"cat": "fox"})
    changes = [op.edit.auto(tiny_sd1, p, **few) for p in pairs]
    calls = []

    def on_progress(*progress):
        calls.append(progress)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        tasks.stack_changes(tiny_sd1, changes, on_progress)
    assert calls[1][0] < calls[2][0] < calls[2][1]


@pytest.mark.parametrize(
    "settings, message",
    [
        (("  ", "", (0,), 1), "the prompt is empty: write what to draw"),
        (("a cat", "", (0,), 0), "must be 1 to 100, got 0"),
        (("a cat", "", (), 1), "must be 1 to 8, got 0"),
        (("a cat", "", (-1,), 1), r"`seed` must be an integer from 0 to 2\*\*53 - 1, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings(*settings)


def test_concepts_outside_the_prompt_and_unknown_methods_are_refused(tiny_sd1):
    with pytest.raises(ValueError, match="the concept is empty: write words of the prompt"):
        tasks.trace_text_encoder(tiny_sd1, PromptSettings("a cat"), ignore)
    with pytest.raises(ValueError, match="'dog' is not in the prompt 'a cat'"):
        tasks.trace_text_encoder(tiny_sd1, PromptSettings("a cat", "dog"), ignore)
    with pytest.raises(ValueError, match="unknown method 'magic': choose auto or quickfix"):
        tasks.solve_edit(tiny_sd1, "a", "b", ignore, method="magic")
