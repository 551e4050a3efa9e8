"""Curves, thinned out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aetheria.loom.reader import Curve
from aetheria.weaver.series import as_json, thinned


def curve(values: np.ndarray) -> Curve:
    steps = np.arange(len(values), dtype=np.int64) * 10
    return Curve(steps, values.astype(np.float64), steps / 10.0)


@pytest.mark.parametrize("count", [5, 100, 1001, 100_000])
@pytest.mark.parametrize("points", [4, 50, 800])
def test_peaks_and_ends_stay(count: int, points: int) -> None:
    values = np.sin(np.arange(count) / 50.0)
    values[count // 3], values[count // 2] = 7.0, -7.0
    thin = thinned(curve(values), points)
    assert len(thin.steps) <= max(points, 4) + 2
    assert thin.values.max() == 7.0
    assert thin.values.min() == -7.0
    assert (thin.steps[0], thin.steps[-1]) == (0, (count - 1) * 10)
    assert (np.diff(thin.steps) > 0).all()
    assert (thin.values == values[thin.steps // 10]).all()


def test_a_short_curve_is_left_as_it_is() -> None:
    whole = curve(np.arange(4.0))
    assert thinned(whole, 4) is whole


def test_gaps_stay_gaps() -> None:
    values = np.arange(1000.0)
    values[400:600] = math.nan
    thin = thinned(curve(values), 20)
    assert np.isnan(thin.values).any()
    assert np.nanmax(thin.values) == 999.0


def test_values_that_are_no_numbers_are_spelled() -> None:
    data = as_json(curve(np.array([1.5, math.nan, math.inf, -math.inf])), 9)
    assert data["values"] == [1.5, "NaN", "Infinity", "-Infinity"]
    assert data["total"] == 9
