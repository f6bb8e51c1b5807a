"""Heat maps and bars of effects: panels, colors, labels and files."""

import math
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from overpaint.images import charts as figures
from overpaint.images.charts import Bar, BarPanel, Panel
from overpaint.report import charts
from overpaint.trace import Effects, plot


def row(kind, index, value, *, part="text", role="last_subject", probe="p", **more):
    drawn = {} if more.get("control") else {"indirect_effect": value}
    name = f"{part}.{kind}.{index}" if part == "unet" else f"{part}.{index}.{kind}"
    return {
        "site": name, "part": part, "kind": kind, "index": index, "path": name, "role": role,
        "control": "", "probe": probe, "embed_recovery": value / 2, **drawn, **more,
    }  # fmt: skip


def text(**more):
    return [
        row(kind, index, value + index / 10, role=role, **more)
        for kind, value in (("mlp", 0.1), ("self_attn", 0.5))
        for index in range(3)
        for role in ("eos", "last_subject")
    ]


def unet(**more):
    return [
        row(kind, index, index / 10, part="unet", role="", probe=p, **more)
        for kind in ("resnet", "cross_attn")
        for index in range(2)
        for p in "pq"
    ]


def test_text_states_are_a_heat_map_of_layers_by_roles_for_each_kind():
    self_attn, mlp = plot.map_panels(Effects.of(text(), {}).table, "indirect_effect")
    assert (self_attn.title, mlp.title) == ("Self-attention", "MLP")
    assert self_attn.rows == ("layer 0", "layer 1", "layer 2")
    assert self_attn.columns == ("last subject", "eos")
    assert self_attn.values[2] == pytest.approx((0.7, 0.7))
    assert mlp.values[0] == pytest.approx((0.1, 0.1))


def test_the_untrained_encoder_is_shown_beside_the_trained_one_if_measured():
    both = Effects.of(text() + text(control="untrained"), {})
    titles = [panel.title for panel in plot.map_panels(both.table, "embed_recovery")]
    assert titles == [f"{kind}, {run}" for kind in ("Self-attention", "MLP")
                      for run in ("trained", "untrained")]  # fmt: skip
    assert len(plot.map_panels(both.table, "indirect_effect")) == 2


def test_a_state_without_a_value_is_nan_and_its_cell_has_no_color():
    rows = [r for r in text() if (r["index"], r["role"]) != (1, "eos")]
    panel = plot.map_panels(Effects.of(rows, {}).table, "indirect_effect")[0]
    assert math.isnan(panel.values[1][1])
    axis = figures.heat_map([panel], theme=figures.LIGHT).figure.axes[0]
    drawn = axis.images[0].get_array()
    assert drawn.mask.tolist() == [[False, False], [False, True], [False, False]]
    assert axis.images[0].to_rgba(drawn)[1, 1, 3] == 0  # lets the hatching of the paper through
    assert axis.patch.get_hatch()


def test_the_second_encoder_has_separate_panels():
    both = Effects.of(text() + text(part="text2"), {})
    titles = [panel.title for panel in plot.map_panels(both.table, "indirect_effect")]
    assert titles == ["Self-attention", "MLP", "Self-attention, 2nd encoder", "MLP, 2nd encoder"]


def test_heads_are_a_heat_map_of_layers_by_heads_for_each_role():
    rows = text() + [row("self_attn", 1, 0.3, head=h, role=r) for h in (10, 2) for r in ("eos", "pad")]  # fmt: skip
    panels = plot.map_panels(Effects.of(rows, {}).table, "indirect_effect")
    assert [p.title for p in panels] == ["Self-attention", "MLP", "Heads, eos", "Heads, pad"]
    assert panels[2].columns == ("2", "10")
    assert panels[2].rows == ("layer 1",)
    assert panels[0].columns == ("last subject", "eos")


