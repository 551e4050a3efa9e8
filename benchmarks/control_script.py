"""The script that is steered: plain PyTorch, a step of about 2 ms, and a line more where there is a Weavelet.

`python -m benchmarks.control_script RUNS` trains until somebody stops the run, or the process that started it is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aetheria.control.weavelet import Weavelet

__all__ = ["BATCH_SIZE", "FEATURES", "METRICS", "WIDTH", "batches", "by_hand", "metrics_of", "network", "watched"]

FEATURES, WIDTH, BATCH_SIZE, BATCHES = 64, 208, 64, 16
METRICS = 20  # scalars that a step reports

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Returns the model, with the same weights for everybody."""
    torch.manual_seed(0)
    sizes = (FEATURES, WIDTH, WIDTH, WIDTH)
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 1))


def batches() -> list[Batch]:
    """Returns what is trained on: features [64, 64] and targets [64, 1], float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH_SIZE, FEATURES), (BATCH_SIZE, 1))
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(BATCHES)]  # type: ignore[misc]


def metrics_of(loss: Tensor, names: list[str]) -> dict[str, float]:
    """Returns what a script reports of a step: a new dictionary, of Python's numbers."""
    value = loss.item()
    return dict.fromkeys(names, value)


def by_hand(lane: Iterable[Batch]) -> None:
    """What everybody else is compared with: it reads the loss, as scripts do, and reports it to nobody."""
    names = [f"metric {number}" for number in range(METRICS)]
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for features, targets in lane:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()
        optimizer.step()
        metrics_of(loss, names)


def watched(lane: Iterable[Batch], weavelet: Weavelet) -> None:
    """The same with a Weavelet: `step` ends each step, and reports 20 metrics."""
    names = [f"metric {number}" for number in range(METRICS)]
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for features, targets in lane:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()
        optimizer.step()
        weavelet.step(metrics_of(loss, names))


class _Steerable:
    """What can be set in this script."""

    value = 0.0


def _train(runs: Path) -> None:
    torch.set_num_threads(1)
    weavelet = Weavelet(run="benchmark", runs_dir=runs)
    weavelet.control(_Steerable(), "value")
    parent = os.getppid()

    def endless() -> Any:
        data = batches()
        while not weavelet.should_stop and os.getppid() == parent:
            yield from data

    with weavelet:
        watched(endless(), weavelet)


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
