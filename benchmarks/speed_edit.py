"""Time to compute, apply and revert an edit, compared with other methods.

    python benchmarks/speed_edit.py [--quick] [--json]

The model has random weights in the sizes of SD 1.4: the whole text encoder, with CLIP's vocabulary, and the keys and
values of the UNet's cross-attention. The other weights of the UNet are not allocated, because no edit reads them. One
edit is a call of `quickfix`, from prompts to a change; a hundred edits are one joint solve; `auto` is the automatic
edit with all its steps, and `auto_layer` that without the MLP and without reading everyday captions. `LIMITS` has the
figures that these should stay below, with the size of the compact file of one edit. The other methods are:

naive      the same edit with a whole forward pass for each caption and the paper's 768 x 768 inverse
uce        the formula of UCE as its release computes it: two captions, then 32 matrices, each with its own inverse
rivals     `time`, `loco`, `oce`, `dp`, `speed` and `hirm` with their default settings, and a preserve list where they
           take one; `oce` reads 5,000 captions, which is most of its time (64 with `--quick`). Once each.
finetune   cross-attention trained by gradient descent until `icons-judge` recognises the erased style as rarely as
           after the edit; on `icons`, since it needs pictures. If the largest number of steps is not enough, the ratio
           is a lower bound and `finetune_reached` is 0.

`peak_gib` is the peak memory of a new process that loads a text encoder of SD 1.4's size, stored in float16,
from a pipeline folder and makes one edit.

The methods run alternately, so that other load on the machine slows all of them. Figures are medians over the repeats.
`--quick` repeats less often and trains for fewer steps. On a shared machine only the ratios are comparable.
Writes `benchmarks/results/speed_edit.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import overpaint as op
from overpaint import files
from overpaint.edit.methods.quickfix import FRAMES
from overpaint.edit.weights import find_weight, text_layers
from overpaint.model.hooks import record_inputs
from overpaint.model.sites import find_unet
from overpaint.model.token_spans import end_of_text, find_span
from overpaint.probes import questions
from overpaint.scorers import judge as features
from overpaint.train import card
from overpaint.zoo import builders

RESULTS = Path(__file__).parent / "results"
OLD, NEW, RIDGE, SITE = "van gogh", "painting", 0.01, "text.0.self_attn.out_proj"
FIRST = ("red", "green", "blue", "yellow", "purple", "orange", "white", "gray", "pink", "high")
SECOND = ("dog", "cat", "robot", "rocket", "house", "fish", "tree", "bird", "apple", "flag")
KEPT = ("claude monet", "a dog", "a robot", "tree", "a red house", "a bird", "an apple", "a car")
LIMITS = {
    "one_edit_seconds": 0.25,
    "auto_seconds": 10.0,
    "hundred_edits_seconds": 2.0,
    "change_kb": 100.0,
}
ICONS = {"openmoji style": "noto style"}
BUDGETS = (25, 50, 100, 200, 400)  # numbers of fine-tuning steps, tried in this order


def sd14(*, seed: int = 0) -> op.TextToImage:
    """Return a random text encoder in SD-1.4's size with the keys and values of its UNet's cross-attention."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import layouts

    tokenizer = layouts.tokenizer()
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
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.conv_in.to_empty(device="cpu")  # the device of this weight is the device of the model
    for module in projections(unet):
        module.to_empty(device="cpu")
        module.reset_parameters()
    return op.TextToImage(
        SimpleNamespace(text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, config={}),
        name="random weights in SD-1.4's size",
    )


def projections(unet: torch.nn.Module) -> list[Any]:
    """Return the 32 projections that UCE edits, keys and values of each cross-attention."""
    paths = [site.path for site in find_unet(unet) if site.kind == "cross_attn"]
    return [unet.get_submodule(f"{path}.{name}") for path in paths for name in ("to_k", "to_v")]


def naive(model: op.TextToImage) -> Tensor:
    """Return the movement of the same edit, computed in the direct way."""
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
    weight = find_weight(model, SITE).parameter.detach().double()
    v = weight @ torch.cat(sources).T
    inverse = torch.linalg.inv(RIDGE * torch.eye(len(k), dtype=torch.float64) + k @ k.T)
    return (RIDGE * weight + v @ k.T) @ inverse - weight


