"""Everything that `quality_scene_text` measures of one list of cases: lines, readings, tables and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scene_text_methods as methods
import scene_text_tables as style_tables
from scene_text_cases import digest
from scene_text_crops import Crop, Materials, crops, images
from scene_text_methods import (
    CHARACTERS_OFF,
    INSTRUCTION_OFF,
    NO_WORD,
    OURS,
    RENDERED,
    RENDERED_DEFAULT,
    TRUTH,
    Settings,
)
from scene_text_networks import Fonts, naturalness, train_fonts
from scene_text_pictures import ANGLE, edit_seconds, edited_lines, true_lines
from scene_text_reading import (
    MEASURED,
    Scores,
    by_length,
    difference,
    gap,
    scores,
    several,
    wrong_words,
)
from scene_text_sets import MAIN, SETS, Case
from scene_text_store import Reader, Store, code
from scene_text_style import isolated

from overpaint.metrics import share, ssim
from overpaint.scene_text import Lettering
from overpaint.train import photographs

__all__ = [
    "PARTS",
    "SAMPLES",
    "SEEN",
    "STAGE_SETS",
    "UNSEEN",
    "Plan",
    "Run",
    "figures",
    "pictures_code",
    "tables",
]

HERE, PACKAGE = Path(__file__).parent, Path(photographs.__file__).parents[1]
SEEN, UNSEEN = "seen word, seen font", "unseen word, seen font"
UNSEEN_FONT = "unseen word, unseen font"
PARTS = (CHARACTERS_OFF, INSTRUCTION_OFF)
STAGE_SETS = {"grey": "grey line", "single": "one font"}
# The engine that reads letters in black on white: of the validation's true lines with unseen words in seen fonts it
# read 80 % so, and 25 % as they are.
ISOLATED = "Tesseract"
SAMPLES = 3  # of the pictures of `several`


@dataclass(frozen=True)
class Plan:
    """Arguments of a run."""

    split: str  # "test", "validation" or "quick"
    settings: Settings
    fonts: Path
    photos: Path
    store: Path
    font_samples: int  # words that the classifier of fonts is trained on
    epochs: int  # of the classifier of real and generated lines
    repeats: int  # edits that are timed
    several: int  # lines that three samples are drawn of


class Run:
    """The cases, models and engines of a run, and what was written and read."""

    def __init__(
        self,
        plan: Plan,
        cases: Sequence[Case],
        materials: Materials,
        models: Mapping[str, tuple[Lettering, str]],
        readers: Mapping[str, Reader],
    ) -> None:
        self.plan, self.cases, self.materials, self.models, self.readers = (
            plan, cases, materials, models, readers
        )  # fmt: skip
        by_set = {name: [case for case in cases if case.set == name] for name in SETS}
        self.drawn: dict[str, list[Crop]] = {
            name: crops(group, materials) for name, group in by_set.items() if group
        }
        self.main = [name for name in MAIN if name in self.drawn]
        self.families = {face.name: face.family for face in materials.faces.values()}
        self.trained_apart = [
            name for name in models if name not in STAGE_SETS and name != OURS
        ]  # fmt: skip
        self.store = Store(plan.store / f"{digest(cases)}-{pictures_code()}")

    def lines(
        self, method: str, name: str, variant: str = "", seed: int = 0, count: int | None = None
    ) -> np.ndarray:
        """Return the lines that a method writes for the first `count` cases of a set, RGB uint8 (N, H, W, 3)."""
        model, mark = self.models.get(method, self.models[OURS])
        drawn = self.drawn[name][:count]
        if method == TRUTH:
            return methods.write(model, method, drawn, self.plan.settings, self.materials.faces)
        key = f"{method}--{name}--{variant}--{seed}--{len(drawn)}--{self.mark(method, mark)}"
        return self.store.lines(
            key,
            lambda: methods.write(
                model,
                method,
                drawn,
                self.plan.settings,
                self.materials.faces,
                variant=variant,
                seed=seed,
            ),
        )

    def mark(self, method: str, weights: str) -> str:
        """Return weights and settings that the lines of a method depend on."""
        if method in (TRUTH, RENDERED, RENDERED_DEFAULT):
            return ""
        s = self.plan.settings
        return f"{weights}-{s.steps}-{s.spelling:g}-{s.style:g}"

    def texts(
        self,
        engine: str,
        method: str,
        name: str,
        variant: str = "",
        seed: int = 0,
        count: int | None = None,
    ) -> list[str]:
        """Return what an engine reads in the lines of a method."""
        mark = self.mark(method, self.models.get(method, self.models[OURS])[1])
        drawn = self.drawn[name][:count]
        key = f"read--{method}--{name}--{variant}--{seed}--{len(drawn)}--{mark}"
        lines = self.lines(method, name, variant, seed, count)
        if engine == ISOLATED:
            lines = np.stack(
                [isolated(x, o.clean, o.mask) for x, o in zip(lines, drawn, strict=True)]
            )
        return self.store.readings(key, self.readers[engine], lines, drawn)

    def scores(self, engine: str, method: str, name: str, **chosen: Any) -> Scores:
        """Return the scores of what an engine reads; further arguments as in `lines`."""
        texts = self.texts(engine, method, name, **chosen)
        return scores(texts, self.drawn[name][: chosen.get("count")], self.families)

    @cached_property
    def classifier(self) -> Fonts:
        """The classifier of seen fonts."""
        faces = [f for f in self.materials.faces.values() if f.split == "training"]
        return train_fonts(faces, samples=self.plan.font_samples)

    @property
    def engine(self) -> str:
        """The engine of the figures."""
        return next(iter(self.readers))


def word_tables(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the words that were read."""
    every = (TRUTH, RENDERED, RENDERED_DEFAULT, OURS, *PARTS, *run.trained_apart)
    plan = [(method, name) for method in every for name in run.main]
    plan += [(NO_WORD, UNSEEN)]
    plan += [
        (m, n)
        for n in ("grey line", "one font", "twice as wide") if n in run.drawn
        for m in (TRUTH, OURS, *(s for s, own in STAGE_SETS.items() if s in run.models and own == n))
    ]  # fmt: skip
    rows = []
    for method, name in plan:
        row: dict[str, Any] = {"method": method, "set": name, "n": len(run.drawn[name])}
        for engine in run.readers:
            row |= run.scores(engine, method, name).cells(engine)
        rows.append(row)
    return {
        "words read": rows,
        "words read, any case, by length": by_length(
            lambda method, name: run.scores(run.engine, method, name),
            {OURS: OURS, TRUTH: "ceiling"},
            run.main[:4],
        ),
        "words read, any case: the model less another method": [
            {
                "other": other,
                **{e: difference(
                    [run.scores(e, OURS, n) for n in run.main], [run.scores(e, other, n) for n in run.main]
                ) for e in run.readers},
            }
            for other in (*PARTS, *run.trained_apart, RENDERED_DEFAULT, RENDERED)
        ],
        "words read, any case: differences of splits": split_rows(run),
        "three samples": sample_rows(run),
        "controls": control_rows(run),
    }  # fmt: skip


