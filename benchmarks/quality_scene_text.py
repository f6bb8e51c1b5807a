"""Does `lettering` write the words, colors and fonts that it is asked for, and leave the rest of the picture alone?

    python benchmarks/quality_scene_text.py [--quick] [--json] [--validation] [--dry-run] [--model FOLDER]
                                            [--ablations FOLDER ...] [--stage-model STAGE=FOLDER ...]

The test is a list of 1,820 lines that is committed (`scene_text_cases.py` says by which rule it was drawn): five splits
of 200 (seen and unseen words in seen and unseen fonts, and words put on an empty background), and sets on the grey
line, one font, color, style, variants, mixes of fonts, wordings, wide and rotated regions. It is run once: the look is
written into the result before the first picture. `--validation` measures another list, which may be measured as often
as one likes, and writes to `runs/benchmarks`; `--quick` a few lines of a third one.

Two engines read the words: PP-OCR, and Tesseract without its dictionaries if it is installed, which gets the letters
in black on white, as they differ from the known background, since it reads few words on photographs. The rate of an
engine on the true pictures, treated alike, is its ceiling. Compared are the model with one of its encoders switched
off, models that were trained without a part (`--ablations`), and rendering with the true and with a default font.
`--stage-model grey=FOLDER` adds the model of a stage of training on the grey line, `single=FOLDER` on one font. One
sample is drawn of each line, and of some of them three, for the share of any and of all. Intervals of 95 % are over
families of fonts, unless a table says else.

Written lines and readings are stored in `runs/quality_scene_text` under the hashes of code, weights and cases: an
interrupted run continues. `--dry-run` prints how long the run takes. Writes
`benchmarks/results/quality_scene_text.json` and `docs/images/lettering_test.png`, a sheet of 100 random lines, failures
included.
"""

import argparse
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import edit_looks
import scene_text_methods as methods
import torch
from match_report import as_json, markdown
from scene_text_cases import PATH, digest, draw_cases, load, pool
from scene_text_crops import Materials, images
from scene_text_methods import OURS, Settings
from scene_text_run import (
    PARTS,
    SAMPLES,
    SEEN,
    STAGE_SETS,
    UNSEEN,
    Plan,
    Run,
    figures,
    pictures_code,
    tables,
)
from scene_text_sets import SETS, Case
from scene_text_sheet import chosen, sheet
from scene_text_store import Reader, code, fingerprint

from overpaint import files, zoo
from overpaint.errors import MissingExtra
from overpaint.scene_text import Config, Lettering
from overpaint.scorers.text_reader import TesseractReader, TextReader
from overpaint.train import card, lettering, lettering_fonts, photographs
from overpaint.train.lettering_fonts import Face

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHEET = HERE.parent / "docs" / "images" / "lettering_test.png"
NAME = "quality_scene_text"
# Families and photographs of the quick form: small packages, and no Debian package.
QUICK_FONTS = (
    "roboto", "courgette", "courier-prime", "lobster", "anton", "pt-sans", "archivo", "inconsolata",
)  # fmt: skip
QUICK = dict.fromkeys(SETS, 2) | {"variation": 2, "mixing": 3, "rotated": 1}


def engines(threads: int) -> dict[str, Reader]:
    """Return the OCR engines that are installed, PP-OCR first; the lack of Tesseract is printed.

    Raises:
        MissingExtra: rapidocr is not installed.
    """
    result: dict[str, Reader] = {"PP-OCR": TextReader(threads=threads)}
    try:
        result["Tesseract"] = TesseractReader(threads=threads)
    except MissingExtra as error:
        print(f"no second engine: {error}", file=sys.stderr)
    return result


