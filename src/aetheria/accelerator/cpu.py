"""The processor of this machine."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.accelerator.host_memory import keep_freed_memory
from aetheria.core import recursive_to_device
from aetheria.registry import Registry

__all__ = ["CPUAccelerator"]


@Registry.register_accelerator("cpu")
class CPUAccelerator(DeviceAccelerator):
    """One process on the CPU, bit for bit reproducible."""

    def __init__(self, precision: Precision | Literal["mixed"] = "fp32") -> None:
        super().__init__(torch.device("cpu"), precision)
        keep_freed_memory()

    def process_batch(self, batch: Any) -> Any:
        # The common batches are here already; only unusual ones are worth a walk.
        for part in batch if type(batch) in (list, tuple) else (batch,):
            if type(part) is not Tensor or not part.is_cpu:
                return recursive_to_device(batch, self._device)
        return batch

    def _grouped(self, gradients: list[Tensor]) -> list[list[Tensor]]:
        return [gradients]  # here the kernel goes through them one by one, whatever their types
