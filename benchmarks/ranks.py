"""What a framework adds to a step of two ranks, beyond plain `DistributedDataParallel`.

Two processes on this machine, joined by gloo, train an MLP (64-208-208-208-1, 64 samples on each rank, Adam, one thread
each) on the same pre-made batches. For each contestant two fresh processes train it and the loop written by hand around
DDP, in turns of a few steps (`pairs.py`), in the same order on both ranks, and all ranks begin a turn together. A turn
has taken as long as it has taken the slower rank. Whoever has not its turn waits at a lock, in no collective.

Aetheria writes `run.db`, exchanges metrics every 10 steps, and agrees on commands. It is given a list, which every rank
reads whole to take its share; the peers and the loop by hand are given their share.

    python -m benchmarks.ranks [--short] [--only Aetheria ...]
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import TCPStore
from torch.nn.parallel import DistributedDataParallel

from aetheria.accelerator import DDPAccelerator
from aetheria.accelerator.ranks import Ranks
from benchmarks.common import Figure, parser, report, slower_by, summarise
from benchmarks.contestants import (
    Regression,
    accelerate,
    by_hand,
    lane_of,
    lightning_bare,
    lightning_logging,
    train_with_aetheria,
)
from benchmarks.control_script import BATCH_SIZE, FEATURES, network
from benchmarks.pairs import IterableLane, Lane, alternate

RANKS, BATCHES = 2, 64
BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 50, 4, 120, 4
TARGET = 2.0  # percent of a step
PATIENCE = 1800.0  # seconds that a contestant may take


def plain(batches: Lane) -> None:
    """DDP as its documentation has it."""
    by_hand(batches, lambda: DistributedDataParallel(network()))


def plain_with_views(batches: Lane) -> None:
    """DDP with the option that spares it two copies of the gradients."""
    by_hand(batches, lambda: DistributedDataParallel(network(), gradient_as_bucket_view=True))


def ours(batches: Lane) -> None:
    """The same, trained by Aetheria."""
    train_with_aetheria(
        Regression(network),
        batches,
        accelerator=DDPAccelerator(device="cpu"),
        max_steps=len(batches) // RANKS,
        batch_size=BATCH_SIZE,
        runs_dir=os.environ["RUNS"],
        live="off",
    )


CONTESTANTS: dict[str, Callable[[Lane], None]] = {
    "plain DDP again": plain,
    "plain DDP with gradient_as_bucket_view": plain_with_views,
    "Aetheria": ours,
    "Accelerate": lambda batches: accelerate(batches, network),
    "Lightning bare": lambda batches: lightning_bare(batches, network, devices=RANKS, strategy="ddp"),
    "Lightning with self.log and CSVLogger": lambda batches: lightning_logging(
        batches, network, devices=RANKS, strategy="ddp"
    ),
}


def measure(name: str, pairs: int) -> list[Any]:
    """Returns how long each pair of blocks took this rank, plain DDP and a contestant. For a fresh process."""
    torch.set_num_threads(1)
    ranks = Ranks.join("gloo")
    group = dist.new_group(backend="gloo")  # the contestants have their own
    generator = torch.Generator().manual_seed(ranks.where.rank)
    made = [
        tuple(torch.randn(BATCH_SIZE, width, generator=generator) for width in (FEATURES, 1)) for _ in range(BATCHES)
    ]
    turns = pairs + WARM_UP + 1
    reads = RANKS if name == "Aetheria" else 1  # batches in a step
    hand, other = IterableLane(made, BLOCK, turns), lane_of(name, made, BLOCK * reads, turns)
    hand.start(plain)
    other.start(CONTESTANTS[name])
    return alternate(hand, other, pairs, WARM_UP, ready=lambda: dist.all_reduce(torch.zeros(1), group=group))


def in_fresh_processes(name: str, pairs: int) -> NDArray[np.float64] | None:
    """Returns seconds, [pairs, (plain, contestant), (wall of the slower rank, processor of both, halved)].

    None if the contestant is not installed.
    """
    package = name.split()[0].lower()
    if package in ("accelerate", "lightning") and importlib.util.find_spec(package) is None:
        return None
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "benchmarks.ranks", "--measure", name, "--pairs", str(pairs)]
    usual = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    usual |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        environments = [
            os.environ | usual | {"RANK": str(rank), "LOCAL_RANK": str(rank), "RUNS": folder} for rank in range(RANKS)
        ]
        ranks = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for environment in environments
        ]
        try:
            said = [process.communicate(timeout=PATIENCE)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"{name} failed: what its ranks have printed says why.")
    taken = np.array([json.loads(text.splitlines()[-1]) for text in said])
    return np.stack([taken[..., 0].max(axis=0), taken[..., 1].mean(axis=0)], axis=-1)


def figures_of(name: str, pairs: int) -> list[Figure]:
    """Returns the lines of a contestant: by the clock on the wall, and in processor time."""
    taken = in_fresh_processes(name, pairs)
    if taken is None:
        return [Figure(f"{name}: slower by", "%", note="not installed: see benchmarks/requirements.txt")]
    target = TARGET if name == "Aetheria" else None
    processor = taken[:, :, 1]
    share = 100 * (processor[:, 1] - processor[:, 0]) / np.median(processor[:, 0])
    return [
        slower_by(name, taken, BLOCK, target, hand="plain DDP"),
        summarise(f"{name}: processor time of the training threads, more by", "%", share),
    ]


def main() -> None:
    """Measures every contestant and writes the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    options.add_argument("--pairs", type=int, help=f"pairs of blocks; {PAIRS} by default")
    options.add_argument("--measure", help="measure one contestant as one rank, and print the seconds as JSON")
    chosen = options.parse_args()
    pairs = chosen.pairs or (PAIRS_SHORT if chosen.short else PAIRS)
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, pairs)), flush=True)
        return
    figures: list[Figure] = []
    for name in chosen.only:
        figures += (found := figures_of(name, pairs))
        print(f"{name}: {found[0].note}", flush=True)
    report(
        "ranks",
        "Time that a step of two gloo ranks takes beyond plain DistributedDataParallel, as a share of that "
        f"(MLP {FEATURES}-208-208-208-1, {BATCH_SIZE} samples on each rank, Adam, one thread).",
        figures,
        save=not chosen.no_save and chosen.only == list(CONTESTANTS),
        settings={"ranks": RANKS, "steps_in_a_block": BLOCK, "pairs": pairs, "warm_up_pairs": WARM_UP, "threads": 1},
    )


if __name__ == "__main__":
    main()
