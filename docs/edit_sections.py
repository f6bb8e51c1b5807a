"""The sections of docs/results.md on the contest of edits, from `quality_edit` with tuned rivals."""

from collections.abc import Mapping, Sequence

from tables import Run, number, origin, percent, table

__all__ = ["contest", "many"]

COMMAND = "python benchmarks/quality_edit.py"
NAMES = {
    "auto": "**automatic (`edit.auto`)**",
    "auto, weight tuned": "automatic with a tuned preserve weight",
    "quickfix": "Diff-QuickFix",
    "quickfix, list": "Diff-QuickFix with the preserve list",
    "quickfix, last token": "Diff-QuickFix at the last token",
    "uce, last token": "UCE at the last token",
    "uce, to pads": "UCE from the last token to the pads",
    "time": "TIME",
    "loco": "LocoEdit",
    "finetune": "fine-tuning",
    "oce": "OCE",
    "dp": "DP",
    "speed": "SPEED",
    "hirm": "HiRM",
    "random site": "random site",
    "token rows": "token rows (`edit.rename`)",
    "prompt filter": "prompt filter",
    "no edit": "no edit",
}


def contest(run: Run) -> str:
    """Return the section on edits of one concept, by all methods."""
    if "unfinished" in run:
        return f"## Edits of one concept\n\n{run['unfinished']}\n"
    tables, result = run["tables"], run["result"]
    rows = {row["method"]: row for row in tables["methods"]}
    kinds = list(dict.fromkeys(row["kind"] for row in tables["by kind"]))
    counts = ", ".join(f"{len(pairs)} {kind}s" for kind, pairs in run["test"]["concepts"].items())
    pictures = run["protocol"]["pictures"]["targets"]
    plain = rows["no edit"]
    return (
        "## Edits of one concept\n\n"
        + origin(
            COMMAND, run["protocol"], commit=run["commit"], more=f"seed {run['protocol']['seed']}"
        )
        + f"\nTest concepts ({counts}), one edit each, at least {pictures} pictures of each, the same prompts and "
        f"start noise for all rows; intervals over concepts. {_looks(run)} Every method's settings were chosen on "
        "other concepts, by successive halving on the harmonic mean, and methods with a preserve list got the same "
        f"one. The unedited model is recognised to draw the concept in {percent(plain['target'])} of its pictures, in "
        f"held-out wordings in {percent(plain['wording'])}, and the replacement, when the prompt names it, in "
        f"{percent(plain['reached'])}.\n\n"
        + _erased(rows)
        + "\nWhat else changes. *Lost* are labels of pictures without the concept; *scene* is what else pictures of "
        "the concept show, such as the object in an edited style; *captions* are everyday captions that move by more "
        f"than a tenth of their distance from the empty prompt, of the same {run['protocol']['captions']} for all "
        "concepts and methods.\n\n"
        + _kept(rows)
        + f"\n{_outcome(tables['auto minus the row'])}\n\n"
        + _paired(tables["auto minus the row"])
        + "\nHarmonic mean by kind of concept:\n\n"
        + _by_kind(tables["by kind"], kinds)
        + "\nSettings that were chosen, and the cost of one edit; seconds depend on the load of the machine, see "
        "[speed of editing](#speed-of-editing):\n\n"
        + _settings(rows)
        + _refusals(rows)
        + _edges(run.get("edges", {}))
        + _kid(tables["kid"])
        + _attacks(tables.get("attack", []), result, run["test"].get("attacked", []))
    )


def many(run: Run) -> str:
    """Return the section on several concepts in one solve."""
    if "unfinished" in run:
        return f"## Several concepts in one solve\n\n{run['unfinished']}\n"
    found = run["tables"]["many"]
    rows = [
        [
            f"{row['concepts']}", NAMES[row["method"]] + (" (refused)" if row["refused"] else ""),
            *(percent(row[k]) for k in ("kept", "left", "redirection")), f"{row['seconds']:.1f} s",
        ]
        for row in found
    ]  # fmt: skip
    labels = found[0]["kept"]["n"] if found else 0
    heads = ["concepts", "method", "kept", "still the concept", "now the replacement", "time"]
    return (
        "## Several concepts in one solve\n\n"
        + origin(COMMAND, run["protocol"], commit=run["commit"])
        + f"\n*Kept* is the share of {labels} untouched objects, logos, persons and flags that are still recognised. "
        "The aims at 50 concepts are 90 % kept and at most 5 % left.\n\n" + table(heads, rows)
    )


def _looks(run: Run) -> str:
    """Return a sentence on how often the test concepts were looked at."""
    test = run["test"]
    looks = [look for look in test["looks"] if look["list"] == test["list"]]
    if len(looks) == 1:
        return "The test concepts were written down before, and run once."
    here = sum(look["weights"] == run["protocol"]["weights"] for look in looks)
    times = "1 time" if here == 1 else f"{here} times"
    return f"**The test concepts were run {len(looks)} times, {times} on these weights.**"


