"""How long a snapshot of a sharded model keeps the loop, and takes, beside `torch.distributed.checkpoint` directly.

Two gloo ranks share a model of 200 million parameters, trained with AdamW: weights and two moments are 2.4 GB, half of
it on each rank. In turns a snapshot is taken, and the same tensors are given to `dcp.async_save`, which copies them and
writes on a thread, and to `dcp.save`, which writes them at once. A snapshot does more than these: it is synced, hashed,
and read back for the digest of the whole model before it counts.

    python -m benchmarks.snapshot_sharded [--short] [--folder FOLDER]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from aetheria import Callback, Orchestrator, TrainingConfig
from aetheria.config import SnapshotsConfig
from benchmarks.common import Figure, parser, report, summarise
from benchmarks.snapshot_stall import WIDTH, Large, Samples, parameters

RANKS = 2
LAYERS, LAYERS_SHORT = 48, 2
SNAPSHOTS, SNAPSHOTS_SHORT = 5, 2


class Turns(Callback):
    """A snapshot of ours, then both of theirs, and so on; each begins when the last one is durable."""

    critical = True

    def __init__(self, folder: Path, count: int, samples: Samples) -> None:
        self.folder, self.left, self.samples = folder, count, samples
        self.asked = self.durable = False
        self.begun = 0.0

    def on_train_start(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def on_batch_end(self, batch_idx: int, metrics: dict[str, torch.Tensor]) -> None:
        if not batch_idx or self.asked:
            return
        if self.begun:  # it is being written; the ranks go on together when each has seen that it is durable
            seen = torch.tensor(float(self.durable))
            dist.all_reduce(seen, dist.ReduceOp.MIN, group=self.group)
            if not seen:
                return
            self.begun, self.durable = 0.0, False
            self._theirs()
            self.left -= 1
            if not self.left:
                self.context.request_stop("measured")
                return
        self.asked = True
        self.context.request_snapshot("benchmark")

    def took_snapshot(self, seconds: float) -> None:
        """Notes how long the loop was in it."""
        if self.asked:
            self.samples["ours: the loop waits"].append(seconds)
            self.asked, self.begun = False, perf_counter() - seconds

    def on_snapshot(self, path: Path) -> None:
        if self.begun:
            self.samples["ours: until it is durable"].append(perf_counter() - self.begun)
            self.durable = True

    def _theirs(self) -> None:
        from torch.distributed.checkpoint import async_save, save

        model, optimizer = self.context.model, self.context.optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        state: dict[str, Any] = {"model": model.state_dict()}
        state["optimizer"] = {names[parameter]: values for parameter, values in optimizer.state.items()}
        for kind in ("async_save", "save"):
            place = self.folder / kind
            if dist.get_rank() == 0:
                shutil.rmtree(place, ignore_errors=True)
            dist.barrier(self.group)
            begun = perf_counter()
            if kind == "async_save":
                saving = async_save(state, checkpoint_id=place, process_group=self.group)
                self.samples["dcp.async_save: the loop waits"].append(perf_counter() - begun)
                saving.result()
                self.samples["dcp.async_save: until it is written"].append(perf_counter() - begun)
            else:
                save(state, checkpoint_id=place, process_group=self.group)
                self.samples["dcp.save: the loop waits, and it is written"].append(perf_counter() - begun)


class Measured(Orchestrator):
    """Tells the probe how long the loop was in taking a snapshot."""

    turns: Turns

    def _save(self, *arguments: Any, **named: Any) -> None:
        begun = perf_counter()
        super()._save(*arguments, **named)
        self.turns.took_snapshot(perf_counter() - begun)


def train(folder: Path, layers: int, count: int) -> None:
    """Trains, as one of the ranks."""
    samples: Samples = defaultdict(list)
    turns = Turns(folder, count, samples)
    config = TrainingConfig(
        max_steps=10_000, runs_dir=folder, accelerator="fsdp", accelerator_params={"wrap": ["Linear"]}, live="off",
        snapshots=SnapshotsConfig(every_epochs=None, every_seconds=None, consolidate="never"),
    )  # fmt: skip
    run = Measured(Large(layers), [torch.ones(1, WIDTH)] * 10_000, config, callbacks=[turns])
    run.turns = turns
    run.run()
    if run.accelerator.is_main_process:
        (folder / "samples.json").write_text(json.dumps(samples))


def main() -> None:
    """Launches the ranks, and writes the table."""
    options = parser(__doc__)
    options.add_argument("--folder", help="where the snapshots go; the folder for temporary files by default")
    options.add_argument("--rank-of", help="(for the ranks)")
    chosen = options.parse_args()
    layers, count = (LAYERS_SHORT, SNAPSHOTS_SHORT) if chosen.short else (LAYERS, SNAPSHOTS)
    if chosen.rank_of:
        train(Path(chosen.rank_of), layers, count)
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        program = ["-m", "benchmarks.snapshot_sharded", "--rank-of", folder, *(["--short"] if chosen.short else [])]
        subprocess.run([*launcher, *program], check=True)
        samples: Samples = json.loads((Path(folder) / "samples.json").read_text())
    figures: list[Figure] = [
        summarise(name, "ms", [1e3 * value for value in samples[name]], note=f"first {1e3 * samples[name][0]:,.0f} ms")
        for name in sorted(samples)
    ]
    report(
        "snapshot_sharded",
        f"A snapshot of a model that {RANKS} gloo ranks share, beside torch.distributed.checkpoint, in milliseconds.",
        figures,
        save=not chosen.no_save,
        settings={"parameters": parameters(layers), "ranks": RANKS, "snapshots": count},
    )


if __name__ == "__main__":
    main()
