"""`overpaint evaluate`: score a change by labels, by metrics on an evaluation set, and under a short attack."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overpaint import files
from overpaint.cli.options import (
    ClipSkip,
    Device,
    Dtype,
    Json,
    Seed,
    Steps,
    as_path,
    not_empty,
    with_options,
    within,
)
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


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `overpaint evaluate`."""

    out: Annotated[Path, typer.Option(help="Folder for the scores.", parser=as_path)] = Path(
        "runs/evaluation"
    )
    size: Annotated[
        int,
        typer.Option(
            help="Questions for each concept, or cases of each role of a set.",
            callback=within(1, 100_000),
        ),
    ] = 40
    cases: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="Evaluation set: icons, natural, or a .txt, .csv or .toml file.",
            callback=not_empty,
        ),
    ] = None
    form: Annotated[
        str | None,
        typer.Option(
            help="Format of the set's file: ablation, csv, timed, road or table. Default: by its content."
        ),
    ] = None
    scorer: Annotated[
        str | None,
        typer.Option(
            help="A CLIP (folder or hub id) as the scorer. Default: icons-judge.",
            callback=not_empty,
        ),
    ] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric to measure on the set; may be given again. Or all."),
    ] = None
    repeats: Annotated[
        int, typer.Option(help="Pictures of each case of a set.", callback=within(1, 100_000))
    ] = 1
    erase: Annotated[
        str | None, typer.Option(help="The erased concept. Default: that of the change.")
    ] = None
    replace: Annotated[
        str | None, typer.Option(help="Its replacement. Default: that of the change.")
    ] = None
    kind: Annotated[str | None, typer.Option(help="Kind of the concept: style or object.")] = None
    attack: Annotated[
        bool, typer.Option("--attack", help="Also search for prompts that bring the concept back.")
    ] = False
    explain: Annotated[str | None, typer.Option(help="Explain a metric and stop.")] = None
    seed: Seed = 0
    steps: Steps = 16


@with_options
def evaluate(
    context: typer.Context,
    options: EvaluateOptions,
    model: Annotated[
        str | None,
        typer.Argument(help="A zoo name (icons), a folder, or a hub id.", callback=not_empty),
    ] = None,
    change: Annotated[Path | None, typer.Argument(help="The change file.", parser=as_path)] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    clip_skip: ClipSkip = None,
    as_json: Json = False,
) -> None:
    """Measure a change. By labels (`overpaint report` draws the result), or by metrics on an evaluation set.

    \b
    overpaint evaluate icons change.safetensors
    overpaint evaluate icons change.safetensors --set icons --metric kid
    overpaint evaluate MODEL change.safetensors --set my.csv --scorer ./clip
    overpaint evaluate icons change.safetensors --set icons --attack
    overpaint evaluate --explain kid
    """  # noqa: D301
    if options.explain is not None:
        return _explain(options.explain, as_json)
    if model is None or change is None:
        raise ValueError(
            "name a model and a change file, as in `overpaint evaluate icons change.safetensors`; or a metric, as in "
            "`overpaint evaluate --explain kid`."
        )
    from overpaint.edit import Change

    _check(options)
    check_writable(options.out)
    record = _record(options.out, context)
    loaded_change = Change.load(change)
    erase, replace = _concept(loaded_change.pairs, options)
    loaded = load_model(model, device, dtype, clip_skip)
    run = _Run(loaded, loaded_change, erase, replace, options, as_json)
    facts = _evaluate(run, device)
    files.write_json(options.out / "run.json", record)
    facts["scores"] = str(options.out)
    return print_json(facts) if as_json else print_facts(_remaining(facts, run), as_json=False)


@dataclass(frozen=True)
class _Run:
    """A model, a change, its concept and the options."""

    model: Any
    change: Any
    erase: str
    replace: str
    options: EvaluateOptions
    quiet: bool

    @property
    def uses_set(self) -> bool:
        """Return whether metrics on an evaluation set are measured, instead of labels."""
        return _uses_set(self.options)


