"""Recording without waiting: the training loop hands over numbers, a background thread writes them to `run.db`."""

from __future__ import annotations

import itertools
import json
import sqlite3
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from loguru import logger

from aetheria.errors import RunFolderError
from aetheria.loom.database import Event, MetricRecord, Note, RunDatabase

__all__ = ["Recorder"]

_INTERVAL = 0.2  # seconds between two commits: often enough to watch, seldom enough not to be felt
_RETRY_INTERVAL = 5.0  # seconds until the next attempt after one that failed

# The fault is in the records: trying again would not help.
_UNSTORABLE = (TypeError, ValueError, OverflowError, struct.error, sqlite3.ProgrammingError, sqlite3.DataError)

Record = TypeVar("Record")


class _BoundedQueue(Generic[Record]):
    """Hands records from any thread to one, without a lock; a full one drops its oldest record.

    Attributes:
        dropped: how many were dropped, as of the last `take`.
    """

    def __init__(self, capacity: int) -> None:
        self._records: deque[tuple[int, Record]] = deque(maxlen=capacity)
        self._numbers = itertools.count(1)  # `next` on it cannot be interrupted by another thread
        self._newest = 0
        self._taken = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record) -> None:
        self._records.append((next(self._numbers), record))

    def take(self) -> list[Record]:
        """Returns all records, oldest first. For one thread only."""
        # A `put` meanwhile may replace the oldest record, but never makes the queue shorter.
        taken = [self._records.popleft() for _ in range(len(self._records))]
        self._taken += len(taken)
        self._newest = max([self._newest, *(number for number, _ in taken)])
        self.dropped = self._newest - self._taken
        return [record for _, record in taken]


class _Batch(NamedTuple):
    """What goes into one transaction."""

    metrics: list[MetricRecord]
    said: list[Event | Note]

    @property
    def size(self) -> int:
        return len(self.metrics) + len(self.said)


