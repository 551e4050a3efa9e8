"""A steered run from inside: what commands leave behind when they fail, are interrupted, or come while it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aetheria.config import TrainingConfig
from aetheria.control.journal import read_journal
from aetheria.control.knobs import controllable
from aetheria.control.line import NoLine
from aetheria.core import AetherModel, Callback, OptimizerPlan, RunResult, Schedule
from aetheria.data import LoaderDataModule
from aetheria.engine.fingerprint import fingerprint
from aetheria.engine.steering import describe
from aetheria.orchestrator import Orchestrator
from aetheria.protocol import AnyCommand, Outcome, command_of, encode
from aetheria.runs import RunFolder
from aetheria.snapshot.format import model_tensors


class Small(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1))
        self.odd = 1

    @controllable("odd", get="odd")
    def set_odd(self, value: int) -> None:
        if value % 2 == 0:
            raise RuntimeError("that is even")
        self.odd = value

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(batch).squeeze(-1) - batch.sum(-1)).square().mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93), "step")])


class Said(NoLine):
    """A line into which a test speaks after given steps."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = bytearray(8)
        self.word = memoryview(self._memory).cast("Q")
        self.waiting: list[bytes] = []
        self.outcomes: list[Outcome] = []
        self.statuses: list[str] = []

    def put(self, *commands: AnyCommand) -> None:
        self.waiting += map(encode, commands)
        self.word[0] += 1

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken

    def tell(self, kind: Any, data: bytes) -> None:
        import msgspec

        if kind == "ack":
            self.outcomes.append(msgspec.json.decode(data, type=Outcome))
        elif kind == "status":
            self.statuses.append(msgspec.json.decode(data).get("status", ""))


class Script(Callback):
    critical = True

    def __init__(self, line: Said, commands: Mapping[int, list[AnyCommand]]) -> None:
        self.line, self.commands = line, dict(commands)

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        self.line.put(*self.commands.pop(self.context.global_step, []))


def train(
    folder: Path,
    commands: Mapping[int, list[AnyCommand]] | None = None,
    *callbacks: Callback,
    resume: Path | None = None,
    **options: Any,
) -> tuple[RunResult, Said, Orchestrator]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, generator=generator) for _ in range(6)]
    config = TrainingConfig(
        **{"epochs": 3, "runs_dir": folder, "snapshots": {"every_steps": 4, "keep_last": 9}} | options
    )
    line = Said()
    run = Orchestrator(
        Small(), LoaderDataModule(batches), config, callbacks=[Script(line, commands or {}), *callbacks], line=line
    )
    return run.run(resume), line, run


def set_(**values: Any) -> AnyCommand:
    return command_of("set", {"values": {key.replace("__", "."): value for key, value in values.items()}})


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.001},
        {"momentum": 0.1, "weight_decay": 0.1},
        {"optimizer": {"name": "adamw"}},
        {"scheduler": {"name": "onecycle", "params": {"max_lr": 1.0, "total_steps": 30}, "interval": "step"}},
        {"scheduler": "none", "learning_rate": 0.5},
        {"frozen": ["net.0.*"]},
        {"max_grad_norm": 0.01, "grad_accumulation_steps": 3},
        {"optimizer": {"name": "adamw"}, "scheduler": {"name": "exponential", "params": {"gamma": 0.1}}},
    ],
    ids="+".join,
)
def test_a_set_that_fails_leaves_the_run_bit_for_bit_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    result, line, run = train(tmp_path / "failed", {5: [set_(**values, odd=2)]})
    untouched, _, _ = train(tmp_path / "untouched")
    assert [outcome.state for outcome in line.outcomes] == ["accepted", "failed"], line.outcomes
    assert "RuntimeError: that is even" in line.outcomes[-1].message
    assert "could not be put back" not in line.outcomes[-1].message
    assert result.digest == untouched.digest
    assert run._steering.knobs.touched() == {}


@pytest.mark.parametrize("turned", [False, True])
def test_knobs_that_exclude_one_another_can_change_places_and_are_put_back(tmp_path: Path, turned: bool) -> None:
    values: dict[str, Any] = {"max_grad_value": 0.1, "max_grad_norm": None, "epochs": None, "max_steps": 14}
    there = set_(**dict(reversed(values.items())) if turned else values)
    rewind = command_of("rewind", {"step": 4})
    untouched, _, _ = train(tmp_path / "untouched", max_grad_norm=0.5)
    result, line, run = train(tmp_path / "steered", {6: [there], 9: [rewind]}, max_grad_norm=0.5)
    assert [outcome.state for outcome in line.outcomes if outcome.is_final] == ["applied", "applied"], line.outcomes
    assert (run.config.max_grad_norm, run.config.max_grad_value) == (0.5, None)
    assert (run.config.epochs, run.config.max_steps) == (3, None)
    assert result.digest == untouched.digest


