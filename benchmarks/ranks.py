"""What the framework adds to a step of two ranks, beyond plain `DistributedDataParallel`.

Two processes on this machine, joined by gloo, train an MLP (64-208-208-208-1, 64 samples on each rank, Adam, one thread
each). In both the loop written by hand around DDP and Aetheria (with `run.db`, metrics of all ranks every 10 steps, and
the agreement on commands) take turns of a few steps (`pairs.py`), in the same order; the figures are the first rank's.

    python -m benchmarks.ranks [--short]
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.nn.parallel import DistributedDataParallel

from aetheria import AetherModel, Orchestrator, TrainingConfig
from aetheria.accelerator import DDPAccelerator
from aetheria.accelerator.ranks import Ranks
from benchmarks.common import parser, report, summarise
from benchmarks.contestants import pace_recorder
from benchmarks.pairs import IterableLane, Lane, SequenceLane, alternate

RANKS, FEATURES, WIDTH, BATCH = 2, 64, 208, 64
BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 50, 4, 120, 4
TARGET = 2.0  # percent of a step


def network() -> nn.Sequential:
    """Returns the model, with the same weights for both."""
    torch.manual_seed(0)
    sizes = [FEATURES, WIDTH, WIDTH, WIDTH]
    hidden = [layer for first, last in itertools.pairwise(sizes) for layer in (nn.Linear(first, last), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 1))


def by_hand(batches: Lane) -> None:
    """DDP as its documentation has it."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.Adam(model.parameters())
    for features, targets in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()
        optimizer.step()


class _Model(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        features, targets = batch
        return {"loss": nn.functional.mse_loss(self.network(features), targets)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def ours(batches: Lane, folder: str) -> None:
    """The same, trained by Aetheria. A list of batches is read by both ranks, each of which takes every other one."""
    pace_recorder(batches)
    config = TrainingConfig(
        max_steps=len(batches) // RANKS, runs_dir=Path(folder), sample_seeding=False, live="off", batch_size=BATCH
    )
    Orchestrator(_Model(), batches, config, DDPAccelerator(device="cpu")).run()


def one_rank(rank: int, port: int, pairs: int, folder: str, answer: Any) -> None:
    """Measures, as one of the ranks."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.set_num_threads(1)
    Ranks.join("gloo")
    generator = torch.Generator().manual_seed(rank)
    made = [
        (torch.randn(BATCH, FEATURES, generator=generator), torch.randn(BATCH, 1, generator=generator))
        for _ in range(64)
    ]
    turns = pairs + WARM_UP + 1
    hand, aetheria = IterableLane(made, BLOCK, turns), SequenceLane(made, BLOCK * RANKS, turns)
    hand.start(by_hand)
    aetheria.start(lambda lane: ours(lane, folder))
    answer.put((rank, [[tuple(turn) for turn in pair] for pair in alternate(hand, aetheria, pairs, WARM_UP)]))


def main() -> None:
    """Measures and writes the table."""
    chosen = parser(__doc__).parse_args()
    pairs = PAIRS_SHORT if chosen.short else PAIRS
    spawn = multiprocessing.get_context("spawn")
    answer: Any = spawn.Queue()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            spawn.Process(target=one_rank, args=(rank, store.port, pairs, folder, answer)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        found = dict(answer.get() for _ in ranks)
        for process in ranks:
            process.join()
    taken = np.array(found[0]) * 1e6 / BLOCK  # [pairs, (by hand, ours), (wall, processor)], microseconds a step
    step, processor_step = np.median(taken[:, 0], axis=0)
    difference, processor_difference = (taken[:, 1] - taken[:, 0]).T
    note = f"by hand {step:,.0f} us a step"
    report(
        "ranks",
        "Time that a step of two gloo ranks takes beyond plain DistributedDataParallel.",
        [
            summarise("wall time, share of a step", "%", 100 * difference / step, TARGET, note),
            summarise("wall time", "µs", difference),
            summarise(
                "processor time of the training thread, share of a step",
                "%",
                100 * processor_difference / processor_step,
            ),
        ],
        save=not chosen.no_save,
        settings={"ranks": RANKS, "steps_in_a_block": BLOCK, "pairs": pairs, "warm_up_pairs": WARM_UP, "threads": 1},
    )


if __name__ == "__main__":
    main()
