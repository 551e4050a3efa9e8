"""A hub with its message server in a folder of its own, the processes beside it, and what they cost: from /proc."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aetheria.client.sync import Hub, Run
from aetheria.loom.hub_file import HubAddress, read_hub_file
from benchmarks.common import Figure

__all__ = ["Stage", "connected_run", "cores", "memory", "processor_seconds", "quantile", "stage", "wait_for"]

PATIENCE = 60.0  # seconds that anything may take

Found = TypeVar("Found")


class Stage:
    """A hub that runs.

    Attributes:
        home: what AETHERIA_HOME is for whoever shall find it.
        hub: its process.
        messages: the process of its message server.
        address: where it is.
    """

    def __init__(self, home: Path, hub: subprocess.Popen[bytes]) -> None:
        self.home = home
        self.hub = hub
        self.address = wait_for(self._answer, "the hub did not start")
        self.messages = int((home / "hub" / "nats" / "nats.pid").read_text())

    def _answer(self) -> HubAddress | None:
        if self.hub.poll() is not None:
            raise RuntimeError(f"the hub ended at once, with {self.hub.returncode}: what it printed says why.")
        return read_hub_file(self.home / "hub" / "hub.json")

    @contextlib.contextmanager
    def process(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs `python ARGUMENTS` beside this hub; ends it afterwards, whatever it does."""
        environment = {**os.environ, "AETHERIA_HOME": str(self.home)}
        with subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        ) as started:
            try:
                yield started
            finally:
                started.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(10)
                started.kill()


@contextlib.contextmanager
def stage(prepare: Callable[[Path], object] = lambda home: None) -> Iterator[Stage]:
    """Starts a hub in a temporary folder, and ends it.

    Args:
        prepare: is given the folder before the hub starts.
    """
    with tempfile.TemporaryDirectory(prefix="aetheria-benchmark-") as folder:
        home = Path(folder)
        prepare(home)
        hub = subprocess.Popen([sys.executable, "-m", "aetheria.weaver", "--folder", str(home / "hub")])
        try:
            yield Stage(home, hub)
        finally:
            hub.terminate()
            try:
                hub.wait(PATIENCE)
            finally:
                hub.kill()


def wait_for(condition: Callable[[], Found | None], otherwise: str, patience: float = PATIENCE) -> Found:
    """Returns what a condition finds, once it finds something.

    Raises:
        TimeoutError: it does not, in time.
    """
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {patience:g} s.")
        time.sleep(0.02)
    return found


def connected_run(client: Hub) -> Run:
    """Returns the one run of a hub, once it listens."""

    def found() -> Run | None:
        names = [status.id for status in client.runs() if status.connected]
        return client.run(names[0]) if names else None

    return wait_for(found, "the run did not find the hub")


def processor_seconds(process: int) -> float:
    """Returns for how long a process has computed, in all of its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def cores(processes: Sequence[int], work: Callable[[], object]) -> tuple[list[float], float]:
    """Returns how many cores each process kept busy while some work was done, and how many seconds that took."""
    begun, before = time.perf_counter(), [processor_seconds(process) for process in processes]
    work()
    taken = time.perf_counter() - begun
    after = [processor_seconds(process) for process in processes]
    return [(late - early) / taken for late, early in zip(after, before, strict=True)], taken


def memory(process: int) -> float:
    """Returns how much memory a process has had at its most, with what it shares with others, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def quantile(
    name: str,
    unit: str,
    values: Sequence[float] | NDArray[np.float64],
    share: float,
    target: float | None = None,
    note: str = "",
) -> Figure:
    """Returns a quantile and its 95 % bootstrap interval, as `summarise` does for the median.

    Args:
        name: of the figure.
        unit: of the values.
        values: samples.
        share: 0.99 for the 99th percentile.
        target: what it should not exceed.
        note: what the reader should know.
    """
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(0, len(array), size=(4000, len(array)))
    low, high = np.percentile(np.quantile(array[drawn], share, axis=1), (2.5, 97.5))
    found = float(np.quantile(array, share))
    return Figure(name, unit, found, float(low), float(high), float(array.mean()), len(array), target, note)
