"""Ranks that are killed at random, one or all, train to the weights of those that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranked import end, launch, run_ranks, wait_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherModel, Orchestrator, TrainingConfig
from aetheria.config import SnapshotsConfig
from aetheria.core import OptimizerPlan, Schedule
from aetheria.data import LoaderDataModule
from aetheria.runs import find_runs
from aetheria.snapshot import list_snapshots

KILLS = int(os.environ.get("AETHERIA_CHAOS_RANK_KILLS", "2"))
PATIENCE = 60.0 + 10.0 * KILLS  # seconds that an undisturbed training may take, on a machine with much else to do


class Model(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        time.sleep(0.002)
        return {"loss": (self.net(batch[0]).squeeze(1) - batch[0].sum(1)).square().mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.9), "step")])


def train(runs_dir: str, steps: int, accelerator: str) -> str:
    samples = TensorDataset(torch.randn(210, 8, generator=torch.Generator().manual_seed(2)))
    # Whole batches only: a batch norm cannot do with one sample, and a short last row is shared by all ranks.
    loader = DataLoader(samples, batch_size=4, shuffle=True, drop_last=True)
    data = LoaderDataModule(loader, DataLoader(samples, batch_size=16))
    config = TrainingConfig(
        max_steps=steps, grad_accumulation_steps=2, runs_dir=Path(runs_dir), live="off", log_every=3,
        snapshots=SnapshotsConfig(every_steps=7), accelerator=accelerator,
    )  # fmt: skip
    torch.manual_seed(0)
    return Orchestrator(Model(), data, config).run("auto").digest


@pytest.mark.parametrize(
    ("count", "accelerator"), [(3, "auto"), (2, "fsdp"), *([(2, "auto"), (3, "fsdp")] if KILLS > 3 else [])]
)
def test_killed_ranks_end_at_the_same_weights(tmp_path: Path, count: int, accelerator: str) -> None:
    steps = 60 + 40 * KILLS
    (expected, *others) = run_ranks(
        count, train, str(tmp_path / "whole"), steps, accelerator, patience=PATIENCE, AETHERIA_LAUNCH_ID="whole"
    )
    assert others == [expected] * (count - 1)
    chance = random.Random(count)
    killed, without_progress, reached = 0, 0, -1
    while killed < KILLS:
        ranks = launch(count, train, str(tmp_path / "killed"), steps, accelerator, AETHERIA_LAUNCH_ID="killed")
        time.sleep(chance.uniform(0.3, 1.5))
        doomed = ranks if chance.random() < 0.3 else [chance.choice(ranks)]
        for rank in doomed:
            if rank.process.is_alive():
                rank.kill(signal.SIGKILL)
                killed += 1
        for rank in ranks:  # most end by themselves; those that wait for a rank to come, torchrun would kill
            rank.process.join(3)
        end(ranks)
        run = next(iter(find_runs(tmp_path / "killed")), None)
        now = max((snapshot.manifest.step for snapshot in list_snapshots(run.snapshots)), default=-1) if run else -1
        without_progress = 0 if now > reached else without_progress + 1
        reached = max(now, reached)
        assert without_progress < 30, "lives that make no progress"
    found = run_ranks(
        count, train, str(tmp_path / "killed"), steps, accelerator, patience=PATIENCE, AETHERIA_LAUNCH_ID="killed"
    )
    print(f"{killed} ranks of {count} killed, {accelerator}; {steps} steps")
    assert found == [expected] * count
    assert len(find_runs(tmp_path / "killed")) == 1


CONFIG = """
max_steps: 120
batch_size: 4
model_name: SimpleMLP
data_name: RandomData
live: "off"
log_every: 5
snapshots: {every_steps: 10}
runs_dir: runs
"""


def test_torchrun_starts_killed_ranks_again_and_ranks_end_with_their_agent(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "aetheria", "launch", "--nproc", "2", "--max-restarts", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def snapshots() -> list[Any]:
        runs = find_runs(tmp_path / "runs")
        return list_snapshots(runs[0].snapshots) if runs else []

    def start(steps: int, *more: str) -> subprocess.Popen[bytes]:
        arguments = [*command, *more, "config.yaml", "--set", f"max_steps={steps}"]
        return subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    agent = start(1_000_000, "--run-id", "one")
    try:
        wait_for(snapshots, "a snapshot", 60)
        before = find_runs(tmp_path / "runs")[0].read()["pid"]
        os.kill(before, signal.SIGKILL)  # rank 0
        wait_for(lambda: find_runs(tmp_path / "runs")[0].read()["pid"] != before, "another life", 90)
        assert len(find_runs(tmp_path / "runs")) == 1
        reached = snapshots()[-1].manifest.step
        wait_for(lambda: snapshots()[-1].manifest.step > reached, "progress", 90)
        agent.kill()
        agent.wait()
        run = find_runs(tmp_path / "runs")[0]
        wait_for(lambda: not run.in_use(), "the ranks to end", 30)
        assert run.read()["status"] == "interrupted", run.read()["status_detail"]
    finally:
        agent.kill()
        agent.wait()
