"""Accuracy of networks trained with diffGrad, compared with Adam, with Adam at half the rate, and with others.

    python benchmarks/quality_diffgrad.py [--quick] [--json] [--data FOLDER] [--work FOLDER]

Fashion-MNIST, a subset of 6,000 training images, and all 10,000 test images; a network of two convolutions and two
linear layers without normalisation (52,000 parameters), batches of 64, 8 epochs, the last two at a tenth of the rate
as in the paper. Five seeds, each with one subset, one start and one order for all optimisers, so that differences are
paired; intervals are Student's over the seeds. The comparisons are:

  - nine optimisers at the paper's rate of 1e-3, with Adam at half of it among them; SGDM, AdaGrad and AdaDelta, whose
    rates are on another scale, at the best of three rates on 2,000 held-out training images and a sixth seed;
  - diffGrad against Adam at half the rate under the paper's four activation functions;
  - both over a range of rates, so that each has its best rate;
  - diffGrad with the loss times 30 and times 1,000, which changes the friction but not Adam, against Adam with its rate
    times the mean friction of those runs: steps of the same length with the same friction for all coordinates;
  - the mean friction of each epoch, over all parameters, at every tenth step.

Limits: one small network and one data set, not CIFAR and ResNet-50, which the paper used.

`--quick` takes scikit-learn's digits (8 x 8, 1,237 to train on) and a network of two linear layers. Each finished run
is stored under `runs/quality_diffgrad`, so that a stopped benchmark can be resumed. The key of a run is its data and
settings, not the code or the release of torch, so empty the folder when these change. The benchmark takes about 12
minutes on one idle core. The images are from Debian's package `dataset-fashion-mnist`. Writes
`benchmarks/results/quality_diffgrad.json`; with `--quick`, into `runs/benchmarks`.
"""

import argparse
import gzip
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn, optim

from overpaint import __version__, files
from overpaint.optim import DiffGrad
from overpaint.train import card

RESULTS = Path(__file__).parent / "results"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DIGESTS = {  # sha256 of the unpacked files, because compression may differ
    "train-images-idx3": "c59f468a2f672dc8",
    "train-labels-idx1": "bad3541b69d91243",
    "t10k-images-idx3": "5b4141f0afbad91e",
    "t10k-labels-idx1": "0402a96d92fd2663",
}
RATE, SEEDS, TUNING_SEED = 1e-3, range(5), 99
LOSS_SCALES = (30.0, 1000.0)
Make = Callable[[Iterable[nn.Parameter], float], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGDM": lambda p, lr: optim.SGD(p, lr, momentum=0.9),
    "AdaGrad": lambda p, lr: optim.Adagrad(p, lr),
    "AdaDelta": lambda p, lr: optim.Adadelta(p, lr),
    "RMSProp": lambda p, lr: optim.RMSprop(p, lr),
    "Adam": lambda p, lr: optim.Adam(p, lr),
    "AdamW": lambda p, lr: optim.AdamW(p, lr),
    "AMSGrad": lambda p, lr: optim.Adam(p, lr, amsgrad=True),
    "DiffGrad": lambda p, lr: DiffGrad(p, lr),
}
TUNED = {"SGDM": (0.01, 0.03, 0.1), "AdaGrad": (0.003, 0.01, 0.03), "AdaDelta": (0.3, 1.0, 3.0)}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "leaky ReLU": lambda: nn.LeakyReLU(0.1),
    "ELU": nn.ELU,
    "SELU": nn.SELU,
}
SWEEP = {
    "Adam": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "DiffGrad": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W) with zero mean and unit deviation over the training images, and their classes (N,)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Data, network and duration of a run."""

    data: str
    subset: int
    held_out: int
    epochs: int
    batch: int
    network: str
    judge_every: int  # epochs


@dataclass(frozen=True)
class Cell:
    """One training run."""

    optimizer: str
    rate: float
    activation: str
    seed: int
    held_out: bool = False  # evaluated on held-out training images instead of the test images
    loss_scale: float = 1.0


def fashion(folder: Path) -> Data:
    """Return Fashion-MNIST from the files of Debian's package."""
    arrays = {}
    for name, digest in DIGESTS.items():
        path = folder / f"{name}-ubyte.gz"
        if not path.exists():
            raise SystemExit(
                f"there is no {path}: install it with `apt-get install dataset-fashion-mnist`, or name its folder with "
                "--data; `--quick` needs no download."
            )
        raw = gzip.decompress(path.read_bytes())
        if not hashlib.sha256(raw).hexdigest().startswith(digest):
            raise SystemExit(f"{path} is not Fashion-MNIST as published: get it again.")
        offset = 16 if "images" in name else 8
        arrays[name] = np.frombuffer(raw, np.uint8, offset=offset)
    pairs = [
        (arrays[f"{part}-images-idx3"].reshape(-1, 1, 28, 28), arrays[f"{part}-labels-idx1"])
        for part in ("train", "t10k")
    ]
    return _standardised("fashion-mnist", *pairs)


