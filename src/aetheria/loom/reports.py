"""What a sidecar does with the rings: into `run.db` where it records, and to the hub where there is one.

A record leaves its ring only when it has arrived, so that a sidecar that is killed takes nothing with it. Without a
hub, or without a disk that can be written, the rings fill and drop their oldest; what was dropped is counted and said.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from aetheria.loom.deliveries import Deliveries
from aetheria.loom.messages import Event, MetricBatch, Point, decode_points, encode_metrics, mark_of
from aetheria.loom.recorder import Recorder
from aetheria.loom.region import Region
from aetheria.loom.ring import Record, RingReader

if TYPE_CHECKING:  # what only a sidecar with a hub loads
    from aetheria.loom.run_end import RunEnd

__all__ = ["Recording", "Reporting"]

_EVENTS_AT_ONCE = 64
_BATCH_BYTES = 400_000  # of metrics in one message: below what a message server takes (1 MB)
_FLUSH = 2.0  # seconds; a disk that takes longer is asked again the next time


class Recording:
    """Copies the rings into `run.db`."""

    def __init__(self, region: Region, path: Path, start_step: int) -> None:
        """Opens the file in the background.

        Args:
            region: the shared memory.
            path: of `run.db`.
            start_step: the step from which this life of the run continues. What an earlier sidecar of this life has
                recorded stays visible.
        """
        self._region = region
        self._metrics = region.reader("metrics recorded")
        self._events = region.reader("events recorded")
        self._metrics_read: Record | None = None
        self._events_read: Record | None = None
        self._newest = region.recorded_step
        self._recorder = Recorder(path, start_step if self._newest is None else self._newest)
        self._said_missed = self._metrics.missed + self._events.missed

    @property
    def pending(self) -> int:
        """How many points and events are not on the disk yet."""
        return self._metrics.pending + self._events.pending

    async def copy(self) -> None:
        """Copies what is new, and waits a while for the disk."""
        for record in self._metrics.read():
            self._metrics_read = record
            self._record_metrics(record)
        for record in self._events.read():
            self._events_read = record
            self._record_event(record)
        self._say_missed()
        if self._metrics_read is None and self._events_read is None:
            return
        committed = asyncio.wrap_future(self._recorder.begin_flush())
        await asyncio.wait([committed], timeout=_FLUSH)
        if committed.done() and committed.result():
            self._note_done()

    async def close(self, timeout: float) -> None:
        """Copies the rest and closes the file."""
        await self.copy()
        if await asyncio.to_thread(self._recorder.close, timeout):
            self._note_done()

    def _note_done(self) -> None:
        if self._newest is not None:
            self._region.recorded_step = self._newest
        if self._metrics_read is not None:
            self._metrics.done(self._metrics_read)
        if self._events_read is not None:
            self._events.done(self._events_read)
        self._metrics_read = self._events_read = None

    def _record_metrics(self, record: Record) -> None:
        points, problem = decode_points(record.data)
        if problem:
            logger.warning("Metrics that are none cannot be recorded: {}", problem)
        for _, step, values in points:
            self._recorder.metrics(values, step)
            self._newest = step if self._newest is None else max(step, self._newest)

    def _record_event(self, record: Record) -> None:
        kind, data = mark_of(record.data)
        if kind != "event":
            return  # outcomes are in the journal; a status is worth something only now
        try:
            event = msgspec.json.decode(data, type=Event)
            if event.kind == "note":
                self._recorder.note(event.step, event.message, str(event.data.get("author", "")))
            else:
                self._recorder.event(event.kind, event.step, event.message, event.data)
        except (msgspec.DecodeError, TypeError, ValueError) as error:
            logger.warning("An event that is none cannot be recorded: {}", error)

    def _say_missed(self) -> None:
        missed = self._metrics.missed + self._events.missed
        if missed > self._said_missed:
            count, self._said_missed = missed - self._said_missed, missed
            message = f"{count} records are missing before this step: nobody fetched them in time."
            self._recorder.event("lost", self._region.step, message, {"records": count})


class Reporting:
    """Sends the rings to the hub."""

    def __init__(self, region: Region, deliveries: Deliveries, replica: str) -> None:
        """Sends nothing yet.

        Args:
            region: the shared memory.
            deliveries: told the outcomes that have been stored.
            replica: which of the run's replicas this is; "" where it has no others.
        """
        self._region = region
        self._deliveries = deliveries
        self._replica = replica
        self._metrics = region.reader("metrics sent")
        self._events = region.reader("events sent")
        self._unsent_metrics: list[Record] = []  # read, and not stored: to be sent again just as they are
        self._unsent_events: list[Record] = []
        self._statuses: dict[str, bytes] = {}
        self._sending = {"metric": asyncio.Lock(), "event": asyncio.Lock()}  # the same records are not sent twice
        self._said_missed = {"metric": self._metrics.missed, "event": self._events.missed}

    @property
    def pending(self) -> int:
        """How many points and events the hub does not have yet."""
        return self._metrics.pending + self._events.pending

    @property
    def dropped(self) -> dict[str, int]:
        """How many points and events the hub will never have, by kind."""
        return {"metric": self._metrics.missed, "event": self._events.missed}

    async def send_events(self, end: RunEnd) -> bool:
        """Sends what is new of outcomes, events and statuses. Returns whether there was anything.

        Raises:
            HubError: it was not stored; the next call sends it again.
        """
        async with self._sending["event"]:
            records = self._unsent_events = self._unsent_events or self._events.read(_EVENTS_AT_ONCE, _BATCH_BYTES)
            if not records:
                return False
            said = [(*mark_of(record.data), f"{self._region.id}-{record.number}") for record in records]
            await end.report(said)
            self._unsent_events = []
            self._events.done(records[-1])
            for kind, data, _ in said:
                if kind == "ack":
                    await self._deliveries.answered(data)
                elif kind == "status":
                    self._statuses[_kind_of(data)] = data
            await self._say_missed(end, "event", self._events)
            return True

    async def send_metrics(self, end: RunEnd) -> None:
        """Sends one batch of metrics, if there are any.

        Raises:
            HubError: it was not stored; the next call sends it again.
        """
        async with self._sending["metric"]:
            records = self._unsent_metrics = self._unsent_metrics or self._metrics.read(size=_BATCH_BYTES)
            if not records:
                return
            batch = MetricBatch(replica=self._replica, points=_points(records), dropped=self._metrics.missed)
            identity = f"{self._region.id}-m{records[0].number}-{records[-1].number}"
            await end.report([("metric", encode_metrics(batch), identity)])
            self._unsent_metrics = []
            self._metrics.done(records[-1])
            await self._say_missed(end, "metric", self._metrics)

    async def repeat_statuses(self, end: RunEnd) -> None:
        """Sends the newest status of each kind again: this hub may be another one.

        Raises:
            HubError: they were not stored.
        """
        await end.report([("status", data, "") for data in self._statuses.values()])

    async def _say_missed(self, end: RunEnd, kind: str, reader: RingReader) -> None:
        count = reader.missed - self._said_missed[kind]
        if count > 0:
            event = {
                "kind": "lost",
                "step": self._region.step,
                "message": f"{count} records of kind {kind} were dropped while the hub could not be reached.",
                "data": {"records": count, "of": kind},
                "time": time.time(),
            }
            await end.report([("event", msgspec.json.encode(event), f"{self._region.id}-lost-{kind}-{reader.missed}")])
            self._said_missed[kind] = reader.missed


def _points(records: list[Record]) -> list[Point]:
    points = []
    for record in records:
        found, problem = decode_points(record.data)
        if problem:
            logger.warning("Metrics that are none cannot be sent: {}", problem)
        points += found
    return points


def _kind_of(status: bytes) -> str:
    try:
        return msgspec.json.decode(status, type=Event).kind
    except msgspec.DecodeError:
        return ""