def split_rows(run: Run) -> list[dict[str, Any]]:
    """Return the differences of unseen and seen words and fonts, for words of 2 to 8 letters."""
    pairs = (
        ("unseen less seen words, seen fonts", SEEN, UNSEEN),
        ("unseen less seen words, unseen fonts", "seen word, unseen font", UNSEEN_FONT),
        ("unseen less seen fonts, unseen words", UNSEEN, UNSEEN_FONT),
    )
    return [
        {"splits": label}
        | {
            e: gap(*(run.scores(e, OURS, n).only(MEASURED) for n in (first, second)))
            for e in run.readers
        }
        for label, first, second in pairs
    ]


def sample_rows(run: Run) -> list[dict[str, Any]]:
    """Return the share of words read in one, in any and in all of three samples of the same lines."""
    rows = []
    for name in (UNSEEN, UNSEEN_FONT):
        samples = [
            run.scores(run.engine, OURS, name, seed=seed, count=run.plan.several)
            for seed in range(SAMPLES)
        ]
        rows.append({"set": name, **several(samples)})
    return rows


def control_rows(run: Run) -> list[dict[str, Any]]:
    """Return the share of readings that equal another case's word of the same length, by engine and method."""
    rows = []
    for method in (TRUTH, OURS):
        row: dict[str, Any] = {"control": "the word of another line", "method": method}
        for engine in run.readers:
            values: list[float] = []
            for name in run.main:
                words = [one.case.text for one in run.drawn[name]]
                values += wrong_words(run.texts(engine, method, name), words)
            row[engine] = share(values)
        rows.append(row)
    return rows