def load_models(
    plan: Any, faces: Sequence[Face], *, quick: bool
) -> dict[str, tuple[Lettering, str]]:
    """Return the models by method, with the fingerprints of their weights.

    The quick form takes random weights where no model is shipped.
    """
    folder = zoo.folder("lettering") if plan.model == "lettering" else Path(plan.model)
    if quick and plan.model == "lettering" and not (folder / "config.json").is_file():
        print("no model is shipped yet: random weights are measured", file=sys.stderr)
        names = [face.name for face in faces if face.split == "training"]
        models = {OURS: (Lettering.build(lettering.styles(Config(channels=(80, 80)), names)), "random")}  # fmt: skip
    else:
        models = {OURS: (Lettering.load(folder), fingerprint(folder))}
    for text in plan.stage_model:
        stage, _, path = text.partition("=")
        if stage not in STAGE_SETS or not path:
            raise SystemExit(
                f"`--stage-model` must be {' or '.join(f'{s}=FOLDER' for s in STAGE_SETS)}, got {text!r}: name the "
                "stage and the folder of its model."
            )
        models[stage] = (Lettering.load(Path(path)), fingerprint(Path(path)))
    for path in plan.ablations:
        label = f"trained apart: {path.parent.name}/{path.name}"
        models[label] = (Lettering.load(path), fingerprint(path))
    return models


def materials_and_cases(plan: Any, split: str) -> tuple[Materials, list[Case]]:
    """Return fonts and photographs, downloaded if they are missing, and the cases of a list."""
    packages = QUICK_FONTS if split == "quick" else ()
    lettering_fonts.fetch(plan.fonts, packages)
    faces = lettering_fonts.load(plan.fonts, packages)
    source = pool(faces, "validation" if split == "quick" else split)
    if split == "quick":
        names = tuple(n for n in source.photos if n.partition("/")[0] in ("skimage", "sklearn"))
        source = replace(source, split=split, photos=names)
    else:
        photographs.fetch(plan.photos)
    materials = Materials.load(faces, source.photos, plan.photos)
    cases = draw_cases(materials, source, counts=QUICK) if split == "quick" else load(split)
    return materials, cases


def dry_run(run: Run) -> None:
    """Print how many lines are written by the model and how long that takes, from one batch."""
    several_ = (SAMPLES - 1) * 2 * run.plan.several
    main = sum(len(run.drawn[n]) for n in run.main)
    beside = sum(len(d) for n, d in run.drawn.items() if n not in run.main)
    twice = ("color", "variation", "wording", "rotated")
    variants = sum(len(run.drawn[n]) for n in twice if n in run.drawn)
    lines = main * (1 + len(PARTS) + len(run.trained_apart)) + beside + variants + several_
    lines += len(run.drawn[UNSEEN])
    model, drawn = run.models[OURS][0], run.drawn[SEEN][:16]
    start = time.perf_counter()
    methods.write(model, OURS, drawn, run.plan.settings, run.materials.faces)
    seconds = (time.perf_counter() - start) / len(drawn)
    reading = time.perf_counter()
    for reader in run.readers.values():
        reader.read_boxes(images([one.truth for one in drawn]), [(0, 0, 128, 32)] * len(drawn))
    reading = (time.perf_counter() - reading) / len(drawn)
    print(f"{lines} lines at {seconds:.2f} s each, and {reading:.2f} s to read: "
          f"{lines * (seconds + reading) / 60:.0f} minutes")  # fmt: skip


