"""A run stopped at any step and continued ends exactly where the uninterrupted one does: weights, metrics, history."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler

from aetheria.config import TrainingConfig
from aetheria.core import AetherDataModule, AetherModel, OptimizerPlan, RunResult, Schedule
from aetheria.data import LoaderDataModule
from aetheria.loom.reader import RunReader
from aetheria.orchestrator import Orchestrator

LENGTH = 23


class Noisy(Dataset[Tensor]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / LENGTH) + torch.randn(4) + float(np.random.randn()) + random.random()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(LENGTH):
            yield torch.full((4,), index / LENGTH) + torch.randn(4)


class StatefulStream(IterableDataset[Tensor]):
    """Remembers how far it is, within an epoch and over epochs."""

    def __init__(self) -> None:
        self.position = self.epochs = 0
        self.reads = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < LENGTH:
            self.position += 1
            self.reads += 1
            yield torch.full((4,), self.position / LENGTH + self.epochs) + torch.randn(4)
        self.position = 0
        self.epochs += 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.epochs = state["position"], state["epochs"]


class Moody(Sampler[int]):
    """Remembers something from one epoch to the next."""

    def __init__(self) -> None:
        self.generator = random.Random(5)

    def __iter__(self) -> Iterator[int]:
        order = list(range(LENGTH))
        self.generator.shuffle(order)
        yield from order

    def __len__(self) -> int:
        return LENGTH


class Model(AetherModel):
    def __init__(self, schedule: str = "step") -> None:
        super().__init__()
        self.schedule = schedule
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: Tensor) -> dict[str, Any]:
        error = (self.net(batch).squeeze(-1) - batch.sum(-1)) ** 2
        return {"loss": error.mean(), "worst": error.max().detach(), "weight": float(len(batch))}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.AdamW(
            [
                {"params": list(self.net[0].parameters()), "name": "first"},
                {"params": [p for layer in self.net[1:] for p in layer.parameters()], "lr": 0.02},
            ],
            lr=0.01,
        )
        schedules = {
            "step": lambda: Schedule(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40), "step"),
            "epoch": lambda: Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "epoch"),
            "plateau": lambda: Schedule(
                torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "epoch", "val_loss"
            ),
        }
        return OptimizerPlan(optimizer, [schedules[self.schedule]()])


def loaders(kind: str) -> AetherDataModule:
    val = DataLoader(Noisy(), batch_size=7)
    match kind:
        case "shuffled":
            return LoaderDataModule(DataLoader(Noisy(), batch_size=3, shuffle=True), val)
        case "workers":
            return LoaderDataModule(
                DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2, persistent_workers=True), val
            )
        case "sampler":
            return LoaderDataModule(DataLoader(Noisy(), batch_size=3, sampler=Moody()), val)
        case "weighted":
            sampler = WeightedRandomSampler(list(range(1, LENGTH + 1)), LENGTH)
            return LoaderDataModule(DataLoader(Noisy(), batch_size=3, sampler=sampler), val)
        case "stream":
            return LoaderDataModule(DataLoader(Stream(), batch_size=3), val)
        case "stateful":
            return LoaderDataModule(DataLoader(StatefulStream(), batch_size=3), val)
    generator = torch.Generator().manual_seed(7)
    return LoaderDataModule([torch.randn(3, 4, generator=generator) for _ in range(8)], val)


def train(
    runs_dir: Path, kind: str, schedule: str, resume: Path | None = None, **options: Any
) -> tuple[RunResult, Orchestrator]:
    torch.manual_seed(0)
    model = Model(schedule)
    torch.manual_seed(random.getrandbits(32))  # whatever the caller did with the generators must not matter
    config = TrainingConfig(epochs=3, runs_dir=runs_dir, log_every=3, snapshots={"every_epochs": 2}, **options)
    orchestrator = Orchestrator(model, loaders(kind), config)
    return orchestrator.run(resume), orchestrator


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shuffled": ("shuffled", "step", {}),
    "accumulated": ("shuffled", "epoch", {"grad_accumulation_steps": 3, "max_grad_norm": 1.0}),
    "fp16": ("shuffled", "step", {"precision": "fp16"}),
    "bf16": ("shuffled", "step", {"precision": "bf16"}),
    "workers": ("workers", "step", {"val_every_steps": 4}),
    "plateau": ("shuffled", "plateau", {}),
    "averaged": ("shuffled", "step", {"callbacks": [{"name": "ExponentialMovingAverage", "params": {"decay": 0.9}}]}),
    "own sampler": ("sampler", "step", {}),
    "own sampler, limited": ("sampler", "step", {"limit_train_batches": 5}),
    "weighted sampler": ("weighted", "step", {"grad_accumulation_steps": 2}),
    "iterable": ("stream", "step", {}),
    "stateful iterable": ("stateful", "step", {"grad_accumulation_steps": 2}),
    "list of batches": ("list", "step", {"limit_train_batches": 7}),
    "overfit": ("shuffled", "step", {"overfit_batches": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_stopped_anywhere_and_continued(case: str, tmp_path: Path) -> None:
    kind, schedule, options = CASES[case]
    whole, _ = train(tmp_path / "whole", kind, schedule, **options)
    assert whole.status == "completed"
    curves = RunReader(whole.folder / "run.db")
    # Every place in an epoch, its end, and the first step of the next; elsewhere some of these.
    places = {*range(1, 10), 16} if case == "shuffled" else {1, 3, 8}
    stops = sorted(places | {whole.global_step - 1})
    for stop in stops:
        part, _ = train(tmp_path / "parts", kind, schedule, max_steps=stop, **options)
        assert part.global_step == stop
        rest, _ = train(tmp_path / "parts", kind, schedule, part.folder, **options)
        assert rest.folder == part.folder
        assert rest.digest == whole.digest, f"stopped at step {stop}"
        assert rest.history == whole.history, f"stopped at step {stop}"
        continued = RunReader(rest.folder / "run.db")
        for name in ("loss", "learning_rate.first", "epoch_loss"):
            assert np.array_equal(continued.metric(name).values, curves.metric(name).values), (name, stop)
            assert np.array_equal(continued.metric(name).steps, curves.metric(name).steps), (name, stop)


def test_the_first_batches_of_a_stateful_iterable_are_not_read_again(tmp_path: Path) -> None:
    part, _ = train(tmp_path, "stateful", "step", max_steps=6)
    _, orchestrator = train(tmp_path, "stateful", "step", part.folder, max_steps=7)
    loader = orchestrator.data.train_dataloader()
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, StatefulStream)
    assert loader.dataset.reads == 3


def test_validating_more_often_changes_nothing(tmp_path: Path) -> None:
    seldom, _ = train(tmp_path, "shuffled", "step", val_every_steps=1000)
    often, _ = train(tmp_path, "shuffled", "step", val_every_steps=1)
    assert seldom.digest == often.digest


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    alone, _ = train(tmp_path, "shuffled", "step")
    helped, _ = train(tmp_path, "workers", "step")
    assert alone.digest == helped.digest


def test_an_older_snapshot_starts_a_new_run(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, "shuffled", "step")
    snapshots = sorted((whole.folder / "snapshots").iterdir())
    before = (whole.folder / "run.json").read_bytes()
    again, _ = train(tmp_path, "shuffled", "step", snapshots[0])
    assert again.folder != whole.folder
    assert again.digest == whole.digest
    assert (whole.folder / "run.json").read_bytes() == before
    newest, _ = train(tmp_path, "shuffled", "step", snapshots[-1])
    assert newest.folder == whole.folder


def test_another_number_of_threads_is_warned_of(tmp_path: Path) -> None:
    """It decides in which order sums are added up."""
    part, _ = train(tmp_path, "shuffled", "step", max_steps=3)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        whole, _ = train(tmp_path, "shuffled", "step", part.folder)
    finally:
        torch.set_num_threads(before)
    warnings = [event.message for event in RunReader(whole.folder / "run.db").events("warning")]
    assert any(f"threads {before} -> {before + 1}. Bits may differ" in warning for warning in warnings), warnings
