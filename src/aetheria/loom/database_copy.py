"""Copying a `run.db` to where it cannot be seen: what is new in it, and the same file built again from that.

Within one life the points of a series only grow at the end, whatever chunks they are kept in, and so do the events and
the notes. So "how many of each" says how far a copy has got.
"""

from __future__ import annotations

import itertools
import json
import operator
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import msgspec

from aetheria.errors import RunFolderError
from aetheria.loom.database import SCHEMA_VERSION, SEALED_POINTS, RunDatabase, _chunk
from aetheria.loom.parts import (
    PART_BYTES,
    Copied,
    EventsPart,
    LifeRow,
    LivesPart,
    NotesPart,
    Part,
    PointsPart,
    common_lives,
)

__all__ = ["CopiedDatabase", "DamagedDatabaseError", "DatabasePart", "DatabaseTail"]

_POINTS_AT_ONCE = 8192  # in one part: 200 kB
_TEXT_LENGTH = 30_000  # characters in a text of an event or a note; a longer one is cut
_CUT_DATA = '{"cut": true}'

Row = TypeVar("Row", bound=tuple[object, ...])
DatabasePart = LivesPart | PointsPart | EventsPart | NotesPart


class DatabaseTail:
    """Reads what a copy of a `run.db` lacks, while the run writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks_copied = 0  # the number of a chunk: no series has anything new in or before it

    def reset(self) -> None:
        """Looks at everything again: the copy is not as far as it was thought to be."""
        self._chunks_copied = 0

    def parts(self, copied: Copied, size: int = PART_BYTES) -> list[Part]:
        """Returns what is new, about `size` bytes of it; nothing where the copy is complete.

        Args:
            copied: how much there is in the copy.
            size: bytes.

        Raises:
            sqlite3.Error: the file cannot be read now.
        """
        if not self._path.exists():
            return []
        found: list[Part] = []
        uri = self._path.absolute().as_uri() + "?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None)) as connection:
            connection.execute("BEGIN")  # one moment for all queries
            if connection.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
                return []  # somebody is just making it
            newest = connection.execute("SELECT coalesce(max(id), 0) FROM chunks").fetchone()[0]
            for part, length in self._all(connection, copied):
                found.append(part)
                size -= length
                if size <= 0:
                    return found
        self._chunks_copied = newest
        return found

    def _all(self, connection: sqlite3.Connection, copied: Copied) -> Iterator[tuple[DatabasePart, int]]:
        lives = connection.execute("SELECT id, started, start_step, host, pid FROM lives ORDER BY id").fetchall()
        if lives != copied.lives:
            if len(common_lives(lives, copied.lives)) < len(copied.lives):
                self._chunks_copied = 0  # another file of that name: what the copy has of these lives is not of it
            copied = msgspec.structs.replace(copied)
            copied.begin(lives)
            yield LivesPart(lives), 64 * len(lives)
        yield from _events(connection, copied.events)
        yield from _notes(connection, copied.notes)
        keys = connection.execute(
            "SELECT DISTINCT life, series, name FROM chunks JOIN series ON series.id = series WHERE chunks.id > ? "
            "ORDER BY life, series",
            (self._chunks_copied,),
        ).fetchall()
        for life, series, name in keys:
            yield from _points(connection, life, series, name, copied.points.get(life, {}).get(name, 0))


def _points(
    connection: sqlite3.Connection, life: int, series: int, name: str, have: int
) -> Iterator[tuple[PointsPart, int]]:
    # In the order of their numbers, chunks hold the points in their order: a sealed one is newer than those it replaces
    # and older than those that come after it.
    query = "SELECT id, count FROM chunks WHERE life = ? AND series = ? ORDER BY id"
    start = 0
    for chunk, count in connection.execute(query, (life, series)).fetchall():
        if start + count > have:
            columns = connection.execute('SELECT steps, times, "values" FROM chunks WHERE id = ?', (chunk,)).fetchone()
            while have < start + count:
                taken = slice(8 * (have - start), 8 * (have - start + _POINTS_AT_ONCE))
                part = PointsPart(life, name, have, *(column[taken] for column in columns))
                yield part, 3 * len(part.steps) + len(name)
                have += len(part.steps) // 8
        start += count


def _events(connection: sqlite3.Connection, have: dict[int, int]) -> Iterator[tuple[EventsPart, int]]:
    for life, total in connection.execute("SELECT life, count(*) FROM events GROUP BY life").fetchall():
        offset = have.get(life, 0)
        while offset < total:
            query = "SELECT step, time, kind, message, data FROM events WHERE life = ? ORDER BY id LIMIT 256 OFFSET ?"
            found = connection.execute(query, (life, offset))
            cut = ((*row[:2], _cut(row[2]), _cut(row[3]), row[4] if _fits(row[4]) else _CUT_DATA) for row in found)
            rows, size = _some(cut)
            yield EventsPart(life, offset, rows), size
            offset += len(rows)


def _notes(connection: sqlite3.Connection, have: dict[int, int]) -> Iterator[tuple[NotesPart, int]]:
    for life, total in connection.execute("SELECT life, count(*) FROM notes GROUP BY life").fetchall():
        offset = have.get(life, 0)
        while offset < total:
            query = "SELECT step, time, author, text FROM notes WHERE life = ? ORDER BY id LIMIT 256 OFFSET ?"
            found = connection.execute(query, (life, offset))
            rows, size = _some((*row[:2], _cut(row[2]), _cut(row[3])) for row in found)
            yield NotesPart(life, offset, rows), size
            offset += len(rows)


def _some(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Returns the first rows, as many as fit into one message, and how many bytes they have."""
    taken: list[Row] = []
    size = 0
    for row in rows:
        taken.append(row)
        size += 32 + sum(len(value.encode()) for value in row if isinstance(value, str))
        if size > PART_BYTES // 2:
            break
    return taken, size


