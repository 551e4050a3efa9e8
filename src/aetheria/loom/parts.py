"""What a run sends of its folder to a hub that cannot look into it, and how the hub says what it has already.

Everything in a run folder only ever grows at its end: the journal by lines, each series of `run.db` by points, the
events by events. So a **part** is what stands at some place, and says where. One that comes twice is known; one that
comes too early waits for what is before it, which the run sends again when the hub is asked and says what it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from zlib import crc32

import msgspec

__all__ = [
    "PART_BYTES",
    "Copied",
    "EventsPart",
    "Have",
    "JournalPart",
    "LifeRow",
    "LivesPart",
    "NotesPart",
    "Parcel",
    "Part",
    "PointsPart",
    "RunFilePart",
    "checksum",
    "common_lives",
    "decode_have",
    "decode_parcel",
    "encode_have",
    "encode_parcel",
]

PART_BYTES = 400_000  # in one message: below what a message server takes (1 MB)
_HAVE_BYTES = 800_000

LifeRow = tuple[int, float, int, str, int]
"""A process that trained the run: its number, when it started, from which step, host, pid."""

EventRow = tuple[int, float, str, str, str]
"""Step, time, kind, message, data as JSON."""

NoteRow = tuple[int, float, str, str]
"""Step, time, author, text."""


class RunFilePart(msgspec.Struct, tag="run"):
    """`run.json`, whole."""

    content: bytes


class JournalPart(msgspec.Struct, tag="journal"):
    """Bytes of `journal.jsonl`, from `offset` on."""

    offset: int
    content: bytes


class LivesPart(msgspec.Struct, tag="lives"):
    """All lives of `run.db`."""

    lives: list[LifeRow]


class PointsPart(msgspec.Struct, tag="points"):
    """Points that a life gave a series, from the one numbered `offset` on: packed arrays, as `run.db` keeps them."""

    life: int
    name: str
    offset: int
    steps: bytes
    times: bytes
    values: bytes


class EventsPart(msgspec.Struct, tag="events"):
    """Events of a life, from the one numbered `offset` on."""

    life: int
    offset: int
    events: list[EventRow]


class NotesPart(msgspec.Struct, tag="notes"):
    """Notes of a life, from the one numbered `offset` on."""

    life: int
    offset: int
    notes: list[NoteRow]


Part = RunFilePart | JournalPart | LivesPart | PointsPart | EventsPart | NotesPart


class Parcel(msgspec.Struct):
    """What is sent at once.

    Attributes:
        session: of a sidecar, which is the one who counts.
        number: of this parcel, from 1.
        parts: in the order in which they are to be taken.
    """

    session: str
    number: int
    parts: list[Part]


class Copied(msgspec.Struct):
    """How much of a `run.db` there is.

    Attributes:
        lives: all of them.
        points: how many, by life and name of the series.
        events: how many, by life.
        notes: how many, by life.
    """

    lives: list[LifeRow] = []
    points: dict[int, dict[str, int]] = {}
    events: dict[int, int] = {}
    notes: dict[int, int] = {}

    def begin(self, lives: list[LifeRow]) -> None:
        """Takes over the lives of the original, and forgets what belongs to lives that it does not have."""
        kept = {life for life, *_ in common_lives(self.lives, lives)}
        self.lives = lives
        self.points = {life: counts for life, counts in self.points.items() if life in kept}
        self.events = {life: count for life, count in self.events.items() if life in kept}
        self.notes = {life: count for life, count in self.notes.items() if life in kept}


class Have(msgspec.Struct):
    """What a hub has of a run's folder.

    Attributes:
        wanted: whether it wants more. Not where it can look into the folder itself.
        room: whether there is room for more than `run.json`.
        run: the checksum of its `run.json`; 0 where it has none.
        journal: bytes of its `journal.jsonl`.
        journal_checksum: of those bytes.
        database: how much of `run.db` it has.
        told_from: of lives before this one, the points are not told: the message would be too long.
        session: of the last parcel that it was given.
        number: the highest of that session, whatever became of it.
    """

    wanted: bool = False
    room: bool = True
    run: int = 0
    journal: int = 0
    journal_checksum: int = 0
    database: Copied = msgspec.field(default_factory=Copied)
    told_from: int = 0
    session: str = ""
    number: int = 0

    def add(self, parts: list[Part]) -> None:
        """Counts parts that follow what is there."""
        database = self.database
        for part in parts:
            match part:
                case RunFilePart():
                    self.run = checksum(part.content)
                case JournalPart():
                    self.journal = part.offset + len(part.content)
                case LivesPart():
                    database.begin(part.lives)
                case PointsPart():
                    database.points.setdefault(part.life, {})[part.name] = part.offset + len(part.steps) // 8
                case EventsPart():
                    database.events[part.life] = part.offset + len(part.events)
                case NotesPart():
                    database.notes[part.life] = part.offset + len(part.notes)

    def covers(self, other: Have) -> bool:
        """Returns whether nothing that `other` counts is missing here, as far as is told; of all but `run.json`."""
        mine, its = self.database, other.database
        return (
            self.journal >= other.journal
            and mine.lives[: len(its.lives)] == its.lives
            and all(mine.events.get(life, 0) >= count for life, count in its.events.items())
            and all(mine.notes.get(life, 0) >= count for life, count in its.notes.items())
            and all(
                mine.points.get(life, {}).get(name, 0) >= count
                for life, counts in its.points.items()
                if life >= self.told_from
                for name, count in counts.items()
            )
        )


def common_lives(one: Sequence[LifeRow], other: Sequence[LifeRow]) -> list[LifeRow]:
    """Returns the lives with which both begin."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    return [life for life, _ in alike]


def checksum(content: bytes, before: int = 0) -> int:
    """Returns the CRC32 of bytes that follow others, whose checksum is `before`."""
    return crc32(content, before)


_encoder = msgspec.msgpack.Encoder()
_parcel_decoder = msgspec.msgpack.Decoder(Parcel)
_have_decoder = msgspec.msgpack.Decoder(Have)


def encode_parcel(parcel: Parcel) -> bytes:
    """Returns it as msgpack."""
    return _encoder.encode(parcel)


def decode_parcel(data: bytes) -> Parcel:
    """Returns the parcel that the bytes say.

    Raises:
        msgspec.MsgspecError: they say none.
    """
    return _parcel_decoder.decode(data)


def encode_have(have: Have) -> bytes:
    """Returns it as msgpack. Where that is too long for a message, the points of the first lives are left out."""
    data = _encoder.encode(have)
    points = dict(sorted(have.database.points.items(), reverse=True))
    while len(data) > _HAVE_BYTES and points:
        told_from = points.popitem()[0] + 1
        database = msgspec.structs.replace(have.database, points=points)
        data = _encoder.encode(msgspec.structs.replace(have, database=database, told_from=told_from))
    return data


def decode_have(data: bytes) -> Have:
    """Returns what the bytes say.

    Raises:
        msgspec.MsgspecError: they say nothing of the kind.
    """
    return _have_decoder.decode(data)
