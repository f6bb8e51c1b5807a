"""A run of the contest of edits on a model with random weights, with a scorer that sees every change of a picture."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
LABELS = json.loads((ROOT / "overpaint/zoo/weights/icons-judge/labels.json").read_text())


class Brightness:
    """Labels pictures by their mean brightness, in steps so small that an edit of a picture changes its label."""

    labels = LABELS

    def predict(self, images, kind):
        values = (images.double().mean((1, 2, 3)) * 1e9).long().tolist()
        return [self.labels[kind][value % len(self.labels[kind])] for value in values]


def make_run(model, folder, **more):
    """Return a run with one prompt of each role, one denoising step, and results stored in `folder`."""
    bench = importlib.import_module("edit_measure").Bench(model, Brightness(), 1, 0)
    sizes = importlib.import_module("edit_prompts").Sizes(1, 1, 1, 1)
    store = importlib.import_module("edit_store").Store(folder)
    runs = importlib.import_module("edit_run")
    return runs.Run(bench, store, "weights", "scorer", sizes, **more)


def count_pictures(monkeypatch):
    """Return a list that gets the number of pictures of each call that draws."""
    bench = importlib.import_module("edit_measure").Bench
    drawn, draw = [], bench.draw

    def counted(self, prompts, seeds):
        drawn.append(len(prompts))
        return draw(self, prompts, seeds)

    monkeypatch.setattr(bench, "draw", counted)
    return drawn
