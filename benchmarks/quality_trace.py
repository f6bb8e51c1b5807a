"""Where does `icons` keep its attributes, does the paper's claim about it hold, and how few steps show the same map?

    python benchmarks/quality_trace.py [--quick] [--json] [--prompts N] [--steps S] [--solver NAME]

For each attribute (style, object, color, count, action, fact) N prompts, as many of each number of concept tokens as
there are, are traced: every (sublayer, position) of the text encoder, with an untrained encoder and with other words
corrupted as controls; every layer of the UNet, from the clean trajectory (the paper) and on the same latents (the
control, whose effects come only from the prompt). The tables answer:

  - which state is best for each attribute, and what is left of it without training;
  - is it layer 0's self-attention at the last concept token, as in the paper, by number of concept tokens;
  - which states are causal (sign-flip test over the prompts that did not set the threshold, Holm's correction): for
    each attribute where its prompts are enough to show any, and over all attributes, with scores in units of the mean
    gap between clean and corrupted, since a probability and a cosine have no common scale;
  - what the control leaves of the UNet's map;
  - how well few steps and gradient screening agree with DDIM's 50 steps and with the exact map, and the time they save.

The scorer is `icons-judge`: the probability of the concept, but for counts, for which it has no head, the cosine of
picture and prompt. Finished prompts are saved in `runs/quality_trace`, so that a stopped run can continue.
The defaults take about 20 minutes on two idle cores; N prompts take N times as long. Writes
`benchmarks/results/quality_trace.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is imported: on a busy machine threads that spin for long cost ten times the time; on an idle one not.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import pyarrow as pa
import torch

import overpaint as op
from overpaint.files import to_json, write_json
from overpaint.metrics import Interval, bootstrap, share
from overpaint.model.token_spans import find_span
from overpaint.probes import Probe
from overpaint.scorers import judge
from overpaint.trace import Drawing, Effects, Noise, TextStates, screening
from overpaint.trace.corruption import corruptions
from overpaint.trace.provenance import fingerprint

RESULTS = Path(__file__).parent / "results"
ATTRIBUTES = ("style", "object", "color", "count", "action", "fact")
COSINE = ("count",)  # icons-judge has no head for it
FIRST, MLP = ("text.0.self_attn", "last_subject"), ("text.0.mlp", "last_subject")
BEFORE_TEXT = ("unet.resnet.0", "unet.self_attn.0")
TRACES = ("text", "clean_trajectory", "same_latent")
Row = dict[str, Any]
Maps = dict[str, Effects]  # by name in TRACES


@dataclass(frozen=True)
class Plan:
    """Settings of the full run or of the quick one."""

    model: op.TextToImage
    scorer: judge.Judge
    attributes: tuple[str, ...]
    prompts: int
    steps: int
    solver: str
    reference: int  # DDIM steps of the solver table
    solvers: tuple[tuple[str, int], ...]
    solver_prompts: int
    folder: Path | None

    @property
    def drawing(self) -> Drawing:
        """Settings of the maps' pictures."""
        return Drawing(self.steps, solver=self.solver)

    def place(self, *names: str) -> Path | None:
        """Return the folder for finished prompts; `None` if they are not saved."""
        return None if self.folder is None else self.folder.joinpath(*names)


def chosen(model: op.TextToImage, attribute: str, count: int) -> list[Probe]:
    """Return `count` probes of an attribute, alternating between numbers of concept tokens, else in random order."""
    order = sorted(
        op.probes.load(attribute), key=lambda p: hashlib.sha256(p.id.encode()).hexdigest()
    )
    groups: dict[int, list[Probe]] = {}
    for probe in order:
        groups.setdefault(tokens(model, probe), []).append(probe)
    mixed = [g[i] for i in range(len(order)) for _, g in sorted(groups.items()) if i < len(g)]
    return mixed[:count]


def tokens(model: op.TextToImage, probe: Any) -> int:
    return len(find_span(model.tokenizer, probe.prompt, probe.concept))