def test_unet_windows_are_columns_of_a_map_and_panels_of_bars():
    rows = [r for window in ("late", "", "early") for r in unet(window=window)]
    effects = Effects.of(rows, {})
    panel = plot.map_panels(effects.table, "indirect_effect")[0]
    assert panel.title == "Cross-attention"
    assert panel.rows == ("cross_attn.0", "cross_attn.1")
    assert panel.columns == ("all steps", "early steps", "late steps")
    bars = plot.bar_panels({"": effects.table}, "indirect_effect")
    assert [p.title for p in bars] == ["All steps", "Early steps", "Late steps"]
    assert [bar.label for bar in bars[0].series[0][1]] == [
        "cross_attn.0", "cross_attn.1", "resnet.0", "resnet.1",
    ]  # fmt: skip


def test_bars_show_means_and_intervals_and_missing_states_have_no_value():
    whole, less = Effects.of(unet(), {}), Effects.of(unet()[:-2], {})
    (panel,) = plot.bar_panels({"a": whole.table, "b": less.table}, "indirect_effect")
    table = {r["site"]: r for r in whole.mean().to_pylist()}
    for bar in panel.series[0][1]:
        row = table[f"unet.{bar.label}"]
        assert (bar.mean, bar.low, bar.high) == (row["mean"], row["low"], row["high"])
    absent = [bar.label for bar in panel.series[1][1] if math.isnan(bar.mean)]
    assert absent == ["cross_attn.1"]
    drawing = figures.bar_chart([panel], theme=figures.LIGHT)
    assert [t.get_text() for t in drawing.figure.axes[0].texts] == ["no value"]