@torch.no_grad()
def uce_formula(model: op.TextToImage, *, ridge: float = 0.5) -> list[Tensor]:
    """Return the 32 new weights by UCE's formula as its release computes it: in float32, one inverse for each."""
    rows = []
    for concept in (OLD, NEW):
        ids = model.tokenize([concept])
        last = end_of_text(model.tokenizer, ids[0]) - 1
        rows.append(model.text_encoder(ids)[0][0, last])
    key, guide = rows
    new = []
    for module in projections(model.unet):
        weight = module.weight
        left = ridge * weight + torch.outer(weight @ guide, key)
        right = ridge * torch.eye(len(key)) + torch.outer(key, key)
        new.append(left @ torch.inverse(right))
    return new


def hundred(model: op.TextToImage) -> op.Change:
    """Return one change that edits a hundred concepts."""
    return op.edit.quickfix(model, {f"{a} {b}": NEW for a in FIRST for b in SECOND}, ridge=RIDGE)


def automatic(model: op.TextToImage) -> dict[str, float]:
    """Return the seconds of an automatic edit, and the size of its compact file in kilobytes."""
    layer, _ = timed(lambda: op.edit.auto(model, {OLD: NEW}, repair=False, collateral=False))
    whole, change = timed(lambda: op.edit.auto(model, {OLD: NEW}))
    return {
        "auto_seconds": round(whole, 2),
        "auto_layer_seconds": round(layer, 2),
        "auto_kb": round(saved_size(change.compact()) / 1000, 1),
    }


def rivals(model: op.TextToImage, *, quick: bool) -> dict[str, float]:
    """Return the seconds of one edit by each of the other methods."""
    pair = {OLD: NEW}
    captions = {"captions": KEPT * 8} if quick else {}
    methods: dict[str, Callable[[], Any]] = {
        "time": lambda: op.edit.time(model, pair),
        "loco": lambda: op.edit.loco(model, pair),
        "dp": lambda: op.edit.dp(model, pair, preserve=KEPT),
        "speed": lambda: op.edit.speed(model, pair, preserve=KEPT),
        "hirm": lambda: op.edit.hirm(model, pair),
        "oce": lambda: op.edit.oce(model, pair, preserve=KEPT, **captions),
    }
    return {f"{name}_seconds": round(timed(work)[0], 3) for name, work in methods.items()}