def trace(plan: Plan, attribute: str) -> Maps:
    """Return the three maps of an attribute."""
    probes = chosen(plan.model, attribute, plan.prompts)
    options = {"drawing": plan.drawing, "scorer": plan.scorer.score}
    text = op.trace.text_encoder(
        plan.model, probes, folder=plan.place(attribute, "text"), **options
    )
    return {
        "text": text,
        **{
            source: op.trace.unet(
                plan.model, probes, source=source, folder=plan.place(attribute, source), **options
            )
            for source in ("clean_trajectory", "same_latent")
        },
    }


def cells(effects: Effects, value: str = "indirect_effect") -> dict[tuple[str, str], Interval]:
    """Return the mean and interval of each state by (site, role)."""
    return {
        (row["site"], row["role"]): Interval(row["mean"], row["low"], row["high"], row["n"])
        for row in effects.mean(value).to_pylist()
    }


def best_of(means: dict[tuple[str, str], Interval]) -> tuple[str, str]:
    return max(means, key=lambda state: means[state].mean)


def text_row(attribute: str, effects: Effects) -> Row:
    means = cells(effects)
    best = best_of(means)
    clean, corrupted = ends_of(effects)
    ranked = sorted(means, key=lambda state: -means[state].mean)
    return {
        "attribute": attribute,
        "score": "cosine" if attribute in COSINE else "probability",
        "prompts": len(set(effects.table["probe"].to_pylist())),
        "clean": round(clean, 3),
        "corrupted": round(corrupted, 3),
        "dropped": effects.dropped,
        "best state": " ".join(best),
        "effect": means[best],
        "layer 0 attention, last token": means[FIRST],
        "layer 0 MLP, last token": means[MLP],
        "rank of the former": f"{ranked.index(FIRST) + 1} of {len(ranked)}",
    }


def control_row(attribute: str, effects: Effects) -> Row:
    """Return trained and untrained recovery of the text features, and their difference."""
    rows = {(r["site"], r["role"]): r for r in effects.test("embed_recovery").table.to_pylist()}
    best = max(rows, key=lambda state: rows[state]["mean"])
    result: Row = {"attribute": attribute}
    for name, state in (("best", best), ("layer 0 attention", FIRST), ("layer 0 MLP", MLP)):
        row = rows[state]
        low, high = row["trained_minus_untrained_low"], row["trained_minus_untrained_high"]
        if name == "best":
            result["best state"] = " ".join(state)
        result[f"{name}: trained"] = round(row["mean"], 3)
        result[f"{name}: untrained"] = round(row["untrained"], 3)
        result[f"{name}: difference"] = Interval(
            row["trained_minus_untrained"], low, high, row["prompts"]
        )
        if row["other_span"] is not None:
            result[f"{name}: other words"] = round(row["other_span"], 3)
    return result


def unet_row(attribute: str, maps: Maps) -> Row:
    paper, control = (cells(maps[name]) for name in ("clean_trajectory", "same_latent"))
    whole, left = (sum(max(0.0, i.mean) for i in means.values()) for means in (paper, control))
    early = [
        max((means[site, ""] for site in BEFORE_TEXT), key=lambda i: i.mean)
        for means in (paper, control)
    ]
    agreement = maps["clean_trajectory"].agreement(maps["same_latent"])
    return {
        "attribute": attribute,
        "best, clean trajectory": best_of(paper)[0],
        "effect": paper[best_of(paper)],
        "best, same latents": best_of(control)[0],
        "its effect": control[best_of(control)],
        "before any text: paper": early[0],
        "before any text: control": early[1],
        "Spearman": agreement,
        "positive effects left": round(left / whole, 3) if whole else None,
    }