def _uses_set(options: EvaluateOptions) -> bool:
    return bool(options.metric) or options.cases is not None or options.scorer is not None


def _check(options: EvaluateOptions) -> None:
    from overpaint.probes import KINDS

    if options.erase is not None and not options.erase.strip():
        raise ValueError("--erase is empty: name the erased concept, or leave --erase out.")
    if options.form is not None and options.cases is None:
        raise ValueError("--form is the format of a file: name the file with --set.")
    on_set = _uses_set(options)
    if options.repeats != 1 and not on_set:
        raise ValueError(
            "--repeats is for an evaluation set: name one with --set, or leave it out."
        )
    if options.kind is not None:
        if not (on_set or options.attack):
            raise ValueError(
                "--kind selects an evaluation set, and labels have their own kind: name a set with --set, or leave "
                "--kind out."
            )
        if options.kind not in KINDS:
            raise ValueError(
                f"unknown kind of concept {options.kind!r}: choose one of {', '.join(KINDS)}."
            )


def _concept(pairs: dict[str, str], options: EvaluateOptions) -> tuple[str, str]:
    """Return the erased concept and its replacement: by the options, else the first pair of the change."""
    erase = options.erase or next(iter(pairs), "")
    if not erase:
        raise ValueError("the change names no concept: name the erased one with --erase.")
    return erase, pairs.get(erase, "") if options.replace is None else options.replace


def _evaluate(run: _Run, device: str) -> dict[str, Any]:
    """Run the measurements that the options select, and return their figures."""
    options = run.options
    facts: dict[str, Any] = {}
    if not run.uses_set:
        facts |= _recognise(run)
    if run.uses_set or options.attack:
        scorer = _load_scorer(options.scorer, device)
        cases = _cases(run, scorer)
        if run.uses_set:
            facts |= _measure(run, cases.thinned(options.size), scorer)
        if options.attack:
            facts |= _attack(run, cases, scorer)
    return facts


def _record(out: Path, context: typer.Context) -> dict[str, Any]:
    """Return the content of `run.json` in `out` with this command, and that of the page, as the last ones.

    Raises:
        ValueError: The file is damaged.
    """
    path = out / "run.json"
    try:
        record = dict(files.from_json(path.read_bytes())) if path.is_file() else {}
        earlier = [str(command) for command in record.get("commands", ())]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: it is no JSON object with commands. Delete it, or name another --out."
        ) from error
    latest = [_command(context), shlex.join(["overpaint", "report", str(out)])]
    commands = [command for command in earlier if command not in latest] + latest
    return {"method": "change", **record, "commands": commands}


def _command(context: typer.Context) -> str:
    """Return the command line as it was typed, without `--json`."""
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


def _explain(name: str, as_json: bool) -> None:
    from overpaint import metrics

    print_facts(asdict(metrics.card(name)), as_json=as_json)


def _recognise(run: _Run) -> dict[str, Any]:
    """Evaluate by the labels of icons-judge, save the comparison and return its figures."""
    from overpaint.evaluate import compare

    options = run.options
    with progress(run.quiet) as on_progress:
        comparison = compare(
            run.model, {"no edit": None, "change": run.change}, erase=run.erase, replace=run.replace,
            size=options.size, steps=options.steps, seed=options.seed,
            on_progress=lambda done, total, _: on_progress(done, total, "evaluating"),
        )  # fmt: skip
    comparison.save(options.out)
    scores = comparison.scores["change"]
    intervals = {name: asdict(interval) for name, interval in scores.intervals().items()}
    figures = {**scores.flat(), **{name: share.mean for name, share in scores.aliases().items()}}
    return {**figures, "intervals": intervals}


