"""The end by time: real clocks, short times."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.test_steered_run import Small, set_, train
from torch import Tensor

from aetheria.config import TrainingConfig
from aetheria.core import Callback, RunResult
from aetheria.data import LoaderDataModule
from aetheria.errors import ConfigError
from aetheria.loom.reader import RunReader
from aetheria.orchestrator import Orchestrator
from aetheria.protocol import AnyCommand, command_of
from aetheria.runs import RunFolder
from aetheria.snapshot import list_snapshots

PATIENCE = 60.0


class Slow(Callback):
    """A step takes a hundredth of a second at least."""

    critical = True

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        time.sleep(0.01)
        assert self.context.global_step < PATIENCE * 100, "the time is never up"


class Ahead(Slow):
    """Puts the clock ahead after a step."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.context.global_step == self.step:
            self.context.clock.set(self.seconds)  # type: ignore[attr-defined]


class Watched(Small):
    def validation_step(self, batch: Tensor) -> dict[str, Tensor]:
        return self.training_step(batch)


def watched(folder: Path, resume: Path | None = None, *callbacks: Callback, **options: Any) -> RunResult:
    """Trains with validations, and boundaries at nothing but what is asked for."""
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, generator=torch.Generator().manual_seed(number)) for number in range(50)]
    quiet: dict[str, Any] = {"log_every": 10**6, "live": "off", "accelerator": "cpu", "runs_dir": folder}
    config = TrainingConfig(**quiet | {"snapshots": {"every_epochs": None, "every_seconds": None}} | options)
    data = LoaderDataModule(batches, batches[:3])
    return Orchestrator(Watched(), data, config, callbacks=callbacks or [Slow()]).run(resume)


def seconds_behind(folder: Path) -> float:
    return float(list_snapshots(folder / "snapshots")[-1].state()["loop"]["seconds"])


def test_the_run_ends_as_with_max_steps_at_the_first_boundary_after_it(tmp_path: Path) -> None:
    """Nothing else comes to a boundary here: no log, no snapshot, no epoch."""
    begun = time.monotonic()
    result = watched(tmp_path, max_time=0.3)
    elapsed = time.monotonic() - begun
    assert 0 < result.global_step <= 30
    assert result.status == "completed"
    assert result.reason == f"0 epochs, {result.global_step} steps; the time is up (max_time 0.3s)"
    assert "val_loss" in result.metrics  # validated at its end, in the middle of an epoch
    (snapshot,) = list_snapshots(result.folder / "snapshots")
    assert (snapshot.manifest.step, snapshot.manifest.digest) == (result.global_step, result.digest)
    assert 0.3 <= seconds_behind(result.folder) <= elapsed
    content = RunFolder(result.folder).read()
    assert (content["status"], content["status_detail"]) == ("completed", result.reason)
    same = watched(tmp_path, max_steps=result.global_step)
    assert same.digest == result.digest
    assert same.metrics == result.metrics


@pytest.mark.parametrize("limit", [{"epochs": 1}, {"max_steps": 50}])
def test_whatever_is_reached_first_ends_the_run_and_the_limit_is_not_seen(tmp_path: Path, limit: Any) -> None:
    limited = watched(tmp_path, None, Callback(), max_time="1h", **limit)
    assert limited.reason == "1 epochs, 50 steps"
    assert limited.digest == watched(tmp_path, None, Callback(), **limit).digest


def test_a_validation_runs_to_its_end(tmp_path: Path) -> None:
    """The run ends with one anyway; whoever cut it short would begin it anew."""
    result = watched(tmp_path, None, LongValidation(), max_time=0.2, val_every_steps=5)
    assert result.global_step == 5
    assert "val_loss" in result.metrics


class LongValidation(Callback):
    def on_validation_start(self) -> None:
        time.sleep(0.25)

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        assert metrics
        assert not hasattr(self, "seen"), "validated twice at one step"
        self.seen = True


# --- over several lives ----------------------------------------------------------------------------------------------
def test_a_continued_run_goes_on_counting_and_says_when_nothing_is_left(tmp_path: Path) -> None:
    first = watched(tmp_path, max_time=0.2)
    behind = seconds_behind(first.folder)

    over = watched(tmp_path, first.folder, max_time=0.2)
    assert (over.global_step, over.digest, over.status) == (first.global_step, first.digest, "completed")
    said = [event.message for event in RunReader(first.folder / "run.db").events() if event.kind == "warning"]
    assert said == ["nothing is left to train: max_time is 0.2s, and 0s lie behind. To go on, continue with more: "
                    "--set max_time=..."]  # fmt: skip

    more = watched(tmp_path, first.folder, max_time=0.4)
    assert first.global_step < more.global_step <= first.global_step + 20
    assert behind + 0.1 < seconds_behind(more.folder)
    assert more.digest == watched(tmp_path, max_steps=more.global_step).digest


def test_steps_and_epochs_that_lie_behind_are_said_too(tmp_path: Path) -> None:
    first = watched(tmp_path, None, Callback(), max_steps=3)
    watched(tmp_path, first.folder, Callback(), max_steps=3)
    said = [event.message for event in RunReader(first.folder / "run.db").events() if event.kind == "warning"]
    assert [text.partition(". ")[0] for text in said] == ["nothing is left to train: max_steps is 3, and 3 lie behind"]