def token_rows(model: op.TextToImage, effects: Effects) -> list[Row]:
    """Return for each number of concept tokens the effects that test the claim on layer 0, as shares of the gap."""
    recoveries: dict[str, dict[tuple[str, str], float]] = {}
    lengths: dict[str, int] = {}
    for row in effects.table.to_pylist():
        if not row["control"] and row["recovery"] is not None:
            probe = recoveries.setdefault(row["probe"], {})
            state = row["site"], row["role"]
            probe[state] = max(row["recovery"], probe.get(state, -math.inf))
            lengths[row["probe"]] = len(find_span(model.tokenizer, row["prompt"], row["concept"]))
    rows: list[Row] = []
    for length in sorted(set(lengths.values())):
        probes = [recoveries[name] for name in recoveries if lengths[name] == length]
        firsts = [probe[FIRST] == max(probe.values()) for probe in probes]
        rows.append(
            {
                "concept tokens": length,
                "prompts": len(probes),
                "layer 0 attention": bootstrap([probe[FIRST] for probe in probes]),
                "layer 0 MLP": bootstrap([probe[MLP] for probe in probes]),
                "best state": bootstrap([max(probe.values()) for probe in probes]),
                "prompts whose best is layer 0 attention": share(firsts),
            }
        )
    return rows


def pooled(effects: Sequence[Effects]) -> Effects:
    return Effects(pa.concat_tables([e.table for e in effects]), effects[0].protocol)


def causal_rows(maps: dict[str, Maps]) -> list[Row]:
    """Return for each map, of each attribute and of all, how many states are causal, and the strongest.

    Raw scores serve for one attribute; over all, scores in units of each attribute's mean gap.
    """
    rows: list[Row] = []
    for name in TRACES:
        rows += [_causal_row(name, attribute, m[name]) for attribute, m in maps.items()]
        units = [scaled for m in maps.values() if (scaled := in_gaps(m[name])) is not None]
        if units:
            rows.append(_causal_row(name, f"all {len(units)}, in gaps", pooled(units)))
    return rows


def _causal_row(name: str, attribute: str, effects: Effects) -> Row:
    test = effects.test("indirect_effect")
    states, protocol = test.table.to_pylist(), test.protocol
    causal = sorted((s for s in states if s["causal"]), key=lambda s: -s["mean"])
    row: Row = {
        "map": name,
        "attribute": attribute,
        "states": len(states),
        "prompts tested": protocol["prompts_tested"],
        "smallest p": f"{protocol['smallest_p']:.2g}",
        "threshold": None if protocol["threshold"] is None else round(protocol["threshold"], 3),
        "reach it": sum(s["score"] >= protocol["threshold"] for s in states) if protocol["threshold"] else None,
    }  # fmt: skip
    if test.reason:
        return {**row, "strongest": "too few prompts to show any"}
    strongest = ", ".join(f"{s['site']} {s['role']}".strip() for s in causal[:4])
    significant = sum(s["p_holm"] <= protocol["alpha"] for s in states)
    return {
        **row,
        "significant": significant,
        "causal": len(causal),
        "strongest": strongest or "none",
    }


def in_gaps(effects: Effects) -> Effects | None:
    """Return effects whose scores are 0 at the mean corrupted and 1 at the mean clean one; `None` without a gap."""
    clean, corrupted = ends_of(effects)
    if (gap := clean - corrupted) <= 0.02:
        return None

    def scaled(row: Row) -> Row:
        if row["score_clean"] is None:
            return row
        levels = {
            n: (row[n] - corrupted) / gap
            for n in ("score_clean", "score_corrupted", "score_restored")
        }
        return {**row, **levels, "indirect_effect": row["indirect_effect"] / gap}

    return Effects.of([scaled(row) for row in effects.table.to_pylist()], effects.protocol)


def ends_of(effects: Effects) -> tuple[float, float]:
    """Return the mean clean and corrupted score of the runs."""
    runs = {
        row["probe"]: (row["score_clean"], row["score_corrupted"])
        for row in effects.table.to_pylist()
        if row["score_clean"] is not None
    }
    clean, corrupted = (sum(numbers) / len(runs) for numbers in zip(*runs.values(), strict=True))
    return clean, corrupted


