"""One NVIDIA or AMD GPU. Nothing in a step waits for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.core import LateAnswer, MicroBatch, Reading, recursive_to_device
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["GPUAccelerator"]


class _Arriving:
    """A tensor on its way to pinned host memory; an event tells when it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def ready(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def values(self) -> list[float]:
        self._event.synchronize()
        return [float(value) for value in self._host.tolist()]


class _StepTaken(_Arriving):
    """Whether a fused optimiser took its step: read one step later, when the device is past it anyway."""

    def __bool__(self) -> bool:
        self._event.synchronize()
        return not bool(self._host)


@Registry.register_accelerator("cuda")
class GPUAccelerator(DeviceAccelerator):
    """One process on one CUDA device.

    With a fused optimiser (`AdamW(..., fused=True)`) the guard's decision never comes to the host before the step: the
    kernel itself reads `found_inf`. Other optimisers need the answer first, which costs one synchronisation a step.

    Args:
        precision: see `DeviceAccelerator`.
        index: which device; `LOCAL_RANK` or 0 when not given.
    """

    def __init__(self, precision: Precision | Literal["mixed"] = "fp32", index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                "accelerator cuda was asked for, but torch finds no CUDA device "
                f"(torch {torch.__version__}). Run `aetheria doctor`, or write accelerator: auto."
            )
        index = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
        if index >= torch.cuda.device_count():
            raise ConfigError(f"CUDA device {index} was asked for; this machine has {torch.cuda.device_count()}.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        super().__init__(device, precision)

    def precisions(self) -> tuple[Precision, ...]:
        emulation_does_not_count = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "fp16") if emulation_does_not_count else ("fp16",)

    def prepare_dataloader(self, batches: Iterator[MicroBatch], ahead: int = 1) -> Iterator[MicroBatch]:
        """Copies `ahead` micro-batches ahead of the computation, on a stream of their own.

        The copying stream first waits for all computation that has been queued so far. That is what makes it safe to
        reuse the memory of batches that have been let go, and it costs nothing: what was queued then is one window
        older than the one that the copy overlaps with.
        """
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        waiting: deque[tuple[MicroBatch, torch.cuda.Event]] = deque()
        for batch in batches:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                batch.data = recursive_to_device(batch.data, self._device)
                waiting.append((batch, stream.record_event()))
            if len(waiting) > ahead:
                yield self._arrived(*waiting.popleft())
        while waiting:
            yield self._arrived(*waiting.popleft())

    @staticmethod
    def _arrived(batch: MicroBatch, event: torch.cuda.Event) -> MicroBatch:
        torch.cuda.current_stream().wait_event(event)
        return batch

    def _step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            return super()._step(optimizer, nonfinite)
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # unscaled already
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        return _StepTaken(nonfinite)

    def read(self, tensor: Tensor) -> Reading:
        return _Arriving(tensor)

    def send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)  # pageable memory would be waited for

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def memory_in_use(self) -> int | None:
        return torch.cuda.memory_allocated(self._device)

    def generator_state(self) -> Tensor | None:
        return torch.cuda.get_rng_state(self._device)

    def seed_generator(self, key: int) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # before that there are no generators
        torch.cuda.default_generators[self._device.index].manual_seed(key)

    def set_generator_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self._device)

    def cleanup(self) -> None:
        torch.cuda.empty_cache()
