"""What a user gets wrong, end to end: each test reads the message, and what the run folder says afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, Callback, OptimizerPlan, RunResult, Schedule
from aetheria.data import LoaderDataModule
from aetheria.errors import (
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
    RunFolderError,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotMismatchError,
    SnapshotVersionError,
)
from aetheria.loom.reader import RunReader
from aetheria.orchestrator import Orchestrator
from aetheria.runs import find_runs
from aetheria.snapshot import Manifest, list_snapshots


class Line(AetherModel):
    def __init__(self, width: int = 4, momentum: float | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        self.net = nn.Linear(width, 1)

    def training_step(self, batch: list[Tensor]) -> dict[str, Any]:
        return {"loss": self.net(batch[0]).square().mean()}

    def configure_optimizers(self) -> Any:
        if self.momentum is not None:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def points(width: int = 4, poison: bool = False) -> DataLoader[Any]:
    data = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
    if poison:
        data[:] = float("nan")
    return DataLoader(TensorDataset(data), batch_size=4)


def train(
    runs_dir: Path,
    model: AetherModel | None = None,
    train_loader: Any = None,
    val: Any = None,
    resume: Path | None = None,
    observers: tuple[Callback, ...] = (),
    **options: Any,
) -> RunResult:
    config = TrainingConfig(**{"epochs": 2, "runs_dir": runs_dir} | options)
    loader = points() if train_loader is None else train_loader
    return Orchestrator(model or Line(), LoaderDataModule(loader, val), config, callbacks=observers).run(resume)


def status_of(runs_dir: Path) -> dict[str, Any]:
    [run] = find_runs(runs_dir)
    assert not run.in_use()
    return run.read()


def test_nan_from_the_first_step(tmp_path: Path) -> None:
    model = Line()
    before = model.net.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"after step 0, 5 in a row \(max_skipped_in_a_row: 5\).*learning rate"):
        train(tmp_path, model, points(poison=True), max_skipped_in_a_row=5, epochs=9)
    assert torch.equal(model.net.weight, before)
    assert status_of(tmp_path)["status"] == "failed"
    events = RunReader(find_runs(tmp_path)[0].path / "run.db").events("nonfinite")
    assert len(events) == 5
    assert events[0].data["sample_ids"] == [0, 1, 2, 3]


def test_nan_stops_or_raises_when_asked_to(tmp_path: Path) -> None:
    stopped = train(tmp_path / "stop", None, points(poison=True), nonfinite="stop")
    assert (stopped.status, stopped.reason) == ("stopped", "NaN or infinite gradients")
    assert list_snapshots(stopped.folder / "snapshots")
    with pytest.raises(NonFiniteError, match="1 in a row"):
        train(tmp_path / "raise", None, points(poison=True), nonfinite="raise")


@pytest.mark.parametrize(
    ("value", "found"),
    [("good", "a str"), (torch.zeros(3), r"a tensor of shape \[3\]"), (None, "a NoneType"), ([1.0], "a list")],
)
def test_a_metric_that_is_not_a_number(tmp_path: Path, value: Any, found: str) -> None:
    class Odd(Line):
        def training_step(self, batch: list[Tensor]) -> dict[str, Any]:
            return super().training_step(batch) | {"accuracy": value}

    with pytest.raises(ModelError, match=f'"accuracy" as {found}.*must be one number'):
        train(tmp_path, Odd())
    assert "accuracy" in status_of(tmp_path)["status_detail"]


def test_a_monitored_metric_that_never_appears(tmp_path: Path) -> None:
    for number, options in enumerate(
        (
            {"snapshots": {"keep_best": {"metric": "val_los"}}},
            {"callbacks": [{"name": "ModelCheckpoint", "params": {"monitor": "val_los"}}]},
            {"callbacks": [{"name": "EarlyStopping", "params": {"monitor": "val_los"}}]},
        )
    ):
        with pytest.raises(ConfigError, match=r"'val_los'.*'val_loss'"):
            train(tmp_path / str(number), val=points(), **options)
    with pytest.raises(ConfigError, match=r"'val_loss'.*never validated"):
        train(tmp_path / "unvalidated", snapshots={"keep_best": {"metric": "val_loss"}})


def test_a_plateau_that_monitors_nothing_there_is(tmp_path: Path) -> None:
    class Plateau(Line):
        def configure_optimizers(self) -> OptimizerPlan:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return OptimizerPlan(optimizer, [Schedule(plateau, monitor="val_loss")])

    with pytest.raises(ConfigError, match=r"monitors 'val_loss'.*'loss'"):
        train(tmp_path, Plateau())


@pytest.mark.parametrize(
    ("configured", "found"),
    [(None, "None"), ("adam", "a str"), ([1], "a list of int")],
)
def test_configure_optimizers_returns_something_else(tmp_path: Path, configured: Any, found: str) -> None:
    class Wrong(Line):
        def configure_optimizers(self) -> Any:
            return configured

    with pytest.raises(ModelError, match=f"configure_optimizers returned {found}; expected an Optimizer"):
        train(tmp_path, Wrong())


def test_loaders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataloader is empty"):
        train(tmp_path / "list", train_loader=[])
    with pytest.raises(DataError, match="val_dataloader is empty"):
        train(tmp_path / "val", val=[])
    with pytest.raises(DataError, match="gives its batches once, and is asked for them a second time"):
        train(tmp_path / "generator", train_loader=iter([[torch.randn(4, 4)]]))
    with pytest.raises(DataError, match=r"batch_size 4 x grad_accumulation_steps 4 = 16 is larger.*12 samples"):
        train(tmp_path / "window", grad_accumulation_steps=4)


def test_a_raising_callback(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            raise KeyError("mine")

    class Critical(Broken):
        critical = True

    result = train(tmp_path / "observer", observers=(Broken(),))
    assert result.status == "completed"
    assert json.loads((result.folder / "run.json").read_text())["callback_failures"] == {"Broken.on_batch_end": 6}
    [event] = RunReader(result.folder / "run.db").events("error")
    assert "KeyError: 'mine'" in event.message
    assert "test_bad_input.py" in event.data["traceback"]
    with pytest.raises(KeyError, match="mine") as caught:
        train(tmp_path / "critical", observers=(Critical(),))
    assert caught.traceback[-1].path.name == "test_bad_input.py"
    assert status_of(tmp_path / "critical")["status_detail"] == "KeyError: 'mine'"


def test_a_raising_model_leaves_a_folder_that_says_so(tmp_path: Path) -> None:
    class Broken(Line):
        def training_step(self, batch: list[Tensor]) -> dict[str, Any]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="allocate") as caught:
        train(tmp_path, Broken())
    assert any("lower batch_size" in note for note in caught.value.__notes__)
    assert caught.traceback[-1].path.name == "test_bad_input.py"
    assert status_of(tmp_path)["status"] == "failed"


def test_a_runs_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/aetheria-runs")):  # /proc refuses even root
        with pytest.raises(RunFolderError, match=r"cannot make a run folder in .*runs_dir"):
            train(place)


def test_resuming_from_something_else(tmp_path: Path) -> None:
    done = train(tmp_path)
    newest = list_snapshots(done.folder / "snapshots")[-1].path
    with pytest.raises(SnapshotMismatchError, match=r"another model: net.weight is \[1, 4\].*and \[1, 5\]"):
        train(tmp_path, Line(width=5), points(5), resume=done.folder)
    with pytest.raises(SnapshotMismatchError, match=r"another optimiser: AdamW .* there, SGD .* here"):
        train(tmp_path, Line(momentum=0.9), resume=newest)
    with pytest.raises(SnapshotError, match="no run and no snapshot at"):
        train(tmp_path, resume=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotDamagedError, match="not a snapshot: it has no manifest"):
        train(tmp_path, resume=tmp_path / "empty")
    assert train(tmp_path, resume=done.folder, epochs=3).status == "completed", "the folder was left whole"


def test_resuming_from_a_damaged_folder(tmp_path: Path) -> None:
    done = train(tmp_path, snapshots={"every_steps": 2})
    *_, older, newest = list_snapshots(done.folder / "snapshots")
    weights = newest.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SnapshotDamagedError, match=r"model.safetensors do not match their sha256"):
        train(tmp_path, resume=newest.path)
    again = train(tmp_path, resume=done.folder)
    assert again.digest == done.digest
    events = RunReader(done.folder / "run.db").events("warning")
    assert any("model.safetensors" in event.message and "before it is used" in event.message for event in events)
    assert json.loads((done.folder / "run.json").read_text())["lives"][-1]["snapshot"] == older.path.name
    for snapshot in list_snapshots(done.folder / "snapshots"):
        (snapshot.path / "state.pt").unlink()
    with pytest.raises(SnapshotError, match=r"every snapshot of .* is damaged"):
        train(tmp_path, resume=done.folder)


def test_resuming_from_a_newer_format(tmp_path: Path) -> None:
    done = train(tmp_path)
    newest = list_snapshots(done.folder / "snapshots")[-1]
    fields = {name: value for name, value in vars(newest.manifest).items() if name != "format"}
    (newest.path / "manifest.json").write_bytes(Manifest(**fields, format=99).encode())
    with pytest.raises(SnapshotVersionError, match=r"format 99; this version of Aetheria reads up to 2. Upgrade"):
        train(tmp_path, resume=done.folder)


def test_an_orchestrator_runs_once(tmp_path: Path) -> None:
    orchestrator = Orchestrator(Line(), LoaderDataModule(points()), TrainingConfig(epochs=1, runs_dir=tmp_path))
    result = orchestrator.run()
    with pytest.raises(Exception, match=r"has run already.*resume_from"):
        orchestrator.run(result.folder)
