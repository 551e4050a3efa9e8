"""What the engine costs where a step takes as long as steps do: a small language model on real text.

TinyGPT (4 layers, width 128, 16 x 128 bytes, AdamW, one thread) is trained by the loop written by hand and by Aetheria
with `run.db`, metrics every 10 steps and the progress bar, in turns of a single step (`pairs.py`). The differences are
given as a share of the step by hand.

    python -m benchmarks.tiny_gpt_overhead [--short]
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from aetheria.plugins.data.text import TextData
from aetheria.plugins.models.tiny_gpt import TinyGPT
from benchmarks.common import parser, report, summarise
from benchmarks.contestants import train_with_aetheria
from benchmarks.pairs import IterableLane, Lane, SequenceLane, alternate

BATCHES, WARM_UP, PAIRS, PAIRS_SHORT = 64, 6, 400, 8
TARGET = 0.5  # percent of a step, with logging on


def model() -> TinyGPT:
    """Returns the model, with the same weights for both."""
    torch.manual_seed(0)
    return TinyGPT()


def by_hand(batches: Lane) -> None:
    """The same training, written down."""
    gpt = model()
    optimizer = gpt.configure_optimizers().optimizer
    for batch in batches:
        optimizer.zero_grad()
        loss = gpt.training_step(batch)["loss"]
        loss.backward()
        optimizer.step()


def text() -> list[Any]:
    """Returns the first batches of the text, made beforehand."""
    data = TextData()
    data.setup()
    torch.manual_seed(0)
    return list(itertools.islice(data.train_dataloader(), BATCHES))


def main() -> None:
    """Measures both and writes the table."""
    chosen = parser(__doc__).parse_args()
    pairs = PAIRS_SHORT if chosen.short else PAIRS
    torch.set_num_threads(1)  # the threads of whoever waits would spin, and take their time from the other
    batches, turns = text(), pairs + WARM_UP + 1
    hand, ours = IterableLane(batches, 1, turns), SequenceLane(batches, 1, turns)
    hand.start(by_hand)
    ours.start(lambda lane: train_with_aetheria(model(), lane, progress_bar=True))
    taken = np.array(alternate(hand, ours, pairs, WARM_UP)) * 1e3  # [pairs, (by hand, ours), (wall, processor)], ms
    step, _processor_step = np.median(taken[:, 0], axis=0)
    difference, processor_difference = (taken[:, 1] - taken[:, 0]).T
    note = f"by hand {step:.1f} ms a step"
    report(
        "tiny_gpt_overhead",
        "Time that a TinyGPT step takes beyond the same loop written by hand, with run.db and progress bar.",
        [
            summarise("wall time, share of a step", "%", 100 * difference / step, TARGET, note),
            summarise("wall time", "ms", difference, note=note),
            summarise("processor time of the training thread", "ms", processor_difference),
        ],
        save=not chosen.no_save,
        settings={"steps_in_a_block": 1, "pairs": pairs, "warm_up_pairs": WARM_UP, "threads": 1},
    )


if __name__ == "__main__":
    main()
