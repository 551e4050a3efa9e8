"""A look into a run's health finds what is wrong, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria.accelerator import CPUAccelerator
from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, Callback
from aetheria.data import BatchSource, LoaderDataModule, prepare_loader
from aetheria.engine.health import check_health
from aetheria.errors import CommandError
from aetheria.orchestrator import Orchestrator

CHECKS = ["numerics", "activations", "throughput", "determinism"]


class Net(AetherModel):
    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
        self.noise = None if not noisy else torch.Generator().manual_seed(0)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        out = self.net(batch[0]).squeeze(-1)
        if self.noise is not None:
            out = out + torch.randn(out.shape, generator=self.noise)
        return {"loss": out.square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Run:
    """As much of a run as is looked into."""

    samples_seen = 12

    def __init__(self, model: AetherModel, validation: bool = True) -> None:
        self.model = model
        self.accelerator = CPUAccelerator()
        self.optimizer: Any = model.configure_optimizers()
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(12, 3, generator=generator))
        self._val: BatchSource | None = None
        if validation:
            self._val = prepare_loader(DataLoader(data, batch_size=4), role="val", seed=0)


def test_a_healthy_run_is_healthy() -> None:
    run = Run(Net())
    found = {check: check_health(check, run) for check in CHECKS}
    assert found["numerics"]["healthy"]
    assert found["numerics"]["not_finite"] == {}
    assert found["numerics"]["largest_weight"] == pytest.approx(
        max(float(parameter.detach().abs().max()) for parameter in run.model.parameters())
    )
    assert found["activations"]["healthy"]
    assert set(found["activations"]["modules"]) == {"net", "net.0", "net.1", "net.2", "net.3", "net.4"}
    assert found["throughput"]["validation_batch_seconds"] > 0
    assert found["throughput"]["samples_seen"] == 12
    assert found["determinism"] == {"healthy": True, "different": []}


def test_what_is_not_finite_is_named_in_weights_and_in_the_optimisers_state() -> None:
    run = Run(Net())
    run.model.training_step([torch.randn(4, 3)])["loss"].backward()
    run.optimizer.step()
    with torch.no_grad():
        run.model.net[0].weight[1, :2] = torch.nan
        run.optimizer.state[run.model.net[4].bias]["exp_avg"][0] = torch.inf
    assert check_health("numerics", run) | {"largest_weight": 0} == {
        "healthy": False,
        "not_finite": {"net.0.weight": 2, "net.4.bias.exp_avg": 1},
        "largest_weight": 0,
    }


def test_a_layer_that_puts_out_nothing_but_zeros_is_dead() -> None:
    run = Run(Net())
    with torch.no_grad():
        run.model.net[1].bias.fill_(-1e6)
    found = check_health("activations", run)
    assert not found["healthy"]
    assert found["dead"] == ["net.2", "net.3"]
    assert found["modules"]["net.2"] == {"mean": 0.0, "deviation": 0.0, "zeros": 1.0, "not_finite": 0}
    with torch.no_grad():
        run.model.net[1].bias.fill_(torch.nan)
    assert "net.1" in check_health("activations", run)["not_finite"]
    assert not any(module._forward_hooks for module in run.model.modules())


def test_what_computes_something_else_each_time_is_found() -> None:
    found = check_health("determinism", Run(Net(noisy=True)))
    assert found == {"healthy": False, "different": ["loss"]}


@pytest.mark.parametrize("check", ["activations", "throughput", "determinism"])
def test_without_validation_data_it_says_so(check: str) -> None:
    with pytest.raises(CommandError, match="no validation data"):
        check_health(check, Run(Net(), validation=False))


def test_looked_into_at_every_step_a_run_ends_at_the_same_weights(tmp_path: Path) -> None:
    class Doctor(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            for check in CHECKS:
                self.context.check_health(check)  # type: ignore[attr-defined]
            assert self.context.model.training

    def train(folder: Path, *callbacks: Callback) -> str:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))
        loaders = LoaderDataModule(DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4))
        return Orchestrator(Net(), loaders, TrainingConfig(epochs=2, runs_dir=folder), callbacks=callbacks).run().digest

    assert train(tmp_path / "watched", Doctor()) == train(tmp_path / "alone")