def digits() -> Data:
    """Return scikit-learn's digits, every fifth of them to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8)
    test = np.arange(len(labels)) % 5 == 0
    return _standardised("digits", (images[~test], labels[~test]), (images[test], labels[test]))


def _standardised(name: str, train: tuple[Any, Any], test: tuple[Any, Any]) -> Data:
    mean, spread = train[0].mean(), train[0].std()

    def tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        pixels = ((images - mean) / spread).astype(np.float32)
        return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))

    return Data(name, tensors(*train), tensors(*test))


def network(task: Task, activation: str) -> nn.Sequential:
    """Return a network with weights drawn from torch's global generator."""
    act = ACTIVATIONS[activation]
    if task.network == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), act(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), act(), nn.Conv2d(8, 16, 3, 2, 1), act(), nn.Flatten(),
        nn.Linear(16 * 49, 64), act(), nn.Linear(64, 10),
    )  # fmt: skip


def train(data: Data, task: Task, cell: Cell) -> dict[str, Any]:
    """Return accuracy after every few epochs, in percent, mean friction of each (DiffGrad alone), and seconds."""
    torch.manual_seed(cell.seed)
    net = network(task, cell.activation)
    order = torch.randperm(len(data.train[1]))
    used = order[: task.subset]
    evaluated = data.test
    if cell.held_out:
        rest = order[task.subset :][: task.held_out]
        evaluated = data.train[0][rest], data.train[1][rest]
    optimizer = OPTIMIZERS[cell.optimizer](net.parameters(), cell.rate)
    begun = time.process_time()
    accuracy: list[float] = []
    friction: list[float] = []
    for epoch in range(task.epochs):
        if epoch == task.epochs * 4 // 5:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        shares: list[float] = []
        for step, rows in enumerate(used[torch.randperm(len(used))].split(task.batch)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(data.train[0][rows]), data.train[1][rows])
            (cell.loss_scale * loss).backward()
            if isinstance(optimizer, DiffGrad) and step % 10 == 0:
                shares.append(mean_friction(optimizer))
            optimizer.step()
        if (epoch + 1) % task.judge_every == 0:
            accuracy.append(_accuracy(net, *evaluated))
        if shares:
            friction.append(sum(shares) / len(shares))
    seconds = time.process_time() - begun
    return {"accuracy": accuracy, "friction": friction, "seconds": round(seconds, 2)}


def mean_friction(optimizer: DiffGrad) -> float:
    """Return the mean friction of the next step over all parameters."""
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            last = optimizer.state[p].get("previous_grad", torch.zeros_like(p))
            total += float((last - p.grad).abs().sigmoid().sum())
            count += p.numel()
    return total / count


@torch.no_grad()
def _accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = sum(
        int((net(x).argmax(1) == y).sum())
        for x, y in zip(images.split(2000), labels.split(2000), strict=True)
    )
    return 100 * right / len(labels)


