"""The HTML of the page's parts: escaping, and the buttons of the map."""

import re

from PIL import Image

from overpaint.studio import html
from overpaint.studio.scheduler import ProgressUpdate
from overpaint.studio.session import AppliedChange, EditState
from overpaint.studio.side_effects import ConceptDrift, SideEffects
from overpaint.studio.tasks import LabelledPicture, PictureGrid, PromptSettings, TraceMap

HOSTILE = "<script>alert(1)</script> ' \" & {{7}} ${alert(2)} `x` <img src=x onerror=alert(3)>"


def test_text_of_users_is_escaped_for_html_and_for_templates(quickfix_change):
    settings, image = PromptSettings(HOSTILE, HOSTILE, (0,), 1), Image.new("RGB", (2, 2))
    trace_map = TraceMap(settings, (HOSTILE,), (("eos", 1, HOSTILE),), ((0.5,),), "text", HOSTILE)
    drift = ConceptDrift(HOSTILE, 0.5, preserved=True)
    fragments = [
        html.alert(HOSTILE), html.note(HOSTILE), html.placeholder(HOSTILE),
        html.progress(ProgressUpdate(0.5, HOSTILE, 3.0)), html.heat_map(trace_map),
        html.restored_pictures([LabelledPicture(image, HOSTILE, HOSTILE)]),
        html.grid(PictureGrid(settings, (HOSTILE, "after"), ((image,), (None,)))),
        html.changes(EditState((AppliedChange(HOSTILE, quickfix_change),), quickfix_change, 0.5)),
        html.side_effects(SideEffects((drift,), 0.5, 0.1, 1, 0.1, verdict=HOSTILE)),
        html.side_effects(SideEffects((), None, None, 1, None, HOSTILE)),
        html.facts({HOSTILE: quickfix_change, "b": None}),
    ]  # fmt: skip
    for fragment in fragments:
        text = re.sub(r"data:image/png;base64,[\w+/=]+", "", fragment)
        assert "alert(1)" in text or "Alert(1)" in text
        assert "<script" not in text and "<img src=x" not in text
        assert not set("{}$`") & set(text)
        values = re.findall(r'[\w-]+="([^"]*)"', text)
        assert not any("<" in value for value in values)
        assert "&amp;lt;" not in text and "&amp;#" not in text  # escaped once


def test_the_heat_map_labels_every_cell_and_marks_the_selected_one():
    settings = PromptSettings("a cat in blob style", "blob style")
    columns = (("subject", 4, "blob"), ("eos", 6, "end of text"))
    values = ((0.5, -0.001), (None, 0.25))
    trace_map = TraceMap(settings, ("text.0.self_attn", "text2.1.mlp"), columns, values, "text")
    page = html.heat_map(trace_map, (0, 0))
    assert page.count("<button") == 3
    label = "layer 0 attention of encoder 1 at blob: 0.50. Show its pictures."
    assert f'aria-label="{label}" aria-pressed="true"' in page
    assert 'style="--v: 0.500" data-cell="1,1"' in page
    assert ">0.00<" in page and "-0.00" not in page
    assert "layer 1 MLP of encoder 2" in page
    assert page.index("layer 1") < page.index("layer 0")
