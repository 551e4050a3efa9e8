"""The contracts: what a model, a data module, a callback, a logger and an accelerator promise each other.

Nothing here trains. The loop (`aetheria.orchestrator`) is written against these classes only, so that a test can
hand it an accelerator of ten lines and a callback of three.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

if TYPE_CHECKING:
    from aetheria.config import TrainingConfig

__all__ = [
    "Accelerator",
    "AetherDataModule",
    "AetherModel",
    "Callback",
    "LateAnswer",
    "Logger",
    "MicroBatch",
    "OptimizerPlan",
    "Reading",
    "RunEvent",
    "RunResult",
    "Schedule",
    "Scheduler",
    "TrainingContext",
    "recursive_to_device",
]

Scheduler = LRScheduler | ReduceLROnPlateau


# --------------------------------------------------------------------------------------------------------------------
# The science: model and data
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """One learning-rate scheduler and when it is stepped.

    Attributes:
        scheduler: any scheduler of `torch.optim.lr_scheduler`.
        interval: "step" (after every optimiser step that was taken, never after a dropped one) or "epoch".
        monitor: the epoch metric that `ReduceLROnPlateau` looks at, for instance "val_loss".
    """

    scheduler: Scheduler
    interval: Literal["step", "epoch"] = "epoch"
    monitor: str | None = None


@dataclass(frozen=True)
class OptimizerPlan:
    """What `AetherModel.configure_optimizers` may return when one optimiser and one scheduler do not say it all.

    Attributes:
        optimizer: one optimiser, of any number of parameter groups. A group may carry a "name"; its learning rate is
            then reported as `learning_rate.<name>`, otherwise as `learning_rate.<index>`.
        schedules: the schedulers, each with its interval.
    """

    optimizer: Optimizer
    schedules: Sequence[Schedule] = ()


class _RemembersArguments(ABCMeta):
    """Notes the constructor's arguments on the instance before `__init__` runs, so that `__init__` may read them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        if isinstance(instance, cls):
            # Past nn.Module.__setattr__, which refuses to work before nn.Module.__init__ has run.
            object.__setattr__(instance, "hyperparameters", _bound_arguments(cls, args, kwargs))
            instance.__init__(*args, **kwargs)
        return instance


def _bound_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return {}  # __init__ is about to raise the same error, with its own name in the traceback
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])  # without self
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and not arguments.get(name):
            arguments.pop(name, None)
    return arguments


