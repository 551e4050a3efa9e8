"""When snapshots are taken and which ones stay, seen from a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, Callback, RunResult
from aetheria.data import LoaderDataModule
from aetheria.orchestrator import Orchestrator
from aetheria.snapshot import Manifest, list_snapshots


class Line(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": self.net(batch[0]).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(runs_dir: Path, *callbacks: Callback, **options: Any) -> tuple[RunResult, list[Manifest]]:
    data = TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    loaders = LoaderDataModule(DataLoader(data, batch_size=2), DataLoader(data, batch_size=8))
    config = TrainingConfig(**{"epochs": 5, "runs_dir": runs_dir} | options)
    torch.manual_seed(0)
    result = Orchestrator(Line(), loaders, config, callbacks=callbacks).run()
    return result, [snapshot.manifest for snapshot in list_snapshots(result.folder / "snapshots")]


def test_the_newest_two_stay_and_the_last_one_is_the_end(tmp_path: Path) -> None:
    result, manifests = train(tmp_path, snapshots={"every_steps": 3})
    assert [manifest.step for manifest in manifests] == [39, 40]
    assert manifests[-1].digest == result.digest


def test_the_best_by_validation_is_kept_although_steps_and_epochs_fall_together(tmp_path: Path) -> None:
    class Worsen(Callback):
        """After two epochs every further step makes the model worse."""

        def on_epoch_end(self, metrics: dict[str, float]) -> None:
            if self.context.epoch >= 1:
                for group in self.context.optimizer.param_groups:
                    group["lr"] = -0.05

    result, manifests = train(tmp_path, Worsen(), snapshots={"every_steps": 8, "keep_best": {"metric": "val_loss"}})
    losses = [metrics["val_loss"] for metrics in result.history]
    assert min(losses) == losses[1]
    kept = {manifest.step: manifest.metrics.get("val_loss") for manifest in manifests}
    assert kept == {16: losses[1], 32: losses[3], 40: losses[4]}


def test_a_request_at_a_step_that_is_saved_already_does_not_haunt_later_steps(tmp_path: Path) -> None:
    class Ask(Callback):
        def on_epoch_end(self, metrics: dict[str, float]) -> None:
            self.context.request_snapshot("asked for")

    _, manifests = train(tmp_path, Ask(), epochs=2, snapshots={"every_steps": 8, "every_epochs": None, "keep_last": 9})
    assert [manifest.step for manifest in manifests] == [8, 16]


def test_snapshots_by_the_clock(tmp_path: Path) -> None:
    _, manifests = train(tmp_path, epochs=1, snapshots={"every_epochs": None, "every_seconds": 1e-6, "keep_last": 99})
    assert [manifest.step for manifest in manifests] == list(range(9))