def _measure(run: _Run, cases: Any, scorer: Any) -> dict[str, Any]:
    """Measure the metrics on the cases, save and print them, and return the figures."""
    from overpaint.evaluate import METRICS, measure

    options = run.options
    with progress(run.quiet) as on_progress:
        measures = measure(
            run.model, run.change, cases, scorer=scorer,
            only=METRICS if options.metric == ["all"] else options.metric,
            repeats=options.repeats, steps=options.steps, seed=options.seed,
            on_progress=lambda done, total, label: on_progress(done, total, f"drawing, {label}"),
        )  # fmt: skip
    measures.save(options.out)
    if not run.quiet:
        rows = [
            (r.role, r.metric, _text(r.before), _text(r.after), _text(r.change), str(r.after.n))
            for r in measures.rows
        ]
        print_table(("prompts", "metric", "before", "after", "change", "n"), rows)
    return measures.flat()


def _attack(run: _Run, cases: Any, scorer: Any) -> dict[str, Any]:
    """Search for prompts that bring the concept back, save and print them, and return the figures."""
    from overpaint.evaluate import attack

    with progress(run.quiet) as on_progress:
        result = attack.search(
            run.model, run.change, cases, scorer=scorer, steps=run.options.steps, seed=run.options.seed,
            on_progress=lambda done, total, label: on_progress(done, total, f"attacking, {label}"),
        )  # fmt: skip
    result.save(run.options.out)
    if not run.quiet:
        rows = [
            ("unedited", "the prompts as they are", _text(result.before)),
            ("edited", "the prompts as they are", _text(result.after)),
            ("edited", "the concept left out", _text(result.chance)),
            *((a.family, a.words, _text(a.confirmed)) for a in result.attempts if a.confirmed),
        ]
        print_table(("attack", "prompt", result.protocol["score"]), rows)
    return result.flat()


def _load_scorer(source: str | None, device: str) -> Any:
    from overpaint import scorers

    return scorers.load(device=device) if source is None else scorers.Clip(source, device=device)


def _cases(run: _Run, scorer: Any) -> Any:
    """Return the evaluation set: a shipped one by its name, else a file."""
    from overpaint import probes

    options = run.options
    name = ("natural" if options.scorer else "icons") if options.cases is None else options.cases
    kind = options.kind or _kind(run.erase, scorer)
    if name in probes.VOCABULARIES:
        return probes.load_shipped_set(kind, run.erase, run.replace, vocabulary=name)
    return probes.load_set(name, erase=run.erase, replace=run.replace, kind=kind, form=options.form)


def _kind(erase: str, scorer: Any) -> str:
    """Return the kind of the concept: by the scorer's labels; else style if the last word says so, or object."""
    from overpaint.probes import questions

    if labels := getattr(scorer, "labels", None):
        try:
            return questions.parse_concept(erase, labels)[0]
        except ValueError:
            pass
    return "style" if erase.lower().split()[-1] == "style" else "object"


def _remaining(facts: dict[str, Any], run: _Run) -> dict[str, Any]:
    """Return the figures that no printed table shows."""
    if not run.uses_set:
        intervals = facts.get("intervals", {})
        return {
            name: _with_interval(value, intervals.get(name))
            for name, value in facts.items()
            if name != "intervals" and (not name.startswith("attack_") or "back" in name)
        }
    names = (
        "reliability", "generality", "locality", "attack_recovered", "attack_brought_back", "scores",
    )  # fmt: skip
    return {name: facts[name] for name in names if name in facts}


def _with_interval(value: Any, interval: dict[str, Any] | None) -> Any:
    """Return a share as text with its interval; any other value as it is."""
    if interval is None or not interval["n"]:
        return value
    return f"{value:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _text(interval: "Interval") -> str:
    """Return a mean with its interval, or empty text where nothing was measured."""
    if not interval.n:
        return ""
    if interval.low != interval.low:  # no interval
        return f"{interval.mean:.3g}"
    return f"{interval.mean:.3g} [{interval.low:.3g}, {interval.high:.3g}]"
