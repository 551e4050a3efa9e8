"""The processor of this machine."""

from __future__ import annotations

from typing import Literal

import torch

from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.core import recursive_to_device
from aetheria.registry import Registry

__all__ = ["CPUAccelerator"]


@Registry.register_accelerator("cpu")
class CPUAccelerator(DeviceAccelerator):
    """One process on the CPU, bit for bit reproducible."""

    def __init__(self, precision: Precision | Literal["mixed"] = "fp32") -> None:
        super().__init__(torch.device("cpu"), precision)

    def process_batch(self, batch: object) -> object:
        # The common batches are there already; only unusual ones are worth a walk.
        kind = type(batch)
        if kind is torch.Tensor and batch.device.type == "cpu":  # type: ignore[attr-defined]
            return batch
        if kind is list or kind is tuple:
            if all(type(item) is torch.Tensor and item.device.type == "cpu" for item in batch):  # type: ignore[attr-defined]
                return batch
        return recursive_to_device(batch, self._device)
