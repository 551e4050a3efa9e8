"""A run that does not run: what a callback sees of one, to be moved by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from aetheria.config import TrainingConfig
from aetheria.core import Accelerator, AetherModel
from aetheria.plugins import SimpleMLP


class HostAccelerator(Accelerator):
    device = torch.device("cpu")


@dataclass
class FakeRun:
    """A `TrainingContext` whose counters the test sets, and which notes what callbacks ask of it."""

    folder: Path
    model: AetherModel = field(default_factory=SimpleMLP)
    config: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=3))
    accelerator: Accelerator = field(default_factory=HostAccelerator)
    run_id: str = "quiet-otter"
    global_step: int = 0
    epoch: int = 0
    max_epochs: int | None = 3
    max_steps: int | None = None
    steps_per_epoch: int | None = 10
    samples_seen: int = 0
    stops: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    best: list[tuple[str, str, int]] = field(default_factory=list)
    logged: dict[str, float | Tensor] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.model.configure_optimizers()
        self.optimizer: Optimizer = getattr(plan, "optimizer", plan)

    def request_stop(self, reason: str) -> None:
        self.stops.append(reason)

    def request_snapshot(self, reason: str) -> None:
        self.snapshots.append(reason)

    def keep_best(self, metric: str, mode: str, k: int) -> None:
        self.best.append((metric, mode, k))

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        self.logged.update(metrics)

    def record(self, kind: str, message: str, **data: Any) -> None:
        self.events.append((kind, message))


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)
