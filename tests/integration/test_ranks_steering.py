"""A command takes effect at the same step on every rank, or nowhere; a pause outlasts every time-out."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.ranked import launch, run_ranks, wait_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherModel, Callback, Orchestrator, TrainingConfig
from aetheria.accelerator import DDPAccelerator
from aetheria.accelerator.ranks import Ranks
from aetheria.control.agreement import Agreement
from aetheria.control.desk import Desk
from aetheria.control.journal import Journal, read_journal
from aetheria.control.knobs import Knob, Knobs, controllable
from aetheria.control.line import NoLine
from aetheria.data import LoaderDataModule
from aetheria.orchestrator import continue_run
from aetheria.protocol import AnyCommand, command_of, encode
from aetheria.registry import Registry
from aetheria.runs import RunFolder
from aetheria.snapshot import list_snapshots

PAUSE, TIMEOUT = (
    float(os.environ.get("AETHERIA_RANKED_PAUSE", "4")),
    float(os.environ.get("AETHERIA_RANKED_TIMEOUT", "2")),
)


STEPS = int(os.environ.get("AETHERIA_RANKED_STEPS", "400"))


class Model(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.sharpness = 2.0

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0)
    def set_sharpness(self, value: float) -> None:
        self.sharpness = value
        if value == 3.0 and os.environ.get("RANK") == "1":
            raise RuntimeError("three is not to rank 1's taste")

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.net(batch[0]).abs().pow(self.sharpness).mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Data(LoaderDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        samples = TensorDataset(torch.randn(48, 4, generator=torch.Generator().manual_seed(1)))
        super().__init__(DataLoader(samples, batch_size=batch_size, shuffle=True), DataLoader(samples, batch_size=8))


class ScriptedLine(NoLine):
    """Brings what is put in, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.word = memoryview(bytearray(8)).cast("Q")
        self.waiting: list[bytes] = []
        self.told: list[bytes] = []

    def put(self, *commands: AnyCommand) -> None:
        self.waiting += map(encode, commands)
        self.word[0] += 1

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken

    def tell(self, kind: Any, data: bytes) -> None:
        self.told.append(data)


class Operator(Callback):
    """Sends random commands from rank 0, and makes every rank a straggler now and then."""

    critical = True

    def __init__(self, line: ScriptedLine, seed: int) -> None:
        self.line = line
        self.chance = random.Random(seed)
        self.delays = random.Random(os.getpid())
        self.applied: list[tuple[int, str, str]] = []
        self.sent = 0

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.delays.random() < 0.01:
            time.sleep(self.delays.random() * 0.01)
        if self.context.accelerator.is_main_process and self.chance.random() < 0.05:
            self.line.put(*(self.command() for _ in range(self.chance.choice([1, 1, 3]))))

    def command(self) -> AnyCommand:
        self.sent += 1
        choice = self.chance.randrange(10)
        if choice < 3:
            return command_of("set", {"values": {"learning_rate": round(self.chance.uniform(1e-4, 1e-3), 7)}})
        if choice == 3:  # refused by all; or by one rank alone, when it is carried out
            return command_of("set", {"values": {"sharpness": self.chance.choice([9.0, 3.0])}})
        if choice == 4:
            return command_of("set", {"values": {"sharpness": self.chance.uniform(1.0, 2.0), "log_every": 7}})
        if choice == 5:
            return command_of("note", {"text": "x" * self.chance.choice([3, 900])})
        if choice == 6:
            return command_of("validate", {})
        if choice == 7:
            return command_of("set", {"values": {"frozen": self.chance.choice([[], ["net.0.*"]])}})
        if choice == 8:
            return command_of("health", {"check": "ranks"})
        return command_of("ping", {}, dry_run=self.chance.random() < 0.5)


def steer(runs_dir: str, steps: int, seed: int, accelerator: str = "auto") -> dict[str, Any]:
    Registry.register_model("ranked")(Model)
    Registry.register_data("ranked")(Data)
    torch.manual_seed(0)
    line = ScriptedLine()
    operator = Operator(line, seed)
    config = TrainingConfig(
        max_steps=steps, runs_dir=Path(runs_dir), log_every=50, live="off", model_name="ranked", data_name="ranked",
        batch_size=2, accelerator=accelerator,
    )  # fmt: skip
    run = Orchestrator(Model(), Data(), config, callbacks=[operator], line=line)
    outcomes: list[Any] = []
    healthy: list[bool] = []
    told = run._note_outcome

    def note(command: AnyCommand | None, outcome: Any) -> None:
        outcomes.append((outcome.step, outcome.command, outcome.state, outcome.message))
        if "digests" in outcome.result:
            healthy.append(outcome.result["healthy"])
        told(command, outcome)

    run._note_outcome = note  # type: ignore[method-assign]
    result = run.run()
    return {"outcomes": outcomes, "digest": result.digest, "healthy": healthy, "folder": str(result.folder)}