def test_a_rewind_that_was_interrupted_and_is_done_again_finds_its_folder_in_use(tmp_path: Path) -> None:
    rewind = command_of("rewind", {"step": 4})
    untouched, _, _ = train(tmp_path / "untouched")

    class Leftovers(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == 10:
                left = self.context.folder / "snapshots" / "undone-by-revision-1" / "step-00000008"
                left.mkdir(parents=True, exist_ok=True)
                (left / "manifest.json").write_text("{}")

    result, line, _ = train(tmp_path / "steered", {11: [rewind]}, Leftovers())
    assert line.outcomes[-1].state == "applied", line.outcomes
    assert result.digest == untouched.digest


def test_a_rewind_that_fails_half_way_ends_the_run_which_can_be_continued(tmp_path: Path) -> None:
    class InTheWay(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == 10:
                (self.context.folder / "snapshots" / "undone-by-revision-1").touch()

    untouched, _, _ = train(tmp_path / "untouched")
    result, line, _ = train(tmp_path / "steered", {11: [command_of("rewind", {"step": 4})]}, InTheWay())
    assert line.outcomes[-1].state == "failed"
    assert (result.status, result.reason) == (
        "stopped",
        "rewinding to step 4 failed half-way; continue the run from its newest snapshot",
    )
    continued, _, _ = train(tmp_path / "steered", resume=result.folder)
    assert continued.digest == untouched.digest


def test_a_stop_ends_a_pause(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_command(self, command: AnyCommand) -> None:
            if command.op_name == "pause":
                line = self.context._line  # type: ignore[attr-defined]
                threading.Timer(0.05, line.put, [command_of("stop")]).start()

    result, line, _ = train(tmp_path, {4: [command_of("pause")]}, Stops())
    assert (result.status, result.global_step) == ("stopped", 4)
    assert line.statuses.index("paused") < len(line.statuses) - 1
    assert line.statuses[-1] == "" or "ended" in line.statuses


def test_without_a_snapshot_if_so_commanded(tmp_path: Path) -> None:
    result, _, _ = train(tmp_path, {6: [command_of("stop", {"snapshot": False})]})
    assert sorted(path.name for path in (result.folder / "snapshots").iterdir()) == ["step-00000004"]


def test_who_goes_on_after_a_stop_gets_past_it(tmp_path: Path) -> None:
    class Breaks(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == 7:
                raise ValueError("stumbled")

    stopped, _, _ = train(tmp_path, {6: [command_of("stop", {"snapshot": False})]})
    assert (stopped.status, stopped.global_step) == ("stopped", 6)
    with pytest.raises(ValueError, match="stumbled"):
        train(tmp_path, None, Breaks(), resume=stopped.folder)
    finished, _, _ = train(tmp_path, resume=stopped.folder)  # from step 4, before the stop, once more
    assert (finished.status, finished.global_step) == ("completed", 18)
    assert finished.digest == train(tmp_path / "untouched")[0].digest


def test_a_stop_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    stopped, _, _ = train(tmp_path, {6: [command_of("stop", {"snapshot": False})]})
    RunFolder(stopped.folder).update(status="running")  # as if it had been killed before it had ended
    again, _, _ = train(tmp_path, resume=stopped.folder)
    assert (again.status, again.global_step) == ("stopped", 6)


def test_commands_that_come_together_are_done_in_their_order(tmp_path: Path) -> None:
    commands = [set_(learning_rate=rate / 1000) for rate in range(1, 101)]
    result, line, _ = train(tmp_path, {3: commands})
    finals = [outcome for outcome in line.outcomes if outcome.is_final]
    assert [outcome.command for outcome in finals] == [command.id for command in commands]
    assert [outcome.revision for outcome in finals] == list(range(1, 101))
    assert {outcome.step for outcome in finals} == {3}
    assert len(read_journal(result.folder / "journal.jsonl")) == 200


def test_what_arrives_after_the_last_step_is_refused_with_a_word(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_end(self) -> None:
            self.context._line.put(command_of("ping"))  # type: ignore[attr-defined]

    _, line, _ = train(tmp_path, {}, Late())
    assert [outcome.message for outcome in line.outcomes] == ["the run has ended; it takes no more commands."]


# --- small parts -----------------------------------------------------------------------------------------------------
def changed(change: Callable[[Small], object]) -> str:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        change(model)
    return fingerprint(model_tensors(model)[0])


def test_a_fingerprint_sees_every_bit_and_every_place() -> None:
    def swap(model: Small) -> None:
        weight = model.net[0].weight.view(-1)
        weight[[0, 1]] = weight[[1, 0]]

    def last_bit(model: Small) -> None:
        model.net[0].weight.view(torch.int32)[0, 0] ^= 1

    same = changed(lambda model: None)
    assert same == changed(lambda model: None)
    different = [changed(swap), changed(last_bit), changed(lambda model: model.net[3].bias.neg_())]
    assert len({same, *different}) == 4


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 250, 251, 252, 1000])
def test_any_kind_and_size_of_tensor_has_a_fingerprint(kind: torch.dtype, size: int) -> None:
    def of(value: int) -> str:
        model = Small()
        content = torch.zeros(size)
        if size:
            content[-1] = value
        model.net = nn.Sequential()
        model.register_buffer("content", content.to(kind))
        return fingerprint(model_tensors(model)[0])

    assert of(0) == of(0)
    assert (of(0) != of(1)) == (size > 0)


def test_a_model_without_weights_has_none() -> None:
    model = Small()
    model.net = nn.Sequential()
    assert fingerprint(model_tensors(model)[0]) == ""


@pytest.mark.parametrize(
    ("command", "outcome", "sentence"),
    [
        (
            command_of("set", {"values": {"a": 2}}, author="ana", reason="why not"),
            {"state": "applied", "result": {"before": {"a": 1}, "after": {"a": 2}}},
            "a 1 -> 2 by ana (why not)",
        ),
        (set_(a=2), {"state": "rejected", "message": "no such knob"}, "a = 2: rejected, no such knob"),
        (command_of("pause"), {"state": "applied"}, "pause"),
    ],
)
def test_described_a_command_is_one_sentence(command: AnyCommand, outcome: dict[str, Any], sentence: str) -> None:
    assert describe(command, Outcome(command=command.id, **outcome)) == sentence
