"""The shared memory: nothing torn, nothing twice, what is missing is counted, and nobody waits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.errors import HubError
from aetheria.loom.region import SLOTS, Region
from aetheria.loom.ring import CURSOR_WORDS, RING_WORDS, RingReader, RingWriter
from aetheria.protocol import COMMAND_BYTES


class Ring:
    """A ring in ordinary memory, with as many readers as wanted."""

    def __init__(self, size: int) -> None:
        self.words = memoryview(bytearray(8 * RING_WORDS)).cast("Q")
        self.data = memoryview(bytearray(size))
        self.cursor = memoryview(bytearray(8 * CURSOR_WORDS))
        self.writer = RingWriter(self.words, self.data)

    def reader(self) -> RingReader:
        return RingReader(self.words, self.data, self.cursor)


# --- the ring --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_once_and_in_order() -> None:
    ring = Ring(1024)
    reader = ring.reader()
    assert reader.read() == []
    for payload in (b"", b"a", b"b" * 100):
        ring.writer.write(payload)
    assert reader.pending == 3
    records = reader.read()
    assert [record.data for record in records] == [b"", b"a", b"b" * 100]
    assert [record.number for record in records] == [0, 1, 2]
    assert reader.read() == []
    assert reader.pending == 3  # read, but nobody said that it is done
    reader.done(records[1])
    assert reader.pending == 1
    assert [record.data for record in ring.reader().read()] == [b"b" * 100]  # a reader after this one


def test_limits_of_a_read() -> None:
    ring = Ring(4096)
    for number in range(10):
        ring.writer.write(b"%d" % number * 100)
    reader = ring.reader()
    assert len(reader.read(count=3)) == 3
    assert len(reader.read(size=250)) == 3
    assert len(reader.read(size=1)) == 1
    assert len(reader.read()) == 3


def test_a_full_ring_drops_the_oldest_and_counts() -> None:
    ring = Ring(256)
    reader = ring.reader()
    for number in range(100):
        ring.writer.write(b"%016d" % number)  # 32 bytes each: eight fit
    records = reader.read()
    assert [int(record.data) for record in records] == list(range(92, 100))
    assert {record.missed for record in records} == {92} == {reader.missed}
    reader.done(records[-1])
    assert reader.pending == 0
    again = ring.reader()
    assert again.missed == 92
    assert again.read() == []


def test_it_is_things_that_are_counted_not_records() -> None:
    ring = Ring(256)
    reader = ring.reader()
    for number in range(100):
        ring.writer.write(b"%016d" % number, number % 5 + 1)  # 32 bytes each: eight fit
    assert ring.writer.count == reader.pending == 300
    records = reader.read()
    assert [record.things for record in records] == [3, 4, 5, 1, 2, 3, 4, 5]
    assert records[0].number == reader.missed == 300 - sum(record.things for record in records)
    reader.done(records[1])
    assert reader.pending == ring.reader().pending == sum(record.things for record in records[2:])
    assert ring.reader().missed == reader.missed


def test_a_record_that_is_too_long_is_refused() -> None:
    ring = Ring(1024)
    with pytest.raises(ValueError, match="a record of 65,536 things; at most 65,535"):
        ring.writer.write(b"x", 1 << 16)
    ring.writer.write(b"x" * 256)
    with pytest.raises(ValueError, match="a record of 257 bytes; at most 256"):
        ring.writer.write(b"x" * 257)
    assert [len(record.data) for record in ring.reader().read()] == [256]


def test_a_writer_goes_on_where_another_one_was() -> None:
    ring = Ring(256)
    for number in range(20):
        RingWriter(ring.words, ring.data).write(b"%016d" % number)
    assert [int(record.data) for record in ring.reader().read()] == list(range(12, 20))


def test_a_damaged_record_is_never_returned_and_is_counted() -> None:
    ring = Ring(1024)
    for number in range(3):
        ring.writer.write(b"%016d" % number)
    ring.data[32 + 20] ^= 1  # in the second
    reader = ring.reader()
    assert [record.number for record in reader.read()] == [0]
    ring.writer.write(b"later")
    assert [(record.data, record.missed) for record in reader.read()] == [(b"later", 2)]


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 120), st.none()), max_size=120), st.sampled_from([512, 528, 1024]))
def test_any_mixture_of_writing_and_reading(actions: list[int | None], size: int) -> None:
    """Lengths are written, None reads: what comes is a suffix of what was not read, and the rest is counted."""
    ring = Ring(size)
    reader = ring.reader()
    unread: deque[bytes] = deque()
    missed = number = 0
    for action in [*actions, None]:
        if action is not None:
            unread.append(random.Random(number).randbytes(min(action, ring.writer.longest)))
            ring.writer.write(unread[-1])
            number += 1
            continue
        records = reader.read()
        while len(unread) > len(records):
            unread.popleft()
            missed += 1
        assert [record.data for record in records] == list(unread)
        assert reader.missed == missed
        unread.clear()
        if records:
            reader.done(records[-1])
            reader = ring.reader()


_WRITER = """
import random, sys, time
from aetheria.loom.region import Region
region = Region(int(sys.argv[1]))
generator = random.Random(1)
end = time.monotonic() + 1.0
number = 0
while time.monotonic() < end:
    for _ in range(100):
        region.metrics.write(number.to_bytes(8, "little") + bytes([number % 251]) * generator.randrange(400))
        number += 1
