"""The Weavelet in a plain loop: what it counts, what can be set, how it waits and ends; with a real sidecar, no hub."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from aetheria.control.journal import read_journal
from aetheria.control.knobs import controllable
from aetheria.control.weavelet import TrainingStopped, Weavelet
from aetheria.errors import AetheriaError, ConfigError
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, Outcome, command_of, encode
from aetheria.runs import RunFolder


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part:
    """Something of the user's that has a knob."""

    def __init__(self) -> None:
        self.rate, self.name, self.colour, self.weird = 0.1, "a", Colour.RED, None

    @controllable("dropout", get="rate", ge=0, lt=1)
    def set_dropout(self, value: float) -> None:
        self.rate = value


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Weavelet]]:
    """Returns a function that makes a Weavelet; whatever was started is stopped in the end."""
    made: list[Weavelet] = []

    def make(**options: Any) -> Weavelet:
        made.append(Weavelet(run="loop", hub="off", runs_dir=tmp_path / "runs", **options))
        return made[-1]

    yield make
    for weavelet in made:
        weavelet.stop()


Begin = Callable[..., Weavelet]


def say(weavelet: Weavelet, *commands: AnyCommand) -> None:
    """Does what the sidecar does with commands that have come."""
    for command in commands:
        assert weavelet._link._region.offer(encode(command))
    weavelet._link._region.announce()


def set_(**values: Any) -> AnyCommand:
    return command_of("set", {"values": values})


def outcome(weavelet: Weavelet, command: AnyCommand) -> Outcome:
    return [
        entry.outcome
        for entry in read_journal(weavelet.folder / "journal.jsonl")
        if entry.outcome.command == command.id
    ][-1]


def optimizer(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=rate)


def test_an_optimisers_steps_are_counted_and_its_rate_can_be_set(begin: Begin) -> None:
    moved = optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(moved, 4, 0.5)
    weavelet = begin(optimizer=moved, scheduler=scheduler).start()
    command = set_(learning_rate=0.4)
    rates = []
    for number in range(8):
        if number == 2:
            say(weavelet, command)
        rates.append(moved.param_groups[0]["lr"])
        moved.step()
        scheduler.step()
    assert weavelet.global_step == 8
    assert rates == pytest.approx([0.1] * 3 + [0.4] + [0.2] * 4)
    assert (outcome(weavelet, command).state, outcome(weavelet, command).step) == ("applied", 3)
    weavelet.stop()
    moved.step()
    assert weavelet.global_step == 8, "stopped it counts no more"


def test_what_a_script_has_becomes_knobs(begin: Begin) -> None:
    part, kinds = Part(), []
    weavelet = begin()
    weavelet.control(part, "name", help="what it is called").control(part, "colour", key="paint")
    weavelet.control(part, "weird", key="odd", type=float | None, ge=0).register(part)

    @weavelet.handler("optimizer_type")
    def swap(kind: Literal["sgd", "adamw"]) -> str:
        kinds.append(kind)
        return f"now {kind}"

    weavelet.start()
    good = set_(name="b", paint="blue", odd=2, dropout=0.5, optimizer_type="adamw")
    bad = set_(name="c", paint="green")
    say(weavelet, good, bad)
    weavelet.step()
    assert (part.name, part.colour, part.weird, part.rate, kinds) == ("b", Colour.BLUE, 2.0, 0.5, ["adamw"])
    assert outcome(weavelet, good).message == "now adamw"
    assert "paint = 'green' is refused" in outcome(weavelet, bad).message
    assert weavelet.get_config_update() == {
        "name": "b", "paint": "blue", "odd": 2.0, "dropout": 0.5, "optimizer_type": "adamw"
    }  # fmt: skip
    assert weavelet.get_config_update() == {}, "told once"
    assert '| `paint` | `"blue"` | one of red, blue |' in weavelet.describe()
    with pytest.raises(ConfigError, match="no attribute 'nothing'"):
        weavelet.control(part, "nothing")


def test_between_steps_nothing_is_changed(begin: Begin) -> None:
    part = Part()
    weavelet = begin().register(part).start()
    say(weavelet, set_(dropout=0.5))
    weavelet.log({"loss": 1.0})
    weavelet.get_config_update()
    assert part.rate == 0.1
    weavelet.step()
    assert part.rate == 0.5


