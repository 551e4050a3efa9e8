"""Weighted means that stay on the device until somebody needs to read them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from aetheria.core import Accelerator
from aetheria.errors import ModelError

__all__ = ["NOT_METRICS", "Arriving", "ArrivingMetrics", "MetricMeans", "SharedMetrics"]

NOT_METRICS = frozenset({"weight", "sample_loss"})
_HEAD = 5
_NAMES_AT_ONCE = 64  # metrics that ranks exchange without telling one another their names
_FOLD_AFTER = 256  # rows held back at most, however rarely anybody reads


class MetricMeans:
    """The weighted means of metrics, since the last reading and since the epoch began.

    Adding only appends. The arithmetic is done once for many steps: on the device in as much precision as it has,
    without waiting for it; or with Python's own numbers where the metrics lie in host memory, because there a dozen
    tensor operations cost more than the step's whole bookkeeping.

    Args:
        accelerator: knows the device that the metrics are on, and how to reach it.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._arithmetic = _OnHost() if accelerator.device.type == "cpu" else _OnDevice(accelerator)
        self._rows: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        self._since_reading: _Sums = {}
        self._since_epoch: _Sums = {}

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
            try:
                self._arithmetic.add(names, weights, columns, (self._since_reading, self._since_epoch))
            except (RuntimeError, TypeError, ValueError):
                for row in rows:
                    check_metrics(dict(zip(names, row[1:], strict=True)))
                raise
            rows.clear()

    def since_reading(self) -> Arriving:
        """Returns the means since the last call, over all ranks, and begins anew. Every rank must call it."""
        self._fold()
        sums, self._since_reading = self._since_reading, {}
        return self._arriving(sums)

    def since_epoch(self) -> Arriving:
        """Returns the means since `new_epoch`, over all ranks. Every rank must call it."""
        self._fold()
        return self._arriving(self._since_epoch)

    def _arriving(self, sums: _Sums) -> Arriving:
        if self._accelerator.world_size > 1:
            return SharedMetrics(self._accelerator, sums)
        return ArrivingMetrics(self._accelerator, self._arithmetic.means(sums))

    def new_epoch(self) -> None:
        """Begins the epoch's means anew."""
        self._fold()
        self._since_epoch = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, so that an interval or an epoch cut in two has the mean of the whole."""
        self._fold()
        return {"reading": dict(self._since_reading), "epoch": dict(self._since_epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned, on this device or another."""
        number = self._arithmetic.number
        self._since_reading, self._since_epoch = (
            {name: (number(total), number(weight)) for name, (total, weight) in state[kept].items()}
            for kept in ("reading", "epoch")
        )


_Sums = dict[str, tuple[Any, Any]]  # of value * weight, and of the weights: floats, or scalar tensors on a device


class _OnHost:
    """Python's own numbers, added one by one: the sums do not depend on how often they are looked at."""

    number = float

    def add(
        self, names: tuple[str, ...], weights: tuple[Any, ...], columns: list[tuple[Any, ...]], to: tuple[_Sums, _Sums]
    ) -> None:
        # A weight of zero means nothing was measured: whatever stands there, NaN included, must not count.
        counted = [float(weight) for weight in weights]
        numbers = [[float(value) for value in column] for column in columns]
        for sums in to:
            for name, column in zip(names, numbers, strict=True):
                total, total_weight = sums.get(name, (0.0, 0.0))
                for value, weight in zip(column, counted, strict=True):
                    if weight > 0:
                        total += value * weight
                        total_weight += weight
                sums[name] = total, total_weight

    def means(self, sums: _Sums) -> dict[str, float | Tensor]:
        return {name: total / weight if weight else float("nan") for name, (total, weight) in sums.items()}


