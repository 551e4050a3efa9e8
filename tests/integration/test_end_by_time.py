"""The end by time: of several ranks at once, and as a replay sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_ranks import Data, Watched
from tests.integration.test_replay_cli import PLUGIN
from tests.ranked import run_ranks
from torch import Tensor
from typer.testing import CliRunner

from aetheria import Callback, Orchestrator, TrainingConfig
from aetheria.cli import app
from aetheria.control.line import NoLine
from aetheria.core import RunResult
from aetheria.engine.clock import TrainingClock
from aetheria.loom.reader import RunReader
from aetheria.protocol import command_of, encode
from aetheria.registry import Registry
from aetheria.runs import RunFolder
from aetheria.snapshot import list_snapshots

HOUR = 3600.0


class Ahead(Callback):
    """On one rank the clock is ahead, from a step on."""

    def __init__(self, rank: int, step: int, by: float = 2 * HOUR) -> None:
        self.rank, self.step, self.by = rank, step, by

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        context: Any = self.context
        if context.accelerator.rank == self.rank and context.global_step == self.step:
            context.clock.set(context.clock.seconds + self.by)


def ends(runs_dir: str, resume: str | None, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    given: dict[str, Any] = {"runs_dir": Path(runs_dir), "live": "off", "max_time": "1h", "limit_val_batches": 4}
    data = Data(6, samples=4800)  # long epochs: at the end of one the ranks agree anyway
    result = Orchestrator(Watched(), data, TrainingConfig(**given | options), callbacks=callbacks).run(resume)
    found = vars(result) | {"folder": str(result.folder)}
    return {name: found[name] for name in ("status", "global_step", "digest", "reason", "metrics", "folder")}


def lives(runs_dir: str) -> dict[str, dict[str, Any]]:
    """One run: rank 1's clock is ahead; continued with nothing left; continued with more, rank 0's clock ahead then."""
    ended = ends(runs_dir, None, Ahead(1, 3))
    folder = ended["folder"]
    if os.environ["RANK"] == "0":  # who writes, and has waited for it
        snapshots = {each.manifest.step: each for each in list_snapshots(Path(folder) / "snapshots")}
        newest = snapshots[ended["global_step"]]
        assert newest.manifest.digest == ended["digest"]
        assert max(snapshots) == newest.manifest.step
        ended["seconds"] = newest.state()["loop"]["seconds"]
    over = ends(runs_dir, folder)
    more = ends(runs_dir, folder, Ahead(0, ended["global_step"] + 2, 8 * HOUR), max_time="10h")
    steps = ends(f"{runs_dir}/steps", None, max_steps=ended["global_step"])
    return {"ended": ended, "over": over, "more": more, "steps": steps}


def test_where_one_ranks_clock_says_so_all_leave_at_the_same_step_with_one_snapshot(tmp_path: Path) -> None:
    first, second = run_ranks(2, lives, str(tmp_path))
    seconds = first["ended"].pop("seconds")
    for life in ("ended", "over", "more"):
        assert second[life] == first[life]
    ended, over, more = first["ended"], first["over"], first["more"]
    step = ended["global_step"]
    assert 3 < step <= 400
    assert ended["status"] == "completed"
    assert ended["reason"].endswith("; the time is up (max_time 1h)")
    assert "val_error" in ended["metrics"]
    assert first["steps"]["digest"] == ended["digest"]

    # What was agreed on is what a continued run counts on from, not the first rank's own clock.
    assert 2 * HOUR <= seconds < 3 * HOUR
    assert (over["global_step"], over["digest"]) == (step, ended["digest"])
    events = RunReader(Path(ended["folder"]) / "run.db").events()
    said = [event.message for event in events if event.kind == "warning"]
    assert [text[: text.index(", and")] for text in said] == ["nothing is left to train: max_time is 1h"]
    assert more["global_step"] >= step + 2
    assert more["reason"].endswith("; the time is up (max_time 10h)")


def given_more(runs_dir: str) -> tuple[int, str]:
    """More time is given in the step in which one rank's clock is ahead: all ranks go by the new limit."""

    class Line(NoLine):
        def __init__(self) -> None:
            super().__init__()
            self.word = memoryview(bytearray(8)).cast("Q")
            self.waiting: list[bytes] = []

        def take(self) -> list[bytes]:
            taken, self.waiting = self.waiting, []
            return taken

    line = Line()

    class Gives(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.accelerator.is_main_process and self.context.global_step == 3:
                line.waiting.append(encode(command_of("set", {"values": {"max_time": "9h"}})))
                line.word[0] += 1

    config = TrainingConfig(max_time="1h", max_steps=60, runs_dir=Path(runs_dir), live="off")
    result = Orchestrator(Watched(), Data(6), config, callbacks=[Gives(), Ahead(1, 3)], line=line).run()
    return result.global_step, result.reason


def test_more_time_that_is_given_at_the_last_moment_counts_for_all(tmp_path: Path) -> None:
    assert [step for step, _ in run_ranks(2, given_more, str(tmp_path))] == [60, 60]


# --- replayed --------------------------------------------------------------------------------------------------------
class Hurries(Callback):
    """Gives the run an hour more than it is configured to have, and then takes it, in the middle of an epoch."""

    def on_train_start(self) -> None:
        self.context.clock.set(-HOUR)  # type: ignore[attr-defined]

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        clock: TrainingClock = self.context.clock  # type: ignore[attr-defined]
        if self.context.global_step == 11:
            clock.set(clock.seconds + 2 * HOUR)


def inside(*arguments: str) -> tuple[int, str]:
    with Registry.isolated():
        result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "tiny.py").write_text(PLUGIN)
    (tmp_path / "config.yaml").write_text(
        'model_name: Tiny\ndata_name: Noise\nmax_time: 0.001\naccelerator: cpu\nlive: "off"\nlog_every: 1\n'
        "snapshots: {every_steps: 8, every_epochs: null, keep_last: 5}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_replay_trains_to_the_step_at_which_the_time_was_up(project: Path) -> None:
    with Registry.isolated():
        config = TrainingConfig.from_yaml("config.yaml")
        built = Orchestrator.from_config(config)
        result: RunResult = Orchestrator(built.model, built.data, config, callbacks=[Hurries()]).run()
    assert (result.global_step, result.reason) == (11, "1 epochs, 11 steps; the time is up (max_time 0.001s)")
    status, output = inside("replay", "@last")
    assert status == 0, output
    assert "EQUAL: the same weights at 2 steps, the last of them 11." in output
    (replay,) = (project / "runs" / "replays").iterdir()
    assert RunFolder(replay).read()["global_step"] == 11

    status, output = inside("continue", "@last")
    assert status == 0, output
    assert "nothing is left to train: max_time is 0.001s, and 1h" in output
    assert f"aetheria continue runs/{result.run_id} --set max_time=N" in output
    status, output = inside("continue", "@last", "--set", "max_time=2d", "--set", "max_steps=20")
    assert status == 0, output
    assert "2 epochs, 20 steps" in output
    status, output = inside("replay", "@last", "--json")
    assert status == 0, output
    assert json.loads(output)["compared"][-1] == 20


def test_a_wrong_time_is_told_with_its_line_before_anything_is_loaded(project: Path) -> None:
    (project / "config.yaml").write_text("model_name: Tiny\nmax_time: 12:30\n")
    (project / "plugins" / "tiny.py").write_text("raise SystemExit('the plugins were loaded')\n")
    status, output = inside("train", "config.yaml")
    assert status == 2
    assert "config.yaml:2: max_time: found '12:30' (a string), expected seconds as a number" in output
    assert not (project / "runs").exists()
