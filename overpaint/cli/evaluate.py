"""`overpaint evaluate`: what a change did, by a judge's labels, on an evaluation set, and under a short attack."""

import json
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint.cli.options import Device, Json, Seed, Steps
from overpaint.cli.terminal import (
    check_writable,
    load_model,
    print_facts,
    print_json,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from overpaint.metrics import Interval

__all__ = ["evaluate"]


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A zoo name (icons), a folder, or a hub id.")
    ] = None,
    change: Annotated[Path | None, typer.Argument(help="The change file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the scores.")] = Path("runs/evaluation"),
    size: Annotated[
        int, typer.Option(help="Questions for each concept; of a set, cases of each role.")
    ] = 40,
    cases: Annotated[
        str | None,
        typer.Option(
            "--set", help="Evaluation set: icons, natural, or a .txt, .csv or .toml file."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of the file: ablation, csv, timed, road or table. Default: told from it."
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="A CLIP (folder or hub id) as the scorer. Default: icons-judge."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Measure this on the set; may be repeated. Or all.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Pictures of each case of a set.")] = 1,
    erase: Annotated[
        str | None, typer.Option(help="What was edited. Default: as the change says.")
    ] = None,
    replace: Annotated[
        str | None, typer.Option(help="To what. Default: as the change says.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="style or object: of the concept.")] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Also search for prompts that bring the concept back.")
    ] = False,
    explain: Annotated[str | None, typer.Option(help="Say what a metric means, and stop.")] = None,
    seed: Seed = 0,
    steps: Steps = 16,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Judge a change: by labels (`overpaint report` draws the result), or by any metric on an evaluation set.

    \b
    overpaint evaluate icons change.safetensors
    overpaint evaluate icons change.safetensors --set icons --metric clip_accuracy --metric kid
    overpaint evaluate MODEL change.safetensors --set prompts.csv --scorer openai/clip-vit-base-patch32
    overpaint evaluate icons change.safetensors --set icons --attack
    overpaint evaluate --explain kid
    """  # noqa: D301
    if explain is not None:
        return _explain(explain, as_json)
    if model is None or change is None:
        raise ValueError(
            "name a model and a change file, as in `overpaint evaluate icons change.safetensors`; or a metric, as in "
            "`overpaint evaluate --explain kid`."
        )
    from overpaint.edit import Change

    check_writable(out)
    run = _with_command(out, context)
    found = Change.load(change)
    asked = (erase or next(iter(found.pairs), ""), replace or "")
    if not asked[0]:
        raise ValueError("the change does not say which concept it edits: name it with --erase.")
    asked = (asked[0], asked[1] or found.pairs.get(asked[0], ""))
    loaded = load_model(model, device)
    facts: dict[str, Any] = {}
    measured = bool(cases or scorer or metric)
    if not measured:
        facts |= _judge(loaded, found, asked, out, size, seed, steps, as_json)
    if measured or attack:
        loaded_scorer = _load_scorer(scorer, device)
        name = cases or ("natural" if scorer else "icons")
        chosen = _cases(name, form, kind, asked, loaded_scorer)
        if measured:
            facts |= _measure(
                loaded,
                found,
                chosen.thinned(size),
                loaded_scorer,
                metric,
                repeats,
                out,
                seed,
                steps,
                as_json,
            )
        if attack:
            facts |= _attack(loaded, found, chosen, loaded_scorer, out, seed, steps, as_json)
    _write(out / "run.json", run)
    facts["scores"] = str(out)
    return print_json(facts) if as_json else print_facts(_last(facts, measured), as_json=False)


def _with_command(out: Path, context: typer.Context) -> dict[str, Any]:
    """Return what `run.json` in `out` says, with this command, and the page's after it, as the last.

    Raises:
        ValueError: The file is damaged.
    """
    path = out / "run.json"
    try:
        told = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        earlier = [str(command) for command in told.get("commands", ())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is no JSON object with commands. Delete it, or name another --out."
        ) from error
    made = [_command(context), shlex.join(["overpaint", "report", str(out)])]
    return {"method": "change", **told, "commands": [c for c in earlier if c not in made] + made}


def _command(context: typer.Context) -> str:
    """Return the command as it was given; `--json`, which only prints, is left out."""
    words = ["overpaint", "evaluate"]
    options: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or parameter.name == "as_json":
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            options.append(parameter.opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else (value,):
                options += [parameter.opts[0], str(one)]
    return shlex.join(words + options)


def _write(path: Path, told: dict[str, Any]) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(told, indent=1), encoding="utf-8")
    os.replace(draft, path)


def _explain(name: str, as_json: bool) -> None:
    from overpaint import metrics

    print_facts(asdict(metrics.card(name)), as_json=as_json)


def _judge(
    model: Any,
    change: Any,
    asked: tuple[str, str],
    out: Path,
    size: int,
    seed: int,
    steps: int,
    quiet: bool,
) -> dict[str, Any]:
    from overpaint.evaluate import compare

    with progress(quiet) as stage:
        comparison = compare(
            model, {"no edit": None, "change": change}, erase=asked[0], replace=asked[1], size=size, steps=steps,
            seed=seed, on_progress=lambda done, total, _: stage(done, total, "judging"),
        )  # fmt: skip
    comparison.save(out)
    scores = comparison.scores["change"]
    return {**scores.flat(), **{name: share.mean for name, share in scores.aliases().items()}}


def _measure(
    model: Any, change: Any, cases: Any, scorer: Any, metric: list[str] | None, repeats: int, out: Path, seed: int,
    steps: int, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    from overpaint.evaluate import METRICS, measure

    only = METRICS if metric == ["all"] else metric
    with progress(quiet) as stage:
        found = measure(
            model, change, cases, scorer=scorer, only=only, repeats=repeats, steps=steps, seed=seed,
            on_progress=lambda done, total, what: stage(done, total, f"drawing, {what}"),
        )  # fmt: skip
    found.save(out)
    if not quiet:
        rows = [
            (
                row.role,
                row.metric,
                _show(row.before),
                _show(row.after),
                _show(row.change),
                str(row.after.n),
            )
            for row in found.rows
        ]
        print_table(("prompts", "metric", "before", "after", "change", "n"), rows)
    return found.flat()


def _attack(
    model: Any, change: Any, cases: Any, scorer: Any, out: Path, seed: int, steps: int, quiet: bool
) -> dict[str, Any]:
    from overpaint.evaluate import attack

    with progress(quiet) as stage:
        found = attack.search(
            model, change, cases, scorer=scorer, steps=steps, seed=seed,
            on_progress=lambda done, total, what: stage(done, total, f"attacking, {what}"),
        )  # fmt: skip
    found.save(out)
    if not quiet:
        rows = [
            ("unedited", "the prompts as they are", _show(found.before)),
            ("edited", "the prompts as they are", _show(found.after)),
            ("edited", "the concept left out", _show(found.chance)),
            *((a.family, a.words, _show(a.confirmed)) for a in found.attempts if a.confirmed),
        ]
        print_table(("attack", "asked", found.protocol["score"]), rows)
    return found.flat()


def _load_scorer(source: str | None, device: str) -> Any:
    if source is not None:
        from overpaint.scorers.clip import Clip

        return Clip(source, device=device)
    from overpaint.scorers import judge

    return judge.load(device=device)


def _cases(
    name: str, form: str | None, kind: str | None, asked: tuple[str, str], scorer: Any
) -> Any:
    """Return the evaluation set: one of ours by name, else a file."""
    from overpaint import probes

    erase, replace = asked
    chosen = kind or _kind(erase, scorer)
    if name in probes.VOCABULARIES:
        return probes.load_shipped_set(chosen, erase, replace, vocabulary=name)
    return probes.load_set(name, erase=erase, replace=replace, kind=chosen, form=form)


def _kind(erase: str, scorer: Any) -> str:
    """Return the kind of the concept: by the judge's labels, else a style if it says so."""
    from overpaint.probes import questions

    if labels := getattr(scorer, "labels", None):
        try:
            return questions.parse_concept(erase, labels)[0]
        except ValueError:
            pass
    return "style" if erase.lower().split()[-1] == "style" else "object"


def _last(facts: dict[str, Any], measured: bool) -> dict[str, Any]:
    """Return what no table has shown."""
    if not measured:
        return {k: v for k, v in facts.items() if not k.startswith("attack_") or "back" in k}
    names = (
        "reliability",
        "generality",
        "locality",
        "attack_recovered",
        "attack_brought_back",
        "scores",
    )
    return {name: facts[name] for name in names if name in facts}


def _show(interval: "Interval") -> str:
    if not interval.n:
        return ""
    if interval.low != interval.low:  # no interval
        return f"{interval.mean:.3g}"
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"
