"""A disk that is full while a snapshot is written: a small file system of its own fills up for real."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, RunResult
from aetheria.data import LoaderDataModule
from aetheria.errors import SnapshotError
from aetheria.orchestrator import Orchestrator
from aetheria.runs import find_runs
from aetheria.snapshot import list_snapshots


class Wide(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(500, 500)  # with AdamW three megabytes a snapshot

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(batch).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(runs_dir: Path, resume: Path | None = None) -> RunResult:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 500, generator=generator) for _ in range(8)]
    torch.manual_seed(0)
    config = TrainingConfig(epochs=1, runs_dir=runs_dir, snapshots={"every_steps": 1, "keep_last": 50})
    return Orchestrator(Wide(), LoaderDataModule(batches), config).run(resume)


def test_a_full_disk_ends_the_run_with_a_word_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "roomy")
    with pytest.raises(
        SnapshotError, match=r"No space left.*It needs about 3.0 MB, \d\.\d MB are free there.*make room"
    ):
        train(small_disk / "runs")
    [run] = find_runs(small_disk / "runs")
    content = run.read()
    assert content["status"] == "failed"
    assert "No space left" in content["status_detail"]
    assert not list(run.snapshots.glob(".*")), "what was half-written is gone"
    snapshots = list_snapshots(run.snapshots)
    assert len(snapshots) >= 2
    for snapshot in snapshots:
        snapshot.verify()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    continued = train(small_disk / "runs", run.path)
    assert continued.folder == run.path
    assert continued.digest == whole.digest