def _erased(rows: Run) -> str:
    heads = {
        "target": "still the concept", "wording": "in held-out wordings", "synonym": "by synonyms",
        "new synonym": "by held-out synonyms",
        "redirection": "now the replacement", "harmonic": "harmonic mean of erased and kept",
    }  # fmt: skip
    if any("attack" in row for row in rows.values()):
        heads |= {"attack": "under attack", "attack_chance": "by chance"}
    return table(
        ["method", *heads.values()],
        [[NAMES[name], *(_cell(row, key) for key in heads)] for name, row in rows.items()],
    )


def _kept(rows: Run) -> str:
    heads = {
        "others_drop": "others of its kind, lost", "rest_drop": "all else, lost", "scene_drop": "scene, lost",
        "captions": "captions moved",
    }  # fmt: skip
    return table(
        ["method", *heads.values()],
        [[NAMES[name], *(_cell(row, key) for key in heads)] for name, row in rows.items()],
    )


def _cell(row: Run, key: str) -> str:
    if key not in row:
        return ""
    return number(row[key]) if key == "harmonic" else percent(row[key])


def _outcome(rows: list[Run]) -> str:
    """Return sentences on which tuned rivals, and which controls, `auto` beats, ties with and loses to."""
    rivals, controls = (_verdicts(rows, role) for role in ("rival", "control"))
    text = f"By the paired interval of the harmonic mean, `auto` is {rivals}."
    return f"{text} Of the rows that cost nothing it is {controls}." if controls else text


def _verdicts(rows: list[Run], role: str) -> str:
    parts = []
    for verdict, words in (
        ("auto is better", "better than"), ("draw", "a draw with"), ("auto is worse", "worse than"),
    ):  # fmt: skip
        names = [NAMES[r["method"]] for r in rows if r["verdict"] == verdict and r["role"] == role]
        if names:
            parts.append(f"{words} {', '.join(names)}")
    return "; ".join(parts)


def _paired(rows: list[Run]) -> str:
    return table(
        ["`auto` minus", "concepts", "harmonic mean, paired by concept", "verdict"],
        [[NAMES[r["method"]], str(r["n"]), number(r["harmonic"], 3), r["verdict"]] for r in rows],
    )


def _by_kind(rows: list[Run], kinds: list[str]) -> str:
    by = {(row["kind"], row["method"]): row["harmonic"]["mean"] for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return table(
        ["method", *kinds], [[NAMES[m], *(number(by[kind, m]) for kind in kinds)] for m in methods]
    )


def _settings(rows: Run) -> str:
    return table(
        ["method", "settings", "seconds", "file"],
        [
            [NAMES[name], row["settings"], f"{row['seconds']['mean']:.2f} s", f"{row['bytes']['mean'] / 1000:,.0f} KB"]
            for name, row in rows.items()
        ],
    )  # fmt: skip


def _refusals(rows: Run) -> str:
    refused = [
        f"{NAMES[name]} {100 * row['refused']['mean']:.0f} %"
        for name, row in rows.items()
        if row["refused"]["mean"]
    ]
    if not refused:
        return ""
    return f"\nConcepts that a method refuses, which count as unedited: {', '.join(refused)}.\n"


def _edges(remarks: Mapping[str, Sequence[str]]) -> str:
    found = [f"{NAMES[name]} ({'; '.join(texts)})" for name, texts in remarks.items() if texts]
    if not found:
        return ""
    return f"\nChosen numbers at the edge of their grids: {', '.join(found)}.\n"


def _attacks(rows: list[Run], result: Run, concepts: Sequence[str]) -> str:
    """Return what attacks show: `auto` against each other attacked row, paired by concept."""
    if "attack_after" not in result:
        return "\nNo attacks were run.\n"
    plain, after = (percent(result[f"attack_{name}"]) for name in ("plain", "after"))
    return (
        f"\n{len(concepts)} of the concepts, a third of each kind, were attacked, each method with the same budget. "
        f"The judge's mean probability of the concept in pictures of `auto`'s edits is {plain} with plain prompts and "
        f"{after} under the best attempt that was confirmed with other seeds. Against other rows, on the concepts that "
        "both edit (below 0, `auto` withstands more):\n\n"
        + table(
            ["`auto` minus", "concepts", "under attack, paired", "`auto` minus half of the row", "at most half"],
            [[NAMES[r["method"]], str(r["n"]), number(r["difference"]), number(r["minus half"]), r["at most half"]]
             for r in rows],
        )
    )  # fmt: skip


def _kid(rows: list[Run]) -> str:
    edited = [row["p"] for row in rows if "against other seeds" in row["set"]]
    if not edited:
        return ""
    return (
        "\nKID of unrelated prompts, edited by `auto` against other seeds of the unedited model: "
        f"{len(edited)} edits, p between {min(edited):.2f} and {max(edited):.2f}.\n"
    )
