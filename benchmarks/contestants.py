"""The same MLP trained by every contestant: the loop by hand, ours, and the peers', each as its documentation has it.

Everybody gets the same pre-made batches, the same model and the same Adam; nobody reads the loss (`.item()`) unless
its logging does. The peers are given the cheapest form that they document: no progress bar, no checkpoints, and the
iterable as it is rather than wrapped by their data loaders.

What trains is `build()`: the small MLP, unless whoever measures (`ranks.py`, `gpu.py`) brings another one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from aetheria import AetherModel, Orchestrator, TrainingConfig
from aetheria.core import Accelerator
from aetheria.loom import recorder
from aetheria.plugins.callbacks.progress_bar import ProgressBar
from benchmarks.pairs import IterableLane, Lane, SequenceLane

__all__ = [
    "CONTESTANTS",
    "FEATURES",
    "Build",
    "Regression",
    "accelerate",
    "by_hand",
    "lane_of",
    "lightning_bare",
    "lightning_logging",
    "network",
    "train_with_aetheria",
]

FEATURES, HIDDEN = 10, 64

Build = Callable[[], nn.Module]  # makes the model, with the same weights whenever it is called


def network() -> nn.Sequential:
    """Returns the model, with the same weights for everybody."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def by_hand(batches: Iterable[Any], build: Build = network) -> None:
    """What everybody else is compared with."""
    model = build()
    optimizer = adam(model)
    for features, targets in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimiser: in one kernel where that is what one takes."""
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.Adam(model.parameters(), fused=True if on_cuda else None)


# --- ours ------------------------------------------------------------------------------------------------------------


class Regression(AetherModel):
    """The model and its loss, as Aetheria takes them.

    Args:
        build: makes the model.
    """

    def __init__(self, build: Build = network) -> None:
        super().__init__()
        self.network = build()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns the loss."""
        features, targets = batch
        return {"loss": nn.functional.mse_loss(self.network(features), targets)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns everybody's optimiser."""
        return adam(self)


class _Terminal(io.StringIO):
    """Something that says it is a terminal, so that the bars are drawn, and forgets what is drawn."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class _PacedProgressBar(ProgressBar):
    """The progress bar, drawn during its own contestant's turns only."""

    def __init__(self, lane: Lane) -> None:
        # Half as often by the clock on the wall, of which half is this contestant's: four times a second, as usual.
        super().__init__(refresh_per_second=2.0, console=Console(file=_Terminal(), force_terminal=True, width=120))
        self._lane = lane

    def _draw(self) -> Any:
        self._lane.wait_for_turn()
        return super()._draw()


def _pace_recorder(lane: Lane) -> None:
    """Has `run.db` written during this contestant's turns only, as often in its own time as usual."""
    commit = recorder.Recorder._commit

    def paced(self: recorder.Recorder) -> bool:
        lane.wait_for_turn()
        return commit(self)

    recorder.Recorder._commit = paced  # type: ignore[method-assign]
    recorder._INTERVAL *= 2


def train_with_aetheria(
    model: AetherModel,
    batches: Lane,
    progress_bar: bool = False,
    accelerator: Accelerator | str = "cpu",
    **options: Any,
) -> None:
    """Trains until the lane ends, as every run does: with `run.db`, and metrics logged every 10 steps.

    Args:
        model: what is trained.
        batches: its data.
        progress_bar: whether to draw the bars as on a terminal.
        accelerator: the hardware, or its name.
        options: of the configuration, where it is to be another one.
    """
    _pace_recorder(batches)
    with tempfile.TemporaryDirectory() as folder:
        # The lane stands for a list; read as lists are, without seeding the generators for each of its batches.
        usual = {"max_steps": len(batches), "runs_dir": folder, "sample_seeding": False}
        name, made = (accelerator, None) if isinstance(accelerator, str) else ("auto", accelerator)
        callbacks = [_PacedProgressBar(batches)] if progress_bar else []
        Orchestrator(model, batches, TrainingConfig(**{**usual, "accelerator": name, **options}), made, callbacks).run()


def aetheria_bare(batches: Lane) -> None:
    """No callbacks and no loggers; `run.db` is written by every run."""
    train_with_aetheria(Regression(), batches)


def aetheria_logging(batches: Lane) -> None:
    """With the progress bar on a terminal."""
    train_with_aetheria(Regression(), batches, progress_bar=True)


# --- the peers -------------------------------------------------------------------------------------------------------


def fabric(batches: Lane) -> None:
    """Lightning Fabric: model and optimiser set up by it, backward through it."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    for features, targets in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        fabric.backward(loss)
        optimizer.step()


def accelerate(batches: Lane, build: Build = network) -> None:
    """Accelerate: model and optimiser prepared by it, backward through it. Several ranks it finds out by itself."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    for features, targets in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        accelerator.backward(loss)
        optimizer.step()


def ignite(batches: Lane) -> None:
    """Ignite: an engine around the loop's body, which returns the loss as it is."""
    from ignite.engine import Engine

    model = network()
    optimizer = torch.optim.Adam(model.parameters())

    def update(_engine: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, targets = batch
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()
        optimizer.step()
        return loss

    Engine(update).run(batches, max_epochs=1, epoch_length=len(batches))


def lightning_bare(batches: Lane, build: Build = network, **options: Any) -> None:
    """Lightning's Trainer with everything that can be switched off switched off, by its own `barebones=True`."""
    _train_lightning(batches, build, log=False, barebones=True, **options)


def lightning_logging(batches: Lane, build: Build = network, **options: Any) -> None:
    """Lightning's Trainer with `self.log` and a CSVLogger written every 10 steps; no progress bar, no checkpoints."""
    from lightning.pytorch.loggers import CSVLogger

    with tempfile.TemporaryDirectory() as folder:
        _train_lightning(
            batches,
            build,
            log=True,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )


def _train_lightning(batches: Lane, build: Build, log: bool, **options: Any) -> None:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build()

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            features, targets = batch
            loss = nn.functional.mse_loss(self.network(features), targets)
            if log:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    with contextlib.redirect_stdout(io.StringIO()):
        lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "devices": 1, **options}).fit(Module(), batches)


CONTESTANTS: dict[str, Callable[[Lane], None]] = {
    "the same loop by hand again": by_hand,
    "Aetheria bare": aetheria_bare,
    "Aetheria with run.db and progress bar": aetheria_logging,
    "Ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "Lightning bare": lightning_bare,
    "Lightning with self.log and CSVLogger": lightning_logging,
}


def lane_of(name: str, batches: list[Any], block: int, turns: int) -> Lane:
    """Returns a lane in the form that a contestant takes data in."""
    kind = SequenceLane if name.startswith("Aetheria") else IterableLane
    return kind(batches, block, turns)
