"""Lightning's own Trainer, steered: every command at the step it says, and nothing changed where there is none."""

from __future__ import annotations

import copy
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's, about the packages that it imports
    lightning = pytest.importorskip("lightning.pytorch", reason="needs: pip install 'aetheria[lightning]'")

from aetheria import controllable, weavelet_handler
from aetheria.errors import AetheriaError, ConfigError
from aetheria.integrations.lightning import (
    EnhancedWeaveletLightningModule,
    WeaveletCallback,
    WeaveletLightningModule,
    attach_lightning,
)
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, command_of
from scripted import journalled, scripted, set_, status_of, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),  # of torch, to Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

STEPS = 8  # an epoch


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))
        self.sharpness = 2.0
        self.rates: dict[int, float] = {}  # with which each step was taken
        self.validated_at: list[int] = []

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0)
    def set_sharpness(self, value: float) -> None:
        """Exponent of the error."""
        self.sharpness = value

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        x, y = batch
        loss = ((self.net(x) - y).abs() ** self.sharpness).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean())

    def on_validation_start(self) -> None:
        self.validated_at.append(self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates[self.trainer.global_step + 1] = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(lightning.LightningDataModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4 * STEPS, 4, generator=generator)
        self.numbers = TensorDataset(x, x.sum(1, keepdim=True))
        self.noise = 0.0

    @weavelet_handler("noise", get="noise", ge=0.0)
    def set_noise(self, value: float) -> None:
        self.noise = value

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.numbers, batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.numbers, batch_size=8)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "enable_checkpointing": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, callbacks=[*callbacks], **silent | settings | options)


def fit(folder: Path, script: dict[int, list[AnyCommand]], when_paused: Any = (), **options: Any) -> Any:
    weavelet, line = scripted(folder, script, when_paused)
    model = options.pop("model", None) or Model()
    data = options.pop("data", None) or Data()
    ckpt_path = options.pop("ckpt_path", None)
    training = trainer(folder, WeaveletCallback(weavelet), **options)
    torch.manual_seed(7)
    training.fit(model, data, ckpt_path=ckpt_path, weights_only=False)
    return model, weavelet, line, training


def untouched(folder: Path, **options: Any) -> Any:
    model = Model()
    torch.manual_seed(7)
    trainer(folder, **options).fit(model, Data())
    return model


def test_a_learning_rate_takes_effect_at_the_step_of_its_outcome_and_the_schedule_goes_on(tmp_path: Path) -> None:
    command = set_(learning_rate=0.005)
    model, weavelet, line, _ = fit(tmp_path, {3: [command]})
    assert [model.rates[step] for step in (3, 4, 6, 7)] == pytest.approx([0.02, 0.005, 0.005, 0.0025])
    assert [said["state"] for said in line.outcomes(command)] == ["accepted", "applied"]
    assert (line.outcome(command)["step"], line.outcome(command)["revision"]) == (3, 1)
    assert line.outcome(command)["result"] == {"before": {"learning_rate": 0.02}, "after": {"learning_rate": 0.005}}
    assert journalled(weavelet)[command.id].state == "applied"
    assert status_of(weavelet) == "completed"
    assert line.closed


def test_with_accumulated_batches_a_command_waits_for_the_end_of_the_window(tmp_path: Path) -> None:
    command = set_(learning_rate=0.001)
    model, _, line, _ = fit(tmp_path, {2: [command]}, accumulate_grad_batches=3)
    assert sorted(model.rates) == [1, 2, 3, 4, 5, 6]  # windows of 3, 3 and 2 batches, twice
    assert [model.rates[step] for step in (2, 3)] == pytest.approx([0.02, 0.001])
    assert line.outcome(command)["step"] == 2
    assert line.series("loss")[1] == pytest.approx(line.series("train_loss")[1], rel=3)  # not a third of it
    assert sorted(line.series("loss")) == [1, 2, 3, 4, 5, 6]