@pytest.mark.parametrize(("ranks", "accelerator"), [(2, "fsdp"), (3, "auto")])
def test_every_rank_does_the_same_at_the_same_step(tmp_path: Path, ranks: int, accelerator: str) -> None:
    found = run_ranks(ranks, steer, str(tmp_path), STEPS, ranks, accelerator)
    first = found[0]
    assert all(each["digest"] == first["digest"] for each in found)
    assert first["healthy"]
    assert all(first["healthy"])
    final = [outcome for outcome in first["outcomes"] if outcome[2] != "accepted"]
    assert len(final) > STEPS // 60
    for each in found[1:]:
        assert each["outcomes"] == first["outcomes"][: len(each["outcomes"])]
        # What came too late for the last exchange, the first rank refuses by itself.
        rest = first["outcomes"][len(each["outcomes"]) :]
        assert all("has ended" in message for *_, message in rest)
    states = {state for _, _, state, _ in final}
    assert states == {"applied", "rejected", "failed"} | ({"accepted"} & states)
    assert any("rank 1: RuntimeError: three is not" in message for *_, message in final)
    entries = read_journal(Path(first["folder"]) / "journal.jsonl")
    journalled = {(entry.outcome.command, entry.outcome.state, entry.outcome.step) for entry in entries}
    assert {(command, state, step) for step, command, state, _ in final if state == "applied"} <= journalled


# --- pauses and signals ----------------------------------------------------------------------------------------------
class Pauser(Callback):
    """Pauses at a step; sends the rest while the run is paused, after a while."""

    critical = True

    def __init__(self, line: ScriptedLine, seconds: float, at: int = 20) -> None:
        self.line, self.seconds, self.at = line, seconds, at

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.context.accelerator.is_main_process and self.context.global_step == self.at:
            self.line.put(command_of("pause", {}))

    def on_command(self, command: Any) -> None:
        if self.context.accelerator.is_main_process and command.op_name == "pause":

            def later() -> None:
                time.sleep(self.seconds)
                self.line.put(command_of("set", {"values": {"learning_rate": 0.5}}), command_of("note", {"text": "x"}))
                if self.seconds < 1000:
                    self.line.put(command_of("resume", {}))

            threading.Thread(target=later, daemon=True).start()


def pause(runs_dir: str, seconds: float, timeout: float, steps: int = 60) -> dict[str, Any]:
    torch.manual_seed(0)
    line = ScriptedLine()
    config = TrainingConfig(max_steps=steps, runs_dir=Path(runs_dir), live="off")
    accelerator = DDPAccelerator(device="cpu", timeout=timeout)
    run = Orchestrator(Model(), Data(), config, accelerator, [Pauser(line, seconds)], line=line)
    result = run.run()
    return {
        "digest": result.digest,
        "rate": run.optimizer.param_groups[0]["lr"],
        "states": [decode_status(data) for data in line.told],
        "status": result.status,
        "step": result.global_step,
    }


def decode_status(data: bytes) -> Any:
    content = msgspec.json.decode(data)
    return content.get("status") or content.get("state") or content.get("kind")


def test_a_pause_outlasts_the_time_out_of_the_process_group(tmp_path: Path) -> None:
    found = run_ranks(2, pause, str(tmp_path), PAUSE, TIMEOUT)
    assert found[0]["digest"] == found[1]["digest"]
    assert [each["rate"] for each in found] == [0.5, 0.5]
    assert [each["step"] for each in found] == [60, 60]
    assert found[0]["states"].count("paused") == 1


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_parked_rank_ends_all(tmp_path: Path, who: int) -> None:
    ranks = launch(2, pause, str(tmp_path), 1000.0, 30.0, 10_000)
    wait_for(lambda: _paused(tmp_path), "a pause")
    ranks[who].kill(signal.SIGTERM)
    found = [rank.result() for rank in ranks]
    assert {each["status"] for each in found} == {"interrupted"}
    assert found[0]["step"] == found[1]["step"]
    assert found[0]["digest"] == found[1]["digest"]


