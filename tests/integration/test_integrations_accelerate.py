"""Loops that Accelerate has prepared, steered: every command at the step it says, and nothing else changed."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of the packages that it imports
    accelerate = pytest.importorskip("accelerate", reason="needs: pip install 'aetheria[accelerate]'")

from aetheria import TrainingStopped, Weavelet, controllable
from aetheria.errors import ConfigError, MissingDependencyError
from aetheria.integrations.common import begin
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, command_of
from scripted import journalled, scripted, set_, status_of, weights

STEPS = 8  # an epoch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))
        self.scale = 1.0

    @controllable("scale", get="scale", gt=0.0)
    def set_scale(self, value: float) -> None:
        self.scale = value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * self.scale
        return out


class Loop:
    """A training loop as Accelerate's documents write it."""

    def __init__(self, weavelet: Weavelet | None, accumulate: int = 1, schedule: bool = True) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4 * STEPS, 4, generator=generator)
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
        self.model: Any = Model()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        objects = [self.model, optimizer, loader]
        if schedule:
            objects.append(torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5))
        prepare = self.accelerator.prepare if weavelet is None else self.through(weavelet)
        self.model, self.optimizer, self.loader, *schedulers = prepare(*objects)
        self.schedulers = schedulers
        self.weavelet = weavelet
        self.rates: list[float] = []

    def through(self, weavelet: Weavelet) -> Callable[..., Any]:
        return lambda *objects: weavelet.prepare(self.accelerator, *objects)

    def train(self, epochs: int = 2) -> None:
        torch.manual_seed(7)
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(x) - y).square().mean()
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.rates.append(self.optimizer.param_groups[0]["lr"])
                    self.optimizer.step()
                    for scheduler in self.schedulers:
                        scheduler.step()
                    self.optimizer.zero_grad()
                if self.weavelet is not None and self.accelerator.sync_gradients:
                    self.weavelet.log({"loss": loss})


@pytest.fixture(autouse=True)
def _accelerators_forget() -> Any:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(folder: Path, script: dict[int, list[AnyCommand]], when_paused: Any = (), **options: Any) -> Any:
    weavelet, line = scripted(folder, script, when_paused)
    loop = Loop(weavelet, **options)
    with weavelet:
        loop.train()
    return loop, weavelet, line


def untouched() -> str:
    loop = Loop(None)
    loop.train()
    return weights(loop.model)


def test_a_learning_rate_takes_effect_at_the_step_of_its_outcome_and_the_schedule_goes_on(tmp_path: Path) -> None:
    command = set_(learning_rate=0.005, scale=0.5)
    loop, weavelet, line = train(tmp_path, {3: [command]})
    assert loop.rates[2:8] == pytest.approx([0.02, 0.005, 0.005, 0.005, 0.0025, 0.0025])
    assert loop.model.scale == 0.5
    assert [said["state"] for said in line.outcomes(command)] == ["accepted", "applied"]
    assert (line.outcome(command)["step"], line.outcome(command)["revision"]) == (3, 1)
    assert journalled(weavelet)[command.id].state == "applied"
    assert weavelet.global_step == 2 * STEPS
    assert status_of(weavelet) == "completed"


def test_right_before_the_schedule_falls_it_is_the_next_steps_rate_that_is_set(tmp_path: Path) -> None:
    loop, _, _ = train(tmp_path, {6: [set_(learning_rate=0.004)]})
    assert loop.rates[5:7] == pytest.approx([0.02, 0.004])


def test_micro_batches_do_not_count(tmp_path: Path) -> None:
    command = set_(learning_rate=0.001)
    loop, weavelet, line = train(tmp_path, {2: [command]}, accumulate=3, schedule=False)
    assert len(loop.rates) == weavelet.global_step == 6  # windows of 3, 3 and 2 batches, twice
    assert loop.rates[1:3] == pytest.approx([0.02, 0.001])
    assert line.outcome(command)["step"] == 2
    assert list(line.series("loss")) == [1, 2, 3, 4, 5, 6]