def solver_rows(plan: Plan) -> list[Row]:
    """Return how well few steps agree with many, and the time they save; text states at two tokens.

    The settings alternate prompt by prompt in this process, and nothing is read from disk, so that other work on the
    machine slows all of them equally.
    """
    probes = [
        p for a in plan.attributes[:2] for p in chosen(plan.model, a, -(-plan.solver_prompts // 2))
    ][: plan.solver_prompts]
    _, sigma = corruptions(plan.model, probes, Noise())
    settings = [("ddim", plan.reference), *plan.solvers]
    maps: dict[tuple[str, int], list[Maps]] = {setting: [] for setting in settings}
    seconds = dict.fromkeys(settings, 0.0)
    for probe in probes:
        for solver, steps in settings:
            start = time.perf_counter()
            maps[solver, steps].append(_short(plan, probe, sigma, solver, steps))
            seconds[solver, steps] += time.perf_counter() - start
    reference, *others = settings
    rows = [
        {"solver": reference[0], "steps": reference[1], "text": None, "unet": None, "saved": 1.0}
    ]
    for setting in others:
        agreements = {
            name: pooled([m[name] for m in maps[setting]]).agreement(
                pooled([m[name] for m in maps[reference]])
            )
            for name in ("text", "unet")
        }
        saved = round(seconds[reference] / seconds[setting], 2)
        rows.append({"solver": setting[0], "steps": setting[1], **agreements, "saved": saved})
    return rows


def _short(plan: Plan, probe: Probe, sigma: float, solver: str, steps: int) -> Maps:
    """Return the maps of one prompt; that of the text encoder has two roles and no controls."""
    options: dict[str, Any] = {
        "drawing": Drawing(steps, solver=solver), "scorer": plan.scorer.score, "noise": Noise(sigma=sigma),
    }  # fmt: skip
    states = TextStates(positions=("last_subject", "eos"))
    return {
        "text": op.trace.text_encoder(
            plan.model, [probe], states=states, controls="none", **options
        ),
        "unet": op.trace.unet(plan.model, [probe], **options),
    }


def screen_rows(plan: Plan, maps: dict[str, Maps]) -> list[Row]:
    """Return how well attribution through the last K steps agrees with the exact maps."""
    rows: list[Row] = []
    for last in dict.fromkeys((1, -(-plan.steps // 2), plan.steps)):
        row: Row = {"last steps": last}
        for name in TRACES:
            start = time.perf_counter()
            screened = [_screened(plan, attribute, name, last) for attribute in maps]
            exact = pooled([m[name] for m in maps.values()])
            row[name] = pooled(screened).agreement(
                exact, value="attribution", other_value="indirect_effect"
            )
            row[f"{name}, seconds a prompt"] = round(
                (time.perf_counter() - start) / (len(maps) * plan.prompts), 2
            )
        rows.append(row)
    return rows


def _screened(plan: Plan, attribute: str, name: str, last: int) -> Effects:
    probes = chosen(plan.model, attribute, plan.prompts)
    drawing = replace(plan.drawing, batch_size=8)
    options = {"last": last, "drawing": drawing, "scorer": plan.scorer.score}
    if name == "text":
        return screening.text_encoder(plan.model, probes, **options)
    return screening.unet(plan.model, probes, source=name, **options)


def table(title: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table; intervals as mean [low, high]."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"\n### {title}\n", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [
        "| " + " | ".join("" if row.get(n) is None else _text(row[n]) for n in names) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, Interval):
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return str(value)


def plain(value: Any) -> Any:
    """Return an interval as a dictionary for JSON."""
    if isinstance(value, Interval):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    return value


def figures(tables: dict[str, list[Row]]) -> dict[str, float]:
    """Return the flat figures, numbers by their names."""
    result: dict[str, float] = {}
    for row in tables["text"]:
        a = row["attribute"]
        result[f"{a}_clean"], result[f"{a}_corrupted"] = row["clean"], row["corrupted"]
        result[f"{a}_text_best"] = row["effect"].mean
        result[f"{a}_text_layer0"] = row["layer 0 attention, last token"].mean
    for row in tables["unet"]:
        a = row["attribute"]
        result[f"{a}_unet_best"], result[f"{a}_unet_best_control"] = (
            row["effect"].mean,
            row["its effect"].mean,
        )
        result[f"{a}_unet_spearman"] = row["Spearman"].mean
    for row in tables["solvers"][1:]:
        name = f"{row['solver']}_{row['steps']}"
        result[f"{name}_spearman_text"] = row["text"].mean
        result[f"{name}_spearman_unet"] = row["unet"].mean
        result[f"{name}_saved"] = row["saved"]
    for row in tables["screening"]:
        for name in TRACES:
            result[f"screen_{row['last steps']}_spearman_{name}"] = row[name].mean
    return {name: round(n, 4) for name, n in result.items() if math.isfinite(n)}


def plan_of(arguments: argparse.Namespace) -> Plan:
    model, scorer = op.load("icons"), judge.load()
    if arguments.quick:
        return Plan(
            model, scorer, ("style", "object"), 1, 1, "own", 2, (("own", 1), ("dpm", 1)), 1, None
        )
    solvers = (("own", 10), ("own", 15), ("own", 20), ("dpm", 10), ("dpm", 15))
    name = f"{fingerprint(model)}-{arguments.prompts}-{arguments.solver}-{arguments.steps}"
    folder = Path("runs/quality_trace") / name
    return Plan(
        model, scorer, ATTRIBUTES, arguments.prompts, arguments.steps, arguments.solver, 50, solvers, 2, folder
    )  # fmt: skip


def tables_of(plan: Plan) -> dict[str, list[Row]]:
    maps = {attribute: trace(plan, attribute) for attribute in plan.attributes}
    text = pooled([m["text"] for m in maps.values()])
    return {
        "text": [text_row(a, m["text"]) for a, m in maps.items()],
        "control": [control_row(a, m["text"]) for a, m in maps.items()],
        "tokens": token_rows(plan.model, text),
        "unet": [unet_row(a, m) for a, m in maps.items()],
        "causal": causal_rows(maps),
        "screening": screen_rows(plan, maps),
        "solvers": solver_rows(plan),
    }


TITLES = {
    "text": "Text encoder: score(restored) - score(corrupted), mean over prompts [95 % interval]",
    "control": "Text features recovered, trained and untrained",
    "tokens": "By number of concept tokens: share of the gap that one state restores",
    "unet": "UNet: the paper's source and the same-latent control",
    "causal": "Causal states by attribute and over all (sign flips, Holm, half-gap of validation prompts)",
    "screening": "Gradient screening against the exact map: Spearman over states",
    "solvers": "Few steps against many: Spearman of the maps, and how many times faster",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two prompts, few steps, same code")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--prompts", type=int, default=4, help="prompts an attribute")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of the maps")
    parser.add_argument("--solver", default="own", help="own, ddim or dpm")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(2)
    plan = plan_of(arguments)
    tables = tables_of(plan)
    for name, rows in tables.items():
        print(table(TITLES[name], rows))
    result = {**figures(tables), "seconds": round(time.perf_counter() - start, 1)}
    protocol = {
        **plan.model.protocol(steps=plan.steps, guidance_scale=plan.model.guidance_scale),
        "weights": fingerprint(plan.model),
        "solver": plan.solver,
        "prompts": {
            a: [p.prompt for p in chosen(plan.model, a, plan.prompts)] for a in plan.attributes
        },
        "seed": 0,
        "quick": arguments.quick,
        "load_average": os.getloadavg()[0],
    }
    report = {
        name: [{n: plain(v) for n, v in row.items()} for row in rows]
        for name, rows in tables.items()
    }
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "quality_trace.json", {"result": result, "tables": report, "protocol": protocol}
    )
    if arguments.json:
        print(to_json(result))


if __name__ == "__main__":
    main()