def _paused(runs_dir: Path) -> bool:
    journals = list(runs_dir.glob("*/journal.jsonl"))
    return bool(journals) and any(entry.outcome.state == "applied" for entry in read_journal(journals[0]))


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_rank_ends_all_at_the_same_step_with_one_snapshot(tmp_path: Path, who: int) -> None:
    ranks = launch(2, steer, str(tmp_path), 1_000_000, 5)
    wait_for(lambda: _paused(tmp_path), "some steps")
    ranks[who].kill(signal.SIGTERM)
    found = [rank.result() for rank in ranks]
    assert found[0]["digest"] == found[1]["digest"]
    (folder,) = tmp_path.iterdir()
    newest = list_snapshots(folder / "snapshots")[-1]
    assert newest.manifest.reason == "signal 15"
    assert newest.manifest.world_size == 2
    assert newest.digest() == found[0]["digest"]
    assert RunFolder(folder).read()["status"] == "interrupted"


# --- replay, and a crash between decision and effect -----------------------------------------------------------------
def killed_in_between(runs_dir: str, seed: int) -> None:
    """Dies, both ranks, after the first journalled change and before it has taken effect."""
    perform = Desk._perform

    def die(desk: Desk, command: Any, boundary: Any, again: bool = False) -> Any:
        if command.op_name == "set" and boundary.step > 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return perform(desk, command, boundary, again)

    Desk._perform = die  # type: ignore[method-assign]
    steer(runs_dir, 100_000, seed)


def go_on(folder: str, steps: int) -> dict[str, Any]:
    Registry.register_model("ranked")(Model)
    Registry.register_data("ranked")(Data)
    result = continue_run(Path(folder), [f"max_steps={steps}"])
    return {"digest": result.digest, "step": result.global_step, "folder": str(result.folder)}


def test_a_crash_between_decision_and_effect_is_made_good(tmp_path: Path) -> None:
    ranks = launch(2, killed_in_between, str(tmp_path), 7)
    for rank in ranks:
        with pytest.raises(ChildProcessError):
            rank.result()
    (folder,) = tmp_path.iterdir()
    entries = read_journal(folder / "journal.jsonl")
    accepted, last = entries[-1].outcome, entries[-1].command
    assert accepted.state == "accepted"
    assert last is not None
    found = run_ranks(2, go_on, str(folder), accepted.step + 50)
    assert found[0]["digest"] == found[1]["digest"]
    after = [entry for entry in read_journal(folder / "journal.jsonl") if entry.outcome.command == last.id]
    assert [entry.outcome.state for entry in after][-1] in ("applied", "failed")
    assert after[-1].outcome.step == accepted.step


def on_a_full_disk(place: str) -> tuple[list[tuple[str, str]], float]:
    ranks = Ranks.join("gloo", 20.0)
    first = ranks.where.rank == 0
    path, filler = Path(place) / "journal.jsonl", Path(place) / "filler"
    journal = Journal(path, copy=None if first else b"")
    values = {"rate": 1.0}
    knob = Knob("rate", float, lambda value: values.update(rate=value), lambda: values["rate"], ge=0)
    desk = Desk("a-run", journal, Knobs([knob]), {}, lambda outcome: None, lambda: str(values), Agreement(ranks).vote)
    if first:
        filler.write_bytes(b"x" * os.statvfs(place).f_bavail * os.statvfs(place).f_bsize)
    wanted, refused = (
        command_of("set", {"values": {"rate": value}}, id=f"{name}-0123456789")
        for value, name in ((0.5, "wanted"), (-1.0, "refused"))
    )
    said = [desk.handle(command, 3) for command in (wanted, refused, refused)]
    if first:
        filler.unlink()
    ranks.barrier()
    said += [desk.handle(command, step) for step, command in enumerate((wanted, wanted, refused), start=4)]
    ranks.leave()
    return [(outcome.state, outcome.message) for outcome in said], values["rate"]


@pytest.mark.parametrize("small_disk", ["8k"], indirect=True)
def test_a_journal_that_cannot_be_written_refuses_on_all_ranks_and_sent_again_it_is_done_on_all(
    small_disk: Path,
) -> None:
    answers = run_ranks(2, on_a_full_disk, str(small_disk))
    (first, rate), (second, other_rate) = answers
    assert rate == other_rate == 0.5
    assert [state for state, _ in first] == ["rejected", "rejected", "rejected", "applied", "applied", "rejected"]
    assert "No space left" in first[0][1]
    assert first == second
    assert [entry.outcome.state for entry in read_journal(small_disk / "journal.jsonl")] == ["accepted", "applied"]