def protocol(run: Run, plan: Any, folder: Path) -> dict[str, Any]:
    """Return the settings of the run."""
    model = run.models[OURS][0]
    return {
        "commit": card.commit() or "unknown", "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cv2": cv2.__version__,
            "pillow": version("pillow"), **{label: reader.name for label, reader in run.readers.items()},
        },
        "engine_of_figures": run.engine, "second_engine": "Tesseract" in run.readers,
        "case_rule": "figures ignore case; the tables have both", "split": run.plan.split,
        "steps": run.plan.settings.steps, "guidance": asdict(run.plan.settings), "seed": 0, "threads": plan.threads,
        "samples": 1, "weights": run.models[OURS][1], "model": files.public_name(folder),
        "line": asdict(model.config.line),
        "cases": {name: len(drawn) for name, drawn in run.drawn.items()}, "list": digest(run.cases),
        "font_classifier": {"faces": len(run.classifier.names), "samples": run.plan.font_samples},
        "checks_of_training": "words that the checks of the training wrote are in no list",
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few lines of each set")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--validation", action="store_true", help="the list for choosing settings")
    parser.add_argument("--dry-run", action="store_true", help="print how long the run takes")
    parser.add_argument(
        "--again", action="store_true", help="run a test list again; it is recorded"
    )
    parser.add_argument("--model", default="lettering", help="a folder, or the shipped one")
    parser.add_argument(
        "--ablations", type=Path, nargs="*", default=[], help="models trained without a part"
    )
    parser.add_argument(
        "--stage-model", action="append", default=[], help="grey=FOLDER or single=FOLDER"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--spelling", type=float, default=1.0, help="guidance by the characters")
    parser.add_argument("--style", type=float, default=1.0, help="guidance by the instruction")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fonts", type=Path, default=Path("runs/fonts"))
    parser.add_argument("--photos", type=Path, default=Path("runs/photographs"))
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    plan = parse()
    start = time.perf_counter()
    torch.set_num_threads(1 if plan.quick else plan.threads)
    cv2.setNumThreads(1)
    split = "quick" if plan.quick else "validation" if plan.validation else "test"
    settings = Settings(2 if plan.quick else plan.steps, plan.spelling, plan.style)
    store = Path("runs") / NAME / (f"quick-{os.getpid()}" if plan.quick else split)
    full = Plan(split, settings, plan.fonts, plan.photos, store, 150_000, 8, 5, 60)
    sizes = Plan(split, settings, plan.fonts, plan.photos, store, 256, 1, 1, 2)
    materials, cases = materials_and_cases(plan, split)
    models = load_models(plan, list(materials.faces.values()), quick=plan.quick)
    readers = engines(1 if plan.quick else plan.threads)
    try:
        run = Run(sizes if plan.quick else full, cases, materials, models, readers)
        if plan.dry_run:
            dry_run(run)
            return
        measure(run, plan, start)
    finally:
        if plan.quick:
            shutil.rmtree(store, ignore_errors=True)


def measure(run: Run, plan: Any, start: float) -> None:
    """Measure everything, print the tables and write result and sheet; a test's look is written first."""
    folder = zoo.folder("lettering") if plan.model == "lettering" else Path(plan.model)
    is_test = run.plan.split == "test"
    out = RESULTS if is_test else Path("runs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{NAME}.json"
    looks = begin(run, path, plan.again) if is_test else []
    results = tables(run)
    values = figures(run, results)
    words = [(n, i) for n in run.main for i in range(len(run.drawn[n]))]
    rows = chosen(len(words))
    sheet(
        [run.lines(OURS, n)[i] for n, i in words], [run.drawn[n][i].case.text for n, i in words],
        [run.texts(run.engine, OURS, n)[i] for n, i in words], SHEET if is_test else out / SHEET.name, rows=rows,
    )  # fmt: skip
    values["seconds"] = time.perf_counter() - start
    content = {
        "result": {k: as_json(v) for k, v in values.items()},
        "tables": {t: [{k: as_json(v) for k, v in row.items()} for row in rows] for t, rows in results.items()},
        "protocol": protocol(run, plan, folder),
    }  # fmt: skip
    if is_test:
        concepts = {name: {"lines": str(len(drawn))} for name, drawn in run.drawn.items()}
        edit_looks.finish(path, looks, {**content, "test": {"concepts": concepts}})
    else:
        files.write_json(path, content)
    for title, table in results.items():
        print(markdown(table, title))
    for name, value in values.items():
        print(f"{name:28} {value:8.4f}")
    if plan.json:
        print(files.to_json(content["result"]))


def begin(run: Run, path: Path, again: bool) -> list[dict[str, Any]]:
    """Write the look of a test into the result file and return all looks.

    Raises:
        SystemExit: The list was run before.
    """
    marks = {name: mark for name, (_, mark) in run.models.items()}
    settings = f"{pictures_code()}-{code(HERE / 'quality_scene_text.py')}-{asdict(run.plan.settings)}-{marks}"
    concepts = {name: {"lines": str(len(drawn))} for name, drawn in run.drawn.items()}
    try:
        return edit_looks.begin(
            path, concepts=concepts, list_digest=digest(run.cases), weights=run.models[OURS][1], settings=settings,
            commit=card.commit() or "unknown", again=again,
        )  # fmt: skip
    except edit_looks.AlreadyRun as error:
        looks = edit_looks.read_looks(path)
        raise SystemExit(
            f"{path.name} holds a run of this list of {looks[-1]['date']}: a test is run once. Draw another list with "
            f"another seed in {PATH.stem}.py, or pass --again, which is recorded."
        ) from error


if __name__ == "__main__":
    main()
