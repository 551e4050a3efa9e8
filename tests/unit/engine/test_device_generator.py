"""A device with a random generator of its own, as GPUs have: seeded by the run, saved, not moved by who looks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aetheria.accelerator import CPUAccelerator
from aetheria.config import TrainingConfig
from aetheria.core import AetherModel, Callback
from aetheria.data import LoaderDataModule
from aetheria.engine.health import check_health
from aetheria.orchestrator import Orchestrator


class Device(CPUAccelerator):
    """What `GPUAccelerator` does with the generator of its device."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.generator.seed()  # whatever it was before the run

    def generator_state(self) -> Tensor | None:
        return self.generator.get_state()

    def seed_generator(self, key: int) -> None:
        self.generator.manual_seed(key)

    def set_generator_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


class Noisy(AetherModel):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self._device = device

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        noise = torch.randn(batch.shape, generator=self._device.generator)
        return {"loss": self.net(batch + noise).square().mean()}

    def validation_step(self, batch: Tensor) -> dict[str, Tensor]:
        return self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(tmp_path: Path, resume: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    device = Device()
    batches = list(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)))
    callbacks = options.pop("callbacks", [])
    config = TrainingConfig(**{"max_steps": 12, "live": "off", "runs_dir": tmp_path, "val_interval": None} | options)
    run = Orchestrator(Noisy(device), LoaderDataModule(batches, batches[:2]), config, device, callbacks)
    return run.run(resume)


def test_the_seed_of_the_run_decides_what_the_device_draws(tmp_path: Path) -> None:
    first, again, other = (train(tmp_path, seed=seed).digest for seed in (3, 3, 4))
    assert first == again != other


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    part = train(tmp_path / "part", max_steps=7)
    assert train(tmp_path / "part", part.folder).digest == whole.digest


def test_whoever_looks_draws_the_same_and_moves_nothing(tmp_path: Path) -> None:
    found = []

    class Looks(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == 5:
                found.append(check_health("determinism", self.context))  # type: ignore[arg-type]

    watched = train(tmp_path, val_interval=1, callbacks=[Looks()])
    assert watched.digest == train(tmp_path).digest
    assert found == [{"healthy": True, "different": []}]