def test_paused_it_waits_and_takes_commands_until_it_is_resumed(begin: Begin) -> None:
    part = Part()
    weavelet = begin().register(part).start()
    change = set_(dropout=0.5)

    def operator() -> None:
        while not weavelet.paused:
            threading.Event().wait(0.005)
        say(weavelet, change, command_of("resume"))

    thread = threading.Thread(target=operator)
    thread.start()
    say(weavelet, command_of("pause"))
    weavelet.step({"loss": 1.0})
    thread.join(30)
    assert not weavelet.paused
    assert (part.rate, outcome(weavelet, change).step) == (0.5, 1)


def test_run_for_pauses_after_so_many_steps(begin: Begin) -> None:
    weavelet = begin().start()
    epochs = command_of("run_for", {"epochs": 1})
    say(weavelet, command_of("run_for", {"steps": 3}), epochs)
    seen = []

    def operator() -> None:
        while not weavelet.paused:
            threading.Event().wait(0.005)
        seen.append(weavelet.global_step)
        say(weavelet, command_of("resume"))

    thread = threading.Thread(target=operator)
    thread.start()
    for _ in range(6):
        weavelet.step()
    thread.join(30)
    assert seen == [4]
    assert "run_for takes steps here" in outcome(weavelet, epochs).message


def test_a_loop_that_asks_ends_by_itself_and_another_is_told_by_raising(begin: Begin) -> None:
    asks = begin().start()
    say(asks, command_of("stop", author="ana", reason="lunch"))
    while not asks.should_stop:
        asks.step()
    asks.stop()
    content = RunFolder.open(asks.folder).read()
    assert (asks.global_step, content["status"], content["status_detail"]) == (1, "stopped", "stopped by ana: lunch")

    with begin() as never_asks:
        say(never_asks, command_of("stop"))
        with pytest.raises(TrainingStopped, match="stopped"):
            never_asks.step()
    assert RunFolder.open(never_asks.folder).read()["status"] == "stopped"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed"), (TrainingStopped, "completed")]
)
def test_however_its_block_ends_the_run_folder_says_so(begin: Begin, error: type[BaseException], status: str) -> None:
    weavelet = begin()
    with pytest.raises(error), weavelet:
        raise error
    assert RunFolder.open(weavelet.folder).read()["status"] == status


def test_metrics_and_notes_are_in_the_run_database_when_it_has_stopped(begin: Begin) -> None:
    weavelet = begin().start()
    for number in range(1, 101):
        weavelet.step({"loss": 1 / number, "tensor": torch.tensor(float(number))})
    weavelet.publish_training_status({"accuracy": 0.5, "phase": "warm"})
    weavelet.note("half way")
    say(weavelet, command_of("note", {"text": "from outside"}))
    weavelet.step()
    weavelet.stop()
    reader = RunReader(weavelet.folder / "run.db")
    series = reader.metric("loss")
    assert list(series.steps) == list(range(1, 101))
    assert list(series.values) == pytest.approx([1 / number for number in range(1, 101)])
    assert list(reader.metric("accuracy").values) == [0.5]
    assert [(note.step, note.text) for note in reader.notes()] == [(100, "half way"), (101, "from outside")]


def test_actions_are_what_a_command_does(begin: Begin) -> None:
    weavelet = begin()

    @weavelet.action("validate")
    def validate() -> dict[str, float]:
        return {"val_loss": 0.25}

    weavelet.start()
    known, unknown = command_of("validate"), command_of("rewind", {"step": 1})
    say(weavelet, known, unknown)
    weavelet.step()
    assert outcome(weavelet, known).result == {"val_loss": 0.25}
    assert "this run cannot rewind" in outcome(weavelet, unknown).message


def test_started_twice_is_an_error_and_stopped_twice_is_not(begin: Begin) -> None:
    weavelet = begin().start()
    with pytest.raises(AetheriaError, match="started already"):
        weavelet.start()
    weavelet.stop()
    weavelet.stop()
    weavelet.step({"loss": 1.0})


def test_nothing_is_drawn_and_nothing_rounded(begin: Begin) -> None:
    """With it and without it: the same weights, bit for bit."""

    def train(weavelet: Weavelet | None) -> bytes:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        moved = torch.optim.AdamW(model.parameters(), lr=0.01)
        if weavelet is not None:
            weavelet.watch(moved).start()
        for _ in range(20):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            if weavelet is not None:
                weavelet.log({"loss": loss})
            moved.step()
            moved.zero_grad()
        return b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())

    assert train(begin()) == train(None)