class Runs:
    """Training runs, each stored in a file."""

    def __init__(self, data: Data, task: Task, folder: Path) -> None:
        self.data, self.task, self.folder = data, task, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Return a run; a finished run is read from its file."""
        facts = {"task": asdict(self.task), "cell": asdict(cell)}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text())["run"]
        run = train(self.data, self.task, cell)
        files.write_json(path, {**facts, "run": run}, indent=2)
        return run

    def last(
        self, optimizer: str, rate: float, activation: str = "ReLU", loss_scale: float = 1.0
    ) -> np.ndarray:
        """Return the accuracy after the last epoch for each seed."""
        cells = [Cell(optimizer, rate, activation, s, loss_scale=loss_scale) for s in SEEDS]
        return np.array([self(cell)["accuracy"][-1] for cell in cells])

    def best(self, optimizer: str, rate: float) -> np.ndarray:
        """Return the accuracy after the best epoch of each seed; the choice uses the test images."""
        return np.array([max(self(Cell(optimizer, rate, "ReLU", s))["accuracy"]) for s in SEEDS])


def tuned(runs: Runs) -> dict[str, float]:
    """Return a rate for each optimiser; those of `TUNED` are chosen on held-out images."""
    rates = dict.fromkeys(OPTIMIZERS, RATE)
    for name, grid in TUNED.items():
        cells = {lr: Cell(name, lr, "ReLU", TUNING_SEED, held_out=True) for lr in grid}
        rates[name] = max(grid, key=lambda lr: runs(cells[lr])["accuracy"][-1])
    return rates


def interval(values: np.ndarray, digits: int = 3) -> list[float]:
    """Return mean, and Student's 95 % bounds; NaN for the bounds if all values are equal, whose spread is not known."""
    if np.ptp(values) == 0:
        return [round(float(values.mean()), digits), float("nan"), float("nan")]
    mean, error = float(values.mean()), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return [round(mean, digits), round(mean - reach, digits), round(mean + reach, digits)]


def ranking(runs: Runs) -> list[dict[str, Any]]:
    """Return one row for each optimiser."""
    contenders = [(name, name, rate) for name, rate in tuned(runs).items()]
    contenders.insert(5, ("Adam, half the rate", "Adam", RATE / 2))
    diff = runs.last("DiffGrad", RATE)
    return [
        {
            "name": label,
            "rate": rate,
            "last": interval(runs.last(name, rate)),
            "spread": round(float(runs.last(name, rate).std(ddof=1)), 3),
            "best": interval(runs.best(name, rate)),
            "diffgrad_minus": interval(diff - runs.last(name, rate)),
            "seconds": float(
                np.median([runs(Cell(name, rate, "ReLU", s))["seconds"] for s in SEEDS])
            ),
        }
        for label, name, rate in contenders
    ]


def activations(runs: Runs) -> list[dict[str, Any]]:
    """Return one row for each activation function: diffGrad, Adam at half the rate, friction by epoch."""
    rows = []
    for name in ACTIVATIONS:
        ours, half = runs.last("DiffGrad", RATE, name), runs.last("Adam", RATE / 2, name)
        shares = [runs(Cell("DiffGrad", RATE, name, s))["friction"] for s in SEEDS]
        rows.append(
            {
                "name": name,
                "diffgrad": interval(ours),
                "adam_half": interval(half),
                "difference": interval(ours - half),
                "friction": np.mean(shares, axis=0).round(5).tolist(),
            }
        )
    return rows


def loss_scales(runs: Runs) -> list[dict[str, Any]]:
    """Return one row for each factor of the loss: diffGrad against Adam with the same mean step."""
    rows = []
    for scale in LOSS_SCALES:
        cells = [Cell("DiffGrad", RATE, "ReLU", s, loss_scale=scale) for s in SEEDS]
        friction = np.mean([runs(cell)["friction"] for cell in cells], axis=0)
        rate = round(RATE * float(friction.mean()), 6)
        ours, adam = runs.last("DiffGrad", RATE, loss_scale=scale), runs.last("Adam", rate)
        rows.append(
            {
                "loss_scale": scale,
                "friction": friction.round(5).tolist(),
                "adam_rate": rate,
                "diffgrad": interval(ours),
                "adam": interval(adam),
                "difference": interval(ours - adam),
            }
        )
    return rows


