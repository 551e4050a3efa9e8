"""What a step costs beyond the work: each framework's loop around the same tiny model, against the loop by hand.

An MLP (10-64-1, batch 32, Adam, one thread) is so small that the framework is what takes the time. For each contestant
a fresh process runs it and the hand-written loop in turns of 200 steps (`pairs.py`), and takes the difference pair by
pair. The median leaves out what happens in few blocks (a drawing of the bars, a commit to `run.db`); the mean has it.

    python -m benchmarks.engine_overhead [--short] [--only "Aetheria bare" ...]
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import Figure, parser, report, summarise
from benchmarks.contestants import CONTESTANTS, FEATURES, by_hand, lane_of
from benchmarks.pairs import IterableLane, Turn, alternate

BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 200, 10, 300, 20
BATCH_SIZE, BATCHES = 32, 64
TARGET = 20.0  # microseconds a step, with logging on


def batches() -> list[tuple[Tensor, Tensor]]:
    """Returns what is trained on: features [32, 10] and targets [32, 1], float32."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH_SIZE, FEATURES, generator=generator), torch.randn(BATCH_SIZE, 1, generator=generator))
        for _ in range(BATCHES)
    ]


def measure(name: str, pairs: int) -> list[list[Turn]]:
    """Returns how long each pair of blocks took, by hand and by a contestant. For a fresh process."""
    torch.set_num_threads(1)
    made, turns = batches(), pairs + WARM_UP + 1
    hand, other = IterableLane(made, BLOCK, turns), lane_of(name, made, BLOCK, turns)
    hand.start(by_hand)
    other.start(CONTESTANTS[name])
    return [list(pair) for pair in alternate(hand, other, pairs, WARM_UP)]


def in_fresh_process(name: str, pairs: int) -> NDArray[np.float64] | None:
    """Returns microseconds a step, [pairs, (by hand, contestant), (wall, processor)]; None if it is not installed."""
    command = [sys.executable, "-m", "benchmarks.engine_overhead", "--measure", name, "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return np.array(json.loads(done.stdout.splitlines()[-1])) / BLOCK * 1e6
    if "ModuleNotFoundError: No module named" in done.stderr:
        return None
    raise RuntimeError(f"{name} failed:\n{done.stderr}")


def main() -> None:
    """Measures every contestant and writes the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    options.add_argument("--pairs", type=int, help=f"pairs of blocks; {PAIRS} by default")
    options.add_argument("--measure", help="measure one contestant in this process and print the seconds as JSON")
    chosen = options.parse_args()
    pairs = chosen.pairs or (PAIRS_SHORT if chosen.short else PAIRS)
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, pairs)))
        return
    figures = []
    for name in chosen.only:
        taken = in_fresh_process(name, pairs)
        if taken is None:
            figures.append(Figure(name, "µs", note="not installed: see benchmarks/requirements.txt"))
            continue
        hand, processor = np.median(taken[:, 0, 0]), np.median(taken[:, 1, 1] - taken[:, 0, 1])
        note = f"by hand {hand:.0f} µs; in processor time {processor:+.1f} µs"
        target = TARGET if name.startswith("Aetheria") else None
        figures.append(summarise(name, "µs", taken[:, 1, 0] - taken[:, 0, 0], target, note))
        print(f"{name}: {figures[-1].median:+.1f} µs, {note}", flush=True)
    report(
        "engine_overhead",
        "Time a step takes beyond the same loop written by hand, in microseconds (MLP 10-64-1, batch 32, Adam).",
        figures,
        save=not chosen.no_save,
        settings={"steps_in_a_block": BLOCK, "pairs": pairs, "warm_up_pairs": WARM_UP, "threads": 1},
    )


if __name__ == "__main__":
    main()
