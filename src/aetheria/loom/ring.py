"""A ring of records in shared memory: one process writes and never waits, others read and notice what they missed.

The writer drops the oldest records when there is no room. It says so *before* it overwrites them, and a reader looks
*after* it has copied; so on processors that keep the order of stores (x86) a reader never takes half a record for a
whole one, and on others the checksum, which covers the record's number too, finds it out.

Positions count bytes from the very beginning and only grow; modulo the size they are places. A record is never split:
where it does not fit before the end, a mark says that the next one is at the start.

A record may hold several things, and it is things that are numbered and counted, not records.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from zlib import crc32

__all__ = ["CURSOR_WORDS", "RING_WORDS", "Record", "RingReader", "RingWriter"]

RING_WORDS = 3  # 8 bytes each: the position after the newest record, that of the oldest, how many things ever were
CURSOR_WORDS = 3  # where a reader is, the number of the next thing, how many it missed

_HEAD, _OLDEST, _COUNT = range(RING_WORDS)
_HEADER = struct.Struct("<IIQ")  # length, checksum, number of the first thing and, in the last 16 bits, how many
_CURSOR = struct.Struct("=QQQ")
_MOST = (1 << 16) - 1  # things in a record
_UNIT = 16  # every record begins at a multiple of it, so that a header is never split
_TO_THE_START = 0xFFFFFFFF  # in place of a length
_ATTEMPTS = 100  # at a record whose checksum is wrong: it may just be on its way from one processor to another


class Record(NamedTuple):
    """What was read.

    Attributes:
        number: of the first thing in it, counted from 0.
        data: what was written.
        missed: how many things before these were never read, since the beginning.
        end: the position behind it.
        things: how many are in it.
    """

    number: int
    data: bytes
    missed: int
    end: int
    things: int


class RingWriter:
    """The only writer of a ring."""

    def __init__(self, words: memoryview, data: memoryview) -> None:
        """Goes on where the ring stands.

        Args:
            words: `RING_WORDS` of format "Q", zero in a new ring.
            data: the ring itself; a multiple of 16 bytes.
        """
        self._words = words
        self._data = data
        self._size = len(data)
        self._head: int = words[_HEAD]
        self._oldest: int = words[_OLDEST]
        self._count: int = words[_COUNT]
        self.longest = len(data) // 4  # bytes of one record

    @property
    def count(self) -> int:
        """How many things were written."""
        return self._count

    def write(self, payload: bytes, count: int = 1) -> None:
        """Appends a record, and drops as many of the oldest as need be.

        Args:
            payload: the record.
            count: how many things are in it.

        Raises:
            ValueError: it is longer than a quarter of the ring, or there is too much in it.
        """
        length = len(payload)
        if length > self.longest:
            raise ValueError(f"a record of {length:,} bytes; at most {self.longest:,} are possible here.")
        if count > _MOST:
            raise ValueError(f"a record of {count:,} things; at most {_MOST:,} are possible.")
        size, data, number = self._size, self._data, self._count
        needed = (length + _HEADER.size + _UNIT - 1) // _UNIT * _UNIT
        place = self._head % size
        at_start = place + needed > size
        end = self._head + needed + (size - place if at_start else 0)
        if end - self._oldest > size:
            oldest = self._oldest
            while end - oldest > size:
                oldest = self._after(oldest)
            self._oldest = self._words[_OLDEST] = oldest  # said first, done then
        if at_start:
            _HEADER.pack_into(data, place, _TO_THE_START, 0, 0)
            place = 0
        checksum = crc32(payload, (number + count) & 0xFFFFFFFF)
        _HEADER.pack_into(data, place, length, checksum, number << 16 | count)
        start = place + _HEADER.size
        data[start : start + length] = payload
        self._head = self._words[_HEAD] = end
        self._count = self._words[_COUNT] = number + count

    def _after(self, position: int) -> int:
        place = position % self._size
        length: int = _HEADER.unpack_from(self._data, place)[0]
        if length == _TO_THE_START:
            return position + self._size - place
        return position + (length + _HEADER.size + _UNIT - 1) // _UNIT * _UNIT


class RingReader:
    """Reads a ring from where it left off, in this process or in one before it."""

    def __init__(self, words: memoryview, data: memoryview, cursor: memoryview) -> None:
        """Goes on where the cursor stands.

        Args:
            words: of the ring.
            data: the ring itself.
            cursor: `CURSOR_WORDS` bytes-addressable words of this reader, zero at the beginning.
        """
        self._words = words
        self._data = data
        self._size = len(data)
        self._cursor = cursor
        self._position: int
        self._expected: int
        self._missed: int
        self._position, self._expected, self._missed = _CURSOR.unpack_from(cursor)

    @property
    def missed(self) -> int:
        """How many things were dropped before they could be read."""
        return self._missed

    @property
    def pending(self) -> int:
        """How many things were written and are not `done`, without those missed so far."""
        _, expected, missed = _CURSOR.unpack_from(self._cursor)
        return max(0, int(self._words[_COUNT] - expected - (self._missed - missed)))

    def read(self, count: int = 1 << 30, size: int = 1 << 30) -> list[Record]:
        """Returns the next records, the oldest first; none where nothing was written.

        Args:
            count: the most records.
            size: about the most bytes; one record may always be larger.
        """
        records: list[Record] = []
        while len(records) < count and size > 0 and (record := self._next()) is not None:
            records.append(record)
            size -= len(record.data)
        return records

    def done(self, record: Record) -> None:
        """Notes that this record, and all before it, need not be read again, not even by a process after this one."""
        _CURSOR.pack_into(self._cursor, 0, record.end, record.number + record.things, record.missed)

    def _next(self) -> Record | None:
        words, data = self._words, self._data
        attempts = 0
        while self._position < (head := words[_HEAD]):
            position = max(self._position, words[_OLDEST])
            self._position = position
            place = position % self._size
            length, checksum, numbers = _HEADER.unpack_from(data, place)
            start = place + _HEADER.size
            payload = bytes(data[start : start + length]) if start + length <= self._size else None
            if words[_OLDEST] > position:  # it was overwritten meanwhile
                continue
            if length == _TO_THE_START:
                self._position = position + self._size - place
                continue
            number, count = numbers >> 16, numbers & _MOST
            if payload is not None and crc32(payload, (number + count) & 0xFFFFFFFF) == checksum:
                self._missed += number - self._expected
                self._expected = number + count
                self._position = position + (length + _HEADER.size + _UNIT - 1) // _UNIT * _UNIT
                return Record(number, payload, self._missed, self._position, count)
            attempts += 1
            if attempts >= _ATTEMPTS:  # damaged for good; where the next record begins cannot be known
                self._position = head
        return None