def over_limits(result: Mapping[str, float]) -> list[str]:
    """Return the names of the figures that are above `LIMITS`."""
    return [name for name, limit in LIMITS.items() if result[name] > limit]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that `work` takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(*, repeats: int, quick: bool) -> dict[str, float]:
    """Return the figures of the SD-1.4-size model."""
    model = sd14()
    edit = lambda: op.edit.quickfix(model, {OLD: NEW}, ridge=RIDGE)  # noqa: E731
    methods: dict[str, Callable[[], Any]] = {
        "one_edit": edit,
        "naive": lambda: naive(model),
        "uce_formula": lambda: uce_formula(model),
        "uce": lambda: op.edit.uce(model, {OLD: NEW}, ridge=0.5, frames=("",)),
    }
    results = {name: work() for name, work in methods.items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in (*methods, "apply", "revert", "hundred_edits")}  # fmt: skip
    stages: dict[str, list[float]] = {}
    for turn in range(repeats):
        for name, work in methods.items():
            duration, result = timed(work)
            seconds[name].append(duration)
            if name == "one_edit":
                for stage, part in result.report["seconds"].items():
                    stages.setdefault(stage, []).append(part)
        for _ in range(5):
            seconds["apply"].append(timed(lambda: results["one_edit"].apply(model))[0])
            seconds["revert"].append(timed(lambda: results["one_edit"].revert(model))[0])
        if turn < max(1, repeats // 3):
            seconds["hundred_edits"].append(timed(lambda: hundred(model))[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    delta, naive_delta = results["one_edit"].delta, results["naive"]
    compact = results["one_edit"].compact()
    return {
        "one_edit_seconds": round(median["one_edit"], 4),
        **{
            f"one_edit_{stage}_ms": round(1000 * statistics.median(s), 2)
            for stage, s in stages.items()
        },
        "hundred_edits_seconds": round(median["hundred_edits"], 3),
        "apply_ms": round(1000 * median["apply"], 2),
        "revert_ms": round(1000 * median["revert"], 2),
        "change_kb": round(saved_size(compact) / 1000, 1),
        "compact_error": round(compact.report["compact_error"], 4),
        "ratio_naive": round(median["naive"] / median["one_edit"], 2),
        "ratio_uce": round(median["uce_formula"] / median["one_edit"], 2),
        "uce_seconds": round(median["uce"], 4),
        "ratio_uce_same": round(median["uce_formula"] / median["uce"], 2),
        "difference_naive": float((delta - naive_delta).norm() / naive_delta.norm()),
        "difference_uce": _difference_uce(model, results["uce"], results["uce_formula"]),
        "repeats": repeats,
        **automatic(model),
        **rivals(model, quick=quick),
    }


_ONE_EDIT = """
import resource, sys
from pathlib import Path
import overpaint as op
op.edit.quickfix(op.load(sys.argv[1]), {"van gogh": "painting"})
status = Path("/proc/self/status")  # ru_maxrss may be that of the process that started this one
lines = status.read_text().splitlines() if status.exists() else []
peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
print(peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_gib() -> float:
    """Return the peak memory of a new process that makes one edit of a text encoder of SD 1.4's size, in GiB."""
    from diffusers import UNet2DConditionModel

    pipe = builders.tiny(text_layers=1)
    pipe.text_encoder = sd14().text_encoder
    pipe.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pipe.to(torch.float16).save_pretrained(folder)
        command = [sys.executable, "-c", _ONE_EDIT, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(int(done.stdout) / 2**20, 3)


def saved_size(change: op.Change) -> int:
    """Return the bytes of the change's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "change.safetensors"
        change.save(path)
        return path.stat().st_size


def _difference_uce(model: op.TextToImage, change: op.Change, weights: list[Tensor]) -> float:
    """Return the distance of the applied change from the weights of the formula, relative to the movement."""
    old = [module.weight.detach().clone() for module in projections(model.unet)]
    with change.applied(model):
        new = [module.weight.detach().clone() for module in projections(model.unet)]
    difference = sum(float((a - b).square().sum()) for a, b in zip(new, weights, strict=True))
    moved = sum(float((a - b).square().sum()) for a, b in zip(old, weights, strict=True))
    return (difference / moved) ** 0.5


def against_finetune(*, pictures: int, budgets: tuple[int, ...]) -> dict[str, float]:
    """Return the time of fine-tuning that erases a style of `icons` as well as the edit does, and the ratio of both."""
    model, judge = op.load("icons"), features.load()
    targets = [
        q
        for q in questions.build(
            "style", "openmoji", labels=judge.labels, held_out=model.held_out, size=pictures
        )
        if q.role == "target"
    ]
    op.edit.quickfix(model, ICONS)  # warm-up
    edit_seconds, change = timed(lambda: op.edit.quickfix(model, ICONS))
    aim = _still_recognised(model, change, targets, judge)
    for steps in budgets:
        tuning_seconds, tuned = timed(lambda n=steps: op.edit.finetune(model, ICONS, steps=n))
        remaining = _still_recognised(model, tuned, targets, judge)
        if remaining <= aim:
            break
    return {
        "ratio_finetune": round(tuning_seconds / edit_seconds, 1),
        "finetune_seconds": round(tuning_seconds, 2),
        "finetune_steps": steps,
        "finetune_reached": int(remaining <= aim),
        "finetune_target_after": round(remaining, 4),
        "edit_target_after": round(aim, 4),
        "edit_seconds_icons": round(edit_seconds, 4),
    }


def _still_recognised(
    model: op.TextToImage,
    change: op.Change,
    targets: list[questions.Question],
    judge: features.Judge,
) -> float:
    """Return the share of pictures that the judge still recognises as the erased style."""
    prompts, seeds = [q.prompt for q in targets], [q.seed for q in targets]
    with change.applied(model):
        images = model.generate(prompts, seed=seeds, steps=8).images
    return sum(label == "openmoji" for label in judge.predict(images, "style")) / len(targets)


def write(name: str, result: Mapping[str, Any], protocol: Mapping[str, Any], folder: Path) -> None:
    """Write the full result."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / f"{name}.json", {"result": result, "protocol": protocol}, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter tuning")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    result = measure(repeats=2 if arguments.quick else 9, quick=arguments.quick)
    result |= against_finetune(
        pictures=8 if arguments.quick else 24, budgets=BUDGETS[:1] if arguments.quick else BUDGETS
    )
    result["peak_gib"] = peak_gib()
    result["seconds"] = round(time.perf_counter() - start, 1)
    for name, value in result.items():
        print(f"{name:>24} {value:12.4g}")
    for name in over_limits(result):
        print(f"{name} is above its limit of {LIMITS[name]:g}")
    protocol = {
        "edit": {OLD: NEW},
        "edit_icons": ICONS,
        "ridge": RIDGE,
        "limits": LIMITS,
        "kept": list(KEPT),
        "frames": list(FRAMES),
        "budgets": BUDGETS,
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
        print(files.to_json(result))


if __name__ == "__main__":
    main()
