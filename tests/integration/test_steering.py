"""A steered run: commands take effect at their boundary, once; killed and replayed it ends at the same weights."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aetheria.config import TrainingConfig
from aetheria.control.journal import read_journal
from aetheria.control.knobs import controllable
from aetheria.control.line import NoLine
from aetheria.core import AetherModel, Callback, OptimizerPlan, RunResult, Schedule
from aetheria.data import LoaderDataModule
from aetheria.loom.reader import RunReader
from aetheria.orchestrator import Orchestrator, continue_run
from aetheria.protocol import AnyCommand, Outcome, command_of, encode
from aetheria.registry import Registry
from aetheria.replay import replay_run

LENGTH, EPOCHS = 24, 4  # 6 steps an epoch with batches of 4


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / LENGTH) + torch.randn(4)


class SteeredModel(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.loss_weights = {"small": 0.1}
        self.sharpness = 2.0

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0, help="exponent of the error")
    def set_sharpness(self, value: float) -> None:
        if value == 3.0:
            raise RuntimeError("three is not to my taste")
        self.sharpness = value

    def training_step(self, batch: Tensor) -> dict[str, Any]:
        out = self.net(batch).squeeze(-1)
        error = (out - batch.sum(-1)).abs() ** self.sharpness
        return {"loss": error.mean() + self.loss_weights["small"] * out.square().mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.SGD(
            [{"params": [*self.net[0].parameters()], "name": "first"}, {"params": [*self.net[1:].parameters()]}],
            lr=0.02,
            momentum=0.9,
        )
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.7), "step")])


class SteeredData(LoaderDataModule):
    def __init__(self) -> None:
        super().__init__(DataLoader(Numbers(), batch_size=4, shuffle=True), DataLoader(Numbers(), batch_size=8))


@pytest.fixture(autouse=True)
def _registered() -> None:
    Registry.register_model("steered")(SteeredModel)
    Registry.register_data("steered")(SteeredData)


class ScriptedLine(NoLine):
    """Brings commands when they are put in, and keeps what is told."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = bytearray(8)
        self.word = memoryview(self._memory).cast("Q")
        self.waiting: list[bytes] = []
        self.told: list[tuple[str, bytes]] = []

    def put(self, *commands: AnyCommand | bytes) -> None:
        self.waiting += [command if isinstance(command, bytes) else encode(command) for command in commands]
        self.word[0] += 1

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken

    def tell(self, kind: Any, data: bytes) -> None:
        self.told.append((kind, data))


class Script(Callback):
    """Sends commands after given steps, and dies at another."""

    critical = True

    def __init__(self, line: ScriptedLine, commands: Mapping[int, list[AnyCommand]], die_at: int | None = None) -> None:
        self.line, self.commands, self.die_at = line, dict(commands), die_at
        self.sent: set[int] = set()
        self.seen: list[tuple[int, float]] = []

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        step = self.context.global_step
        self.seen.append((step, self.context.optimizer.param_groups[0]["lr"]))
        if step == self.die_at:
            raise KeyboardInterrupt
        if step in self.commands and step not in self.sent:
            self.sent.add(step)
            self.line.put(*self.commands[step])


def config(folder: Path, **more: Any) -> TrainingConfig:
    options: dict[str, Any] = {"snapshots": {"every_steps": 5, "keep_last": 20}} | more
    return TrainingConfig(
        epochs=EPOCHS,
        runs_dir=folder,
        model_name="steered",
        data_name="steered",
        **options,
    )


def steered(
    folder: Path, commands: Mapping[int, list[AnyCommand]], die_at: int | None = None, **more: Any
) -> tuple[RunResult | Path, ScriptedLine, Script]:
    line = ScriptedLine()
    script = Script(line, commands, die_at)
    settings = config(folder, **more)
    plain = Orchestrator.from_config(settings)
    orchestrator = Orchestrator(plain.model, plain.data, settings, callbacks=[script], line=line)
    try:
        return orchestrator.run(), line, script
    except KeyboardInterrupt:
        return orchestrator.folder, line, script


