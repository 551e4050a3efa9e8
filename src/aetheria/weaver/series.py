"""Curves, thinned out without losing their peaks: the smallest and the largest value of each stretch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from aetheria.loom.reader import Curve

__all__ = ["as_json", "thinned"]


def thinned(curve: Curve, points: int) -> Curve:
    """Returns at most about `points` points of a curve: of each of `points / 2` stretches the lowest and the highest.

    The first and the last point stay. A stretch with values that are no numbers (NaN) keeps one of them, so that a gap
    is seen as one.

    Args:
        curve: all points, in their order.
        points: how many to keep; at least 4.
    """
    count = len(curve.steps)
    if count <= points:
        return curve
    edges = np.linspace(0, count, max(points // 2 - 1, 1) + 1).astype(np.int64)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(edges):
        values = curve.values[start:end]
        missing = np.isnan(values)
        if missing.any():
            kept.add(int(start + missing.argmax()))
        if not missing.all():
            kept.add(int(start + np.nanargmin(values)))
            kept.add(int(start + np.nanargmax(values)))
    chosen = np.array(sorted(kept), dtype=np.int64)
    return Curve(curve.steps[chosen], curve.values[chosen], curve.times[chosen])


def as_json(curve: Curve, total: int) -> dict[str, Any]:
    """Returns a curve as JSON data; values that JSON has no number for stand as "NaN", "Infinity", "-Infinity"."""
    values: list[float | str] = curve.values.tolist()
    if not np.isfinite(curve.values).all():
        values = [value if math.isfinite(value) else _spelled(value) for value in curve.values.tolist()]
    return {"steps": curve.steps.tolist(), "values": values, "times": curve.times.tolist(), "total": total}


def _spelled(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
