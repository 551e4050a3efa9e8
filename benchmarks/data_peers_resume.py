"""Going on in the middle of an epoch: how soon the next batch is there, and which samples come twice or never.

One process reads a whole epoch, and asks for the state when half of it has come. Others go on from that state, with as
many workers, with another number of them, and as two ranks with half of each batch; the samples are told apart by the
numbers in them. Then fresh processes go on until their first batch only.
"""

from __future__ import annotations

import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_peers_contestants import CONTESTANTS
from benchmarks.data_peers_drive import run
from benchmarks.data_peers_process import Task
from benchmarks.data_peers_samples import KINDS
from benchmarks.data_peers_tree import STILL_CACHED, drop, fill

__all__ = ["WORKERS", "Resumed", "resume"]

WORKERS, OTHER = 2, 1
KIND = "blobs"


@dataclass
class Resumed:
    """What came of going on.

    Attributes:
        first: seconds until the first batch, by page cache, of each round.
        counts: by topology: samples that came again, samples that never came; or what was said instead.
        note: why there is nothing.
    """

    first: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, tuple[int, int] | str] = field(default_factory=dict)
    note: str = ""


def resume(name: str, folder: Path, count: int, rounds: int, say: Callable[[str], None]) -> Resumed:
    """Returns how a contestant goes on at 50 % of the samples of 100 KB.

    Args:
        name: of the contestant.
        folder: with its data.
        count: samples in them.
        rounds: how many times the first batch is waited for, with each page cache.
        say: is told what comes out.
    """
    contestant, result = CONTESTANTS[name], Resumed()
    if not contestant.saves:
        result.note = "cannot go on: it begins the epoch anew"
        return result
    size = KINDS[KIND].batch_size
    half = count // size // 2
    with tempfile.TemporaryDirectory() as temporary:
        state, at_first = str(Path(temporary) / "state"), Path(temporary) / "whole.npy"

        def task(workers: int, batch_size: int = size, **others: Any) -> Task:
            return Task(name, KIND, str(folder), workers, batch_size, **others)

        fill(folder)
        found = run([task(WORKERS, collect=str(at_first), state_after=half, state_out=state)])[0]
        if found.failure or not Path(state).exists():
            result.note = found.failure or "gave no state"
            return result
        before = np.load(at_first)[: half * size]
        topologies = {
            f"{WORKERS} workers": [task(WORKERS, state_in=state)],
            f"{OTHER} worker": [task(OTHER, state_in=state)],
        }
        if contestant.ranks:
            port = _free_port()
            topologies["2 ranks"] = [
                task(1, size // 2, state_in=state, rank=rank, ranks=2, meeting=port) for rank in range(2)
            ]
        for topology, tasks in topologies.items():
            result.counts[topology] = _counted(tasks, before, count, Path(temporary))
            say(f"{name}, saved with {WORKERS} workers, resumed with {topology}: {result.counts[topology]}")
        for cache in ("warm", "cold"):
            for _ in range(rounds):
                if cache == "warm":
                    fill(folder)
                elif (left := drop(folder)) > STILL_CACHED:
                    say(f"{name}: not resumed cold, {100 * left:.0f} % of the files stayed in the page cache")
                    continue
                found = run([task(WORKERS, state_in=state)])[0]
                if not found.failure:
                    result.first.setdefault(cache, []).append(found.values["first"])
    return result


def _counted(tasks: list[Task], before: np.ndarray[Any, Any], count: int, folder: Path) -> tuple[int, int] | str:
    for task in tasks:
        task.collect = str(folder / f"rest-{task.rank}.npy")
        Path(task.collect).unlink(missing_ok=True)
    if failures := [found.failure for found in run(tasks) if found.failure]:
        return f"failed: {failures[0]}"
    after = np.concatenate([np.load(task.collect) for task in tasks])
    times = Counter(before.tolist())
    times.update(after.tolist())
    again = sum(number - 1 for number in times.values())
    return again, count - len(times)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
