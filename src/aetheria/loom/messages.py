"""What a sidecar reports beside outcomes and events, which pass through it as they are: metrics and heartbeats."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec

__all__ = [
    "BEATS",
    "Event",
    "Heartbeat",
    "Kind",
    "MetricBatch",
    "Point",
    "decode_heartbeat",
    "decode_metrics",
    "decode_points",
    "encode_metrics",
    "encode_points",
    "mark_of",
    "marked",
]

Kind = Literal["ack", "event", "status"]
"""What a training process says: the outcome of a command, something that happened, something of which only the newest
counts. JSON, all of them."""

Point = tuple[float, int, dict[str, float]]
"""The metrics of one moment: seconds since 1970 (UTC), the step, the values by name."""

BEATS = 2
"""Seconds between two heartbeats: whoever says nothing for fifteen is called silent."""


class Event(msgspec.Struct):
    """Something that happened, as a training process says it; a note is one of the kind "note".

    Attributes:
        kind: a short name, for instance "nonfinite".
        step: the optimiser step at which it happened.
        message: one sentence for a person; the text of a note.
        data: the same for a program; for a note its "author".
    """

    kind: str = "event"
    step: int = 0
    message: str = ""
    data: dict[str, Any] = {}


class MetricBatch(msgspec.Struct, kw_only=True, frozen=True):
    """Metrics of some steps, the oldest first. Travels as msgpack, on `weave.v1.<run>.metric`.

    Attributes:
        replica: which of the run's replicas they come from; "" where it has no others.
        points: the metrics.
        dropped: how many points this run could not deliver so far: the hub was away, and the ring was full.
    """

    replica: str = ""
    points: Sequence[Point] = ()
    dropped: int = 0


class Heartbeat(msgspec.Struct, kw_only=True, frozen=True):
    """A sign of life, once a second. Travels as JSON, on `weave.v1.<run>.hb`; nobody keeps it.

    Attributes:
        replica: which of the run's replicas it comes from; "" where it has no others.
        host: the machine.
        pid: the training process.
        sidecar: the process that sends this.
        devices: what it trains on.
        step: the optimiser steps taken, as of the training process's last heartbeat.
        age: seconds since that heartbeat: large while it validates, is stopped, or hangs.
        dropped: records lost so far, by kind: "metric", "event".
        time: when, in seconds since 1970.
    """

    replica: str = ""
    host: str = ""
    pid: int = 0
    sidecar: int = 0
    devices: Sequence[str] = ()
    step: int = 0
    age: float = 0.0
    dropped: dict[str, int] = {}
    time: float = 0.0


_metric_encoder = msgspec.msgpack.Encoder()
_points_decoder = msgspec.msgpack.Decoder(list[Point])
_point_decoder = msgspec.msgpack.Decoder(Point)
_parts_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_metric_decoder = msgspec.msgpack.Decoder(MetricBatch)
_heartbeat_decoder = msgspec.json.Decoder(Heartbeat)


def encode_points(points: Sequence[Point]) -> bytes:
    """Returns a record for the ring of metrics.

    Raises:
        TypeError, ValueError, OverflowError: something in it is neither a number nor a name.
    """
    return _metric_encoder.encode(points)


def decode_points(record: bytes) -> tuple[list[Point], str]:
    """Returns the points of a record, and what is wrong with those that are none: "" where nothing is."""
    try:
        return _points_decoder.decode(record), ""
    except msgspec.DecodeError as error:
        problem = str(error)
    points = []
    try:
        for part in _parts_decoder.decode(record):
            with suppress(msgspec.DecodeError):  # the problem is known
                points.append(_point_decoder.decode(part))
    except msgspec.DecodeError as error:
        problem = str(error)
    return points, problem


def encode_metrics(batch: MetricBatch) -> bytes:
    """Returns a batch as msgpack."""
    return _metric_encoder.encode(batch)


def decode_metrics(data: bytes) -> MetricBatch:
    """Returns the batch that the bytes say.

    Raises:
        msgspec.DecodeError: they say none.
    """
    return _metric_decoder.decode(data)


def decode_heartbeat(data: bytes) -> Heartbeat:
    """Returns the heartbeat that the bytes say.

    Raises:
        msgspec.DecodeError: they say none.
    """
    return _heartbeat_decoder.decode(data)


_marks: dict[Kind, bytes] = {"ack": b"a", "event": b"e", "status": b"s"}
_kinds: dict[bytes, Kind] = {mark: kind for kind, mark in _marks.items()}


def marked(kind: Kind, data: bytes) -> bytes:
    """Returns a record for the ring of events: a byte for the kind, and what is said."""
    return _marks[kind] + data


def mark_of(record: bytes) -> tuple[Kind, bytes]:
    """Returns what a record of the ring of events says, and of what kind that is."""
    return _kinds[record[:1]], record[1:]
