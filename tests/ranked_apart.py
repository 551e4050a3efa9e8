"""Ranks that train apart, in a test: a model that remembers what it was given, and what becomes of its runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from tests.ranked import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherModel, Callback, Orchestrator, TrainingConfig
from aetheria.accelerator import LocalSGDAccelerator
from aetheria.core import AetherDataModule
from aetheria.snapshot.format import model_tensors

__all__ = ["DILOCO", "MEAN", "Data", "Model", "Watch", "assert_close", "by_case", "train"]

FEATURES = 5
MEAN = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}  # Local SGD: the plain mean of the weights
DILOCO = {"outer_learning_rate": 0.7, "outer_momentum": 0.9}


class Model(AetherModel):
    """Remembers which samples each of its steps was given."""

    def __init__(
        self,
        inner: str = "adamw",
        poisoned: tuple[int, int] | None = None,
        noisy: bool = False,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.poisoned, self.weighted = inner, poisoned, weighted
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.noise = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.2)).double() if noisy else nn.Identity()
        self.seen: list[list[float]] = []

    def loss_of(self, features: Tensor, target: Tensor, tokens: Tensor | None = None) -> Tensor:
        losses = (self.layers(self.noise(features)).squeeze(1) - target).square()
        return losses.mean() if tokens is None else (losses * tokens).sum() / tokens.sum()

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        features, target, number = batch
        self.seen.append(number.tolist())
        if self.weighted:
            tokens = number % 3
            return {"loss": self.loss_of(features, target, tokens), "weight": tokens.sum()}
        loss = self.loss_of(features, target)
        if self.poisoned == (int(os.environ.get("RANK", "0")), len(self.seen)):
            loss = loss * float("nan")
        return {"loss": loss}

    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss_of(*batch[:2])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.inner == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Data(AetherDataModule):
    def __init__(self, batch_size: int, samples: int = 50) -> None:
        self.batch_size = batch_size
        features = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.dataset = TensorDataset(features, features.sum(1).sin(), torch.arange(samples))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)


class Watch(Callback):
    """Notes when the ranks come together, and what the run records; does what a test asks for at a step."""

    critical = True

    def __init__(self, signalled_at: int | None = None, broken_at: int | None = None) -> None:
        self.signalled_at, self.broken_at = signalled_at, broken_at
        self.together: list[int] = []
        self.events: list[tuple[str, str]] = []
        self.validated: list[float] = []
        self.dropped: list[Any] = []

    def on_train_start(self) -> None:
        accelerator = self.context.accelerator
        if not isinstance(accelerator, LocalSGDAccelerator):
            return
        move = accelerator._move

        def noted(means: Any) -> None:
            self.together.append(self.context.global_step + 1)  # the step is counted after its window
            move(means)

        accelerator._move = noted  # type: ignore[method-assign]

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.context.accelerator.rank != 1:
            return
        if self.context.global_step == self.signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.context.global_step == self.broken_at:
            with torch.no_grad():
                next(self.context.model.parameters()).fill_(float("inf"))

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self.validated.append(metrics["val_loss"])

    def on_event(self, event: Any) -> None:
        self.events.append((event.kind, event.message))
        if event.kind == "nonfinite" and "sample_ids" in event.data:
            self.dropped.append(event.data["sample_ids"])


def train(runs_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains, on one of several ranks; returns what became of it."""
    options = dict(options)
    torch.manual_seed(0)
    model = Model(**options.pop("model", {}))
    data = Data(options.pop("micro", 12 // int(os.environ["WORLD_SIZE"])), options.pop("samples", 50))
    watch, resume = Watch(**options.pop("watch", {})), options.pop("resume", None)
    if (local := options.pop("local", None)) is not None:
        options |= {"accelerator": "local_sgd", "accelerator_params": local}
    if "max_steps" not in options:
        options.setdefault("epochs", 2)
    config = TrainingConfig(**{"log_every": 1, "runs_dir": Path(runs_dir), "live": "off", **options})
    run = Orchestrator(model, data, config, callbacks=[watch])
    begun = collectives(run)
    result = run.run(resume)
    return {
        "weights": {name: tensor.tolist() for name, tensor in model_tensors(model)[0].items()},
        "digest": result.digest, "step": result.global_step, "status": result.status, "folder": str(result.folder),
        "seen": model.seen, "together": watch.together, "events": watch.events, "validated": watch.validated,
        "dropped": watch.dropped,
        "metrics": result.metrics, "collectives": collectives(run) - begun,
    }  # fmt: skip


def collectives(run: Orchestrator) -> int:
    """Returns how many there have been; but those of the agreements, which come by the clock."""
    groups = (torch.distributed.group.WORLD, run.accelerator.ranks.group)
    return sum(group._get_sequence_number_for_group() for group in groups if group is not None)


def train_all(runs_dir: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(f"{runs_dir}/{number}", options) for number, options in enumerate(cases)]


def by_case(ranks: int, runs_dir: Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns for each case what each rank found, when all have ended with the same weights at the same step."""
    found = [list(of_ranks) for of_ranks in zip(*run_ranks(ranks, train_all, str(runs_dir), cases), strict=True)]
    for of_ranks in found:
        for key in ("digest", "step", "status", "together", "metrics", "validated"):
            assert all(each[key] == of_ranks[0][key] for each in of_ranks), key
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        ours, theirs = (torch.as_tensor(one, dtype=torch.float64) for one in (found[name], values))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=name)