def test_paused_it_waits_takes_commands_and_goes_on(tmp_path: Path) -> None:
    ping, change = command_of("ping"), set_(sharpness=1.5, noise=0.5, weight_decay=0.01, max_grad_norm=1.0)
    model, _, line, training = fit(
        tmp_path, {4: [command_of("pause")]}, when_paused=[ping, change, command_of("resume")]
    )
    assert line.statuses == ["running", "paused", "running", "ended"]
    assert (line.outcome(ping)["message"], line.outcome(ping)["step"]) == ("paused", 4)
    assert line.outcome(change)["state"] == "applied"
    assert (model.sharpness, training.datamodule.noise, training.gradient_clip_val) == (1.5, 0.5, 1.0)
    assert training.optimizers[0].param_groups[0]["weight_decay"] == 0.01
    assert training.global_step == 2 * STEPS


def test_paused_and_resumed_it_ends_at_the_same_weights(tmp_path: Path) -> None:
    model, *_ = fit(tmp_path, {4: [command_of("pause")]}, when_paused=[command_of("resume")])
    assert weights(model) == weights(untouched(tmp_path))


def test_a_stop_ends_it_at_its_step_even_before_min_epochs_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    command = command_of("stop", author="ana", reason="lunch")
    _, weavelet, line, training = fit(tmp_path, {5: [command]}, min_epochs=2)
    assert training.global_step == 5
    assert line.outcome(command)["state"] == "applied"
    assert status_of(weavelet) == "stopped"
    assert [path.name for path in (weavelet.folder / "checkpoints").iterdir()] == ["step-00000005.ckpt"]
    _, weavelet, *_ = fit(tmp_path, {5: [command_of("stop", {"snapshot": False})]})
    assert not (weavelet.folder / "checkpoints").exists()


def test_a_snapshot_is_lightnings_checkpoint_and_is_continued_from(tmp_path: Path) -> None:
    command = command_of("snapshot")
    (tmp_path / "second").mkdir()
    model, weavelet, line, _ = fit(tmp_path, {STEPS: [command]})  # where an epoch ends, to draw the same batches after
    assert weights(model) == weights(untouched(tmp_path))  # it has changed nothing
    path = Path(line.outcome(command)["result"]["path"])
    assert path == weavelet.folder / "checkpoints" / "step-00000008.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == STEPS
    later, _, line, training = fit(tmp_path / "second", {}, ckpt_path=path)
    assert training.global_step == 2 * STEPS
    assert sorted(later.rates) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert [said["step"] for said in line.told if said.get("status") == "running"] == [STEPS]


def test_it_validates_before_the_next_step_and_then_as_often_as_before(tmp_path: Path) -> None:
    command = command_of("validate")
    model, _, line, training = fit(
        tmp_path, {3: [command]}, check_val_every_n_epoch=2, num_sanity_val_steps=0, max_epochs=2
    )
    assert model.validated_at == [3, 2 * STEPS]
    assert line.outcome(command)["state"] == "applied"
    assert sorted(line.series("val_loss")) == [3, 2 * STEPS]
    assert (training.val_check_batch, training.check_val_every_n_epoch) == (STEPS, 2)


def test_where_there_is_nothing_to_validate_on_it_says_so(tmp_path: Path) -> None:
    command = command_of("validate")
    _, _, line, _ = fit(tmp_path, {3: [command]}, limit_val_batches=0)
    assert line.outcome(command)["state"] == "rejected"
    assert "nothing to validate on" in line.outcome(command)["message"]


def test_refused_commands_change_nothing(tmp_path: Path) -> None:
    refused = [set_(learning_rate=-1.0), set_(learning_rat=0.1), set_(sharpness=9.0), set_(max_grad_norm=0.0)]
    model, _, line, _ = fit(tmp_path, {3: refused})
    assert [line.outcome(command)["state"] for command in refused] == ["rejected"] * 4
    assert weights(model) == weights(untouched(tmp_path))


