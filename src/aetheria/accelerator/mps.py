"""The GPU of an Apple machine."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["MPSAccelerator"]


@Registry.register_accelerator("mps")
class MPSAccelerator(DeviceAccelerator):
    """One process on Apple's Metal Performance Shaders."""

    def __init__(self, precision: Precision | Literal["mixed"] = "fp32") -> None:
        if not torch.backends.mps.is_available():
            built = "" if torch.backends.mps.is_built() else " (this torch is built without it)"
            raise ConfigError(f"accelerator mps was asked for, but there is none here{built}. Write accelerator: auto.")
        super().__init__(torch.device("mps"), precision)

    def precisions(self) -> tuple[Precision, ...]:
        return ("bf16", "fp16") if torch.backends.mps.is_macos_or_newer(14, 0) else ("fp16",)

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def memory_in_use(self) -> int | None:
        return torch.mps.current_allocated_memory()

    def generator_state(self) -> Tensor | None:
        return torch.mps.get_rng_state()

    def seed_generator(self, key: int) -> None:
        torch.mps.manual_seed(key)

    def set_generator_state(self, state: Tensor) -> None:
        torch.mps.set_rng_state(state)
