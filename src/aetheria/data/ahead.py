"""Reading ahead: batches are planned, read several at once by threads or processes, and handed out in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from aetheria.data.order import mix
from aetheria.data.plan import Plan
from aetheria.data.reading import Lost, Read, Reader, Run
from aetheria.data.sources import WORKER_STREAM
from aetheria.data.workers import begin
from aetheria.errors import DataError

__all__ = ["Ahead", "Delivery", "Processes", "Threads"]

_RUN_BYTES = 2 << 20  # that are read at once, about: more costs memory, fewer cost a search for each batch
_RUN_BATCHES = 32  # that are read at once at most
_PLAN_BATCHES = 32  # that are planned at once at most
_PLANNED = 2  # runs that are planned, and whose blocks are brought near, before they are read


@dataclass(slots=True)
class Delivery:
    """A batch that is handed out.

    Attributes:
        data: nested as the samples are.
        size: samples in it that count; the others, if any, are there so that there is something to compute on.
        ids: of those that count, int64 of shape [size].
        together: ids of all ranks' samples.
        position: the base position behind it.
        positions: how many base positions it spans, on all ranks together.
        lost: samples of it that could not be read.
    """

    data: Any
    size: int
    ids: NDArray[np.int64]
    together: NDArray[np.int64]
    position: int
    positions: int
    lost: list[Lost] = field(default_factory=list)


@dataclass(slots=True)
class _Due:
    """What is known of a batch before it is read."""

    ids: NDArray[np.int64]
    counts: bool  # False where this rank has nothing left, and reads somebody else's sample
    together: NDArray[np.int64]
    position: int
    positions: int


Planned = tuple[Run, list[_Due]]


@dataclass(frozen=True, slots=True)
class Threads:
    """Reads in this process.

    Attributes:
        count: of threads; 0 reads when a batch is asked for.
    """

    count: int = 1


@dataclass(frozen=True, slots=True)
class Processes:
    """Reads in worker processes, as a DataLoader has them.

    Attributes:
        count: of processes.
        options: of the DataLoader, besides their number.
    """

    count: int
    options: dict[str, Any]


class Ahead:
    """Batches of one rank, from any base position of any epoch.

    Args:
        plan: what comes when.
        reader: of it.
        batch_size: samples in a batch of this rank.
        share: which rank this is, and of how many.
        part: which of this rank's batches are read here, and of how many parts: a worker of a DataLoader reads every
            n-th one.
        horizon: samples of all ranks, beyond those that are consumed, that are read at the most.
        by: who reads.
    """

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        batch_size: int,
        *,
        share: tuple[int, int] = (0, 1),
        part: tuple[int, int] = (0, 1),
        horizon: int,
        by: Threads | Processes,
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._batch_size = batch_size
        self._rank, self._ranks = share
        self._part, self._parts = part
        self._row = batch_size * self._ranks
        self._by = by
        self._horizon = horizon // (self._row * self._parts)  # batches of this reader
        self._run_batches = self._batches_in_run()
        self._plan_batches = self._run_batches
        if isinstance(by, Threads):
            self._plan_batches = max(self._run_batches, min(_PLAN_BATCHES, self._horizon // 2))
        self._last: Any = None
        self._starved = False  # whether all that was planned has been handed out
        self.issued = 0  # the base position up to which batches are planned

    def _batches_in_run(self) -> int:
        manifests = [shards.manifest for shards in self._reader.shards]
        size = sum(part.bytes for manifest in manifests for part in manifest.parts)
        each = size / max(1, sum(manifest.rows for manifest in manifests))
        wanted = int(_RUN_BYTES / max(1.0, each * self._batch_size))
        # What may be read ahead is divided: among those that read, what waits for them, and what is planned.
        waiting = self._by.count + _PLANNED if isinstance(self._by, Threads) else 2 * self._by.count + 2
        return max(1, min(wanted, _RUN_BATCHES, self._horizon // waiting))

    def batches(self, epoch: int, start: int, stop: int, consumed: Callable[[], int]) -> Iterator[Delivery]:
        """Yields the batches of an epoch, from a base position on.

        Args:
            epoch: from 0.
            start: base position to begin at.
            stop: base position at which the epoch ends.
            consumed: is asked how many of them have been consumed.
        """
        runs = self._runs(epoch, start, stop, consumed)
        reading = self._in_processes(runs, epoch) if isinstance(self._by, Processes) else self._in_threads(runs)
        try:
            for due, reads in reading:
                for one, read in zip(due, reads, strict=True):
                    self._reader.finish(read, epoch)
                    yield self._delivery(one, read)
        finally:
            reading.close()  # type: ignore[attr-defined]

    # --- planning --------------------------------------------------------------------------------------------------

    def _runs(self, epoch: int, start: int, stop: int, consumed: Callable[[], int]) -> Iterator[Planned | None]:
        """Yields what is to be read next; None while nothing more may be read ahead."""
        self.issued, planned = start, 0
        batches = 1  # the first batch is not to wait for many others; each run is twice as long as the one before
        while self.issued < stop:
            if not self._starved and planned + batches > consumed() + self._horizon:
                yield None
                continue
            self._starved = False
            before, span = self.issued, batches * self._parts * self._row
            planned += batches
            taken = self._plan.take(epoch, before, span, stop)
            self.issued = int(taken.after[-1]) if len(taken.rows) == span else stop
            yield from self._planned(epoch, before, taken.rows, taken.streams, taken.after)
            batches = min(2 * batches, self._plan_batches)

    def _planned(
        self, epoch: int, begin: int, rows: NDArray[np.int64], streams: NDArray[Any] | None, after: NDArray[np.int64]
    ) -> Iterator[Planned]:
        count, whole = len(rows), len(rows) // self._row
        arranged = rows.copy()
        batches = rows[: whole * self._row].reshape(whole, self._row)
        arranged[: whole * self._row] = self._plan.by_lanes(batches).reshape(-1)
        ids = self._reader.ids(arranged, streams)
        chosen: list[NDArray[np.int64]] = []
        due: list[_Due] = []
        for number in range(self._part, -(-count // self._row), self._parts):
            first, last = number * self._row, min((number + 1) * self._row, count)
            size = last - first
            # As evenly as they go: a short row is shared by all, not taken by the first.
            mine = np.arange(first + size * self._rank // self._ranks, first + size * (self._rank + 1) // self._ranks)
            counts = len(mine) > 0
            chosen.append(mine if counts else np.array([first]))
            came_from = begin if number == 0 else int(after[first - 1])
            position = int(after[last - 1])
            due.append(_Due(ids[mine], counts, ids[first:last], position, position - came_from))
        for at in range(0, len(chosen), self._run_batches):
            run = chosen[at : at + self._run_batches]
            places = np.concatenate(run)
            cuts = [0, *itertools.accumulate(map(len, run))]
            of_each = None if streams is None else streams[places]
            yield Run(epoch, arranged[places], of_each, ids[places], cuts), due[at : at + self._run_batches]

    # --- reading ---------------------------------------------------------------------------------------------------

    def _in_threads(self, runs: Iterator[Planned | None]) -> Iterator[tuple[list[_Due], list[Read]]]:
        threads = self._by.count
        pool = ThreadPoolExecutor(threads, thread_name_prefix="aetheria-reader") if threads else None
        planned: deque[Planned] = deque()
        reading: deque[tuple[list[_Due], Future[list[Read]]]] = deque()
        try:
            while True:
                self._starved = not planned and not reading
                while len(planned) < _PLANNED and (run := next(runs, None)) is not None:
                    self._reader.prefetch(run[0].rows, run[0].streams)
                    planned.append(run)
                if pool is None:
                    if not planned:
                        return
                    coming, due = planned.popleft()
                    yield due, self._reader.read(coming)
                    continue
                while planned and len(reading) <= threads:
                    coming, due = planned.popleft()
                    reading.append((due, pool.submit(self._reader.read, coming)))
                if not reading:
                    return
                due, answer = reading.popleft()
                yield due, answer.result()
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _in_processes(self, runs: Iterator[Planned | None], epoch: int) -> Iterator[tuple[list[_Due], list[Read]]]:
        assert isinstance(self._by, Processes)
        issued: deque[list[_Due]] = deque()

        def sampler() -> Iterator[Run]:
            while True:
                # How far worker processes read ahead is the DataLoader's decision.
                self._starved = True
                if (run := next(runs, None)) is None:
                    return
                issued.append(run[1])
                yield run[0]

        # Its workers' seed is drawn from a generator of its own, so that nobody else's is moved.
        generator = torch.Generator().manual_seed(mix(self._reader.seed, WORKER_STREAM, epoch))
        loader: DataLoader[Any] = DataLoader(
            _Runs(self._reader),
            batch_size=None,
            sampler=sampler(),
            collate_fn=_as_it_is,
            num_workers=self._by.count,
            generator=generator,
            **self._by.options,
        )
        for reads in begin(loader):
            yield issued.popleft(), reads

    def _delivery(self, due: _Due, read: Read) -> Delivery:
        ids = due.ids if read.kept is None or not due.counts else due.ids[read.kept]
        if read.data is None:  # something must be computed on, to count for nothing
            if self._last is None:
                raise DataError(f"not one sample of the first batch can be read: {read.lost[0].what}")
            read.data = self._last
        self._last = read.data
        return Delivery(read.data, len(ids), ids, due.together, due.position, due.positions, read.lost)


class _Runs(Dataset[list[Read]]):
    """Runs as a DataLoader's items."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, run: Run) -> list[Read]:
        reads = self.reader.read(run)
        for read in reads:
            self.reader.finish(read, run.epoch)
        return reads


def _as_it_is(reads: list[Read]) -> list[Read]:
    return reads
