"""What a Weavelet costs the training: a step of 2 ms with and without it, its calls alone, and a sidecar that hangs.

Everything is measured with a hub that listens, each figure in a process of its own; the contestants take turns.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import nn

from aetheria.client import connect
from aetheria.control.weavelet import Weavelet
from benchmarks.common import Figure, slower_by, summarise
from benchmarks.control_script import METRICS, batches, by_hand, network, watched
from benchmarks.control_stage import Stage, connected_run, cores, quantile, stage
from benchmarks.pairs import IterableLane, alternate

__all__ = ["BLOCK", "PAIRS", "PAIRS_SHORT", "WARM_UP", "measure"]

BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 200, 4, 70, 4
CALLS, ROUNDS, ROUNDS_SHORT = 20_000, 200, 20  # of an idle `step`
LOGS, LOGS_SHORT = 2000, 100
STOPS, STOPS_SHORT = 12, 2  # how often the sidecar is stopped


def measure(short: bool) -> list[Figure]:
    """Returns the figures."""
    with stage() as hub:
        pairs = _in_fresh_process(hub, "pairs", PAIRS_SHORT if short else PAIRS)
        idle = _in_fresh_process(hub, "idle", ROUNDS_SHORT if short else ROUNDS)
        log = _in_fresh_process(hub, "log", LOGS_SHORT if short else LOGS)
        stopped = _in_fresh_process(hub, "stopped", STOPS_SHORT if short else STOPS)
    differences = np.array([np.quantile(without, 0.99) - np.quantile(steps, 0.99) for steps, without in stopped])
    usual = np.quantile(np.array(stopped)[:, 0], 0.99)
    sidecar, hub_cores, messages, rate = log["cores"]
    beside = f"beside it, at {rate:.0f} steps a second: sidecar {sidecar:.3f} cores, hub {hub_cores:.3f}, message "
    return [
        slower_by("Weavelet, 20 metrics a step", pairs, BLOCK, 0.5),
        summarise("step() with nothing to do", "µs", idle, 0.2),
        summarise("log() of 20 floats, between steps: p50", "µs", log["times"], 10.0, f"{beside}server {messages:.3f}"),
        quantile(
            "log() of 20 floats, between steps: p99",
            "µs",
            log["times"],
            0.99,
            note="once a second: the sidecar is seen to",
        ),
        summarise("p99 of a step: sidecar stopped, less running", "ms", differences, note=f"p99 is {usual:.2f} ms"),
    ]


def _in_fresh_process(hub: Stage, what: str, count: int) -> Any:
    arguments = (what, str(count), str(hub.home / what), str(hub.hub.pid), str(hub.messages))
    with hub.process("-m", "benchmarks.control_overhead", *arguments) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"measuring '{what}' failed: what it printed says why.")
    return json.loads(said.splitlines()[-1])


# --- in a process of its own -----------------------------------------------------------------------------------------


def _pairs(weavelet: Weavelet, pairs: int, _processes: list[int]) -> list[Any]:
    data = batches()
    hand, other = (IterableLane(data, BLOCK, pairs + WARM_UP + 1) for _ in range(2))
    hand.start(by_hand)
    other.start(lambda lane: watched(lane, weavelet))
    return alternate(hand, other, pairs, WARM_UP)


def _idle(weavelet: Weavelet, rounds: int, _processes: list[int]) -> list[float]:
    """Returns microseconds a call, in each round, the loop around it taken off."""
    step = weavelet.step
    taken = []
    for _ in range(rounds):
        begun = perf_counter()
        for _ in repeat(None, CALLS):
            step()
        middle = perf_counter()
        for _ in repeat(None, CALLS):
            pass
        taken.append((middle - begun - (perf_counter() - middle)) / CALLS * 1e6)
    return taken


class _Loop:
    """Steps one by one."""

    def __init__(self, weavelet: Weavelet) -> None:
        self.weavelet = weavelet
        self.data = batches()
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.names = [f"metric {number}" for number in range(METRICS)]
        self.number = 0

    def step(self) -> float:
        """Takes a step and returns its loss."""
        features, targets = self.data[self.number % len(self.data)]
        self.number += 1
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(features), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def steps(self, count: int) -> list[float]:
        """Takes steps with the Weavelet; returns how long each took, in milliseconds."""
        taken = []
        for _ in range(count):
            begun = perf_counter()
            self.weavelet.step(dict.fromkeys(self.names, self.step()))
            taken.append(1e3 * (perf_counter() - begun))
        return taken


def _log(weavelet: Weavelet, count: int, processes: list[int]) -> dict[str, Any]:
    loop = _Loop(weavelet)
    loop.steps(BLOCK)
    times = []

    def work() -> None:
        for _ in range(count):
            metrics = dict.fromkeys(loop.names, loop.step())
            begun = perf_counter_ns()
            weavelet.log(metrics)
            times.append((perf_counter_ns() - begun) / 1e3)
            weavelet.step()

    used, seconds = cores([_sidecar(weavelet), *processes], work)
    return {"times": times, "cores": [*used, count / seconds]}


def _stopped(weavelet: Weavelet, count: int, _processes: list[int]) -> list[list[list[float]]]:
    """Returns how long steps take, [rounds, (sidecar running, sidecar stopped), steps]."""
    loop = _Loop(weavelet)
    loop.steps(BLOCK)
    sidecar = _sidecar(weavelet)
    taken = []
    for number in range(count):
        found: dict[str, list[float]] = {}
        for state in ("running", "stopped") if number % 2 == 0 else ("stopped", "running"):
            os.kill(sidecar, signal.SIGSTOP if state == "stopped" else signal.SIGCONT)
            loop.steps(BLOCK // 2)  # one that goes on again has to catch up first
            found[state] = loop.steps(BLOCK)
        taken.append([found["running"], found["stopped"]])
    os.kill(sidecar, signal.SIGCONT)
    return taken


def _sidecar(weavelet: Weavelet) -> int:
    sidecar = weavelet._link.sidecar
    if sidecar is None:
        raise RuntimeError("the sidecar is gone: its log in the run folder says why.")
    return int(sidecar)


_KINDS: dict[str, Callable[[Weavelet, int, list[int]], Any]] = {
    "pairs": _pairs,
    "idle": _idle,
    "log": _log,
    "stopped": _stopped,
}


def _measure_here(what: str, count: int, runs: Path, processes: list[int]) -> Any:
    torch.set_num_threads(1)
    with Weavelet(run=what, runs_dir=runs) as weavelet, connect() as client:
        connected_run(client)
        return _KINDS[what](weavelet, count, processes)


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), list(map(int, sys.argv[4:])))))
