"""Kill a run at random instants, again and again, and continue it: the weights must be those of a run left alone.

Lives are forked from this process, which has torch imported already, so that a hundred of them take a minute. How many
kills: the environment variable AETHERIA_CHAOS_KILLS (`make chaos` sets 100).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import aetheria.plugins  # noqa: F401 - imported before forking, not by every life anew
from aetheria.config import TrainingConfig
from aetheria.core import AetherDataModule, AetherModel, Callback, OptimizerPlan, Schedule
from aetheria.orchestrator import Orchestrator
from aetheria.runs import RunFolder, find_runs
from aetheria.snapshot import list_snapshots

KILLS = int(os.environ.get("AETHERIA_CHAOS_KILLS", "8"))
LIVES_WITHOUT_PROGRESS = 25
STEPS, VALIDATION = 0, 1

# The first optimiser of a process imports torch's compiler: two seconds that not every life shall spend.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


class AugmentedPoints(Dataset[tuple[Tensor, Tensor]]):
    """Points on a curve, moved about by all three global generators."""

    def __len__(self) -> int:
        return 75  # not a multiple of anything: every epoch ends on a short window

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.linspace(-1, 1, 8) * (index / 75) + 0.1 * torch.randn(8)
        x = x + 0.1 * float(np.random.randn()) + 0.1 * random.gauss(0, 1)
        return x, torch.sin(3 * x.sum()).reshape(1)


class Points(AetherDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(AugmentedPoints(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(AugmentedPoints(), batch_size=16)


class Fragile(AetherModel):
    """Everything that carries state from step to step: dropout, batch norm, momentum, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 1))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": nn.functional.mse_loss(self.net(x), y)}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return OptimizerPlan(optimizer, [Schedule(schedule, "step")])


class Phase(Callback):
    """Tells the parent, through shared memory, whether a validation is going on."""

    def __init__(self, shared: mmap.mmap) -> None:
        self.shared = shared

    def on_validation_start(self) -> None:
        self.shared[0] = VALIDATION

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self.shared[0] = STEPS


def train(runs_dir: Path, shared: mmap.mmap, seed: int) -> str:
    """Trains, or continues what lies in the folder, and returns the digest of the weights."""
    config = TrainingConfig(
        epochs=6,
        seed=seed,
        grad_accumulation_steps=2,
        max_grad_norm=1.0,
        val_every_steps=3,
        log_every=2,
        snapshots={"every_steps": 2, "every_epochs": 1},
        callbacks=["ExponentialMovingAverage"],
        runs_dir=runs_dir,
        run_name="chaos",
    )
    runs = find_runs(runs_dir)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Fragile()
    resume = runs[0].path if runs else None
    return Orchestrator(model, Points(), config, callbacks=[Phase(shared)]).run(resume).digest


def live(runs_dir: Path, shared: mmap.mmap, seed: int) -> int:
    """Forks one life and returns its process id. It ends with 0 only when training came to its end."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        digest = train(runs_dir, shared, seed)
        (runs_dir / "digest").write_text(digest)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a forked life must not return into pytest
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait_until(pid: int, deadline: float) -> int | None:
    """Returns the exit status of a process, or None if it is still alive at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def kill(pid: int) -> None:
    """Kills a life, and afterwards the workers that it leaves behind."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def newest_step(runs_dir: Path) -> int:
    runs = find_runs(runs_dir)
    snapshots = list_snapshots(runs[0].snapshots) if runs else []
    return snapshots[-1].manifest.step if snapshots else -1


def uninterrupted(runs_dir: Path, shared: mmap.mmap, seed: int) -> tuple[str, float]:
    begun = time.monotonic()
    assert wait_until(live(runs_dir, shared, seed), begun + 120) == 0
    return (runs_dir / "digest").read_text(), time.monotonic() - begun


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_run_killed_at_random_instants_ends_with_the_weights_of_one_left_alone(tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("AETHERIA_CHAOS_SEED", "1")))
    shared = mmap.mmap(-1, 1)
    hit: Counter[str] = Counter()
    kills = 0
    seed = 0
    while kills < KILLS:
        reference, duration = uninterrupted(tmp_path / f"whole-{seed}", shared, seed)
        runs_dir = tmp_path / f"killed-{seed}"
        runs_dir.mkdir()
        idle_lives, best = 0, -1
        while True:
            shared[0] = STEPS
            pid = live(runs_dir, shared, seed)
            status = wait_until(pid, time.monotonic() + chance.uniform(0.02, 0.6 * duration))
            if status is not None:
                assert status == 0, "a life ended by itself, with an error"
                break
            phase = "validation" if shared[0] == VALIDATION else "steps"
            if any(runs_dir.glob("*/snapshots/.writing-*")):
                phase = "snapshot"
            kill(pid)
            kills += 1
            hit[phase] += 1
            step = newest_step(runs_dir)
            idle_lives = idle_lives + 1 if step <= best else 0
            best = max(best, step)
            assert idle_lives < LIVES_WITHOUT_PROGRESS, f"no progress beyond step {best} in {idle_lives} lives"
        assert (runs_dir / "digest").read_text() == reference, f"seed {seed}: other weights after {kills} kills"
        folder: RunFolder = find_runs(runs_dir)[0]
        assert folder.display_status() == "completed"
        assert not list(folder.snapshots.glob(".*")), "leftovers of interrupted writes"
        seed += 1
    print(f"{kills} kills over {seed} runs: {dict(hit)}")
    if KILLS >= 100:
        assert set(hit) == {"steps", "validation", "snapshot"}, hit
