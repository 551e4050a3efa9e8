"""A device that decides for itself whether a step is taken, and says so later: nothing may come out differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aetheria.accelerator import CPUAccelerator
from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, Callback, LateAnswer, OptimizerPlan, RunEvent, Schedule
from aetheria.data import LoaderDataModule
from aetheria.orchestrator import Orchestrator


class Later:
    """An answer that notes when it was asked for."""

    def __init__(self, nonfinite: Tensor, asked: list[int], number: int) -> None:
        self.taken = not bool(nonfinite)
        self.asked = asked
        self.number = number

    def __bool__(self) -> bool:
        self.asked.append(self.number)
        return self.taken


class DeviceThatDecides(CPUAccelerator):
    """What `GPUAccelerator` does with a fused optimiser: the kernel reads `found_inf`, the host asks a step later."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.steps = 0
        self.asked_before_step: list[bool] = []

    def _step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        self.asked_before_step.append(self.steps in self.asked or self.steps == 0)
        self.steps += 1
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = nonfinite.clone()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        return Later(nonfinite, self.asked, self.steps)


class Model(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(batch) - 1).square().mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "step")])


class Watch(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.steps: list[int] = []

    def on_event(self, event: RunEvent) -> None:
        if event.kind == "nonfinite":
            self.events.append((event.kind, event.step))

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        self.steps.append(self.context.global_step)


def train(tmp_path: Path, accelerator: CPUAccelerator, **options: Any) -> tuple[Any, Watch]:
    torch.manual_seed(3)
    batches = [torch.randn(4, 2) for _ in range(11)]
    for poisoned in (0, 4, 10):
        batches[poisoned][1, 0] = float("nan")
    watch = Watch()
    config = TrainingConfig(epochs=3, runs_dir=tmp_path, log_every=4, **options)
    torch.manual_seed(4)
    orchestrator = Orchestrator(Model(), LoaderDataModule(batches, batches[1:4]), config, accelerator, [watch])
    return orchestrator.run(), watch


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"grad_accumulation_steps": 2}])
def test_a_late_answer_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    at_once, watched = train(tmp_path, CPUAccelerator(), **options)
    device = DeviceThatDecides()
    late, watched_late = train(tmp_path, device, **options)
    assert late.digest == at_once.digest
    assert late.global_step == at_once.global_step
    assert late.history == at_once.history
    assert watched_late.events == watched.events != []
    assert watched_late.steps == watched.steps == list(range(1, late.global_step + 1))
    assert all(device.asked_before_step), "the learning rate of a step depends on whether the one before was taken"


def test_every_answer_is_asked_for_once_and_in_order(tmp_path: Path) -> None:
    device = DeviceThatDecides()
    train(tmp_path, device)
    assert device.asked == list(range(1, device.steps + 1))