region.events.write(b"%d" % number)
"""


def test_a_reader_that_is_overtaken_by_another_process_never_sees_half_a_record() -> None:
    region = Region.create(metric_bytes=4096, event_bytes=4096)
    reader, said = region.reader("metrics sent"), region.reader("events sent")
    command = [sys.executable, "-c", _WRITER, str(region.descriptor)]
    read = last = -1
    with subprocess.Popen(command, pass_fds=(region.descriptor,)) as writer:
        finished: list[bytes] = []
        while not finished:
            finished = [record.data for record in said.read()]
            for record in reader.read(count=20):
                number = int.from_bytes(record.data[:8], "little")
                assert number == record.number > last
                assert set(record.data[8:]) <= {number % 251}
                last, read = number, read + 1
            assert writer.poll() in (None, 0)
    for record in reader.read():
        last, read = record.number, read + 1
    assert last + 1 == int(finished[0])
    assert read + 1 + reader.missed == int(finished[0])
    assert read > 100
    region.close()


# --- the region ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memfd", "temporary file"])
def region(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Region]:
    if request.param == "temporary file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elif not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd")
    region = Region.create()
    assert list(tmp_path.iterdir()) == []  # it has no name
    yield region
    region.close()


def test_two_sides_see_the_same(region: Region) -> None:
    other = Region(os.dup(region.descriptor))
    assert not os.get_inheritable(region.descriptor)
    assert other.id == region.id
    region.metrics.write(b"metric")
    region.events.write(b"event")
    assert [record.data for record in other.reader("metrics sent").read()] == [b"metric"]
    assert [record.data for record in other.reader("events recorded").read()] == [b"event"]
    assert other.sidecar_age == float("inf")
    other.sidecar_beat()
    region.beat(7)
    assert region.sidecar_age < 1
    assert other.trainer_age < 1
    assert other.step == 7
    assert other.recorded_step is None
    other.recorded_step, other.hub_known, region.closing = 0, True, 5
    assert (region.recorded_step, region.hub_known, other.closing) == (0, True, 5)
    other.close()


def test_commands_are_taken_in_order_and_announced_by_the_word(region: Region) -> None:
    other = Region(os.dup(region.descriptor))
    assert region.word.format == "Q"
    assert region.take() == []
    before = region.word[0]
    commands = [b"", b"a" * COMMAND_BYTES, *(b"%d" % number for number in range(SLOTS - 2))]
    assert [other.offer(command) for command in commands] == [True] * SLOTS
    assert not other.offer(b"too many")
    assert region.word[0] != before
    assert other.full == SLOTS
    assert region.take() == commands
    assert region.take() == []
    assert other.full == 0
    assert other.offer(b"again")
    assert region.take() == [b"again"]
    with pytest.raises(ValueError, match="a command of 65,537 bytes"):
        other.offer(b"x" * (COMMAND_BYTES + 1))
    other.close()


def test_what_is_offered_while_the_slots_are_looked_through_overtakes_nothing(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, late = Region._slot, [b"1", b"2"]
    region.offer(b"0")

    def looked_at(slot: int) -> int:
        while slot == 2 and late:  # slot 1 has been found free
            region.offer(late.pop(0))
        return place(slot)

    monkeypatch.setattr(Region, "_slot", staticmethod(looked_at))
    assert region.take() == [b"0"]
    assert region.take() == [b"1", b"2"]
    assert region.take() == []


def test_a_sidecar_killed_before_the_word_is_made_up_for_by_the_next(region: Region) -> None:
    region.offer(b"command")
    assert region.take() == [b"command"]
    region.offer(b"silent")
    region.word[0] -= 1  # as if it had been killed just before
    assert region.take() == []
    region.announce()
    assert region.take() == [b"silent"]
    word = region.word[0]
    region.announce()
    assert region.word[0] == word


def test_a_damaged_command_is_not_taken(region: Region) -> None:
    region.offer(b"command")
    start = next(index for index, byte in enumerate(region._whole) if region._whole[index : index + 7] == b"command")
    region._whole[start] ^= 1
    assert region.take() == []
    region._whole[start] ^= 1  # it was on its way
    assert region.take() == [b"command"]


def test_what_is_no_region_is_refused(tmp_path: Path, region: Region) -> None:
    with (tmp_path / "file").open("wb+") as file:
        with pytest.raises(HubError, match="no region"):
            Region(file.fileno())
        file.truncate(10_000)
        with pytest.raises(HubError, match="layout 0, this process knows layout 2"):
            Region(file.fileno())


def test_the_word_can_be_looked_at_after_the_end() -> None:
    region = Region.create()
    word = region.word
    region.close()
    region.close()
    del region
    assert word[0] == 0


def test_what_a_step_costs() -> None:
    """Bounds with room for a busy machine; `benchmarks/` measures."""
    region = Region.create()
    times = []
    for number in range(1000):
        started = time.perf_counter()
        region.metrics.write(b"x" * 400)
        region.beat(number)
        region.take()
        times.append(time.perf_counter() - started)
    assert sorted(times)[500] < 50e-6
    region.close()