class AetherModel(nn.Module, ABC, metaclass=_RemembersArguments):
    """A model that knows how it is trained, and alone decides how it is optimised.

    The constructor's arguments are remembered in `hyperparameters` and stored in every snapshot, so that
    `aetheria.Predictor` rebuilds the model without a configuration.

    Attributes:
        hyperparameters: the constructor's arguments by name, defaults included.
        weight_unit: what `weight` in a step's dictionary counts; "samples" unless the model says "tokens".
    """

    hyperparameters: dict[str, Any]
    weight_unit: str = "samples"

    def save_hyperparameters(self, *, ignore: Iterable[str] = ()) -> None:
        """Chooses which constructor arguments are stored; without this call all of them are.

        Args:
            ignore: names that must not be stored, for instance a module handed in from outside. A Predictor then
                asks for them.
        """
        ignored = set(ignore)
        self.hyperparameters = {name: value for name, value in self.hyperparameters.items() if name not in ignored}

    @abstractmethod
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the loss of one micro-batch.

        Returns:
            A dictionary with at least "loss": a scalar with a gradient, the **mean** over the micro-batch. It may
            hold "weight": what that mean is weighted by (a number or a scalar tensor: samples or tokens; the number
            of samples when absent), "sample_loss": a tensor of shape [batch], and any other scalar as a metric.
        """

    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the metrics of one evaluation batch, in eval and inference mode. By default the training step."""
        return self.training_step(batch)

    def test_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the metrics of one test batch. By default the validation step."""
        return self.validation_step(batch)

    def predict_step(self, batch: Any) -> Any:
        """Computes the predictions of one batch, for the Predictor. By default `self(batch)`."""
        return self(batch)

    @abstractmethod
    def configure_optimizers(self) -> Optimizer | tuple[Optimizer, Scheduler] | OptimizerPlan:
        """Returns the optimiser; with a scheduler in a pair (stepped per epoch), or an `OptimizerPlan`."""


class AetherDataModule(ABC):
    """Where the samples come from. The loaders may be `torch.utils.data.DataLoader`s, sequences or iterables."""

    def prepare_data(self) -> None:  # noqa: B027 - a hook, not an obligation
        """Downloads or converts; called once per node, before `setup`. Must not set attributes."""

    def setup(self) -> None:  # noqa: B027 - a hook, not an obligation
        """Loads and splits; called on every rank."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """Returns the loader of the training batches."""

    def val_dataloader(self) -> Iterable[Any] | None:
        """Returns the loader of the validation batches, or None."""
        return None

    def test_dataloader(self) -> Iterable[Any] | None:
        """Returns the loader of the test batches, or None."""
        return None


@dataclass(slots=True)
class MicroBatch:
    """What a loader hands to the loop: the user's batch and what the sampler knows about it.

    Attributes:
        data: the batch as the collate function made it.
        size: the number of samples in it.
        ids: the stable ids of those samples, int64 of shape [size]; None for iterables, which have none.
    """

    data: Any
    size: int
    ids: Any = None


# --------------------------------------------------------------------------------------------------------------------
# Observers
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunEvent:
    """Something that happened, worth a line: a dropped window, a damaged snapshot, a stop.

    Attributes:
        kind: a short name, for instance "nonfinite", "warning", "snapshot", "stop".
        step: the optimiser step at which it happened.
        message: one sentence for a person.
        data: plain values for a program (JSON types only).
    """

    kind: str
    step: int
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


class TrainingContext(Protocol):
    """What a callback sees of the run: `self.context`. The Orchestrator is one."""

    @property
    def config(self) -> TrainingConfig: ...
    @property
    def model(self) -> AetherModel: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def folder(self) -> Path:
        """The run folder."""
        ...

    @property
    def run_id(self) -> str: ...
    @property
    def global_step(self) -> int:
        """Optimiser steps taken since the run began, dropped windows not counted."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch that is being trained, from 0."""
        ...

    @property
    def max_epochs(self) -> int | None: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def steps_per_epoch(self) -> int | None:
        """Windows in one epoch, or None where an iterable does not say its length."""
        ...

    @property
    def samples_seen(self) -> int:
        """Training samples consumed since the run began."""
        ...

    def request_stop(self, reason: str) -> None:
        """Asks the loop to end at the next boundary, with a snapshot."""
        ...

    def request_snapshot(self, reason: str) -> None:
        """Asks the loop for a snapshot at the next boundary."""
        ...

    def keep_best(self, metric: str, mode: Literal["min", "max"], k: int) -> None:
        """Asks that the k best snapshots by this metric are taken and kept."""
        ...

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Adds values (numbers or scalar tensors) to the next metrics that are logged; nothing is synchronised."""
        ...

    def record(self, kind: str, message: str, **data: Any) -> None:
        """Records an event; every logger and `run.db` get it."""
        ...


class Callback:
    """Observes or controls a run. Override what you need; a hook nobody overrides costs nothing.

    Callbacks run on every rank; what writes checks `self.context.accelerator.is_main_process`.

    Attributes:
        critical: what happens when a hook raises. False: it is reported once, counted, and the run goes on. True: the
            run stops with the original traceback.
        context: the run, set before `on_train_start`.
    """

    critical: bool = False
    context: TrainingContext

    def on_train_start(self) -> None:
        """Called once, after a snapshot (if any) has been loaded and before the first step."""

    def on_train_end(self) -> None:
        """Called once when training ends without an exception, before the last snapshot."""

    def on_epoch_start(self) -> None:
        """Called before the first window of an epoch; not called again when an epoch is continued half-way."""

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Called with the epoch's training means and, prefixed `val_`, its validation means."""

    def on_before_step(self) -> None:
        """Called when the gradients are complete and unscaled, before clipping and the optimiser step."""

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Called after each optimiser step, with the index of its window in the epoch and the metrics on the device."""

    def on_validation_start(self) -> None:
        """Called before a validation."""

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Called after a validation with its `val_` means; with an empty dictionary if it was interrupted."""

    def on_snapshot(self, path: Path) -> None:
        """Called at the first boundary after a snapshot has become durable."""

    def on_command(self, command: Any) -> None:
        """Called after a command has been applied."""

    def on_event(self, event: RunEvent) -> None:
        """Called for every recorded event."""

    def on_exception(self, error: BaseException) -> None:
        """Called when the run ends with an exception, which is raised again afterwards."""

    def teardown(self) -> None:
        """Called last, whatever happened: close files and connections here."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what this callback must remember across a resume: plain containers, numbers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; called before `on_train_start`."""


class Logger(Callback):
    """A callback that is given the metrics as plain numbers, on the main process only."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes the metrics of a step: interval means, learning rates, epoch and validation means as they come."""

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Writes the configuration as resolved; called once, before the first metrics."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_id: name of the run folder.
        folder: the run folder.
        status: "completed" (epochs or steps reached), "stopped" (early stopping, `nonfinite: stop`, a limit of time)
            or "interrupted" (SIGINT, SIGTERM).
        global_step: optimiser steps taken since the run began.
        metrics: the last epoch's metrics, training means and `val_` means.
        digest: sha256 over names, dtypes, shapes and bytes of the weights.
        history: the metrics of every epoch, oldest first.
        reason: why it stopped, for a person.
        signal: the signal's number when it was interrupted.
    """

    run_id: str
    folder: Path
    status: Literal["completed", "stopped", "interrupted"]
    global_step: int
    metrics: dict[str, float]
    digest: str
    history: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""
    signal: int | None = None


# --------------------------------------------------------------------------------------------------------------------
# The hardware
# --------------------------------------------------------------------------------------------------------------------


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

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which this rank computes."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is global rank 0, which alone writes the run folder."""
        return self.rank == 0

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

    def barrier(self) -> None:  # noqa: B027 - a hook
        """Waits until every rank is here."""

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

    def set_generator_state(self, state: Tensor) -> None:  # noqa: B027 - a hook
        """Restores the state of the device's random generator."""

    def cleanup(self) -> None:  # noqa: B027 - a hook
        """Gives everything back."""
