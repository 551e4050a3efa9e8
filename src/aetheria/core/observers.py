"""Those who watch a run, and what they see of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer

from aetheria.core.hardware import Accelerator
from aetheria.core.science import AetherDataModule, AetherModel

if TYPE_CHECKING:
    from aetheria.config import TrainingConfig

__all__ = ["Callback", "Logger", "RunEvent", "RunResult", "TrainingContext"]


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
    def data(self) -> AetherDataModule: ...
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
        status: "completed" (epochs, steps or time reached), "stopped" (early stopping, `nonfinite: stop`, a command) or
            "interrupted" (SIGINT, SIGTERM).
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