def colors(values, theme=figures.LIGHT):
    """Return the color of each cell of a one-row map."""
    panel = Panel("p", ("r",), tuple(map(str, range(len(values)))), (tuple(values),))
    image = figures.heat_map([panel], theme=theme).figure.axes[0].images[0]
    return np.asarray(image.to_rgba(image.get_array()))[0, :, :3]


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
def test_zero_has_the_background_color_and_negative_values_the_cold_hue(theme):
    paper = np.array([int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    cells = colors([0.8, 0.4, 0.0, -0.4], theme)
    assert cells[2] == pytest.approx(paper, abs=0.01)
    warm, cold = cells[1] - paper, cells[3] - paper
    assert warm[0] > warm[2]
    assert cold[2] > cold[0]
    assert np.abs(cells[0] - paper) == pytest.approx(2 * np.abs(warm), abs=0.02)
    assert colors([1.0, 0.0], theme)[0] == pytest.approx(
        np.array([int(theme.warm[i : i + 2], 16) for i in (1, 3, 5)]) / 255, abs=0.01
    )


def test_a_small_negative_value_has_a_weak_color():
    paper, weak = colors([0.8, 0.0, -0.01])[1:]
    assert np.abs(weak - paper).max() < 0.02


def test_the_largest_and_the_most_negative_value_are_written_into_their_cells():
    panel = Panel("p", ("r",), ("a", "b", "c"), ((0.8, -0.3, -0.1),))
    axis = figures.heat_map([panel], theme=figures.LIGHT).figure.axes[0]
    assert sorted(t.get_text() for t in axis.texts) == ["-0.30", "0.80"]


def test_maps_without_any_value_and_with_groups_can_be_drawn():
    nothing = Panel("p", ("r",), ("a",), ((math.nan,),))
    assert figures.heat_map([nothing], theme=figures.LIGHT).png()
    groups = Effects.of([row("group", 0, 0.5), *text()], {})
    assert plot.map_panels(groups.table, "indirect_effect")[-1].rows == ("text.0.group",)
    assert plot.bar_panels({"": groups.table}, "indirect_effect")


def test_labels_do_not_overlap_and_stay_inside_the_figure():
    """Measured on the figure: tick labels of one axis are apart, and every text lies inside."""
    rows = [r for part in ("text", "text2") for r in text(part=part)]
    rows += [row("self_attn", n, 0.1, role=r) for n in range(3, 14) for r in ("subject", "pad")]
    charts = (
        Effects.of(rows, {}).plot(),
        Effects.of([r for w in ("", "early", "middle", "late") for r in unet(window=w)], {}).plot(),
    )
    for chart in charts:
        renderer = FigureCanvasAgg(chart.figure).get_renderer()
        chart.figure.draw(renderer)
        width, height = chart.figure.bbox.size
        for axis in chart.figure.axes:
            boxes = [t.get_window_extent(renderer) for t in axis.get_yticklabels() if t.get_text()]
            tops = sorted((box.y0, box.y1) for box in boxes)
            assert all(a[1] <= b[0] + 1 for a, b in zip(tops, tops[1:], strict=False))
            names = (
                axis.get_xticklabels() if axis.images else []
            )  # numbers beyond the end are not drawn
            texts = [*axis.get_yticklabels(), *names, axis._left_title]
            for box in (t.get_window_extent(renderer) for t in texts if t.get_text()):
                assert box.x0 >= -1
                assert box.y0 >= -1
                assert box.x1 <= width + 1
                assert box.y1 <= height + 1


def test_charts_are_saved_as_png_or_svg_and_are_reproducible(tmp_path):
    effects = Effects.of(unet(), {})
    drawing = effects.plot(path=tmp_path / "deep" / "bars.png")
    with Image.open(tmp_path / "deep" / "bars.png") as picture:
        assert picture.format == "PNG"
    drawing.save(tmp_path / "bars.svg")
    svg = (tmp_path / "bars.svg").read_text()
    assert re.search(r"<text[^>]*>resnet\.1<", svg)
    assert effects.plot().png() == drawing.png() == drawing._repr_png_()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bars.svg", "deep"]
    with pytest.raises(
        ValueError, match=r"cannot write a chart as 'bars.pdf': use the suffix .png or .svg"
    ):
        drawing.save(tmp_path / "bars.pdf")


def test_the_default_is_a_heat_map_for_text_and_heads_and_bars_for_the_unet():
    heads = Effects.of(unet(head=1), {})
    for effects, images in ((Effects.of(text(), {}), 2), (Effects.of(unet(), {}), 0), (heads, 1)):
        axes = effects.plot().figure.axes
        assert sum(len(a.images) for a in axes if a.get_title(loc="left")) == images
    labels = effects.plot("bars").figure.axes[0].get_yticklabels()
    assert [t.get_text() for t in labels][0] == "cross_attn.0 head 1"


def test_the_unit_depends_on_the_direction_of_the_trace():
    effects = Effects.of(unet(direction="corrupt"), {})
    assert "with the state corrupted" in plot.unit(effects.table, "indirect_effect")
    assert "restored minus" in plot.unit(Effects.of(unet(), {}).table, "indirect_effect")


def test_an_unknown_kind_and_a_missing_value_are_refused():
    effects = Effects.of(text(), {})
    with pytest.raises(ValueError, match="unknown kind of plot 'pie': choose 'map' or 'bars'"):
        effects.plot("pie")
    with pytest.raises(ValueError, match="no state has a 'latent_recovery': plot another value"):
        effects.plot(value="latent_recovery")


def test_several_panels_share_their_scale():
    bars = tuple(Bar(name, "mlp", m, m, m) for name, m in (("a", 0.1), ("b", 2.0)))
    panels = [BarPanel("x", (("", bars[:1]),)), BarPanel("y", (("", bars[1:]),))]
    first, second = figures.bar_chart(panels, theme=figures.LIGHT).figure.axes
    assert first.get_xlim() == second.get_xlim()


@pytest.mark.parametrize(
    ("scorer", "kinds", "caption"),
    [
        ("icons-judge", ("style",), "Scored by icons-judge as a probability; "),
        (
            "icons-judge",
            ("count",),
            "Scored by icons-judge as the raw cosine of picture and prompt; ",
        ),
        (
            "icons-judge",
            ("style", "count"),
            "as a probability or, for counts and views, as the raw",
        ),
        ("brightness", ("style",), "Scored by brightness; "),
    ],
)
def test_the_caption_states_the_meaning_of_the_scores(scorer, kinds, caption):
    rows = [r for kind in kinds for r in unet(attribute=kind)]
    (chart,) = charts.unet_charts({"same_latent": Effects.of(rows, {"scorer": scorer})})
    assert caption in chart["caption"]
