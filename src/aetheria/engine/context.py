"""What callbacks see of a run: `self.context`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from aetheria.config import TrainingConfig
from aetheria.control.decision import Decision
from aetheria.core import Accelerator, AetherModel, RunEvent
from aetheria.data import BatchSource
from aetheria.engine.clock import TrainingClock
from aetheria.engine.keeper import SnapshotKeeper
from aetheria.engine.loop_state import LoopState
from aetheria.engine.opening import OpenedRun
from aetheria.engine.reporting import Reporter
from aetheria.engine.schedules import Schedules
from aetheria.engine.signals import StopSignals
from aetheria.snapshot import KeepBest

__all__ = ["RunContext"]


class RunContext:
    """The `TrainingContext` that the Orchestrator is. Requests are noted here, and honoured at the next boundary.

    Attributes:
        config: how the run is trained.
        model: what is trained.
        accelerator: the hardware.
        state: where the loop is: step, cursor, history.
        clock: how long it has been trained.
    """

    config: TrainingConfig
    model: AetherModel
    accelerator: Accelerator
    state: LoopState
    clock: TrainingClock
    _opened: OpenedRun
    _schedules: Schedules
    _train: BatchSource
    _keeper: SnapshotKeeper
    _reporter: Reporter
    _signals: StopSignals
    _pending: bool = False
    _wished_stop: str = ""
    _agreed: Decision = Decision()  # what all ranks have agreed on, where there are several

    @property
    def _alone(self) -> bool:
        return self.accelerator.world_size == 1

    @property
    def _stop_reason(self) -> str:
        """Why the run is to end; of several ranks, once they have agreed on it."""
        return self._wished_stop if self._alone else self._agreed.stop

    @property
    def _signal(self) -> int | None:
        """The signal that ends the run; of several ranks, once they have agreed on it."""
        return self._signals.received if self._alone else self._agreed.signal or None

    @property
    def global_step(self) -> int:
        return self.state.global_step

    @property
    def epoch(self) -> int:
        return self.state.cursor.epoch

    @property
    def samples_seen(self) -> int:
        return self.state.cursor.total_samples

    @property
    def max_epochs(self) -> int | None:
        return self.config.epochs

    @property
    def max_steps(self) -> int | None:
        return self.config.max_steps

    @property
    def steps_per_epoch(self) -> int | None:
        batches = self._train.batches_per_epoch
        return None if batches is None else math.ceil(batches / self.config.grad_accumulation_steps)

    @property
    def optimizer(self) -> Optimizer:
        return self._schedules.plan.optimizer

    @property
    def folder(self) -> Path:
        return self._opened.folder.path

    @property
    def run_id(self) -> str:
        return self._opened.folder.run_id

    def request_stop(self, reason: str) -> None:
        self._wished_stop = self._wished_stop or reason
        self._pending = True

    def request_snapshot(self, reason: str) -> None:
        self._keeper.request(reason)
        self._pending = True

    def keep_best(self, metric: str, mode: Literal["min", "max"], k: int) -> None:
        self._keeper.rules.append(KeepBest(metric, mode, k))

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        self._reporter.add(metrics)

    def record(self, kind: str, message: str, **data: Any) -> None:
        self._reporter.record(RunEvent(kind, self.global_step, message, data))

    def _note_remarks(self) -> None:
        for remark in self.accelerator.remarks():
            self.record("nonfinite", remark)
        for notice in self._train.notices():
            self.record("data", notice)
