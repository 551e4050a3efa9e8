"""The hardware, as the loop sees it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from aetheria.core.science import AetherModel, MicroBatch

__all__ = ["Accelerator", "LateAnswer", "Reading", "recursive_to_device"]


def recursive_to_device(batch: Any, device: torch.device | str) -> Any:
    """Returns the batch with every tensor in it on `device`; what is there already is returned as it is.

    Goes through dictionaries, lists, tuples, named tuples and dataclasses, and calls `.to(device)` on anything else
    that has it (a `PackedSequence`, a Transformers `BatchEncoding`). Pinned host memory is copied without waiting.

    Args:
        batch: any nesting of the above; numbers, strings and None pass through.
        device: where to.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=batch.is_pinned()) if batch.device.type == "cpu" else batch.to(device)
    if isinstance(batch, str | bytes | int | float | bool) or batch is None:
        return batch
    if callable(to := getattr(batch, "to", None)) and not isinstance(batch, type):
        return to(device)
    if isinstance(batch, Mapping):
        moved = {key: recursive_to_device(value, device) for key, value in batch.items()}
        if type(batch) is dict:
            return moved
        if not isinstance(batch, MutableMapping):
            return type(batch)(moved)  # type: ignore[call-arg]
        mapping = copy.copy(batch)  # not type(batch)(moved): a defaultdict is not made of another one
        mapping.update(moved)
        return mapping
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(recursive_to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(recursive_to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        twin: Any = copy.copy(batch)  # not dataclasses.replace: that would run __post_init__ again
        for item in dataclasses.fields(batch):
            if hasattr(batch, item.name):  # a field without a default may not have been set yet
                object.__setattr__(twin, item.name, recursive_to_device(getattr(batch, item.name), device))
        return twin
    return batch


class LateAnswer(Protocol):
    """A yes or no that the device knows first. Reading it may wait, but only for the work it depends on."""

    def __bool__(self) -> bool: ...


class Reading(Protocol):
    """Numbers on their way from the device to the host."""

    def ready(self) -> bool:
        """Returns whether `values` would come without waiting."""
        ...

    def values(self) -> list[float]:
        """Returns the numbers, waiting for them if it must."""
        ...


@dataclass(frozen=True)
class _Here:
    """A reading of a tensor that already lies in host memory."""

    tensor: Tensor

    def ready(self) -> bool:
        return True

    def values(self) -> list[float]:
        return [float(value) for value in self.tensor.tolist()]


class Accelerator(ABC):
    """The hardware, seen from the loop. Everything has a default for one process in full precision, except the device.

    The order of calls: `setup` (moves or wraps the model), then the model's `configure_optimizers`, then
    `setup_optimizer`; per window `process_batch`, `forward_context`, `backward`, `unscale`, `check_finite`,
    `clip_grad_norm`, `step`; at the end `cleanup`.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    sharded: bool = False  # whether each rank holds a part of every weight: `aetheria.core.shards`
    tensor_parallel: int = 1  # ranks next to one another that compute the same samples together, each a part of a layer
    sync_every: int | None = None  # windows between two exchanges of ranks that train apart; None: each step is of all
    team: Any = None  # the ranks that write snapshots together, where sharded: `aetheria.snapshot.sharded.Team`
    ranks: Any = None  # what several ranks talk to one another with: `aetheria.control.agreement.Group`

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which this rank computes."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is global rank 0, which alone writes the run folder."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank takes, from 0; that of every rank that computes them with it."""
        return self.rank // self.tensor_parallel

    @property
    def data_ranks(self) -> int:
        """How many shares there are."""
        return self.world_size // self.tensor_parallel

    # --- the model -------------------------------------------------------------------------------------------------
    def setup(self, model: AetherModel) -> None:
        """Moves the model to the device (and, in a strategy of many ranks, wraps or shards it)."""
        model.to(self.device)

    def setup_optimizer(self, optimizer: Optimizer) -> None:  # noqa: B027 - a hook
        """Prepares the optimiser; called after `setup`, so that it was built on the parameters as they are now."""

    def step_function(self, model: AetherModel, name: str) -> Callable[[Any], dict[str, Tensor]]:
        """Returns what runs `model.<name>(batch)`: through the wrapper, where there is one."""
        function: Callable[[Any], dict[str, Tensor]] = getattr(model, name)
        return function

    # --- the data --------------------------------------------------------------------------------------------------
    def process_batch(self, batch: Any) -> Any:
        """Returns the batch with every tensor in it on the device."""
        return recursive_to_device(batch, self.device)

    def prepare_dataloader(self, batches: Iterator[MicroBatch], ahead: int = 1) -> Iterator[MicroBatch]:
        """Returns the same micro-batches with their data on the device, up to `ahead` of them moved ahead of time."""
        for batch in batches:
            batch.data = self.process_batch(batch.data)
            yield batch

    # --- the window ------------------------------------------------------------------------------------------------
    def forward_context(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass: autocast, where a lower precision was asked for."""
        return contextlib.nullcontext()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Returns the context of every micro-batch of a window but the last: gradients are not exchanged in it."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:  # noqa: B027 - a hook
        """Takes a loss scale, if there is one, out of the gradients."""

    def check_finite(self, gradients: list[Tensor], norm: Tensor | None = None) -> Tensor:
        """Returns a scalar tensor on the device: not zero where any gradient is NaN or infinite.

        Args:
            gradients: the reduced gradients, dense.
            norm: their total norm where it is known already; it is finite exactly when they are.
        """
        if norm is not None:
            return torch.isfinite(norm).logical_not_()
        return torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all().logical_not_()

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Returns the 2-norm of all gradients together, a scalar on the device."""
        return torch.nn.utils.get_total_norm(gradients)

    def clip_grad_norm(self, gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
        """Scales the gradients, in place, so that their total norm is at most `max_norm`."""
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_(max=1.0))

    def step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        """Takes the optimiser step unless `nonfinite` says no; then nothing at all changes.

        Returns:
            Whether the step was taken. On a device that decides for itself this is a `LateAnswer`.
        """
        if nonfinite:
            return False
        optimizer.step()
        return True

    def overflow_expected(self) -> bool:
        """Whether a dropped window may be the loss scale looking for its place (fp16), rather than a fault."""
        return False

    # --- many ranks ------------------------------------------------------------------------------------------------
    def reduce_metric(self, value: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
        """Returns the value reduced over all ranks; shape and dtype stay."""
        return value

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to add a tensor up over all ranks, in place; returns what waits for the sum and returns it."""
        return lambda: tensor

    def barrier(self) -> None:  # noqa: B027 - a hook
        """Waits until every rank is here."""

    def main_says(self, function: Callable[[], bytes]) -> bytes:
        """Returns on every rank what a function returns on the main process, which alone calls it.

        Raises:
            RankError: it raised there; there, the exception itself.
        """
        return function()

    def gather(self, data: bytes) -> list[bytes]:
        """Returns on every rank what each of them gives, by rank."""
        return [data]

    def once_per_node(self, function: Callable[[], object]) -> None:
        """Calls a function on one rank of each node; the others wait for it, however long it takes.

        Raises:
            RankError: it raised there; there, the exception itself.
        """
        function()

    def follow(self, model: AetherModel) -> None:  # noqa: B027 - a hook
        """Takes note of which parameters are trained now; called when some have been frozen or thawed."""

    def share_buffers(self, model: AetherModel) -> None:  # noqa: B027 - a hook
        """Gives every rank the main process's buffers: before they are saved, or evaluated with."""

    def new_shard(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns memory for a tensor of this shape, in host memory, as parameters are held here."""
        return torch.empty(shape, dtype=dtype)

    # Ranks that train apart: each takes steps of its own, and has weights of its own from one exchange to the next.
    def end_window(self) -> bool:
        """Called by ranks that train apart after each window, whether or not its step was taken.

        Returns:
            Whether they have come together: then weights and buffers are not what they were.
        """
        return False

    def come_together(self) -> None:  # noqa: B027 - a hook
        """Has ranks that train apart exchange now what they have changed. Every rank must call it."""

    def shared_weights(self, model: AetherModel) -> AbstractContextManager[None]:
        """Returns the context in which the model has the weights and buffers that all ranks have in common."""
        return contextlib.nullcontext()

    def remarks(self) -> list[str]:
        """Returns what this rank has learned of the others since it was last asked, for the run's record."""
        return []

    def own_state(self) -> dict[str, Any]:
        """Returns what must survive a resume, and is this rank's alone."""
        return {}

    def combined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns what each rank takes over from those that were there before, where these were more or fewer."""
        return states[0]

    def load_own_state(self, state: dict[str, Any]) -> list[str]:
        """Takes back what `own_state` or `combined` returned; returns warnings about what it could not."""
        if not state.get("windows"):
            return []
        return [
            f"the snapshot is of ranks that trained apart, {state['windows']} windows after they had last come "
            "together: these are left out, because the ranks that continue it do not train apart"
        ]

    def explain(self, error: BaseException) -> BaseException:
        """Returns what ended the run, if that was another rank; else the error, which the others are told."""
        return error

    # --- host and device -------------------------------------------------------------------------------------------
    def read(self, tensor: Tensor) -> Reading:
        """Starts to bring a one-dimensional tensor to the host, without waiting for it."""
        return _Here(tensor)

    def send(self, tensor: Tensor) -> Tensor:
        """Returns a small tensor of the host's on the device, without waiting for what the device is doing."""
        return tensor.to(self.device)

    def synchronize(self) -> None:  # noqa: B027 - a hook
        """Waits until the device has done everything it was asked to."""

    def memory_in_use(self) -> int | None:
        """Returns the bytes that tensors hold on the device, or None where nobody counts them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a resume: the loss scaler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a hook
        """Takes back what `state_dict` returned."""

    def generator_state(self) -> Tensor | None:
        """Returns the state of the device's random generator; None where it is the CPU's."""
        return None

    def seed_generator(self, key: int) -> None:  # noqa: B027 - a hook
        """Seeds the device's random generator with 64 bits; that of the CPU is not the accelerator's to seed."""

    def set_generator_state(self, state: Tensor) -> None:  # noqa: B027 - a hook
        """Restores the state of the device's random generator."""

    def cleanup(self) -> None:  # noqa: B027 - a hook
        """Gives everything back."""
