"""Two training loops take turns in one process, a short block of steps each, so that both meet the same machine.

Every contestant runs its own, true loop, in a thread of its own. What alternates them is their data: after every block
of batches the iterable stops, tells the referee, and waits for its next turn. The clock starts after a turn has been
given and stops when the block is used up, so waiting is never measured; what the data cost is the same for everybody.

A contestant's background threads must not work during the other one's turn: they call `Lane.wait_for_turn`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import torch

__all__ = ["IterableLane", "Lane", "SequenceLane", "Turn", "alternate"]


class Turn(NamedTuple):
    """How long a block took.

    Attributes:
        seconds: by the clock on the wall.
        processor_seconds: that the contestant's thread was computing. What other processes take is not in it, nor is
            waiting: for the disk, for another thread.
    """

    seconds: float
    processor_seconds: float


class Lane:
    """The data of one contestant, and its gate.

    Args:
        batches: what is trained on, over and over.
        block: batches in a turn.
        turns: how many turns it will get; then the data end.
        drain: is called at the end of a turn, before the clock stops: waits for what a device still has to do.
    """

    def __init__(
        self, batches: Sequence[Any], block: int, turns: int, drain: Callable[[], object] = lambda: None
    ) -> None:
        self._drain = drain
        self._batches = batches
        self._block = block
        self._turns = turns
        self._go: SimpleQueue[None] = SimpleQueue()
        self._done: SimpleQueue[Turn | BaseException | None] = SimpleQueue()
        self._running = threading.Event()
        self._running.set()  # until its first batch a contestant is preparing, and nobody is measured
        self._opened: Turn | None = None

    def __len__(self) -> int:
        return self._block * self._turns

    def start(self, train: Callable[[Any], object]) -> None:
        """Begins to train on this lane, as far as its first batch."""

        threads = torch.get_num_threads()

        def run() -> None:
            torch.set_num_threads(threads)  # OpenMP counts anew in every thread that Python starts
            try:
                train(self)
            except BaseException as error:  # noqa: BLE001 - handed to the referee, who raises it
                self._done.put(error)
            else:
                self._done.put(None)

        threading.Thread(target=run, daemon=True).start()
        self._answer()

    def turn(self) -> Turn:
        """Lets the contestant run for one block; returns how long it took."""
        self._running.set()
        self._go.put(None)
        taken = self._answer()
        if taken is None:
            raise RuntimeError("a contestant ended before its data did")
        return taken

    def finish(self) -> None:
        """Lets the contestant run to its end, unmeasured: the last turn, and whatever it does afterwards."""
        ended = False
        while not ended:
            self._running.set()
            self._go.put(None)
            ended = self._answer() is None

    def wait_for_turn(self) -> None:
        """Holds a background thread of this contestant until it may work."""
        self._running.wait()

    def _answer(self) -> Turn | None:
        answer = self._done.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _pass_the_gate(self) -> None:
        """Called by the data between two blocks."""
        self._drain()
        now = Turn(perf_counter(), thread_time())
        since = self._opened or now
        self._running.clear()
        self._done.put(Turn(now.seconds - since.seconds, now.processor_seconds - since.processor_seconds))
        self._go.get()
        self._opened = Turn(perf_counter(), thread_time())


class IterableLane(Lane):
    """Data that are iterated, once."""

    def __iter__(self) -> Iterator[Any]:
        batches, count = self._batches, len(self._batches)
        for first in range(0, len(self), self._block):
            self._pass_the_gate()
            for number in range(first, first + self._block):
                yield batches[number % count]


class SequenceLane(Lane, Sequence[Any]):
    """Data that are asked for by number, in order."""

    def __getitem__(self, number: Any) -> Any:
        if number % self._block == 0:
            self._pass_the_gate()
        return self._batches[number % len(self._batches)]


def alternate(
    first: Lane, second: Lane, pairs: int, warm_up: int, ready: Callable[[], object] = lambda: None
) -> list[tuple[Turn, Turn]]:
    """Gives two contestants, already started, turns; returns how long each pair of blocks took.

    They begin alternately (ABBA), so that a machine that grows slower or faster favours neither.

    Args:
        first: one contestant's lane, of at least `pairs + warm_up + 1` turns.
        second: the other's.
        pairs: turns that count.
        warm_up: turns before them.
        ready: is called before each turn: waits for what the turn before has left to a device, or to other processes.
    """
    taken = []
    for number in range(warm_up + pairs):
        lanes = (first, second) if number % 2 == 0 else (second, first)
        turns = {}
        for lane in lanes:
            ready()
            turns[lane] = lane.turn()
        taken.append((turns[first], turns[second]))
    first.finish()
    second.finish()
    return taken[warm_up:]