def measure(runs: Runs) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the result and the tables that it is taken from."""
    tables = {
        "optimisers": ranking(runs),
        "activations": activations(runs),
        "loss_scales": loss_scales(runs),
        "rates": {
            name: [{"rate": lr, "last": interval(runs.last(name, lr))} for lr in grid]
            for name, grid in SWEEP.items()
        },
    }
    diff, half = runs.last("DiffGrad", RATE), runs.last("Adam", RATE / 2)
    tops = {name: max(row["last"][0] for row in rows) for name, rows in tables["rates"].items()}
    friction = tables["activations"][0]["friction"]
    result = {
        "diffgrad_accuracy": round(float(diff.mean()), 3),
        "adam_accuracy": round(float(runs.last("Adam", RATE).mean()), 3),
        "adam_half_accuracy": round(float(half.mean()), 3),
        "diffgrad_minus_adam": interval(diff - runs.last("Adam", RATE))[0],
        "diffgrad_minus_adam_half": interval(diff - half)[0],
        "adam_half_spread": round(float(half.std(ddof=1)), 3),
        "within_one_deviation": int(diff.mean() >= half.mean() - half.std(ddof=1)),
        "diffgrad_best_rate_accuracy": tops["DiffGrad"],
        "adam_best_rate_accuracy": tops["Adam"],
        "friction_first_epoch": friction[0],
        "friction_last_epoch": friction[-1],
    }
    return result, tables


def show(tables: Mapping[str, Any]) -> None:
    """Print the tables as Markdown."""

    def text(values: list[float]) -> str:
        bounds = (
            f"[{values[1]:.2f}, {values[2]:.2f}]"
            if np.isfinite(values[1])
            else "(equal in all seeds)"
        )
        return f"{values[0] + 0.0:.2f} {bounds}"

    def span(shares: list[float]) -> str:
        return f"{shares[0]:.4f} to {shares[-1]:.4f}"

    print("| optimiser | rate | last epoch, % | best epoch, % | DiffGrad minus it |")
    print("|---|--:|--:|--:|--:|")
    for row in tables["optimisers"]:
        cells = (text(row[key]) for key in ("last", "best", "diffgrad_minus"))
        print(f"| {row['name']} | {row['rate']:g} | {' | '.join(cells)} |")
    print("\n| activation | DiffGrad, % | Adam, half the rate, % | difference | friction |")
    print("|---|--:|--:|--:|--:|")
    for row in tables["activations"]:
        cells = (text(row[key]) for key in ("diffgrad", "adam_half", "difference"))
        print(f"| {row['name']} | {' | '.join(cells)} | {span(row['friction'])} |")
    print("\n| optimiser | rate | last epoch, % |\n|---|--:|--:|")
    for name, rows in tables["rates"].items():
        for row in rows:
            print(f"| {name} | {row['rate']:g} | {text(row['last'])} |")
    print("\n| loss times | friction | DiffGrad, % | Adam at rate | % | difference |")
    print("|--:|--:|--:|--:|--:|--:|")
    for row in tables["loss_scales"]:
        print(
            f"| {row['loss_scale']:g} | {span(row['friction'])} | {text(row['diffgrad'])} | {row['adam_rate']:g} | "
            f"{text(row['adam'])} | {text(row['difference'])} |"
        )
    shares = tables["activations"][0]["friction"]
    print("\nmean friction of DiffGrad by epoch:", *(f"{xi:.4f}" for xi in shares))


def record(
    name: str, result: dict[str, float], facts: dict[str, Any], *, quick: bool, start: float
) -> None:
    """Write the result of a benchmark that began at `start`, with `facts` and the machine; a quick one into `runs`."""
    protocol = {
        **facts,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "quick": quick,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"overpaint": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": card.commit(),
    }  # fmt: skip
    folder = Path("runs/benchmarks") if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"result": result, "protocol": protocol}
    files.write_json(folder / f"{name}.json", facts, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="digits instead of Fashion-MNIST")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of Fashion-MNIST")
    parser.add_argument("--work", type=Path, default=Path("runs/quality_diffgrad"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    if arguments.quick:
        data, task = digits(), Task("digits", 1237, 200, 5, 32, "linear", 1)
    else:
        data = fashion(arguments.data)
        task = Task("fashion-mnist", 6_000, 2_000, 8, 64, "convolutional", 2)
    result, tables = measure(Runs(data, task, arguments.work))
    show(tables)
    facts = {
        "task": asdict(task),
        "seeds": list(SEEDS),
        "tuning_seed": TUNING_SEED,
        "tables": tables,
    }
    record("quality_diffgrad", result, facts, quick=arguments.quick, start=start)
    if arguments.json:
        print(files.to_json(result))


if __name__ == "__main__":
    main()