def set_(reason: str = "", **values: Any) -> AnyCommand:
    return command_of(
        "set", {"values": {key.replace("__", "."): value for key, value in values.items()}}, reason=reason
    )


def outcomes(folder: Path) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for entry in read_journal(folder / "journal.jsonl"):
        found.setdefault(entry.outcome.command, []).append(entry.outcome)
    return found


def test_a_command_takes_effect_between_two_steps_and_is_journalled_with_its_step(tmp_path: Path) -> None:
    command = set_("plateau", learning_rate=0.005)
    result, _line, script = steered(tmp_path, {3: [command]})
    assert isinstance(result, RunResult)
    assert [rate for step, rate in script.seen if step in (3, 4)] == pytest.approx([0.02, 0.005])
    accepted, applied = outcomes(result.folder)[command.id]
    assert (accepted.state, applied.state, applied.step, applied.revision) == ("accepted", "applied", 3, 1)
    assert applied.result == {"before": {"learning_rate": 0.02}, "after": {"learning_rate": 0.005}}
    assert applied.digest
    assert any("0.02 -> 0.005 (plateau)" in event.message for event in RunReader(result.folder / "run.db").events())


def test_the_schedule_goes_on_in_proportion(tmp_path: Path) -> None:
    _, line, script = steered(tmp_path, {3: [set_(learning_rate=0.01)]})
    rates = dict(script.seen)
    moved = [json.loads(data) for kind, data in line.told if kind == "status" and b'"kind":"values"' in data]
    assert moved[0]["values"]["learning_rate"] == pytest.approx(0.01 * 0.7)  # told, though nobody has set it
    assert rates[8] == pytest.approx(0.01 * 0.7)
    assert rates[15] == pytest.approx(0.01 * 0.49)


def changes(generator: random.Random) -> dict[int, list[AnyCommand]]:
    """Returns a script: a few commands of all kinds at random steps."""
    kinds: list[Any] = [
        lambda: set_(learning_rate=generator.choice([0.001, 0.01, 0.05])),
        lambda: set_(learning_rate__first=0.03, weight_decay=0.01),
        lambda: set_(momentum=0.5, max_grad_norm=1.0),
        lambda: set_(grad_accumulation_steps=generator.choice([1, 2, 3])),
        lambda: set_(sharpness=generator.choice([1.5, 1.0, 3.0])),
        lambda: set_(loss_weights__small=0.5),
        lambda: set_(frozen=generator.choice([["net.0.*"], []])),
        lambda: set_(optimizer={"name": "adamw"}),
        lambda: set_(optimizer={"name": "sgd", "params": {"momentum": 0.9}}),
        lambda: set_(scheduler="none"),
        lambda: set_(scheduler={"name": "exponential", "params": {"gamma": 0.9}, "interval": "step"}),
        lambda: set_(unknown=1),
        lambda: set_(learning_rate=-1.0),
        lambda: command_of("validate"),
        lambda: command_of("snapshot", {"name": "mine"}),
        lambda: command_of("note", {"text": "hello"}),
        lambda: command_of("health", {"check": "numerics"}),
        lambda: command_of("ping"),
        lambda: command_of("rewind", {"step": generator.choice([5, 10])}),
    ]
    script: dict[int, list[AnyCommand]] = {}
    for step in sorted(generator.sample(range(1, 22), generator.randint(2, 6))):
        script[step] = [generator.choice(kinds)() for _ in range(generator.randint(1, 2))]
    return script


