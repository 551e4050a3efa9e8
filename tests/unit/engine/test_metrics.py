"""Weighted means: exact whatever they are cut into, and only of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aetheria.accelerator import CPUAccelerator
from aetheria.engine.metrics import MetricMeans, _OnDevice
from aetheria.errors import ModelError


def host() -> MetricMeans:
    return MetricMeans(CPUAccelerator())


def device() -> MetricMeans:
    """Means by tensor operations, as on a GPU, and by these on the CPU."""
    means = MetricMeans(accelerator := CPUAccelerator())
    means._arithmetic = _OnDevice(accelerator)
    return means


either = pytest.mark.parametrize("make", [host, device])
rows = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 9)), min_size=1, max_size=600)


@either
@given(rows=rows, cuts=st.sets(st.integers(0, 600)), tensors=st.booleans())
def test_means_are_weighted_and_survive_being_cut(
    make: Callable[[], MetricMeans], rows: list[tuple[float, int]], cuts: set[int], tensors: bool
) -> None:
    means = make()
    for number, (value, weight) in enumerate(rows):
        if number in cuts:
            saved = means.state_dict()
            means = make()
            means.load_state_dict(saved)
        means.add({"a": torch.tensor(value, dtype=torch.float64) if tensors else value}, weight)
    total = sum(weight for _, weight in rows)
    for found in (means.since_reading().values(), means.since_epoch().values()):
        if total:
            expected = math.fsum(value * weight for value, weight in rows) / total
            assert found["a"] == pytest.approx(expected, abs=1e-9)
        else:
            assert math.isnan(found["a"])


@either
def test_intervals_begin_anew_and_epochs_do_when_told(make: Callable[[], MetricMeans]) -> None:
    means = make()
    means.add({"a": 1.0}, 1)
    assert means.since_reading().values() == {"a": 1.0}
    means.add({"a": 3.0, "b": torch.tensor([2.0])}, 1)
    assert means.since_reading().values() == {"a": 3.0, "b": 2.0}
    assert means.since_epoch().values() == {"a": 2.0, "b": 2.0}
    means.new_epoch()
    assert means.since_epoch().values() == {}


@either
def test_what_weighs_nothing_does_not_count_even_when_it_is_nan(make: Callable[[], MetricMeans]) -> None:
    means = make()
    means.add({"loss": float("nan")}, 0)
    means.add({"loss": 2.0}, 3)
    assert means.since_reading().values() == {"loss": 2.0}


@either
def test_a_value_that_turns_into_something_else_is_named(make: Callable[[], MetricMeans]) -> None:
    means = make()
    means.add({"a": torch.tensor(1.0)}, 1)
    means.add({"a": torch.zeros(2)}, 1)
    with pytest.raises(ModelError, match=r'"a" as a tensor of shape \[2\]'):
        means.since_reading()
