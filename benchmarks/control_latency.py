"""How long a command takes: from the call in one process to the applied outcome in the same hands.

On its way lie the hub and its database, JetStream's disk, the sidecar, the next boundary of the training, the journal's
disk, and all of it back. `created` and `time` in command and outcomes say how long each stretch took.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np

from aetheria.client import connect
from aetheria.client.sync import Run
from aetheria.control.journal import read_journal
from aetheria.protocol import Outcome
from benchmarks.common import Figure, summarise
from benchmarks.control_stage import Stage, connected_run, quantile, stage

__all__ = ["measure"]

COMMANDS, COMMANDS_SHORT, WARM_UP = 400, 30, 20
PAUSE = 0.01  # seconds between two commands, at most
SILENCE, ALONE, ALONE_SHORT = 5.5, 6, 1  # seconds before a command that nobody expects; how many of those


def measure(short: bool) -> list[Figure]:
    """Returns the figures."""
    with (
        stage() as hub,
        hub.process("-m", "benchmarks.control_script", str(hub.home / "runs")),
        connect(hub.address.url, hub.address.operator_token) as client,
    ):
        run = connected_run(client)
        for number in range(WARM_UP):
            run.set(value=float(number))
        figures = _figures(hub, run, COMMANDS_SHORT if short else COMMANDS)
        return [*figures, _alone(run, ALONE_SHORT if short else ALONE)]


def _figures(hub: Stage, run: Run, count: int) -> list[Figure]:
    chance = random.Random(0)
    taken: list[float] = []
    returned: dict[str, float] = {}
    outcomes: list[Outcome] = []
    for number in range(count):
        begun = time.perf_counter()
        outcomes.append(run.set(value=number / count, reason="benchmark"))
        taken.append(time.perf_counter() - begun)
        returned[outcomes[-1].command] = time.time()
        time.sleep(chance.uniform(0.0, PAUSE))  # or all of them would begin just behind a boundary
    step = (outcomes[-1].time - outcomes[0].time) / (outcomes[-1].step - outcomes[0].step)
    milliseconds = 1e3 * np.array(taken)
    note = f"a step takes {1e3 * step:.1f} ms; longest {milliseconds.max():,.0f} ms"
    return [
        summarise("command to applied, less a step: p50", "ms", milliseconds - 1e3 * step, 10.0, note),
        quantile("command to applied, less a step: p99", "ms", milliseconds - 1e3 * step, 0.99, 50.0),
        *_stretches(hub.home / "runs" / run.id, returned),
    ]


def _alone(run: Run, count: int) -> Figure:
    """Returns what a command takes when there has been none for a while: the sidecar then looks less often."""
    taken = []
    for number in range(count):
        time.sleep(SILENCE)
        begun = time.perf_counter()
        run.set(value=-float(number))
        taken.append(1e3 * (time.perf_counter() - begun))
    return summarise(f"the same after {SILENCE:g} s of silence, with the step", "ms", taken)


def _stretches(folder: Path, returned: dict[str, float]) -> list[Figure]:
    """Returns where the time went, as far as commands and outcomes say when they were made."""
    there, carried_out, back = [], [], []
    accepted = {}
    created = {}
    for entry in read_journal(folder / "journal.jsonl"):
        outcome = entry.outcome
        if outcome.command not in returned:
            continue
        if entry.command is not None:
            created[outcome.command] = entry.command.created
        if outcome.state == "accepted":
            accepted[outcome.command] = outcome.time
        elif outcome.state == "applied":
            there.append(1e3 * (accepted[outcome.command] - created[outcome.command]))
            carried_out.append(1e3 * (outcome.time - accepted[outcome.command]))
            back.append(1e3 * (returned[outcome.command] - outcome.time))
    return [
        summarise(
            "of that: until the boundary at which it is accepted", "ms", there, note="a step is half of one more"
        ),
        summarise("of that: journalled and carried out", "ms", carried_out),
        summarise("of that: until the caller has the outcome", "ms", back, note="journalled once more, first"),
    ]
