"""How fast a run goes, and how much memory it holds."""

from __future__ import annotations

import sys
import time

from torch import Tensor

from aetheria.core import Callback
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["Throughput"]


def peak_memory_of_this_process() -> int | None:
    """Returns the most memory this process has held at once, in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kibibytes


@Registry.register_callback("Throughput")
class Throughput(Callback):
    """Adds speed and memory to the metrics every few steps.

    - `samples_per_second`: training samples over wall-clock time, validations left out;
    - `<unit>_per_second`, for instance `tokens_per_second`, for a model whose `weight_unit` is not "samples" and
      which says in `weight_per_sample` how many there are in one sample;
    - `host_memory_bytes`: the most memory the process has held at once, its workers not counted;
    - `device_memory_bytes`: what tensors hold on the device, where the accelerator counts it.

    Nothing is synchronised: on a device that works behind the host a figure is right over many steps, not over one.

    Args:
        every: optimiser steps between two measurements.

    Raises:
        ConfigError: `every` is less than 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"Throughput got every={every}; it must be at least 1.")
        self.every = every

    def on_train_start(self) -> None:
        """Starts the clock."""
        self._restart()
        model = self.context.model
        self._unit = model.weight_unit
        self._per_sample = getattr(model, "weight_per_sample", None) if self._unit != "samples" else None

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._samples = self.context.samples_seen

    def on_validation_start(self) -> None:
        """Stops the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Lets the clock run on as if no time had passed."""
        self._since += time.perf_counter() - self._validation_began

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Measures, every few steps."""
        if self.context.global_step % self.every:
            return
        seconds = time.perf_counter() - self._since
        rate = (self.context.samples_seen - self._samples) / seconds
        self._restart()
        values: dict[str, float | Tensor] = {"samples_per_second": rate}
        if self._per_sample is not None:
            values[f"{self._unit}_per_second"] = rate * self._per_sample
        if (host := peak_memory_of_this_process()) is not None:
            values["host_memory_bytes"] = float(host)
        if (device := self.context.accelerator.memory_in_use()) is not None:
            values["device_memory_bytes"] = float(device)
        self.context.log(values)
