"""Transformers' own Trainer, steered: every command at the step it says, and nothing changed where there is none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of the packages that it imports
    transformers = pytest.importorskip("transformers", reason="needs: pip install 'aetheria[transformers]'")
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'aetheria[transformers]'")
    from transformers import Trainer, TrainingArguments

from aetheria import controllable
from aetheria.errors import ConfigError
from aetheria.integrations.transformers import WeaveletTrainerCallback, attach_transformers
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, command_of
from scripted import journalled, scripted, set_, status_of, weights

STEPS = 8  # an epoch


class Numbers(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.full((4,), index / 32.0)
        return {"x": x, "labels": x.sum(-1, keepdim=True)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))
        self.sharpness = 2.0

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0)
    def set_sharpness(self, value: float) -> None:
        self.sharpness = value

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": ((out - labels).abs() ** self.sharpness).mean(), "logits": out}


class Rates(transformers.TrainerCallback):  # type: ignore[misc]
    """Remembers the learning rate with which each step is taken."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.evaluated_at: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.rates[state.global_step + 1] = parts["optimizer"].param_groups[0]["lr"]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated_at.append(state.global_step)


def trainer(folder: Path, *callbacks: Any, eval_dataset: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    arguments = TrainingArguments(**settings | options)
    return Trainer(
        Model(), arguments, train_dataset=Numbers(), eval_dataset=eval_dataset, callbacks=[*callbacks, Rates()]
    )


def rates(training: Any) -> Rates:
    return next(callback for callback in training.callback_handler.callbacks if isinstance(callback, Rates))


def train(folder: Path, script: dict[int, list[AnyCommand]], when_paused: Any = (), **options: Any) -> Any:
    weavelet, line = scripted(folder, script, when_paused)
    resume = options.pop("resume", None)
    training = trainer(folder, WeaveletTrainerCallback(weavelet), **options)
    training.train(resume_from_checkpoint=resume)
    return training, weavelet, line


def untouched(folder: Path) -> Any:
    training = trainer(folder)
    training.train()
    return training.model


def test_a_learning_rate_takes_effect_at_the_step_of_its_outcome_and_the_schedule_goes_on(tmp_path: Path) -> None:
    command = set_(learning_rate=0.002)
    training, weavelet, line = train(tmp_path, {4: [command]})
    seen = rates(training).rates
    assert seen[4] == pytest.approx(0.02 * 13 / 16)
    assert seen[5] == pytest.approx(0.002)
    assert seen[11] == pytest.approx(0.001)  # half of the way that was left
    assert [said["state"] for said in line.outcomes(command)] == ["accepted", "applied"]
    assert (line.outcome(command)["step"], line.outcome(command)["revision"]) == (4, 1)
    assert journalled(weavelet)[command.id].state == "applied"
    assert line.series("learning_rate")[6] == pytest.approx(seen[6], rel=0.2)
    assert status_of(weavelet) == "completed"
    assert line.closed


def test_with_accumulated_batches_a_step_is_a_window(tmp_path: Path) -> None:
    command = set_(learning_rate=0.001)
    training, _, line = train(tmp_path, {2: [command]}, gradient_accumulation_steps=4)
    assert sorted(rates(training).rates) == [1, 2, 3, 4]
    assert rates(training).rates[3] == pytest.approx(0.001)
    assert line.outcome(command)["step"] == 2


def test_paused_it_waits_takes_commands_and_goes_on(tmp_path: Path) -> None:
    ping, change = command_of("ping"), set_(sharpness=1.5, weight_decay=0.01, max_grad_norm=0.1)
    training, _, line = train(tmp_path, {4: [command_of("pause")]}, when_paused=[ping, change, command_of("resume")])
    assert line.statuses == ["running", "paused", "running", "ended"]
    assert (line.outcome(ping)["message"], line.outcome(ping)["step"]) == ("paused", 4)
    assert (training.model.sharpness, training.args.max_grad_norm) == (1.5, 0.1)
    assert {group["weight_decay"] for group in training.optimizer.param_groups} == {0.01}
    assert training.state.global_step == 2 * STEPS


def test_a_stop_ends_it_at_its_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    training, weavelet, line = train(tmp_path, {5: [command_of("stop", author="ana")]})
    assert training.state.global_step == 5
    assert status_of(weavelet) == "stopped"
    assert (tmp_path / "output" / "checkpoint-5" / "trainer_state.json").exists()
    assert any(said.get("kind") == "note" and "checkpoint-5" in said["message"] for said in line.told)


def test_a_snapshot_is_the_trainers_checkpoint_and_continues_to_the_same_weights(tmp_path: Path) -> None:
    command = command_of("snapshot")
    training, _, line = train(tmp_path, {6: [command]})
    whole = weights(training.model)
    assert whole == weights(untouched(tmp_path))  # it has changed nothing
    path = Path(line.outcome(command)["result"]["path"])
    assert path == tmp_path / "output" / "checkpoint-6"
    assert json.loads((path / "trainer_state.json").read_text())["global_step"] == 6
    training, _, line = train(tmp_path, {}, resume=str(path))
    assert weights(training.model) == whole
    assert [said["step"] for said in line.told if said.get("status") == "running"] == [6]
    assert sorted(rates(training).rates) == list(range(7, 2 * STEPS + 1))


def test_it_validates_before_the_next_step(tmp_path: Path) -> None:
    command = command_of("validate")
    weavelet, line = scripted(tmp_path, {3: [command]})
    training = trainer(tmp_path, eval_dataset=Numbers())
    attach_transformers(training, weavelet=weavelet)
    training.train()
    assert line.outcome(command)["state"] == "applied"
    assert rates(training).evaluated_at == [3]
    assert list(line.series("eval_loss")) == [3]


def test_where_it_cannot_validate_it_says_so_and_goes_on(tmp_path: Path) -> None:
    command = command_of("validate")
    training, _, line = train(tmp_path, {3: [command]})
    assert line.outcome(command)["state"] == "rejected"
    assert "eval_dataset" in line.outcome(command)["message"]
    assert training.state.global_step == 2 * STEPS
    known, _, line = train(
        tmp_path, {3: [again := command_of("validate")]}, eval_dataset=Numbers(), eval_strategy="epoch"
    )
    assert line.outcome(again)["state"] == "applied"
    assert rates(known).evaluated_at == [3, STEPS, 2 * STEPS]


def test_watching_changes_nothing_and_the_metrics_are_in_the_run_folder(tmp_path: Path) -> None:
    callback = WeaveletTrainerCallback(run="watched", hub="off", runs_dir=tmp_path / "runs")
    training = trainer(tmp_path, callback)
    training.train()
    assert weights(training.model) == weights(untouched(tmp_path))
    assert callback.weavelet is not None
    curve = RunReader(callback.weavelet.folder / "run.db").metric("loss")
    assert list(curve.steps) == list(range(1, 2 * STEPS + 1))
    assert list(curve.values) == [entry["loss"] for entry in training.state.log_history if "loss" in entry]


def test_what_is_given_wrongly_is_said(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {})
    with pytest.raises(ConfigError, match="give them to the Weavelet"):
        WeaveletTrainerCallback(weavelet, hub="off")
    training = trainer(tmp_path)
    attach_transformers(training, weavelet=weavelet)
    with pytest.raises(ConfigError, match="one is enough"):
        attach_transformers(training)
    training.train()
    with pytest.raises(ConfigError, match="good for one training"):
        training.train()


def test_a_training_that_raised_is_said_to_have_failed_when_the_next_begins(tmp_path: Path) -> None:
    callback = WeaveletTrainerCallback(run="failing", hub="off", runs_dir=tmp_path / "runs")
    training = trainer(tmp_path, callback, num_train_epochs=1)
    good, training.model.net = training.model.net, None
    with pytest.raises(TypeError):
        training.train()
    failed = callback.weavelet
    assert failed is not None
    training.model.net = good
    training.train()
    assert callback.weavelet is not None
    assert [status_of(failed), status_of(callback.weavelet)] == ["failed", "completed"]