def test_steps_that_the_scaler_skips_do_not_count(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {})
    model = nn.Linear(2, 1)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer: Any
    model, optimizer = weavelet.prepare(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with weavelet:
        for factor in (1.0, float("inf"), 1.0):
            loss = (model(torch.ones(1, 2)) * factor).sum()
            accelerator.scaler.scale(loss).backward()
            optimizer.step()
            assert optimizer.step_was_skipped == (factor == float("inf"))
            optimizer.zero_grad()
        assert weavelet.global_step == 2


def test_paused_it_waits_takes_commands_and_ends_at_the_same_weights(tmp_path: Path) -> None:
    ping = command_of("ping")
    loop, _, line = train(tmp_path, {4: [command_of("pause")]}, when_paused=[ping, command_of("resume")])
    assert line.statuses == ["running", "paused", "running", "ended"]
    assert (line.outcome(ping)["message"], line.outcome(ping)["step"]) == ("paused", 4)
    assert weights(loop.model) == untouched()


def test_a_stop_ends_a_loop_that_does_not_look_with_a_checkpoint(tmp_path: Path) -> None:
    weavelet, line = scripted(tmp_path, {5: [command_of("stop", author="ana", reason="lunch")]})
    loop = Loop(weavelet)
    with pytest.raises(TrainingStopped, match="stopped by ana: lunch"), weavelet:
        loop.train()
    assert (len(loop.rates), weavelet.global_step, status_of(weavelet)) == (5, 5, "stopped")
    assert [path.name for path in (weavelet.folder / "checkpoints").iterdir()] == ["step-00000005"]
    assert line.closed


def test_a_snapshot_is_accelerates_state_of_a_whole_step(tmp_path: Path) -> None:
    command = command_of("snapshot")
    loop, weavelet, line = train(tmp_path, {6: [command]})
    assert weights(loop.model) == untouched()  # it has changed nothing
    path = Path(line.outcome(command)["result"]["path"])
    assert path == weavelet.folder / "checkpoints" / "step-00000006"
    again = Loop(None)
    again.accelerator.load_state(str(path))
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)  # the schedule has fallen at this step
    assert again.schedulers[0].scheduler.last_epoch == 6


def test_watching_changes_nothing_and_the_metrics_are_in_the_run_folder(tmp_path: Path) -> None:
    weavelet = Weavelet(run="watched", hub="off", runs_dir=tmp_path / "runs")
    loop = Loop(weavelet)
    assert weavelet.started
    loop.train()
    weavelet.stop()
    assert weights(loop.model) == untouched()
    curve = RunReader(weavelet.folder / "run.db").metric("loss")
    assert list(curve.steps) == list(range(1, 2 * STEPS + 1))


def test_a_copy_of_the_model_is_not_steered(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {})
    loop = Loop(weavelet)
    with weavelet:
        for each in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
            each(torch.ones(2, 4))
        assert weights(copy.deepcopy(loop.model)) == weights(loop.model)


def test_without_a_model_beside_it_the_optimiser_is_steered_right_after_its_step(tmp_path: Path) -> None:
    weavelet, line = scripted(tmp_path, {2: [command := set_(learning_rate=0.5)]})
    accelerator = accelerate.Accelerator(cpu=True)
    parameter = nn.Parameter(torch.ones(1))
    optimizer: Any = weavelet.prepare(accelerator, torch.optim.SGD([parameter], lr=0.1))
    with weavelet:
        for _ in range(2):
            accelerator.backward(parameter.square().sum())
            optimizer.step()
    assert line.outcome(command)["state"] == "applied"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_knobs_that_come_after_the_start_are_told(tmp_path: Path) -> None:
    weavelet, line = scripted(tmp_path, {})
    with weavelet:
        Loop(weavelet)
        weavelet.control(weavelet, "replica_id")
        told = [said for said in line.told if said.get("kind") == "knobs"][-1]
        assert told["values"].keys() >= {"learning_rate", "scale", "replica_id"}


def test_processes_that_the_weavelet_cannot_find_are_refused(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {})
    with pytest.raises(ConfigError, match="Accelerate trains in 2 processes here, but the Weavelet knows of 1"):
        begin(weavelet, 2, "Accelerate", "cpu")
    assert status_of(weavelet) == "failed"


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate"])
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"aetheria.integrations.{name}", raising=False)
    with pytest.raises(MissingDependencyError, match=f"needs the package '{name}'.*aetheria.{name}."):
        importlib.import_module(f"aetheria.integrations.{name}")


def test_what_is_not_trained_is_only_prepared(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {})
    loader = weavelet.prepare(accelerate.Accelerator(cpu=True), DataLoader(TensorDataset(torch.ones(4))))
    assert len(list(loader)) == 4
    assert not weavelet.started
