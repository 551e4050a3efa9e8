"""What devices there are, and which precisions they really compute in: found out by computing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from aetheria.accelerator.cpu import CPUAccelerator
from aetheria.accelerator.cuda import GPUAccelerator
from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.accelerator.mps import MPSAccelerator

__all__ = ["DeviceSurvey", "PrecisionTrial", "survey_devices", "try_precision"]

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there when the kernel's driver is, whatever torch was built for
_MATRIX_SIZES = {"cpu": 256, "cuda": 4096, "mps": 2048}  # rows: milliseconds of work
_REPETITIONS = 3


@dataclass(frozen=True)
class PrecisionTrial:
    """How a device fared in one precision.

    Attributes:
        precision: which one.
        milliseconds: for a product of two square matrices, the fastest of several; None if it failed.
        problem: why it failed.
    """

    precision: Precision
    milliseconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class DeviceSurvey:
    """A device of this machine, or one that it lacks.

    Attributes:
        name: as `torch.device` spells it: "cpu", "cuda:0", "mps".
        description: model, memory and the like; what is missing, where `present` is False.
        present: whether a run can train on it.
        precisions: one trial for each.
        remedy: what it takes to have it, where it is missing.
    """

    name: str
    description: str
    present: bool
    precisions: list[PrecisionTrial] = field(default_factory=list)
    remedy: str = ""


def survey_devices() -> list[DeviceSurvey]:
    """Returns the devices of this machine, and those of the known kinds that it lacks. Takes about a second each."""
    return [_cpu(), *_cuda(), _mps()]


def try_precision(create: Callable[[Precision], DeviceAccelerator], precision: Precision) -> PrecisionTrial:
    """Multiplies matrices, forward and backward, exactly as a step of a run does.

    Args:
        create: returns the accelerator for a precision.
        precision: the one to try.
    """
    try:
        accelerator = create(precision)
        size = _MATRIX_SIZES.get(accelerator.device.type, 256)
        left, right = (torch.ones(size, size, device=accelerator.device, requires_grad=True) for _ in range(2))
        times = [_timed(accelerator, left, right) for _ in range(1 + _REPETITIONS)]
        # Every entry of the product is `size`, and so are the gradients: no precision has to round it.
        gradient = left.grad
        if gradient is None or not bool((gradient == size * len(times)).all()):
            return PrecisionTrial(precision, None, "the results are wrong")
    except (RuntimeError, ValueError) as error:  # what torch raises; a ConfigError is a ValueError
        return PrecisionTrial(precision, None, str(error).splitlines()[0])
    return PrecisionTrial(precision, 1e3 * min(times[1:]))  # the first one warms up


def _timed(accelerator: DeviceAccelerator, left: Tensor, right: Tensor) -> float:
    accelerator.synchronize()
    begun = time.perf_counter()
    with accelerator.forward_context():
        product = left @ right
    product.sum().backward()  # type: ignore[no-untyped-call]
    accelerator.synchronize()
    return time.perf_counter() - begun


def _trials(create: Callable[[Precision], DeviceAccelerator]) -> list[PrecisionTrial]:
    return [try_precision(create, precision) for precision in get_args(Precision)]


def _cpu() -> DeviceSurvey:
    usable, present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None, os.cpu_count()
    cores = f"{present} cores" if usable in (None, present) else f"{usable} of {present} cores"
    capability = torch.backends.cpu.get_cpu_capability()
    description = f"{_cpu_model()}, {cores}, {capability}, {torch.get_num_threads()} threads"
    return DeviceSurvey("cpu", description, present=True, precisions=_trials(CPUAccelerator))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cuda() -> Iterator[DeviceSurvey]:
    built = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            description = (
                f"{properties.name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} GiB free), "
                f"compute capability {properties.major}.{properties.minor}, torch for {built}"
            )

            def create(precision: Precision, index: int = index) -> GPUAccelerator:
                return GPUAccelerator(precision, index)

            yield DeviceSurvey(f"cuda:{index}", description, present=True, precisions=_trials(create))
    elif built is not None:
        yield DeviceSurvey(
            "cuda",
            f"torch is built for {built} and finds no device",
            present=False,
            remedy="If this machine has a GPU: look at nvidia-smi (or rocm-smi), at CUDA_VISIBLE_DEVICES, and whether "
            "the driver is as new as that; in a container, whether it was started with its GPUs.",
        )
    elif _NVIDIA_DRIVER.exists():
        yield DeviceSurvey(
            "cuda",
            "this machine has an NVIDIA driver, but torch is built without CUDA",
            present=False,
            remedy="Install torch for your driver, as https://pytorch.org/get-started says.",
        )
    else:
        remedy = "It takes an NVIDIA or AMD GPU, and torch built for it: https://pytorch.org/get-started"
        yield DeviceSurvey("cuda", "none", present=False, remedy=remedy)


def _mps() -> DeviceSurvey:
    if torch.backends.mps.is_available():
        return DeviceSurvey("mps", f"Apple GPU, macOS {platform.mac_ver()[0]}", True, _trials(MPSAccelerator))
    remedy = "It takes a Mac with an Apple chip, macOS 14 or newer, and a torch for arm64."
    return DeviceSurvey("mps", "none", present=False, remedy=remedy)
