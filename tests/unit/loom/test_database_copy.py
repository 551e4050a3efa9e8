"""A `run.db` copied piece by piece: the copy reads like the original, whatever was lost or came twice on the way."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aetheria.loom.database import Event, Note, RunDatabase
from aetheria.loom.database_copy import CopiedDatabase, DamagedDatabaseError, DatabaseTail
from aetheria.loom.parts import (
    PART_BYTES,
    Copied,
    EventsPart,
    Have,
    LivesPart,
    NotesPart,
    Parcel,
    PointsPart,
    decode_have,
    decode_parcel,
    encode_have,
    encode_parcel,
)
from aetheria.loom.reader import RunReader


def assert_alike(copy: Path, original: Path) -> None:
    one, other = RunReader(copy), RunReader(original)
    assert one.series() == other.series()
    for name in one.series():
        for found, expected in zip(one.metric(name), other.metric(name)):
            np.testing.assert_array_equal(found, expected)
    assert (one.events(), one.notes(), one.lives()) == (other.events(), other.notes(), other.lives())
    assert repr(one.last()) == repr(other.last())  # NaN differs from itself


def copy_everything(tail: DatabaseTail, copy: CopiedDatabase) -> None:
    copied = copy.copied
    while parts := tail.parts(copied):
        data = encode_parcel(Parcel("session", 1, parts))
        assert len(data) < 1_000_000, "more than a message server takes"
        assert copy.take(decode_parcel(data).parts)
        copied = copy.copied


@contextmanager
def open_copy(path: Path) -> Iterator[CopiedDatabase]:
    copy = CopiedDatabase(path)
    try:
        yield copy
    finally:
        copy.close()


def test_points_of_an_earlier_life_that_were_lost_find_their_place(tmp_path: Path) -> None:
    database = RunDatabase(tmp_path / "run.db")
    for life in range(3):
        database.begin_life(100 * life, 1e9 + life)
        database.write([(1.0, 100 * life + step, ("loss", "other"), (0.5, life)) for step in range(1, 101)])
    tail = DatabaseTail(tmp_path / "run.db")
    with open_copy(tmp_path / "copy.db") as copy:
        parts = tail.parts(Copied())
        copy.take([part for part in parts if not (isinstance(part, PointsPart) and part.life < 3)])
        copy.take([part for part in parts if isinstance(part, PointsPart) and part.life == 2])
        copy.take([part for part in parts if isinstance(part, PointsPart) and part.life == 1])
        assert_alike(tmp_path / "copy.db", tmp_path / "run.db")
    assert_alike(tmp_path / "copy.db", tmp_path / "run.db")
    database.close()


@pytest.mark.parametrize("seed", range(8))
def test_the_copy_reads_like_the_original(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    original, copied = tmp_path / "run.db", tmp_path / "copy.db"
    tail = DatabaseTail(original)
    believed = Have()  # what the run thinks that the copy has
    copy = CopiedDatabase(copied)
    step, moment = 0, 1e9
    for life in range(5):
        database = RunDatabase(original)
        step = chance.randrange(step + 1)  # a life may go back
        database.begin_life(step, 1e9 + life)
        for _ in range(chance.randrange(20)):
            records = []
            for _ in range(chance.choice([1, 3, 700])):
                step, moment = step + 1, moment + 0.5
                values = {"loss": chance.random(), "ä β": float("nan"), **({"rare": 1.0} if step % 7 == 0 else {})}
                records.append((moment, step, tuple(values), tuple(values.values())))
            events = [Event(moment, step, "nonfinite", "x", {"ids": [1], "value": float("inf")})] * chance.randrange(3)
            database.write(records, events, [Note(moment, step, "ann", "…")] * chance.randrange(2))
            if chance.random() < 0.5:
                parts = tail.parts(believed.database)
                believed.add(parts)
                for _ in range(chance.randrange(3)):  # lost, on time, or twice
                    copy.take(parts)
            if chance.random() < 0.2:  # what the copy has is asked for
                believed = decode_have(encode_have(Have(database=copy.copied)))
                tail.reset()
            if chance.random() < 0.1:  # the process that keeps the copy was killed
                copy._connection.close()
                copy = CopiedDatabase(copied, check=True)
        database.close()
    tail.reset()
    copy_everything(tail, copy)
    assert_alike(copied, original)
    small = copy._connection.execute(
        "SELECT max(n) FROM (SELECT sum(count) AS n FROM chunks WHERE NOT sealed GROUP BY life, series)"
    ).fetchone()[0]
    assert (small or 0) < 1024, "small chunks are sealed in the copy, too"
    assert not tail.parts(copy.copied)
    copy.close()
    assert_alike(copied, original)


def test_much_comes_in_messages_that_a_server_takes(tmp_path: Path) -> None:
    database = RunDatabase(tmp_path / "run.db")
    database.begin_life(0)
    names = tuple(f"series {number}" for number in range(8))
    database.write([(1e9 + step, step, names, (0.5,) * 8) for step in range(20_000)])
    long = {"text": "x" * 100_000}
    database.write(events=[Event(1e9, step, "long", "ä" * 50_000, long) for step in range(30)])
    with open_copy(tmp_path / "copy.db") as copy:
        tail, have, sizes = DatabaseTail(tmp_path / "run.db"), Have(), []
        while parts := tail.parts(have.database):
            sizes.append(len(encode_parcel(Parcel("session", 1, parts))))
            assert copy.take(parts)
            have.add(parts)
        assert len(sizes) > 8
        assert max(sizes) < 2 * PART_BYTES
        assert have.database == copy.copied
        assert sum(sizes) < 1.2 * 8 * 20_000 * 24 + 30 * 100_000, "nothing is sent twice"
        reader = RunReader(tmp_path / "copy.db")
        assert len(reader.metric("series 7").steps) == 20_000
        assert "it had 50,000 characters" in reader.events()[0].message
        assert reader.events()[29].data == {"cut": True}
    database.close()


def test_what_comes_too_early_waits(tmp_path: Path) -> None:
    def points(offset: int, *values: float, life: int = 1) -> PointsPart:
        packed = np.array(values, "<f8").tobytes()
        steps = np.arange(offset, offset + len(values), dtype="<i8").tobytes()
        return PointsPart(life, "loss", offset, steps, packed, packed)

    with open_copy(tmp_path / "copy.db") as copy:
        assert not copy.take([points(0, 1.0)]), "a life that nobody has heard of"
        assert copy.take([LivesPart([(1, 1e9, 0, "node", 7)]), points(0, 1.0, 2.0)])
        assert not copy.take([points(3, 4.0)])
        assert not copy.take([EventsPart(1, 1, [(0, 1e9, "a", "b", "{}")])])
        assert not copy.take([NotesPart(1, 1, [(0, 1e9, "a", "b")])])
        assert copy.take([points(1, 2.0, 3.0), points(0, 1.0), points(3, 4.0)])
        assert copy.copied == Copied([(1, 1e9, 0, "node", 7)], {1: {"loss": 4}}, copy.copied.events, copy.copied.notes)
        assert RunReader(tmp_path / "copy.db").metric("loss").values.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_another_original_of_that_name_replaces_what_differs(tmp_path: Path) -> None:
    with open_copy(tmp_path / "copy.db") as copy:
        for started in (1e9, 2e9):  # the machine went down, and with it the last life
            (tmp_path / "run.db").unlink(missing_ok=True)
            database = RunDatabase(tmp_path / "run.db")
            database.begin_life(0, 5e8)
            database.write([(1.0, step, ("loss",), (0.5,)) for step in range(10)])
            database.close()
            database = RunDatabase(tmp_path / "run.db")
            database.begin_life(5, started)
            count = 8 if started == 1e9 else 3
            database.write([(started, 6 + step, ("loss",), (started,)) for step in range(count)])
            database.close()
            copy_everything(DatabaseTail(tmp_path / "run.db"), copy)
            assert_alike(tmp_path / "copy.db", tmp_path / "run.db")


@pytest.mark.parametrize(
    "part",
    [
        PointsPart(1, "loss", 0, b"x" * 8, b"x" * 8, b"x" * 16),
        PointsPart(1, "loss", 0, b"x" * 7, b"x" * 7, b"x" * 7),
        LivesPart([(1, 1e9, 0, "node", 7), (2, float("nan"), 0, "node", 7)]),
        LivesPart([(1, 1e9, 0, "node", 7), (1, 1e9, 0, "node", 7)]),
        LivesPart([(1, 1e9, 0, "node", 7), (2, 2e9, 2**63, "node", 7)]),
        EventsPart(1, 0, [(0, 1e9, "kind", "message", "no JSON")]),
        EventsPart(1, 0, [(0, 1e9, "kind", "message", "[" * 100_000)]),
        EventsPart(1, 0, [(0, 1e9, "kind", "message", "[1]")]),
        EventsPart(1, 0, [(0, float("nan"), "kind", "message", "{}")]),
        EventsPart(1, 0, [(-(2**63) - 1, 1e9, "kind", "message", "{}")]),
        NotesPart(1, 0, [(0, float("nan"), "author", "text")]),
    ],
)
def test_nothing_is_kept_of_what_no_run_db_holds(tmp_path: Path, part: PointsPart | LivesPart | EventsPart) -> None:
    with open_copy(tmp_path / "copy.db") as copy:
        one = np.ones(1).tobytes()
        copy.take([LivesPart([(1, 1e9, 0, "node", 7)])])
        before = copy.copied
        with pytest.raises(ValueError, match=r"no JSON|not what a run.db holds|bytes of steps|out of range|range"):
            copy.take([PointsPart(1, "loss", 0, one, one, one), part])
        assert copy.copied == before
        assert copy.take([PointsPart(1, "loss", 0, one, one, one)])


def test_offsets_that_are_none_do_no_harm(tmp_path: Path) -> None:
    with open_copy(tmp_path / "copy.db") as copy:
        eight = np.zeros(4).tobytes()
        copy.take([LivesPart([(1, 1e9, 0, "node", 7)]), PointsPart(1, "loss", 0, eight, eight, eight)])
        for offset in (-1, -5, 2**62):
            copy.take([PointsPart(1, "loss", offset, eight, eight, eight)])
            copy.take([EventsPart(1, offset, [(0, 1e9, "kind", "message", "{}")])])
        assert copy.copied.points == {1: {"loss": 4}}


def test_a_damaged_copy_is_found_when_it_is_opened(tmp_path: Path) -> None:
    with open_copy(tmp_path / "copy.db") as copy:
        eight = np.zeros(1000).tobytes()
        copy.take([LivesPart([(1, 1e9, 0, "node", 7)]), PointsPart(1, "loss", 0, eight, eight, eight)])
    content = bytearray((tmp_path / "copy.db").read_bytes())
    content[4096:4196] = b"\xff" * 100
    (tmp_path / "copy.db").write_bytes(content)
    with pytest.raises((DamagedDatabaseError, sqlite3.DatabaseError)):
        CopiedDatabase(tmp_path / "copy.db", check=True)


def test_a_reader_keeps_no_writer_waiting(tmp_path: Path) -> None:
    database = RunDatabase(tmp_path / "run.db")
    database.begin_life(0)
    with closing(sqlite3.connect(f"file:{tmp_path}/run.db?mode=ro", uri=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM lives").fetchone()
        database._connection.execute("PRAGMA busy_timeout = 0")
        database.write([(1.0, 1, ("loss",), (0.5,))])
    database.close()


def test_what_a_hub_has_fits_into_a_message() -> None:
    names = {f"a rather long name of a metric {number}": number for number in range(500)}
    have = Have(wanted=True, database=Copied(points={life: dict(names) for life in range(200)}))
    data = encode_have(have)
    assert len(data) <= 800_000
    told = decode_have(data)
    assert told.database.points[199] == names
    assert 0 not in told.database.points
    assert told.told_from == min(told.database.points)
    assert told.covers(have)
    told.database.points[199]["a rather long name of a metric 3"] = 2
    assert not told.covers(have)
    with pytest.raises(msgspec.MsgspecError):
        decode_have(b"nonsense")


def test_have_counts_and_covers() -> None:
    have, other = Have(), Have()
    assert have.covers(other)
    other.add([LivesPart([(1, 1e9, 0, "node", 7)]), PointsPart(1, "loss", 0, b"x" * 16, b"x" * 16, b"x" * 16)])
    assert not have.covers(other)
    assert other.database.points == {1: {"loss": 2}}
    other.add([LivesPart([(1, 2e9, 0, "node", 7)])])
    assert not other.database.points, "these were of another file"
    assert json.loads(msgspec.json.encode(other.database.lives)) == [[1, 2e9, 0, "node", 7]]