class _OnDevice:
    """A few operations for all metrics together, in float64 where the device has it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64

    def number(self, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=self._dtype, device=self._device)

    def add(
        self, names: tuple[str, ...], weights: tuple[Any, ...], columns: list[tuple[Any, ...]], to: tuple[_Sums, _Sums]
    ) -> None:
        weight = self._column(weights)
        values = torch.stack([self._column(column) for column in columns])
        added = torch.where(weight > 0, values * weight, torch.zeros_like(values)).sum(1)
        total = weight.sum()
        for sums in to:
            for name, value in zip(names, added.unbind(), strict=True):
                before = sums.get(name)
                sums[name] = (value, total) if before is None else (before[0] + value, before[1] + total)

    def _column(self, values: tuple[Any, ...]) -> Tensor:
        if isinstance(values[0], Tensor):
            return torch.stack([value.reshape(()) for value in values]).to(self._device, self._dtype)
        return self._accelerator.send(torch.tensor([float(value) for value in values], dtype=self._dtype))

    def means(self, sums: _Sums) -> dict[str, float | Tensor]:
        if not sums:
            return {}
        values, weights = zip(*sums.values(), strict=True)
        return dict(zip(sums, (torch.stack(values) / torch.stack(weights)).unbind(), strict=True))


class Arriving(Protocol):
    """Metrics that are on their way."""

    def ready(self) -> bool:
        """Returns whether `values` would come without waiting."""
        ...

    def values(self) -> dict[str, float]:
        """Returns the numbers by name, waiting for them if it must."""
        ...


class SharedMetrics:
    """Means over all ranks. They are on their way once they have been exchanged; reading them does that, if need be.

    Which names there are is known to each rank for itself. A digest of them is exchanged along with the sums; only if
    the ranks turn out to have different ones do they tell each other, and exchange once more. A metric that some ranks
    lack is the mean over those that have it.

    Args:
        accelerator: knows how to reach the other ranks.
        sums: of value * weight, and of the weights, by name.
    """

    def __init__(self, accelerator: Accelerator, sums: Mapping[str, tuple[Any, Any]]) -> None:
        self._accelerator = accelerator
        self._sums = sums
        self._names = sorted(sums)
        self._on_host = accelerator.device.type == "cpu"
        self._arriving: Callable[[], Tensor] = self._exchanged_alone
        self._values: dict[str, float] | None = None

    @staticmethod
    def exchange(readings: Sequence[SharedMetrics]) -> None:
        """Begins to add up several over the ranks at once, each of which must have as many, and all of them alike.

        An exchange wakes threads of every rank, which costs more than what it carries.
        """
        if not readings:
            return
        arriving = readings[0]._accelerator.sum_later(torch.stack([reading._vector() for reading in readings]))
        for place, reading in enumerate(readings):
            reading._arriving = functools.partial(_row, arriving, place)

    def _exchanged_alone(self) -> Tensor:
        self.exchange([self])
        return self._arriving()

    def _vector(self) -> Tensor:
        fits = len(self._names) <= _NAMES_AT_ONCE
        digest = crc32("\0".join(self._names).encode())
        halves = digest >> 16, digest & 0xFFFF  # their squares, and those of their sums, are exact in float64
        head = [*halves, *(half * half for half in halves), float(not fits)]
        numbers = self._numbers(self._names) if fits else []
        space = [0.0] * (2 * _NAMES_AT_ONCE - len(numbers))
        if self._on_host:
            return torch.tensor([*head, *map(float, numbers), *space], dtype=torch.float64)
        vector = self._accelerator.send(torch.tensor([*head, *space], dtype=torch.float64))
        return torch.cat([vector[:_HEAD], self._column(numbers).to(vector.device), vector[_HEAD:]])

    def _numbers(self, names: list[str]) -> list[Any]:
        return [part for name in names for part in self._sums.get(name, (0.0, 0.0))]

    def _column(self, numbers: list[Any]) -> Tensor:
        device = next((number.device for number in numbers if isinstance(number, Tensor)), None)
        if device is None:
            return torch.tensor(numbers, dtype=torch.float64)
        return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])

    def ready(self) -> bool:
        return False  # what follows from it must happen at the same moment everywhere

    def values(self) -> dict[str, float]:
        if self._values is None:
            vector = self._arriving().tolist()
            ranks = self._accelerator.world_size
            # Of numbers that are all alike, and only of those, this is true (Cauchy and Schwarz).
            alike = not vector[4] and all(vector[half] ** 2 == ranks * vector[half + 2] for half in (0, 1))
            names, found = self._names, vector[_HEAD:]
            if not alike:
                said = self._accelerator.gather("\0".join(self._names).encode())
                names = sorted({name for names in said for name in names.decode().split("\0") if name})
                column = self._column(self._numbers(names))
                column = column if self._on_host else self._accelerator.send(column.cpu())
                found = self._accelerator.sum_later(column.clone())().tolist()
            self._values = {
                name: total / weight if weight else float("nan")
                for name, total, weight in zip(names, found[::2], found[1::2], strict=False)
            }
        return self._values


def _row(arriving: Callable[[], Tensor], place: int) -> Tensor:
    return arriving()[place]


class ArrivingMetrics:
    """Metrics on their way to the host. Those on a device come in one transfer; the others are here already.

    Args:
        accelerator: knows how to read without waiting.
        metrics: numbers, or scalar tensors.
    """

    def __init__(self, accelerator: Accelerator, metrics: Mapping[str, float | Tensor]) -> None:
        self._numbers: dict[str, float] = {}
        on_device: dict[str, Tensor] = {}
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.device.type != "cpu":
                on_device[name] = value.detach().reshape(())
                self._numbers[name] = float("nan")  # keeps its place
            else:
                self._numbers[name] = float(value)
        self._names = list(on_device)
        self._reading = accelerator.read(torch.stack(list(on_device.values()))) if on_device else None

    def ready(self) -> bool:
        """Returns whether `values` would come without waiting."""
        return self._reading is None or self._reading.ready()

    def values(self) -> dict[str, float]:
        """Returns the numbers by name, waiting for them if it must."""
        if self._reading is not None:
            self._numbers.update(zip(self._names, self._reading.values(), strict=True))
        return self._numbers


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
