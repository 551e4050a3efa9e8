"""The same script steered by others, each as its own documentation has it, against the script by hand.

Like everywhere here the two take turns in a fresh process. What a peer reports is what it takes: OnTheFly its own seven
values of each step. Its dashboard is a window of VS Code; without one it keeps in memory what it would send.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Figure, slower_by
from benchmarks.control_script import BATCH_SIZE, batches, by_hand, network
from benchmarks.pairs import IterableLane, Lane, alternate

__all__ = ["measure"]

BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 200, 4, 30, 4
ABSENT = {
    "WeightsLab": (
        "not run. Tried: 2.0.3, the newest, and every earlier one wants torch 2.9 at most; installed past that, its "
        "import needs torchvision, whose package needs CUDA beside torch 2.13. Its import also fetches a program of "
        "180 MB from npm, and `serve()` starts that program as a server and opens a port to every network: nothing "
        "that a benchmark should do to the machine of whoever runs it"
    )
}


def measure(short: bool) -> list[Figure]:
    """Returns the figures."""
    figures = []
    for name, package in (("OnTheFly", "onthefly-ai"),):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            figures.append(Figure(f"{name}: slower by", "%", note="not installed: see benchmarks/requirements.txt"))
            continue
        taken = _in_fresh_process(name, PAIRS_SHORT if short else PAIRS)
        figures.append(slower_by(f"{name} {version}", taken, BLOCK, note="; no dashboard is connected"))
    return [*figures, *(Figure(f"{name}: slower by", "%", note=why) for name, why in ABSENT.items())]


def _in_fresh_process(name: str, pairs: int) -> Any:
    """Returns how long each pair of blocks took. The folder is a temporary one: a peer may write into it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "benchmarks.control_peers", name, str(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own -----------------------------------------------------------------------------------------


class _Loader:
    """A lane for those who ask a loader what it loads."""

    batch_size = BATCH_SIZE

    def __init__(self, lane: Lane) -> None:
        self.dataset = range(len(lane) * BATCH_SIZE)
        self._lane = lane

    def __len__(self) -> int:
        return len(self._lane)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._lane)  # type: ignore[call-overload, no-any-return]


def onthefly(lane: Lane) -> None:
    """Its `Trainer`, which is what its README gives to those who have none."""
    from onthefly import Trainer

    model = network()
    Trainer(project="benchmark", run_name="benchmark", max_epochs=1).fit(
        model=model,
        optimizer=torch.optim.Adam(model.parameters()),
        loss_fn=nn.MSELoss(),
        train_loader=_Loader(lane),
        device="cpu",
        grad_clip_norm=None,  # the script by hand clips nothing
    )


CONTESTANTS: dict[str, Callable[[Lane], None]] = {"OnTheFly": onthefly}


def _measure_here(name: str, pairs: int) -> list[Any]:
    torch.set_num_threads(1)
    data = batches()
    hand, other = (IterableLane(data, BLOCK, pairs + WARM_UP + 1) for _ in range(2))
    hand.start(by_hand)
    other.start(CONTESTANTS[name])
    return alternate(hand, other, pairs, WARM_UP)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = _measure_here(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(measured))
