"""Report of a scaled change: what follows from the figures at the old strength, without those that do not."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["scaled_report"]

# norms of movements, which are proportional to the strength
_LINEAR = (
    "concept_movement",
    "delta_norm",
    "empty_prompt_drift",
    "preserve_drift",
    "relative_delta_norm",
)
# squared norms of movements; `drift_before` is that without the preserved concepts
_SQUARED = ("drift", "drift_before")
# distances from targets, and drifts behind a nonlinearity: they do not follow from their values at one strength
_OTHER = (
    "collateral",
    "compact_residual",
    "compact_residual_before",
    "layer_drift",
    "layer_drift_before_repair",
    "layer_missed",
    "layer_missed_before_repair",
    "loss_after",
    "missed",
    "residual_after",
    "residual_left",
)


def scaled_report(
    report: Mapping[str, Any], factor: float, protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report of a change whose movement is multiplied by `factor`.

    Norms of movements are multiplied by the factor and the drifts of concepts by its square, and `not_kept` names the
    concepts whose drift is then above the bound. Figures that do not follow from those of the report are left out:
    distances from targets, and what was measured on everyday captions and names. `scan` and `layers` stay as they are,
    since they say how settings were chosen.

    Args:
        report: Report of the change before. If it was loaded from a file, it may hold values of any type.
        factor: The factor.
        protocol: Its protocol; the bound of a change by `auto` is read.
    """
    if factor == 1:
        return dict(report)
    scaled = {name: value for name, value in report.items() if name not in _OTHER}
    size = abs(factor)
    scaled |= {name: _times(scaled[name], size) for name in _LINEAR if name in scaled}
    if isinstance(rows := scaled.get("endangered"), list):
        scaled["endangered"] = [_row(row, size**2) for row in rows]
    drifts, bound = scaled.get("drifts"), protocol.get("bound")
    if isinstance(drifts, Mapping) and _is_number(bound):
        scaled["drifts"] = _times(drifts, size**2)
        above = (name for name, d in scaled["drifts"].items() if _is_number(d) and d > bound)
        scaled["not_kept"] = [str(name) for name in above]
    else:  # measured together with the everyday captions, or not known at this strength
        scaled.pop("not_kept", None)
    if isinstance(parts := scaled.get("encoders"), Mapping):
        scaled["encoders"] = {
            name: scaled_report(part, factor, protocol) if isinstance(part, Mapping) else part
            for name, part in parts.items()
        }
    return scaled


def _times(value: Any, factor: float) -> Any:
    """Return a number, or the numbers of a mapping, times `factor`; other values as they are."""
    if isinstance(value, Mapping):
        return {name: _times(one, factor) for name, one in value.items()}
    return value * factor if _is_number(value) else value


def _row(row: Any, factor: float) -> Any:
    if not isinstance(row, Mapping):
        return row
    return {**row, **{name: _times(row[name], factor) for name in _SQUARED if name in row}}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
