"""One contestant in a fresh process, told over standard input what to do.

    python -m benchmarks.data_peers_process TASK

The task is JSON. It imports, prints `ready`, waits for a line, opens the data, reads, prints what it has measured, and
waits for another line, so that the process that has started it can look at its memory before it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks.data_peers_contestants import CONTESTANTS, import_streaming
from benchmarks.data_peers_samples import fold, numbers_in
from benchmarks.data_peers_tree import processor_seconds

__all__ = ["Task"]


@dataclass
class Task:
    """What the process is to do.

    Attributes:
        contestant: its name.
        kind: of the samples.
        folder: with the data.
        workers: how many.
        batch_size: samples in a batch of this rank.
        seconds: for how long to read, after the first batch.
        collect: where the numbers of all samples go, as a NumPy file; nothing is measured then.
        batches: how many to read at most.
        state_after: after how many batches to ask for the state.
        state_out: where it goes.
        state_in: where to go on.
        rank: of this process.
        ranks: of how many.
        meeting: port of this machine at which they meet.
    """

    contestant: str
    kind: str
    folder: str
    workers: int
    batch_size: int
    seconds: float = 0.0
    collect: str = ""
    batches: int | None = None
    state_after: int = 0
    state_out: str = ""
    state_in: str = ""
    rank: int = 0
    ranks: int = 1
    meeting: int = 0

    def text(self) -> str:
        """Returns it as one argument of a command line."""
        return json.dumps(asdict(self))


def work(task: Task, out: TextIO) -> None:
    """Does it, and prints what it has found."""
    contestant = CONTESTANTS[task.contestant]
    for name in contestant.modules:
        import_streaming() if name == "streaming" else importlib.import_module(name)
    state = torch.load(task.state_in, weights_only=True) if task.state_in else None
    if task.ranks > 1:
        torch.distributed.init_process_group("gloo")
    if contestant.package == "streaming":  # as its documentation wants it before a run, on every rank
        importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    print("ready", file=out, flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    opened = contestant.open(task.kind, Path(task.folder), task.workers, task.batch_size, state)
    first = next(opened.batches)
    count = fold(first)
    arrived = time.perf_counter()
    found: dict[str, Any] = {"first": arrived - begun}
    numbers = [numbers_in(first)]
    if task.collect:
        taken = 1
        while True:
            if taken == task.state_after and opened.state is not None:
                torch.save(opened.state(taken), task.state_out)
            if taken == task.batches or (batch := next(opened.batches, None)) is None:
                break
            taken += 1
            numbers.append(numbers_in(batch))
        np.save(task.collect, np.concatenate(numbers))
        found["batches"] = taken
    elif task.seconds:
        used = processor_seconds(os.getpid())
        before, arrived = count, time.perf_counter()
        deadline = arrived + task.seconds
        now = arrived
        for batch in opened.batches:
            count += fold(batch)
            if (now := time.perf_counter()) > deadline:
                break
        found |= {"seconds": now - arrived, "samples": count - before}
        found["processor"] = processor_seconds(os.getpid()) - used
    print(json.dumps(found), file=out, flush=True)
    sys.stdin.readline()


def _work_here() -> None:
    """Keeps standard output for what is measured: contestants print too."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    work(Task(**json.loads(sys.argv[1])), out)


if __name__ == "__main__":
    _work_here()