@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_step_and_continued_and_replayed_it_ends_at_the_same_weights(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    script = changes(generator)
    whole, _, _ = steered(tmp_path / "whole", script)
    assert isinstance(whole, RunResult)

    replayed = replay_run(whole.folder)
    assert replayed.equal, (seed, replayed.differs_at, outcomes(whole.folder))
    assert replayed.result.digest == whole.digest

    die_at = generator.randint(2, whole.global_step - 1)
    folder, _, _ = steered(tmp_path / "killed", script, die_at)
    if isinstance(folder, RunResult):
        return  # rewound, or with longer windows, it never saw that step
    line = ScriptedLine()
    sent = {step: commands for step, commands in script.items() if step >= die_at}
    settings = TrainingConfig.from_resolved(config(tmp_path / "killed").resolved(), None)
    plain = Orchestrator.from_config(settings)
    late = Script(line, sent)
    done = {command for command, states in outcomes(folder).items() if states[-1].is_final}
    for step, commands in list(late.commands.items()):
        late.commands[step] = [command for command in commands if command.id not in done]
    result = Orchestrator(plain.model, plain.data, settings, callbacks=[late], line=line).run(resume_from=folder)
    assert result.digest == whole.digest, (seed, die_at, script)
    assert result.global_step == whole.global_step
    for command, states in outcomes(folder).items():
        assert sum(outcome.is_final for outcome in states) == 1, command


def test_rewound_it_goes_on_from_there_and_nothing_is_lost(tmp_path: Path) -> None:
    rewind = command_of("rewind", {"step": 5}, author="ana", reason="it diverged")
    script = {7: [set_(max_grad_norm=0.5)], 9: [set_(learning_rate=0.5)], 12: [rewind]}
    result, _, _ = steered(tmp_path, script)
    untouched, _, _ = steered(tmp_path / "untouched", {})
    assert isinstance(result, RunResult)
    assert isinstance(untouched, RunResult)
    assert result.digest == untouched.digest  # everything that was set came after step 5
    (applied,) = [outcome for outcome in outcomes(result.folder)[rewind.id] if outcome.state == "applied"]
    assert (applied.step, applied.result) == (5, {"from": 12})
    assert [path.name for path in sorted((result.folder / "snapshots" / "undone-by-revision-3").iterdir())] == [
        "step-00000006",
        "step-00000010",
    ]
    assert replay_run(result.folder).equal


def test_paused_it_waits_and_still_takes_commands(tmp_path: Path) -> None:
    line = ScriptedLine()
    settings = config(tmp_path)
    plain = Orchestrator.from_config(settings)
    paused = threading.Event()
    ping = command_of("ping")

    class Watch(Callback):
        def on_command(self, command: AnyCommand) -> None:
            if command.op_name == "pause":
                paused.set()

    def operator() -> None:
        assert paused.wait(30)
        line.put(ping, set_(learning_rate=0.003), command_of("resume"))

    thread = threading.Thread(target=operator)
    thread.start()
    script = Script(line, {4: [command_of("pause")]})
    result = Orchestrator(plain.model, plain.data, settings, callbacks=[script, Watch()], line=line).run()
    thread.join()
    assert dict(script.seen)[5] == pytest.approx(0.003)
    assert outcomes(result.folder)[ping.id][-1].message == "paused"


def test_run_for_pauses_at_the_step_it_says(tmp_path: Path) -> None:
    line = ScriptedLine()
    settings = config(tmp_path)
    plain = Orchestrator.from_config(settings)

    class Resumes(Callback):
        def on_event(self, event: Any) -> None:
            if event.kind == "command" and event.message.startswith("run_for"):
                threading.Thread(target=self.wait_and_resume).start()

        def wait_and_resume(self) -> None:
            while not any(b'"paused"' in data for kind, data in list(line.told) if kind == "status"):
                threading.Event().wait(0.01)
            assert self.context.global_step == 6
            line.put(command_of("resume"))

    script = Script(line, {2: [command_of("run_for", {"steps": 4})]})
    result = Orchestrator(plain.model, plain.data, settings, callbacks=[script, Resumes()], line=line).run()
    assert result.status == "completed"


def test_a_stop_ends_the_run_with_a_snapshot_and_can_be_continued(tmp_path: Path) -> None:
    result, _, _ = steered(tmp_path, {4: [command_of("stop", author="ana", reason="lunch")]})
    assert isinstance(result, RunResult)
    assert (result.status, result.global_step, result.reason) == ("stopped", 4, "stopped by ana: lunch")
    continued = continue_run(result.folder)
    untouched, _, _ = steered(tmp_path / "untouched", {})
    assert isinstance(untouched, RunResult)
    assert continued.digest == untouched.digest


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (set_(learning_rat=0.1), "there is no knob 'learning_rat'. Did you mean 'learning_rate'"),
        (set_(learning_rate="fast"), "learning_rate = 'fast' is refused: Input should be a valid number"),
        (set_(learning_rate=float("nan")), "learning_rate"),
        (set_(sharpness=9.0), "sharpness = 9.0 is refused: Input should be less than or equal to 4"),
        (set_(grad_accumulation_steps=1.5), "grad_accumulation_steps = 1.5 is refused"),
        (set_(learning_rate=0.1, momentum=2.0), "momentum = 2.0 is refused"),
        (set_(frozen=["nowhere.*"]), "'nowhere.*' is the name of no parameter"),
        (set_(optimizer={"name": "sgdd"}), "sgdd"),
        (set_(sharpness=3.0), "RuntimeError: three is not to my taste"),
        (set_(epochs=None), "max_time must stay"),
        (command_of("rewind", {"step": 3}), "there is no snapshot of step 3"),
        (command_of("test"), "this run has no test data"),
        (command_of("ping", run="another-run"), "the command is for another-run"),
        (command_of("ping", expect_revision=7), "the run is at revision 0, the command expects 7"),
        (command_of("ping", not_after_step=1), "was to take effect by step 1; this is step 2"),
        (b'{"op": "set", "id": "0123456789"}', "required field `args`"),
        (b'{"op": "explode", "id": "0123456789"}', "explode"),
        (b'{"op": "note", "id": "0123456789", "args": {"text": "' + b"x" * 70_000 + b'"}}', "at most 65,536"),
        (b"not json", "this is not a command of version 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else (value.op_name if not isinstance(value, bytes) else "bytes"),
)
def test_what_is_refused_changes_nothing_and_says_why(
    tmp_path: Path, command: AnyCommand | bytes, message: str
) -> None:
    result, line, _ = steered(tmp_path, {2: [command]})  # type: ignore[list-item]
    untouched, _, _ = steered(tmp_path / "untouched", {})
    assert isinstance(result, RunResult)
    assert isinstance(untouched, RunResult)
    assert result.digest == untouched.digest
    answers = [data.decode() for kind, data in line.told if kind == "ack"]
    assert any(message in answer.replace('\\"', '"') for answer in answers), answers


def test_the_same_id_twice_has_one_effect(tmp_path: Path) -> None:
    command = set_(learning_rate=0.004)
    result, line, _ = steered(tmp_path, {2: [command, command], 5: [command]})
    assert isinstance(result, RunResult)
    assert len(outcomes(result.folder)[command.id]) == 2
    assert sum(command.id.encode() in data for kind, data in line.told if kind == "ack") == 4


def test_a_dry_run_is_checked_and_changes_nothing(tmp_path: Path) -> None:
    good = command_of("set", {"values": {"learning_rate": 1.0}}, dry_run=True)
    bad = command_of("set", {"values": {"learning_rate": -1.0}}, dry_run=True)
    result, line, script = steered(tmp_path, {2: [good, bad]})
    assert isinstance(result, RunResult)
    assert dict(script.seen)[3] == pytest.approx(0.02)
    assert not read_journal(result.folder / "journal.jsonl")
    answers = [data.decode() for kind, data in line.told if kind == "ack"]
    assert any("dry run" in answer for answer in answers)
    assert any("rejected" in answer for answer in answers)


def test_what_if_a_command_had_not_been_given(tmp_path: Path) -> None:
    command = set_(learning_rate=0.05)
    result, _, _ = steered(tmp_path, {6: [command]})
    untouched, _, _ = steered(tmp_path / "untouched", {})
    assert isinstance(result, RunResult)
    assert isinstance(untouched, RunResult)
    replayed = replay_run(result.folder, without=[command.id[:8]])
    assert not replayed.equal
    assert replayed.result.digest == untouched.digest
    assert replay_run(result.folder, until=9).equal
