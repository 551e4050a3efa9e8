"""How long the step that takes a snapshot waits, and what writing it in the background costs the steps after it.

A model of 100 million parameters is trained with AdamW: its state, weights and two moments, is 1.2 GB. Every few steps
a snapshot is asked for, and the wait is all the time that the loop spends in taking it. In the same run the same
tensors are copied once into host memory: into new memory, which is what the first snapshot must do, and into
memory that is there already, as the later ones do. The next snapshot is asked for when the last one is durable.

Then the steps: those taken while a snapshot is being written, against those while none is. Most sensitive to a writing
thread that holds on to the interpreter are the steps of a tiny network, taken in between.

    python -m benchmarks.snapshot_stall [--short] [--folder FOLDER]
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from aetheria import AetherModel, Callback, Orchestrator, TrainingConfig
from aetheria.config import SnapshotsConfig
from benchmarks.common import Figure, parser, report, summarise
from benchmarks.contestants import FEATURES, network

WIDTH, LAYERS, LAYERS_SHORT = 2048, 24, 1
ROUNDS, SNAPSHOTS = 3, 4
IDLE_STEPS = 8  # before each snapshot
TINY_STEPS = 100  # of the tiny network, after each step of the large one

Samples = dict[str, list[float]]  # seconds, by what was measured


class Large(AetherModel):
    """Linear layers of 4.2 million parameters each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(batch).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class Probe(Callback):
    """Asks for one snapshot after the other, and measures everything in between."""

    critical = True

    def __init__(self, snapshots: int, samples: Samples, device: str = "cpu") -> None:
        self.samples = samples
        self.device = device
        self.snapshots = snapshots
        self.taken = 0
        self.idle_steps = 0
        self.writing = False
        self.copy: list[Tensor] = []
        self.tiny = network()
        self.tiny_optimizer = torch.optim.Adam(self.tiny.parameters())
        self.last = self.written_since = perf_counter()

    @property
    def _now(self) -> str:
        return "while a snapshot is written" if self.writing else "while none is written"

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Measures the step, and some tiny ones; asks for a snapshot when it has been quiet long enough."""
        self.wait()
        if batch_idx:  # the first one also makes the optimiser's state
            self.samples[f"step {self._now}"].append(perf_counter() - self.last)
        self._train_tiny()
        if not self.writing:
            self.idle_steps += 1
            if self.idle_steps == IDLE_STEPS:
                self._copy_state()
                self.context.request_snapshot("benchmark")
        self.last = perf_counter()

    def took_snapshot(self, seconds: float) -> None:
        """Notes the wait; from here on it is being written."""
        if self.taken == self.snapshots:  # the one at the end of the run
            return
        self.samples["wait for the first snapshot" if self.taken == 0 else "wait for a later snapshot"].append(seconds)
        self.taken += 1
        self.writing, self.last = True, perf_counter()
        self.written_since = self.last

    def on_snapshot(self, path: Path) -> None:
        """Called at the first boundary at which it is durable."""
        if not self.writing:
            return
        self.samples["until it is durable"].append(perf_counter() - self.written_since)
        self.writing, self.idle_steps = False, 0
        if self.taken == self.snapshots:
            self.context.request_stop("measured")

    def wait(self) -> None:
        """Waits until the device has done what it was given: what it still owes to the steps is not the snapshot's."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _train_tiny(self) -> None:
        for _ in range(TINY_STEPS):
            begun = perf_counter()
            self.tiny_optimizer.zero_grad()
            self.tiny(torch.ones(32, FEATURES)).square().mean().backward()
            self.tiny_optimizer.step()
            self.samples[f"tiny step {self._now}"].append(perf_counter() - begun)

    def _copy_state(self) -> None:
        state = [
            tensor.detach()
            for parameter in self.context.model.parameters()
            for tensor in (parameter, *self.context.optimizer.state[parameter].values())
        ]
        self.wait()
        begun = perf_counter()
        copied = [tensor.to("cpu", copy=True) for tensor in state]
        self.samples["one copy into new memory"].append(perf_counter() - begun)
        if not self.copy:
            self.copy = [tensor.pin_memory() for tensor in copied] if self.device == "cuda" else copied
        begun = perf_counter()
        for kept, tensor in zip(self.copy, state, strict=True):
            kept.copy_(tensor, non_blocking=True)
        self.wait()
        self.samples["one copy into memory that is there"].append(perf_counter() - begun)


class Measured(Orchestrator):
    """Tells the probe how long the loop was in taking a snapshot."""

    probe: Probe

    def _save(self, *arguments: Any, **named: Any) -> None:
        self.probe.wait()
        begun = perf_counter()
        super()._save(*arguments, **named)
        self.probe.took_snapshot(perf_counter() - begun)


def train(layers: int, folder: str, samples: Samples, device: str = "cpu") -> None:
    """Trains until enough snapshots have been taken."""
    probe = Probe(SNAPSHOTS, samples, device)
    config = TrainingConfig(
        max_steps=10_000,
        runs_dir=Path(folder),
        accelerator=device,
        snapshots=SnapshotsConfig(every_epochs=None, every_seconds=None),
    )
    run = Measured(Large(layers), [torch.ones(1, WIDTH)] * 10_000, config, callbacks=[probe])
    run.probe = probe
    run.run()


def size(short: bool) -> tuple[int, int]:
    """Returns how many layers the model has, and how often it is trained."""
    return (LAYERS_SHORT, 1) if short else (LAYERS, ROUNDS)


def parameters(layers: int) -> int:
    """Returns the number of parameters of so many layers."""
    return layers * (WIDTH + 1) * WIDTH


def figures_of(samples: Samples, prefix: str = "") -> list[Figure]:
    """Returns the lines of the table. What may be waited for is what a copy into new memory takes."""
    copy = statistics.median(samples["one copy into new memory"])
    figures = []
    for name in sorted(samples):
        values = [1e3 * value for value in samples[name]]
        target = 1e3 * copy if name.startswith("wait") else None
        figures.append(summarise(f"{prefix}{name}", "ms", values, target, f"longest {max(values):,.1f} ms"))
    return figures


def main() -> None:
    """Trains, measures and writes the table."""
    options = parser(__doc__)
    options.add_argument("--folder", help="where the snapshots go; the folder for temporary files by default")
    chosen = options.parse_args()
    layers, rounds = size(chosen.short)
    samples: Samples = defaultdict(list)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            train(layers, folder, samples)
    report(
        "snapshot_stall",
        "How long a snapshot keeps the loop, and slows the steps, in milliseconds.",
        figures_of(samples),
        save=not chosen.no_save,
        settings={"parameters": parameters(layers), "rounds": rounds, "snapshots_in_a_round": SNAPSHOTS},
    )


if __name__ == "__main__":
    main()