def robust_rows(run: Run) -> list[dict[str, Any]]:
    """Return how words are read in regions twice as wide, and in upright and rotated ones of whole pictures."""
    rows = []
    for method in (TRUTH, OURS):
        row: dict[str, Any] = {"region": "twice as wide", "method": method}
        words = [one.case.text for one in run.drawn["twice as wide"]]
        texts = run.texts(run.engine, method, "twice as wide")
        hits = [float(a.lower() == b.lower()) for a, b in zip(texts, words, strict=True)]
        longer = [float(len(a) > len(b) + 1) for a, b in zip(texts, words, strict=True)]
        rows.append(row | {"read": share(hits), "at least two letters too many": share(longer)})
    drawn = run.drawn["rotated"]
    whole = np.ones(drawn[0].mask.shape, bool)
    model, mark = run.models[OURS]
    for angle in (0.0, ANGLE):
        for method in (TRUTH, OURS):

            def edit(method: str = method, angle: float = angle) -> dict[str, Any]:
                edited = (
                    true_lines(drawn, run.materials, angle) if method == TRUTH
                    else edited_lines(model, drawn, run.materials, angle, run.plan.settings)
                )  # fmt: skip
                boxes = [read_box(one, whole) for one in drawn]
                texts = run.readers[run.engine].read_boxes(images(list(edited.lines)), boxes)
                return {"texts": texts, "outside": edited.outside}

            values = run.store.values(f"whole--{method}--{angle:g}--{run.mark(method, mark)}", edit)
            words = [one.case.text.lower() for one in drawn]
            read = [float(t.lower() == w) for t, w in zip(values["texts"], words, strict=True)]
            rows.append({
                "region": f"of a whole picture, {angle:g} degrees", "method": method, "read": share(read),
                "equal outside": share([float(x) for x in values["outside"]]),
            })  # fmt: skip
    return rows


def read_box(one: Crop, whole: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box of the region's line that is read: the region's width around the middle of the line."""
    width = int(one.mask.any(0).sum())
    middle = whole.shape[1] // 2
    return (middle - width // 2 - 1, 3, middle + width // 2 + 1, whole.shape[0] - 3)


def natural_rows(run: Run) -> list[dict[str, Any]]:
    """Return how well a small classifier tells true from written lines, of the sets of seen fonts, and KID."""
    rows = []
    real = np.concatenate([run.lines(TRUTH, n) for n in run.main])
    for method in (RENDERED, RENDERED_DEFAULT, OURS):
        written = np.concatenate([run.lines(method, n) for n in run.main])
        result = naturalness(real, written, epochs=run.plan.epochs)
        rows.append({
            "method": method, "AUC": result.auc, "KID, own features": result.kid,
            "KID of two real sets": result.kid_real,
        })  # fmt: skip
    return rows


def tables(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return all tables that have rows, by title."""

    def lines(method: str, name: str, variant: str) -> np.ndarray:
        return run.lines(method, name, variant)

    seen = [SEEN, UNSEEN]
    result = word_tables(run)
    result["color"] = style_tables.color(lines, run.drawn)
    result["font, by the classifier"] = style_tables.fonts(lines, run.drawn, run.classifier, seen)
    result["style of the second word"] = style_tables.style_copy(
        lines, run.drawn, run.classifier, run.materials
    )
    result["zero-shot: variants"] = style_tables.variation(lines, run.drawn, run.materials)
    result["zero-shot: mixes of fonts"] = style_tables.mixing(
        lines, run.drawn, run.classifier, run.materials
    )
    result["zero-shot: wordings"] = style_tables.wording(lines, run.drawn)
    result["background"] = style_tables.background(lines, run.drawn, run.main)
    result["regions"] = robust_rows(run)
    result["true or written"] = natural_rows(run)
    return {title: _even(rows) for title, rows in result.items() if rows}


def _even(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that all have the columns of each, empty where a row had none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key, "") for key in columns} for row in rows]