def _fits(text: str) -> bool:
    return len(text) <= _TEXT_LENGTH


def _cut(text: str) -> str:
    return text if _fits(text) else f"{text[:_TEXT_LENGTH]} (cut: it had {len(text):,} characters)"


class DamagedDatabaseError(RunFolderError):
    """A `run.db` that is not whole."""


class CopiedDatabase(RunDatabase):
    """A `run.db` built from parts. Every call of `take` is one transaction, after which they are known."""

    def __init__(self, path: Path, *, check: bool = False) -> None:
        """Opens the file; makes it where its folder exists and it does not.

        Args:
            path: `run.db`.
            check: reads all of it, so that damage is found now.

        Raises:
            RunFolderError: the file is no `run.db`, or one of a newer version.
            DamagedDatabaseError: `check` found it damaged.
            sqlite3.Error: the file cannot be made or written.
        """
        super().__init__(path)
        try:
            if check:
                (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise DamagedDatabaseError(f"{path} is damaged: {found}.")
            self._look()
        except BaseException:
            self._connection.close()
            raise

    def _look(self) -> None:
        """Counts what there is."""
        execute = self._connection.execute
        self._series = dict(execute("SELECT name, id FROM series"))
        self._lives: list[LifeRow] = execute(
            "SELECT id, started, start_step, host, pid FROM lives ORDER BY id"
        ).fetchall()
        self._events: defaultdict[int, int] = defaultdict(int, execute("SELECT life, count(*) FROM events GROUP BY 1"))
        self._notes: defaultdict[int, int] = defaultdict(int, execute("SELECT life, count(*) FROM notes GROUP BY 1"))
        self._points: defaultdict[tuple[int, str], int] = defaultdict(int)
        self._small: defaultdict[tuple[int, int], int] = defaultdict(int)  # points in small chunks, by life and series
        for life, series, name, count, small in execute(
            "SELECT life, series, name, sum(count), sum(count * (1 - sealed)) FROM chunks "
            "JOIN series ON series.id = series GROUP BY life, series"
        ):
            self._points[life, name] = count
            self._small[life, series] = small

    @property
    def copied(self) -> Copied:
        """How much there is."""
        points: dict[int, dict[str, int]] = {}
        for (life, name), count in self._points.items():
            points.setdefault(life, {})[name] = count
        return Copied(list(self._lives), points, dict(self._events), dict(self._notes))

    def take(self, parts: Sequence[DatabasePart]) -> bool:
        """Adds what is new in parts of the original.

        Returns:
            Whether nothing was missing between them and what there was.

        Raises:
            ValueError: they are not what a `run.db` holds. Nothing of this call was added.
            RunFolderError: the file was moved or removed.
            sqlite3.Error: it cannot be written now; nothing of this call was.
        """
        if not self._is_in_place():
            raise RunFolderError(f"{self.path} was moved or removed while it was being written. Put it back.")
        complete = True
        before = dict(self._small)
        try:
            with self._transaction():
                for part in parts:
                    if isinstance(part, LivesPart):
                        self._take_lives(part.lives)
                    elif part.life not in (life for life, *_ in self._lives):
                        complete = False
                    else:
                        complete &= self._take_rows(part)
                self._seal([key for key, count in self._small.items() if count >= SEALED_POINTS])
                self._put_in_order(key for key, count in self._small.items() if count != before.get(key, 0))
        except (sqlite3.IntegrityError, OverflowError) as error:  # a time that is NaN, twice the same life
            self._look()
            raise ValueError(f"they are not what a run.db holds: {error}") from error
        except BaseException as error:
            self._look_again(error)
            raise
        for key, count in self._small.items():
            self._small[key] = 0 if count >= SEALED_POINTS else count
        return complete

    def _put_in_order(self, late: Iterable[tuple[int, int]]) -> None:
        """Gives chunks of later lives numbers behind those of earlier ones, whose points came only now: lost before.

        Args:
            late: lives and series that have got points, or a sealed chunk.
        """
        newest = self._lives[-1][0] if self._lives else 0
        for series in {series for life, series in late if life != newest}:
            self._put_rows_in_order("chunks", series)

    def _put_rows_in_order(self, table: str, series: int | None = None) -> None:
        chosen = "" if series is None else f"WHERE series = {series}"
        rows = self._connection.execute(f"SELECT id, life FROM {table} {chosen} ORDER BY id").fetchall()
        ordered = sorted(rows, key=operator.itemgetter(1))
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(rows, ordered)))
        for row, _ in ordered[alike:]:
            self._connection.execute(f"UPDATE {table} SET id = (SELECT max(id) + 1 FROM {table}) WHERE id = ?", (row,))

    def _look_again(self, error: BaseException) -> None:
        try:
            self._look()
        except sqlite3.Error as another:  # it cannot even be read: said together with what went wrong before
            error.add_note(f"and it cannot be read: {another}")

    def _take_rows(self, part: PointsPart | EventsPart | NotesPart) -> bool:
        """Returns whether the part follows what there is."""
        match part:
            case PointsPart():
                return self._take_points(part)
            case EventsPart():
                known = self._events[part.life]
                new_events = part.events[max(0, known - part.offset) :]
                if part.offset > known:
                    return False
                for _, _, kind, _, data in new_events:
                    _check_json(kind, data)
                self._connection.executemany(
                    "INSERT INTO events (step, time, kind, message, data, life) VALUES (?, ?, ?, ?, ?, ?)",
                    [(*row, part.life) for row in new_events],
                )
                self._events[part.life] += len(new_events)
                if part.life != self._lives[-1][0]:
                    self._put_rows_in_order("events")
            case NotesPart():
                known = self._notes[part.life]
                new_notes = part.notes[max(0, known - part.offset) :]
                if part.offset > known:
                    return False
                self._connection.executemany(
                    "INSERT INTO notes (step, time, author, text, life) VALUES (?, ?, ?, ?, ?)",
                    [(*row, part.life) for row in new_notes],
                )
                self._notes[part.life] += len(new_notes)
                if part.life != self._lives[-1][0]:
                    self._put_rows_in_order("notes")
        return True

    def _take_points(self, part: PointsPart) -> bool:
        count = len(part.steps) // 8
        if len(part.steps) % 8 or not len(part.steps) == len(part.times) == len(part.values):
            raise ValueError(f"the points of '{part.name}' are {len(part.steps)} bytes of steps, and others of others.")
        known = self._points[part.life, part.name]
        if part.offset > known:
            return False
        new = slice(8 * (known - part.offset), None)
        if part.offset + count <= known:
            return True
        count = part.offset + count - known
        steps, times, values = (
            list(struct.unpack(f"<{count}{kind}", column[new]))
            for kind, column in (("q", part.steps), ("d", part.times), ("d", part.values))
        )
        series = self._series[part.name] = self._series_id(part.name)
        self._insert([_chunk(part.life, series, steps, times, values)])
        self._points[part.life, part.name] += count
        self._small[part.life, series] += count
        return True

    def _take_lives(self, lives: list[LifeRow]) -> None:
        alike = len(common_lives(lives, self._lives))
        if alike == len(lives):
            return  # known; fewer than there are: it was said before the last ones came
        # As in the original: what a life has left is sealed before the next one adds anything.
        self._seal_all()
        if alike < len(self._lives):  # the original is another file now: what comes next belongs to that one
            first = self._lives[alike][0]
            for table in ("chunks", "events", "notes"):
                self._connection.execute(f"DELETE FROM {table} WHERE life >= ?", (first,))
            self._connection.execute("DELETE FROM lives WHERE id >= ?", (first,))
        self._connection.executemany(
            "INSERT INTO lives (id, started, start_step, host, pid) VALUES (?, ?, ?, ?, ?)", lives[alike:]
        )
        self._look()

    def _seal_all(self) -> None:
        keys = sorted(key for key, count in self._small.items() if count)
        self._seal(keys)
        self._put_in_order(keys)

    def close(self) -> None:
        """Seals everything and closes the file.

        Raises:
            sqlite3.Error: the last points could not be sealed. They are kept as they are, and the file is closed.
        """
        try:
            if self._is_in_place():
                with self._transaction():
                    self._seal_all()
                self._leave_no_log()
        finally:
            self._connection.close()

    @property
    def bytes(self) -> int:
        """The size of the file, with all that is committed."""
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (page,) = self._connection.execute("PRAGMA page_size").fetchone()
        return int(pages * page)


def _check_json(kind: str, data: str) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the data of an event of the kind '{kind[:40]}' are no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the data of an event of the kind '{kind[:40]}' are no JSON object.")
