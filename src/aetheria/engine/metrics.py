"""Weighted means that stay on the device until somebody needs to read them."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aetheria.core import Accelerator
from aetheria.errors import ModelError

__all__ = ["NOT_METRICS", "MetricMeans"]

NOT_METRICS = frozenset({"weight", "sample_loss"})
_FOLD_AFTER = 256  # rows held back at most, however rarely anybody reads


class MetricMeans:
    """The weighted means of metrics, since the last reading and since the epoch began.

    Adding only appends. The arithmetic is done once for many steps, in float64 where the device has it.

    Args:
        accelerator: knows the device that the metrics are on, and how to reach it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._rows: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        self._since_reading = _Sums()
        self._since_epoch = _Sums()

    def add(self, values: dict[str, Any], weight: float | Tensor) -> None:
        """Adds one micro-batch.

        Args:
            values: detached scalar tensors or numbers, by name.
            weight: what they are the mean over: samples or tokens.

        Raises:
            ModelError: a value is not a number.
        """
        names = tuple(values)
        rows = self._rows.get(names)
        if rows is None:
            check_metrics(values)
            rows = self._rows[names] = []
        rows.append((weight, *values.values()))
        if len(rows) >= _FOLD_AFTER:
            self._fold()

    def _fold(self) -> None:
        for names, rows in self._rows.items():
            if not rows:
                continue
            weights, *columns = zip(*rows, strict=True)
            weight = self._column(weights)
            try:
                values = torch.stack([self._column(column) for column in columns])
            except (RuntimeError, TypeError, ValueError):
                for row in rows:
                    check_metrics(dict(zip(names, row[1:], strict=True)))
                raise
            # A weight of zero means nothing was measured: whatever stands there, NaN included, must not count.
            sums = torch.where(weight > 0, values * weight, torch.zeros_like(values)).sum(1)
            total = weight.sum()
            for kept in (self._since_reading, self._since_epoch):
                kept.add(names, sums, total)
            rows.clear()

    def _column(self, values: tuple[Any, ...]) -> Tensor:
        if isinstance(values[0], Tensor):
            return torch.stack([value.reshape(()) for value in values]).to(self._device, self._dtype)
        return self._accelerator.send(torch.tensor([float(value) for value in values], dtype=self._dtype))

    def since_reading(self) -> tuple[list[str], Tensor]:
        """Returns names and means (one-dimensional, on the device) since the last call, and begins anew."""
        self._fold()
        means, self._since_reading = self._since_reading.means(self._device), _Sums()
        return means

    def since_epoch(self) -> tuple[list[str], Tensor]:
        """Returns names and means (one-dimensional, on the device) since `new_epoch`."""
        self._fold()
        return self._since_epoch.means(self._device)

    def new_epoch(self) -> None:
        """Begins the epoch's means anew."""
        self._fold()
        self._since_epoch = _Sums()

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, so that an interval or an epoch cut in two has the mean of the whole."""
        self._fold()
        return {"reading": self._since_reading.sums, "epoch": self._since_epoch.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        for kept, saved in ((self._since_reading, state["reading"]), (self._since_epoch, state["epoch"])):
            kept.sums = {
                name: (value.to(self._device), weight.to(self._device)) for name, (value, weight) in saved.items()
            }


class _Sums:
    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, names: tuple[str, ...], sums: Tensor, weight: Tensor) -> None:
        for name, value in zip(names, sums.unbind(), strict=True):
            before = self.sums.get(name)
            self.sums[name] = (value, weight) if before is None else (before[0] + value, before[1] + weight)

    def means(self, device: torch.device) -> tuple[list[str], Tensor]:
        if not self.sums:
            return [], torch.empty(0, device=device)
        values, weights = zip(*self.sums.values(), strict=True)
        return list(self.sums), torch.stack(values) / torch.stack(weights)


def check_metrics(values: Mapping[str, Any]) -> None:
    """Raises unless every value is one number.

    Raises:
        ModelError: naming the metric and what was found.
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() == 1 and not value.is_complex():
                continue
            found = f"a tensor of shape {list(value.shape)} and {value.dtype}"
        elif isinstance(value, numbers.Real):
            continue
        else:
            found = f"a {type(value).__name__}"
        raise ModelError(
            f'the step returned "{name}" as {found}; a metric must be one number. '
            'Return its mean, or name it "sample_loss" if it is one loss for each sample.'
        )