def test_what_a_crash_undid_does_not_count(tmp_path: Path) -> None:
    class Breaks(Slow):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            super().on_batch_end(batch_idx, metrics)
            if self.context.global_step == 20:
                raise ValueError("stumbled")

    every = {"every_steps": 5, "every_epochs": None, "every_seconds": None, "keep_last": 9}
    with pytest.raises(ValueError, match="stumbled"):
        watched(tmp_path, None, Breaks(), max_time=PATIENCE, snapshots=every)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    newest = list_snapshots(folder / "snapshots")[-1].manifest.step
    before = seconds_behind(folder)
    assert 0.01 * (newest - 1) <= before
    watched(tmp_path, folder, Callback(), max_time=PATIENCE, max_steps=newest + 1, snapshots=every)
    assert before <= seconds_behind(folder) < before + 0.01 * (20 - newest) + PATIENCE / 10


# --- steered ---------------------------------------------------------------------------------------------------------
def test_pauses_do_not_count(tmp_path: Path) -> None:
    class Resumes(Callback):
        def on_command(self, command: AnyCommand) -> None:
            if command.op_name == "pause":
                self.paused = time.monotonic()
                line = self.context._line  # type: ignore[attr-defined]
                threading.Timer(1.1, line.put, [command_of("resume")]).start()

    resumes = Resumes()
    result, line, _ = train(tmp_path, {4: [command_of("pause")]}, resumes, max_time=1.0)
    assert time.monotonic() - resumes.paused > 1.1
    assert [outcome.state for outcome in line.outcomes if outcome.is_final] == ["applied", "applied"]
    assert (result.global_step, result.reason) == (18, "3 epochs, 18 steps")


@pytest.mark.parametrize("value", [0.2, "1s", None])
def test_it_is_a_knob(tmp_path: Path, value: Any) -> None:
    result, line, run = train(
        tmp_path,
        {4: [set_(max_time=value)], 8: [set_(max_time=0.1)]},
        Slow(),
        max_time="1h",
        epochs=None,
        max_steps=9999,
    )
    assert [outcome.state for outcome in line.outcomes if outcome.is_final] == ["applied", "applied"], line.outcomes
    assert [outcome.result["after"]["max_time"] for outcome in line.outcomes if outcome.is_final] == [
        {0.2: 0.2, "1s": 1.0, None: None}[value],
        0.1,
    ]
    assert run.config.max_time == 0.1
    assert result.status == "completed"
    assert result.reason.endswith("the time is up (max_time 0.1s)")
    assert result.global_step < 100


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("12:30", "expected seconds as a number, or a text of whole days"),
        ("90", "expected seconds as a number, or a text of whole days"),
        (0, "greater than 0"),
        (True, "expected seconds as a number"),
    ],
)
def test_a_wrong_time_is_refused_while_the_run_goes_on(tmp_path: Path, value: Any, why: str) -> None:
    result, line, run = train(tmp_path, {4: [set_(max_time=value)]})
    (outcome,) = [outcome for outcome in line.outcomes if outcome.is_final]
    assert outcome.state == "rejected"
    assert why in outcome.message
    assert "Allowed: a number or a text or null" in outcome.message
    assert (result.global_step, run.config.max_time) == (18, None)


def test_the_last_limit_stays(tmp_path: Path) -> None:
    result, line, run = train(
        tmp_path, {4: [set_(epochs=None, max_time="1h")], 8: [set_(max_time=None)], 12: [set_(max_steps=14)]}
    )
    states = [outcome.state for outcome in line.outcomes if outcome.is_final]
    assert states[0] == states[2] == "applied"
    assert states[1] != "applied"
    assert "one of epochs, max_steps and max_time must stay" in line.outcomes[3].message
    assert (result.global_step, run.config.epochs, run.config.max_time) == (14, None, 3600.0)


def test_more_time_that_is_given_at_the_last_moment_counts(tmp_path: Path) -> None:
    """The clock is looked at, then commands take effect, then it is decided whether the run is over."""
    result, line, _ = train(tmp_path, {5: [set_(max_time="2h")]}, Ahead(5, 3601.0), max_time="1h")
    assert [outcome.state for outcome in line.outcomes if outcome.is_final] == ["applied"]
    assert (result.global_step, result.reason) == (18, "3 epochs, 18 steps")


def test_a_rewind_takes_the_clock_back(tmp_path: Path) -> None:
    result, line, run = train(tmp_path, {11: [command_of("rewind", {"step": 4})]}, Ahead(6, 3590.0), max_time="1h")
    assert [outcome.state for outcome in line.outcomes if outcome.is_final] == ["applied"], line.outcomes
    assert result.global_step == 18
    assert 3590 <= seconds_behind(result.folder) < 3600  # step 6 has been taken twice
    assert run.clock.seconds < 3600


def test_without_any_limit_nothing_is_begun() -> None:
    with pytest.raises(ConfigError, match="found none of epochs, max_steps and max_time"):
        TrainingConfig(seed=1)