def test_watching_changes_nothing_and_the_metrics_are_in_the_run_folder(tmp_path: Path) -> None:
    model = Model()
    callback = WeaveletCallback(run="watched", hub="off", runs_dir=tmp_path / "runs")
    torch.manual_seed(7)
    trainer(tmp_path, callback).fit(model, Data())
    assert weights(model) == weights(untouched(tmp_path))
    assert callback.weavelet is not None
    reader = RunReader(callback.weavelet.folder / "run.db")
    curves = {name: reader.metric(name) for name in reader.series()}
    assert list(curves["loss"].steps) == list(range(1, 2 * STEPS + 1))
    assert list(curves["val_loss"].steps) == [STEPS, 2 * STEPS]
    assert list(curves["train_loss_epoch"].steps) == [STEPS, 2 * STEPS]
    assert curves["train_loss"].values[0] == pytest.approx(curves["loss"].values[0])


def test_metrics_come_as_often_as_the_trainer_logs(tmp_path: Path) -> None:
    _, _, line, _ = fit(tmp_path, {}, log_every_n_steps=4)
    assert sorted(line.series("loss")) == [4, 8, 12, 16]


def test_several_optimisers_have_knobs_of_their_own(tmp_path: Path) -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
            second = torch.optim.AdamW(self.net[4].parameters(), lr=0.01)
            return [first, second]

        def training_step(self, batch: list[Tensor], index: int) -> None:
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    command = set_(**{"optimizer_1.learning_rate": 0.002})
    _, _, line, training = fit(tmp_path, {4: [command]}, model=Two())
    assert line.outcome(command)["state"] == "applied"
    assert [each.param_groups[0]["lr"] for each in training.optimizers] == [0.1, 0.002]


def test_a_model_can_bring_it_along(tmp_path: Path) -> None:
    class Woven(WeaveletLightningModule):
        def __init__(self) -> None:
            super().__init__(run="woven", hub="off", runs_dir=tmp_path / "runs")
            self.net = nn.Linear(4, 1)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            assert "learning_rate" in self.weavelet.knobs
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Woven()
    training = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    training.fit(model, Data().train_dataloader())
    assert status_of(model.weavelet) == "completed"
    copy.deepcopy(model)
    assert EnhancedWeaveletLightningModule is WeaveletLightningModule


def test_it_can_be_attached_to_a_trainer_once(tmp_path: Path) -> None:
    weavelet, _ = scripted(tmp_path, {2: [set_(learning_rate=0.5)]})
    training = trainer(tmp_path, enable_checkpointing=True, max_epochs=1)
    model = Model()
    callback = attach_lightning(training, model, weavelet=weavelet)
    assert training.callbacks.index(callback) == len(training.callbacks) - 2  # before what saves
    with pytest.raises(ConfigError, match="one is enough"):
        attach_lightning(training, model)
    training.fit(model, Data())
    assert model.rates[3] == 0.5
    training.fit_loop.max_epochs = 2
    with pytest.raises(ConfigError, match="good for one fit"):
        training.fit(model, Data())
    with pytest.raises(ConfigError, match="give them to the Weavelet"):
        WeaveletCallback(weavelet, hub="off")


def test_a_training_that_raises_is_said_to_have_failed(tmp_path: Path) -> None:
    class Breaks(Model):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 3:
                raise RuntimeError("of its own")
            return super().training_step(batch, index)

    weavelet, line = scripted(tmp_path, {})
    with pytest.raises(RuntimeError, match="of its own"):
        trainer(tmp_path, WeaveletCallback(weavelet)).fit(Breaks(), Data())
    assert status_of(weavelet) == "failed"
    assert line.closed


def test_an_interrupted_training_is_said_to_be_interrupted(tmp_path: Path) -> None:
    class Interrupted(Model):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            raise KeyboardInterrupt

    weavelet, _ = scripted(tmp_path, {})
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, WeaveletCallback(weavelet)).fit(Interrupted(), Data())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert status_of(weavelet) == "interrupted"


def test_without_a_fit_there_is_no_weavelet(tmp_path: Path) -> None:
    callback = WeaveletCallback(runs_dir=tmp_path / "runs")
    trainer(tmp_path, callback).validate(Model(), Data(), verbose=False)
    assert callback.weavelet is None
    assert not (tmp_path / "runs").exists()
    model = WeaveletLightningModule()
    training = trainer(tmp_path, callback)
    model.trainer = training
    with pytest.raises(AetheriaError, match="no Weavelet yet"):
        _ = model.weavelet
