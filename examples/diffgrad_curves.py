"""Draw the three functions of the diffGrad paper, and the runs of Adam and diffGrad on them.

    python examples/diffgrad_curves.py [--out curves.png] [--dark]

Each run starts at -1 and has 299 updates with a rate of 0.1 and betas (0.95, 0.999). Adam at half the rate ends at the
same points as diffGrad, so the curves show the effect of a shorter step and not that of the change of the gradient.

Source: Dubey et al., 2020 (diffGrad), https://arxiv.org/abs/1909.11015, section VI, equations 24 to 26, figure 4.
Deviations: the authors' notebooks omit a factor 8 in F2's gradient. Here it is included, which is needed to reproduce
the figure of the paper. `NOTEBOOK_F2` has the gradient of the notebooks.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Adam, Optimizer

from overpaint import files
from overpaint.images.charts import DARK, LIGHT, Theme
from overpaint.optim import DiffGrad

UPDATES, START, BETAS = 299, -1.0, (0.95, 0.999)


@dataclass(frozen=True)
class Curve:
    """A function of one number and its derivative; at a kink the derivative from the left."""

    value: Callable[[float], float]
    gradient: Callable[[float], float]


def _f2(x: float) -> float:
    return -40 * x - 35.15 if x <= -0.9 else x**3 + x * math.sin(8 * x) + 0.85


def _f2_gradient(x: float) -> float:
    return -40.0 if x <= -0.9 else 3 * x * x + math.sin(8 * x) + 8 * x * math.cos(8 * x)


def _notebook_gradient(x: float) -> float:
    return -40.0 if x <= -0.9 else 3 * x * x + math.sin(8 * x) + x * math.cos(8 * x)


# Right ends of the pieces of F3, with the slope there; beyond them it is x².
_SLOPES = ((-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0))
_OFFSETS = (0.75, 0.0, 0.0, 0.75)


def _f3(x: float) -> float:
    if -0.5 < x <= 0.5:
        for (end, slope), offset in zip(_SLOPES, _OFFSETS, strict=True):
            if x <= end:
                return offset + slope * x
    return x * x


def _f3_gradient(x: float) -> float:
    if -0.5 < x <= 0.5:
        return next(slope for end, slope in _SLOPES if x <= end)
    return 2 * x


CURVES = {
    "F1": Curve(
        lambda x: (x + 0.3) ** 2 if x <= 0 else (x - 0.2) ** 2 + 0.05,
        lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4,
    ),
    "F2": Curve(_f2, _f2_gradient),
    "F3": Curve(_f3, _f3_gradient),
}
NOTEBOOK_F2 = Curve(_f2, _notebook_gradient)
RUNS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "Adam": lambda p: Adam(p, lr=0.1, betas=BETAS),
    "Adam, half the rate": lambda p: Adam(p, lr=0.05, betas=BETAS),
    "diffGrad": lambda p: DiffGrad(p, lr=0.1, betas=BETAS),
}


def descend(
    curve: Curve, make: Callable[[list[torch.nn.Parameter]], Optimizer], *, updates: int = UPDATES
) -> list[float]:
    """Return the values of the parameter, the start included, computed in float64."""
    p = torch.nn.Parameter(torch.tensor([START], dtype=torch.float64))
    optimizer = make([p])
    values = [p.item()]
    for _ in range(updates):
        p.grad = torch.full_like(p, curve.gradient(p.item()))
        optimizer.step()
        values.append(p.item())
    return values


def draw(path: Path, theme: Theme = LIGHT) -> None:
    """Write a figure of the functions with the end points of the runs, and below them the runs over the updates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 5.4), dpi=150, facecolor=theme.background, layout="constrained")
    formats = dict(
        zip(RUNS, ((theme.cold, "-", "o"), (theme.control, "--", "s"), (theme.warm, "-", "^")), strict=True)
    )  # fmt: skip
    grid = [-1 + i / 400 for i in range(801)]
    axes = figure.subplots(2, len(CURVES), squeeze=False)
    for (name, curve), upper, lower in zip(CURVES.items(), axes[0], axes[1], strict=True):
        upper.plot(grid, [curve.value(x) for x in grid], color=theme.text, linewidth=1.2)
        upper.set_title(f"{name}: function and end points", color=theme.text, fontsize=10)
        lower.set_title("value over updates", color=theme.text, fontsize=10)
        for run, make in RUNS.items():
            color, line, marker = formats[run]
            values = descend(curve, make)
            end = values[-1]
            upper.plot(end, curve.value(end), marker, color=color, markersize=7, alpha=0.85)
            lower.plot(values, line, color=color, linewidth=1.6, label=run)
        for ax in (upper, lower):
            ax.set_facecolor(theme.background)
            ax.tick_params(colors=theme.text, labelsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.grid(color=theme.grid, linewidth=0.5)
            for spine in ax.spines.values():
                spine.set_color(theme.grid)
    axes[0][1].set_ylim(-0.05, 1.3)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=theme.text
    )
    with files.atomic(path) as draft:
        figure.savefig(draft, format=path.suffix[1:] or "png", facecolor=theme.background)


def main() -> None:
    """Print the end point of each run, and write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    for name, curve in CURVES.items():
        for run, make in RUNS.items():
            end = descend(curve, make)[-1]
            print(f"{name}  {run:<20} ends at {end:+.6f}, value {curve.value(end):.5f}")
    draw(arguments.out, DARK if arguments.dark else LIGHT)
    print(arguments.out)


if __name__ == "__main__":
    main()
