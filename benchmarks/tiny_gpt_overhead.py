"""What the engine costs where a step takes as long as steps do: a small language model on real text.

TinyGPT (4 layers, width 128, 4 x 128 bytes, AdamW, one thread) is trained by the loop written by hand and by Aetheria
with `run.db`, metrics every 10 steps and the progress bar, in turns of a single step (`pairs.py`). The differences are
given as a share of the step by hand. Where the tensors of each happen to lie in memory moves a step by more than what
is looked for, and stays as it is for the life of a process: several fresh processes are measured.

    python -m benchmarks.tiny_gpt_overhead [--short]
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from aetheria.plugins.data.text import TextData
from aetheria.plugins.models.tiny_gpt import TinyGPT
from benchmarks.common import parser, report, summarise
from benchmarks.contestants import train_with_aetheria
from benchmarks.pairs import IterableLane, SequenceLane, alternate

BATCHES, BATCH_SIZE, WARM_UP = 64, 4, 6
ROUNDS, PAIRS, PAIRS_SHORT = 10, 120, 8
TARGET = 0.5  # percent of a step, with logging on


def model() -> TinyGPT:
    """Returns the model, with the same weights for both."""
    torch.manual_seed(0)
    return TinyGPT()


def by_hand(batches: Iterable[Any], build: Callable[[], TinyGPT] = model) -> None:
    """The same training, written down."""
    gpt = build()
    optimizer = gpt.configure_optimizers().optimizer
    for batch in batches:
        optimizer.zero_grad()
        loss = gpt.training_step(batch)["loss"]
        loss.backward()
        optimizer.step()


def text(batch_size: int = BATCH_SIZE) -> list[Any]:
    """Returns the first whole batches of the text, made beforehand."""
    data = TextData(batch_size=batch_size)
    data.setup()
    torch.manual_seed(0)
    batches = itertools.islice(data.train_dataloader(), BATCHES)
    return [batch for batch in batches if len(batch[0]) == batch_size]


def one_round(pairs: int) -> list[list[tuple[float, float]]]:
    """Returns seconds, [pairs, (by hand, ours), (wall, processor)], as one process finds them."""
    torch.set_num_threads(1)  # the threads of whoever waits would spin, and take their time from the other
    batches, turns = text(), pairs + WARM_UP + 1
    hand, ours = IterableLane(batches, 1, turns), SequenceLane(batches, 1, turns)
    hand.start(by_hand)
    ours.start(lambda lane: train_with_aetheria(model(), lane, progress_bar=True))
    return [[tuple(turn) for turn in pair] for pair in alternate(hand, ours, pairs, WARM_UP)]


def main() -> None:
    """Measures both and writes the table."""
    chosen = parser(__doc__).parse_args()
    rounds, pairs = (1, PAIRS_SHORT) if chosen.short else (ROUNDS, PAIRS)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        found = [processes.submit(one_round, pairs).result() for _ in range(rounds)]
    taken = np.array(found) * 1e3  # [rounds, pairs, (by hand, ours), (wall, processor)], ms
    step, processor_step = np.median(taken[:, :, 0], axis=(0, 1))
    difference, processor_difference = np.moveaxis(taken[:, :, 1] - taken[:, :, 0], -1, 0)
    note = f"by hand {step:.1f} ms a step"
    of_rounds = 100 * np.median(difference, axis=1) / step
    report(
        "tiny_gpt_overhead",
        "Time that a TinyGPT step takes beyond the same loop written by hand, with run.db and progress bar.",
        [
            summarise("wall time, share of a step", "%", 100 * difference.ravel() / step, TARGET, note),
            summarise(
                "processor time of the training thread, share of a step",
                "%",
                100 * processor_difference.ravel() / processor_step,
                TARGET,
            ),
            summarise("wall time, share of a step, medians of the rounds", "%", of_rounds, TARGET),
            summarise("wall time", "ms", difference.ravel(), note=note),
            summarise("processor time of the training thread", "ms", processor_difference.ravel()),
        ],
        save=not chosen.no_save,
        settings={"rounds": rounds, "pairs_in_a_round": pairs, "warm_up_pairs": WARM_UP, "threads": 1},
    )


if __name__ == "__main__":
    main()