class Recorder:
    """Records the metrics, events and notes of one life of a run. Trouble with the disk never reaches the training.

    Everything is queued and written by a thread of its own, a few times a second, in one transaction. Where the
    database cannot be written (a full disk, a folder that is gone) this is reported once, and tried again until it
    works. Until then the queues fill; a full one drops its oldest record, and what was dropped is counted and said in
    the database as an event of kind "lost".

    Metrics and events have a queue each, so that no amount of metrics displaces an event.
    """

    def __init__(self, path: Path | str, run_step: int = 0, *, capacity: int = 10_000) -> None:
        """Starts the thread. The file is opened there: a slow or broken disk is not noticed here.

        Args:
            path: `run.db`, in a folder that exists.
            run_step: the step from which this life of the run continues.
            capacity: how many records each queue holds.
        """
        self._path = Path(path)
        self._run_step = run_step
        self._started = time.time()
        self._metrics: _BoundedQueue[MetricRecord] = _BoundedQueue(capacity)
        self._said: _BoundedQueue[Event | Note] = _BoundedQueue(capacity)
        self._batch = _Batch([], [])  # taken from the queues and not yet written
        self._database: RunDatabase | None = None
        self._failing = False
        self._refused = 0
        self._left_over = 0
        self._said_lost = 0
        self._flushes: deque[Future[bool]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="aetheria-recorder", daemon=True)
        self._thread.start()

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues the metrics of a step. Costs about a microsecond.

        Raises:
            TypeError, ValueError: a value is not a number.
        """
        self._metrics.put((time.time(), step, tuple(metrics), tuple(map(float, metrics.values()))))

    def event(self, kind: str, step: int, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Queues an event.

        Args:
            kind: a short name, for instance "nonfinite".
            step: the optimiser step at which it happened.
            message: one sentence for a person.
            data: the same for a program.

        Raises:
            TypeError: there is something in `data` that JSON has no word for.
        """
        copied = json.loads(json.dumps(dict(data or {})))
        self._said.put(Event(time.time(), step, kind, message, copied))

    def note(self, step: int, text: str, author: str) -> None:
        """Queues a note about a step."""
        self._said.put(Note(time.time(), step, author, text))

    @property
    def dropped(self) -> int:
        """How many records were pushed out of a full queue, as of the last commit."""
        return self._metrics.dropped + self._said.dropped

    @property
    def lost(self) -> int:
        """How many records will never be in the database: dropped, impossible to store, or left over at the end."""
        return self.dropped + self._refused + self._left_over

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until everything queued before is committed.

        Args:
            timeout: seconds.

        Returns:
            Whether it is. False where the database cannot be written now, where time ran out, and after `close`.
        """
        try:
            return self.begin_flush().result(timeout)
        except TimeoutError:
            return False

    def begin_flush(self) -> Future[bool]:
        """Has everything queued before committed; returns whether it is, once that is known. Nobody waits."""
        flush: Future[bool] = Future()
        if self._thread.is_alive():
            self._flushes.append(flush)
            self._wake.set()
        else:  # closed, or this is a process forked from the one that records
            flush.set_result(False)
        return flush

    def close(self, timeout: float = 10.0) -> bool:
        """Writes what is queued, ends the thread and closes the file. Closing again changes nothing.

        Args:
            timeout: seconds; a disk that takes longer is left alone.

        Returns:
            Whether everything that was not dropped is in the database.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("{} could not be closed in {:g} seconds; its last records may be lost.", self._path, timeout)
            return False
        return not self._left_over

    # --- the thread ------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        self._write(self._batch)  # an empty one: it opens the file and registers this life
        closing = False
        while not closing:
            self._wake.wait(_RETRY_INTERVAL if self._failing else _INTERVAL)
            self._wake.clear()
            closing = self._closing
            flushes = [self._flushes.popleft() for _ in range(len(self._flushes))]
            committed = self._commit()
            for flush in flushes:
                flush.set_result(committed)
        self._left_over = self._batch.size + len(self._metrics) + len(self._said)
        if self._left_over:
            logger.warning("{} records were never written to {}.", self._left_over, self._path)
        self._close_database()

    def _commit(self) -> bool:
        """Returns whether everything that was queued when this was called has been committed."""
        if self._batch.size and not self._write(self._batch):
            return False  # the queues keep what came since, as much as they hold
        self._batch = _Batch(self._metrics.take(), self._said.take())
        idle = not self._batch.size and not self._failing
        return idle or self._write(self._batch)

    def _write(self, batch: _Batch) -> bool:
        """Returns whether the batch is done with: committed, or refused for good."""
        lost = self.lost
        events = [record for record in batch.said if isinstance(record, Event)]
        notes = [record for record in batch.said if isinstance(record, Note)]
        if lost > self._said_lost:
            records = lost - self._said_lost
            _, step, *_ = next(reversed([*events, *notes, *batch.metrics]), (0.0, self._run_step))
            message = f"{records} records are missing before this step: they could not be written in time."
            events.append(Event(time.time(), step, "lost", message, {"records": records}))
        try:
            if self._database is None:
                self._database = RunDatabase(self._path)
                self._database.begin_life(self._run_step, self._started)
            self._database.write(batch.metrics, events, notes)
        except _UNSTORABLE as error:
            if not self._refused:
                logger.error(
                    "{} records cannot be stored in {}: {!r}. Later ones like it are counted.",
                    batch.size,
                    self._path,
                    error,
                )
            self._refused += batch.size
        except (sqlite3.Error, OSError, RunFolderError) as error:
            self._close_database()  # what is opened next may be another file, or the same one in better health
            if not self._failing:
                logger.warning("Cannot write {}: {}. Training goes on; this is tried again.", self._path, error)
            self._failing = True
            return False
        else:
            self._said_lost = lost
            if self._failing:
                logger.info("{} can be written again.", self._path)
        self._failing = False
        self._batch = _Batch([], [])
        return True

    def _close_database(self) -> None:
        if self._database is not None:
            # What is committed stays so. Sealing, which may fail here, is done by the next one who opens the file.
            with suppress(sqlite3.Error, OSError):
                self._database.close()
            self._database = None
