"""Draw the figures of docs/findings.md and print its numbers that are in no table of the benchmark.

    python benchmarks/quality_trace.py --prompts 8
    PYTHONPATH=benchmarks python docs/draw_findings.py runs/quality_trace/<the folder it made>

Reads the finished maps and draws no picture with the model, so it takes seconds.
"""

import argparse
from dataclasses import replace
from math import nan
from pathlib import Path

from quality_trace import ATTRIBUTES, FIRST, TRACES, cells, in_gaps, pooled

from overpaint.images import charts
from overpaint.images.charts import Bar, BarPanel, Panel
from overpaint.metrics import Interval, paired
from overpaint.trace import Effects, states
from overpaint.trace.plot import bar_panels
from overpaint.trace.resume import read
from overpaint.trace.states import ROLES

IMAGES = Path(__file__).parent / "images"
END = ("text.0.self_attn", "eos")
PLACES = {"last_subject": "last concept token", "eos": "end of text", "pad": "first pad"}
SOURCES = {"clean_trajectory": "clean trajectory (the paper's)", "same_latent": "same latents"}
Maps = dict[str, dict[str, Effects]]  # by attribute, by name in TRACES


def draw_text(maps: Maps) -> None:
    """Draw one heat map of sublayers by roles an attribute and one of all, in units of the attribute's gap."""
    scaled = {
        attribute: part
        for attribute in ("color", "fact", "action", "style", "object")
        if (part := in_gaps(maps[attribute]["text"])) is not None
    }
    scaled[f"all {len(scaled)}"] = pooled(list(scaled.values()))
    panels: list[Panel] = []
    for attribute, effects in scaled.items():
        means = cells(effects)
        roles = [role for role in ROLES if any(role == r for _, r in means)]
        sites = list(dict.fromkeys(site for site, _ in means))
        values = tuple(
            tuple(means[s, r].mean if (s, r) in means else nan for r in roles) for s in sites
        )
        rows = tuple(s.split(".")[1] + (" attn" if s.endswith("attn") else " MLP") for s in sites)
        panels.append(Panel(attribute, rows, tuple(r.replace("_", " ") for r in roles), values))
    drawing = charts.heat_map(
        panels, theme=charts.LIGHT, columns=3, unit="share of the mean gap that one state restores"
    )
    drawing.save(IMAGES / "findings_text.png")


def draw_places(maps: Maps) -> None:
    """Draw the effect of layer 0's attention at three positions, with intervals."""
    means = {a: cells(maps[a]["text"]) for a in ATTRIBUTES if a != "count"}
    panels = [
        BarPanel(title, (("", tuple(_bar(a, c[FIRST[0], role]) for a, c in means.items())),))
        for role, title in PLACES.items()
    ]
    drawing = charts.bar_chart(
        panels, theme=charts.LIGHT, unit="probability of the concept: restored minus corrupted"
    )
    drawing.save(IMAGES / "findings_places.png")


def draw_unet(maps: Maps) -> None:
    """Draw the UNet's sites under both sources."""
    panels = [
        replace(
            bar_panels(
                {title: maps[a][k].table for k, title in SOURCES.items()}, "indirect_effect"
            )[0],
            title=a,
        )
        for a in ("color", "fact", "style")
    ]
    drawing = charts.bar_chart(
        panels, theme=charts.LIGHT, unit="probability of the concept: restored minus corrupted"
    )
    drawing.save(IMAGES / "findings_unet.png")


def _bar(label: str, interval: Interval) -> Bar:
    return Bar(label, "", interval.mean, interval.low, interval.high)


def show(name: str, interval: Interval) -> None:
    """Print a name and an interval."""
    print(f"  {name}: {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")


def numbers(maps: Maps) -> None:
    """Print the numbers of the findings that are not in the benchmark's tables."""
    for attribute, traces in maps.items():
        prompts = {
            (state.site, state.role): states.by_prompt(pairs)
            for state, pairs in states.cells(traces["text"].table, "indirect_effect").items()
        }
        first, end = prompts[FIRST], prompts[END]
        print(attribute)
        text_means = cells(traces["text"])
        deep = {s: i for s, i in text_means.items() if not s[0].startswith("text.0.")}
        for state in (max(deep, key=lambda s: deep[s].mean), END, (END[0], "pad")):
            show(" ".join(state), text_means[state])
        show("end of text minus last", paired(list(first.values()), [end[p] for p in first]))
        print("  of each prompt, last:", sorted(round(n, 3) for n in first.values()))
        for row in traces["text"].test("embed_recovery").table.to_pylist():
            if (row["site"], row["role"]) == END:
                mean, low, high = (
                    row["trained_minus_untrained" + ending] for ending in ("", "_low", "_high")
                )
                print(f"  end of text, untrained: {row['untrained']:.3f}")
                show("its trained minus untrained", Interval(mean, low, high, row["prompts"]))
        for source in SOURCES:
            unet_means = cells(traces[source])
            for site in ("unet.resnet.0", "unet.resnet.7"):
                show(f"{site}, {source}", unet_means[site, ""])
            crosses = {s: i for s, i in unet_means.items() if "cross_attn" in s[0]}
            best = max(crosses, key=lambda s: crosses[s].mean)
            show(f"best cross-attention, {source}: {best[0]}", crosses[best])
    for name in TRACES:
        scaled = [part for m in maps.values() if (part := in_gaps(m[name])) is not None]
        test = pooled(scaled).test("indirect_effect")
        print(name, "pooled, threshold", round(test.protocol["threshold"], 3))
        for row in sorted(test.table.to_pylist(), key=lambda row: -row["mean"])[:8]:
            show(f"{row['site']} {row['role']}, level {row['score']:.3f}, p {row['p_holm']:.2g}, {row['causal']}",
                 Interval(row["mean"], row["low"], row["high"], row["n"]))  # fmt: skip


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="finished maps: runs/quality_trace/<name>")
    folder: Path = parser.parse_args().folder
    maps = {a: {name: read(folder / a / name) for name in TRACES} for a in ATTRIBUTES}
    draw_text(maps)
    draw_places(maps)
    draw_unet(maps)
    numbers(maps)


if __name__ == "__main__":
    main()
