"""What a Weavelet costs the training: a step of 2 ms with and without it, its calls alone, and a sidecar that hangs.

Everything is measured with a hub that listens, each figure in a process of its own; what is compared takes turns.

Half a percent of a step is less than what two models differ by in one process, because their weights lie elsewhere
in memory. So steps with and without a Weavelet are those of one model in one loop, in blocks of a fifth of a second;
where there is none, its sidecar stands still, and with it whatever the hub would do about this run. It is as often as
that that a sidecar sends metrics: in shorter blocks it would have more to do than it has.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from time import perf_counter, perf_counter_ns, thread_time
from typing import Any

import numpy as np
import torch
from torch import nn

from aetheria.client import connect
from aetheria.control.weavelet import Weavelet
from benchmarks.common import Figure, slower_by, summarise
from benchmarks.control_script import METRICS, batches, metrics_of, network
from benchmarks.control_stage import Stage, connected_run, cores, quantile, stage
from benchmarks.pairs import Turn

__all__ = ["BLOCK", "PAIRS", "PAIRS_SHORT", "WARM_UP", "measure"]

BLOCK, WARM_UP, PAIRS, PAIRS_SHORT = 80, 10, 600, 5
CALLS, ROUNDS, ROUNDS_SHORT = 20_000, 200, 20  # of an idle `step`
LOGS, LOGS_SHORT = 2000, 100
STEPS, STOPS, STOPS_SHORT = 200, 12, 2  # how many steps a 99th percentile is taken of, how often the sidecar stops


def measure(short: bool) -> list[Figure]:
    """Returns the figures."""
    with stage() as hub:
        pairs = {
            count: _in_fresh_process(hub, f"pairs of {count}", PAIRS_SHORT if short else PAIRS)
            for count in (1, METRICS)
        }
        idle = _in_fresh_process(hub, "idle", ROUNDS_SHORT if short else ROUNDS)
        log = _in_fresh_process(hub, "log", LOGS_SHORT if short else LOGS)
        stopped = _in_fresh_process(hub, "stopped", STOPS_SHORT if short else STOPS)
    differences = np.array([np.quantile(without, 0.99) - np.quantile(steps, 0.99) for steps, without in stopped])
    usual = np.quantile(np.array(stopped)[:, 0], 0.99)
    sidecar, hub_cores, messages, rate = log["cores"]
    beside = f"beside it, at {rate:.0f} steps a second: sidecar {sidecar:.3f} cores, hub {hub_cores:.3f}, message "
    return [
        slower_by("Weavelet, the loss of each step", pairs[1], BLOCK, 0.5),
        slower_by(f"Weavelet, {METRICS} metrics of each step", pairs[METRICS], BLOCK, 0.5),
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


def _pairs(metrics: int, weavelet: Weavelet, pairs: int, _processes: list[int]) -> list[tuple[Turn, Turn]]:
    loop = _Loop(weavelet, metrics)
    sidecar = _sidecar(weavelet)
    taken = []
    for number in range(WARM_UP + pairs):
        turns = {}
        for reports in (False, True) if number % 2 == 0 else (True, False):
            os.kill(sidecar, signal.SIGCONT if reports else signal.SIGSTOP)
            begun = Turn(perf_counter(), thread_time())
            loop.block(reports)
            turns[reports] = Turn(perf_counter() - begun.seconds, thread_time() - begun.processor_seconds)
        taken.append((turns[False], turns[True]))
    os.kill(sidecar, signal.SIGCONT)
    return taken[WARM_UP:]


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

    def __init__(self, weavelet: Weavelet, metrics: int = METRICS) -> None:
        self.weavelet = weavelet
        self.data = batches()
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.names = [f"metric {number}" for number in range(metrics)]
        self.number = 0

    def step(self) -> dict[str, float]:
        """Takes a step and returns what a script reports of it."""
        features, targets = self.data[self.number % len(self.data)]
        self.number += 1
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(features), targets)
        loss.backward()
        self.optimizer.step()
        return metrics_of(loss, self.names)

    def block(self, reports: bool) -> None:
        """Takes steps; tells the Weavelet of each of them, or nobody."""
        for _ in range(BLOCK):
            metrics = self.step()
            if reports:
                self.weavelet.step(metrics)

    def steps(self, count: int) -> list[float]:
        """Takes steps with the Weavelet; returns how long each took, in milliseconds."""
        taken = []
        for _ in range(count):
            begun = perf_counter()
            self.weavelet.step(self.step())
            taken.append(1e3 * (perf_counter() - begun))
        return taken


def _log(weavelet: Weavelet, count: int, processes: list[int]) -> dict[str, Any]:
    loop = _Loop(weavelet)
    loop.steps(STEPS)
    times = []

    def work() -> None:
        for _ in range(count):
            metrics = loop.step()
            begun = perf_counter_ns()
            weavelet.log(metrics)
            times.append((perf_counter_ns() - begun) / 1e3)
            weavelet.step()

    used, seconds = cores([_sidecar(weavelet), *processes], work)
    return {"times": times, "cores": [*used, count / seconds]}


def _stopped(weavelet: Weavelet, count: int, _processes: list[int]) -> list[list[list[float]]]:
    """Returns how long steps take, [rounds, (sidecar running, sidecar stopped), steps]."""
    loop = _Loop(weavelet)
    loop.steps(STEPS)
    sidecar = _sidecar(weavelet)
    taken = []
    for number in range(count):
        found: dict[str, list[float]] = {}
        for state in ("running", "stopped") if number % 2 == 0 else ("stopped", "running"):
            os.kill(sidecar, signal.SIGSTOP if state == "stopped" else signal.SIGCONT)
            loop.steps(STEPS // 2)  # one that goes on again has to catch up first
            found[state] = loop.steps(STEPS)
        taken.append([found["running"], found["stopped"]])
    os.kill(sidecar, signal.SIGCONT)
    return taken


def _sidecar(weavelet: Weavelet) -> int:
    sidecar = weavelet._link.sidecar
    if sidecar is None:
        raise RuntimeError("the sidecar is gone: its log in the run folder says why.")
    return int(sidecar)


_KINDS: dict[str, Callable[[Weavelet, int, list[int]], Any]] = {
    "pairs of 1": functools.partial(_pairs, 1),
    f"pairs of {METRICS}": functools.partial(_pairs, METRICS),
    "idle": _idle,
    "log": _log,
    "stopped": _stopped,
}


def _measure_here(what: str, count: int, runs: Path, processes: list[int]) -> Any:
    torch.set_num_threads(1)
    with Weavelet(run=what.replace(" ", "-"), runs_dir=runs) as weavelet, connect() as client:
        connected_run(client)
        return _KINDS[what](weavelet, count, processes)


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), list(map(int, sys.argv[4:])))))
