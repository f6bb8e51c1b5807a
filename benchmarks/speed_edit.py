"""Is a Diff-QuickFix edit of an SD-1.4-size text encoder done in under half a second on two cores?

    python benchmarks/speed_edit.py [--quick] [--json]

The text encoder has CLIP ViT-L/14's shape (12 layers, width 768, 77 positions, 49,408 tokens; 123 M parameters) and
random weights, which time does not depend on. Each stage of the edit is timed: `keys` (one batch of captions, stopped
in layer 0), `values`, `solve` (with the compression to least rank), `report` (residuals, hash of the weight), `apply`.
Beside it the naive way: a whole forward pass a caption, then the paper's 768 x 768 inverse, in float64 too.
The fastest run after a warm-up, since a busy neighbour only ever adds time; the medians stand in the file. `--quick`
repeats less. On a shared machine only the ratio counts.
Writes `benchmarks/results/speed_edit.json`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import overpaint as op
from overpaint.edit.change import text_layers, weight_at
from overpaint.edit.quickfix import FRAMES
from overpaint.hooks import record_inputs
from overpaint.spans import find_span
from overpaint.train import card
from overpaint.zoo import build

RESULTS = Path(__file__).parent / "results"
OLD, NEW, RIDGE, SITE = "van gogh", "painting", 0.01, "text.0.self_attn.out_proj"
STAGES = ("keys", "values", "solve", "report", "apply")


def encoder(*, seed: int = 0) -> op.TextToImage:
    """Return a model that is only a text encoder, in SD-1.4's size, with a tokenizer of 77 positions."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build.clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(config).eval()
    return op.TextToImage(
        SimpleNamespace(text_encoder=text_encoder, tokenizer=tokenizer),
        name="random CLIP ViT-L/14 text tower",
    )


def edit_once(model: op.TextToImage) -> tuple[dict[str, float], Tensor]:
    """Return the seconds of each stage of one edit, and its delta; the model is left as it was."""
    start = time.perf_counter()
    change = op.edit.quickfix(model, {OLD: NEW}, ridge=RIDGE)
    solved = time.perf_counter()
    change.apply(model)
    done = time.perf_counter()
    change.revert(model)
    stages = {**change.report["seconds"], "apply": done - solved, "total": done - start}
    return stages, change.delta


def naive_once(model: op.TextToImage) -> tuple[float, Tensor]:
    """Return the seconds of the same edit done plainly, and its delta."""
    start = time.perf_counter()
    keys, sources = [], []
    linear = text_layers(model)[0].self_attn.out_proj
    for frame in FRAMES:
        rows = []
        for concept in (OLD, NEW):
            with torch.no_grad(), record_inputs(linear) as seen:
                model.text_encoder(model.tokenize([frame + concept]))
            last = find_span(model.tokenizer, frame + concept, concept).last
            rows.append(seen[0][0, last:].double())
        old, new = rows
        offsets = torch.arange(len(old)).clamp(max=len(new) - 1)
        keys.append(old)
        sources.append(new[offsets])
    k = torch.cat(keys).T
    weight = weight_at(model, SITE).detach().double()
    v = weight @ torch.cat(sources).T
    inverse = torch.linalg.inv(RIDGE * torch.eye(len(k), dtype=torch.float64) + k @ k.T)
    delta = (RIDGE * weight + v @ k.T) @ inverse - weight
    return time.perf_counter() - start, delta


def measure(*, repeats: int) -> dict[str, Any]:
    """Return the fastest run, the ratio to the naive way, and how far the two results are apart."""
    model = encoder()
    edit_once(model)
    naive_once(model)
    ours, naive = [], []
    for _ in range(repeats):  # in turn, so that a busy neighbour slows both
        ours.append(edit_once(model))
        naive.append(naive_once(model))
    fastest = min((run[0] for run in ours), key=lambda stages: stages["total"])
    plain = [run[0] for run in naive]
    delta, other = ours[-1][1], naive[-1][1]
    return {
        **{f"{name}_seconds": round(fastest[name], 4) for name in STAGES},
        "edit_seconds": round(fastest["total"], 4),
        "edit_seconds_median": round(statistics.median(run[0]["total"] for run in ours), 4),
        "naive_seconds": round(min(plain), 4),
        "naive_seconds_median": round(statistics.median(plain), 4),
        "naive_over_edit": round(min(plain) / fastest["total"], 2),
        "relative_difference": float((delta - other).norm() / other.norm()),
        "repeats": repeats,
    }


def write(name: str, result: dict[str, Any], protocol: dict[str, Any], folder: Path) -> None:
    """Write the full result beside its place, then rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.part"
    beside.write_text(json.dumps({"result": result, "protocol": protocol}, indent=2) + "\n")
    os.replace(beside, folder / f"{name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    result = measure(repeats=3 if arguments.quick else 9)
    for name in (*STAGES, "edit", "naive"):
        print(f"{name:>8} {result[f'{name}_seconds'] * 1000:9.1f} ms")
    print(f"{'naive / edit':>12} {result['naive_over_edit']:.1f} x")
    print(f"relative difference of the two: {result['relative_difference']:.1e}")
    protocol = {
        "edit": {OLD: NEW},
        "ridge": RIDGE,
        "frames": list(FRAMES),
        "seed": 0,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "quick": arguments.quick,
        "load_average": os.getloadavg()[0],
        "versions": {
            "overpaint": op.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    folder = Path("runs/benchmarks") if arguments.quick else RESULTS
    write("speed_edit", result, protocol | {"commit": card.commit()}, folder)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
