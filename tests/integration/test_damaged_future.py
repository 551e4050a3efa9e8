"""A run that falls back behind damaged snapshots goes its way again, and keeps what is good."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, RunResult
from aetheria.data import LoaderDataModule
from aetheria.orchestrator import Orchestrator
from aetheria.runs import RunFolder
from aetheria.snapshot import Snapshot, list_snapshots


class Small(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(batch).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(runs_dir: Path, steps: int, every: int, resume: Path | None = None) -> RunResult:
    torch.manual_seed(0)
    model = Small()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 4, generator=generator) for _ in range(20)]
    snapshots = {"every_steps": every, "every_epochs": None, "keep_last": 3}
    config = TrainingConfig(max_steps=steps, runs_dir=runs_dir, snapshots=snapshots)
    return Orchestrator(model, LoaderDataModule(batches), config).run(resume)


def steps_of(folder: Path) -> list[int]:
    return [snapshot.manifest.step for snapshot in list_snapshots(folder / "snapshots")]


def test_the_snapshots_behind_damaged_ones_are_kept(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", steps=20, every=20)
    run = train(tmp_path / "runs", steps=12, every=4)
    assert steps_of(run.folder) == [4, 8, 12]
    for step in (8, 12):
        file = run.folder / "snapshots" / f"step-{step:08d}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    # From 4 on, to 6 only: the newest two by their numbers are the damaged ones.
    train(tmp_path / "runs", steps=6, every=1, resume=run.folder)
    assert steps_of(run.folder) == [4, 5, 6]
    for snapshot in list_snapshots(run.folder / "snapshots"):
        snapshot.verify()
    assert train(tmp_path / "runs", steps=20, every=5, resume=run.folder).digest == whole.digest


def test_what_is_saved_before_the_first_step_of_a_new_life_is_the_old_state(tmp_path: Path) -> None:
    """A run that is continued with nothing left to do writes the snapshot of its step once more."""
    whole = train(tmp_path / "whole", steps=20, every=20)
    run = train(tmp_path / "runs", steps=7, every=3)
    before = Snapshot(run.folder / "snapshots" / "step-00000007").state()["loop"]["cursor"]
    train(tmp_path / "runs", steps=7, every=3, resume=run.folder)
    newest = list_snapshots(RunFolder.open(run.folder).snapshots)[-1]
    newest.verify()
    assert newest.state()["loop"]["cursor"] == before
    assert train(tmp_path / "runs", steps=20, every=3, resume=run.folder).digest == whole.digest
