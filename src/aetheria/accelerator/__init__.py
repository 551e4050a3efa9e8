"""The hardware. The only place in Aetheria where a kind of device is spelled out."""

from aetheria.accelerator.cpu import CPUAccelerator
from aetheria.accelerator.cuda import GPUAccelerator
from aetheria.accelerator.ddp import DDPAccelerator
from aetheria.accelerator.device import DeviceAccelerator
from aetheria.accelerator.fsdp import FSDPAccelerator
from aetheria.accelerator.local_sgd import LocalSGDAccelerator
from aetheria.accelerator.mps import MPSAccelerator
from aetheria.accelerator.select import create_accelerator
from aetheria.core import Accelerator, recursive_to_device

__all__ = [
    "Accelerator",
    "CPUAccelerator",
    "DDPAccelerator",
    "DeviceAccelerator",
    "FSDPAccelerator",
    "GPUAccelerator",
    "LocalSGDAccelerator",
    "MPSAccelerator",
    "create_accelerator",
    "recursive_to_device",
]