def figures(run: Run, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the figures by name; words have 2 to 8 letters and are read by the first engine, any case."""

    def part(method: str, *names: str) -> Scores:
        parts = [run.scores(run.engine, method, name) for name in names]
        return sum(parts[1:], parts[0]).only(MEASURED)

    seen, unseen, truth = part(OURS, SEEN), part(OURS, UNSEEN), part(TRUTH, UNSEEN)
    colors = {row["method"]: row for row in results["color"]}
    result = {
        "word_accuracy_seen": float(seen.any_case.mean()),
        "word_accuracy_unseen": float(unseen.any_case.mean()),
        "word_accuracy_unseen_case": float(unseen.exact.mean()),
        "char_accuracy": float(unseen.similarity.mean()),
        "ceiling": float(truth.any_case.mean()),
        "ceiling_case": float(truth.exact.mean()),
        "ratio_to_ceiling": float(unseen.any_case.mean() / max(truth.any_case.mean(), 1e-9)),
        "characters_off": float(part(CHARACTERS_OFF, *run.main).any_case.mean()),
        "instruction_off": float(part(INSTRUCTION_OFF, *run.main).any_case.mean()),
        "wrong_word": results["controls"][-1][run.engine].mean,
        "color_difference": colors[OURS]["CIEDE2000, median"].mean,
    }
    for key, name in (("grey", "grey line"), ("one_font", "one font")):
        result[f"word_accuracy_{key}"] = float(part(OURS, name).any_case.mean())
        result[f"ceiling_{key}"] = float(part(TRUTH, name).any_case.mean())
    rows = [*results["background"], *results["regions"]]
    equal = [
        r["equal outside"].mean for r in rows if r["method"] == OURS and r.get("equal outside")
    ]
    result["outside_mask_equal"] = float(min(equal))
    result["outside_mask_ssim"] = outside_ssim(run)
    model = run.models[OURS][0]
    result["seconds_edit"] = edit_seconds(
        model, run.materials, run.drawn[UNSEEN][0].case, run.plan.settings, repeats=run.plan.repeats
    )
    return result


def outside_ssim(run: Run) -> float:
    """Return the least SSIM of written and given lines with the region set to grey in both."""
    lowest = 1.0
    for name in run.main:
        masks = np.stack([one.mask for one in run.drawn[name]])[..., None]
        both = (run.lines(OURS, name), np.stack([one.input for one in run.drawn[name]]))
        pairs = [images(list(np.where(masks, 128, x).astype(np.uint8))) for x in both]
        lowest = min(lowest, float(ssim(*pairs).min()))
    return lowest


def pictures_code() -> str:
    """Return a short hash of the code that draws, writes and reads lines."""
    own = [HERE / f"scene_text_{n}.py" for n in ("crops", "sets", "methods", "pictures", "store")]
    package = sorted((PACKAGE / "scene_text").glob("*.py"))
    generator = sorted((PACKAGE / "train").glob("lettering_*.py"))
    return code(*own, *package, *generator, PACKAGE / "scorers" / "text_reader.py")
