"""`run.db`: the metrics, events and notes of one run in one SQLite file, and the only class that writes it.

Metrics are kept in **chunks**: the points of one series, in the order in which they came, as three packed arrays. Each
commit adds one small chunk for every series that has news; once a series has gathered enough points they are sealed
into one large chunk. So a commit costs one statement however many steps it covers, and a long series is read in a few
large pieces.

Each process that trains the run is a **life**. A life that resumes at a step earlier than the one the last life
reached walks some steps again. Nothing is deleted for that: the view `visible_chunks` says up to which step each chunk
counts, which is the earliest step at which any later life began.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import socket
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from aetheria.errors import RunFolderError
from aetheria.loom.filesystem import filesystem_of

__all__ = ["SCHEMA_VERSION", "SEALED_POINTS", "Event", "Life", "MetricRecord", "Note", "RunDatabase"]

SCHEMA_VERSION = 1
SEALED_POINTS = 1024  # points from which a series' small chunks are sealed into one

_SCHEMA = """
CREATE TABLE lives (
    id INTEGER PRIMARY KEY,
    started REAL NOT NULL,               -- seconds since 1970, UTC, like every time in this file
    start_step INTEGER NOT NULL,         -- the step this life continues from
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    UNIQUE (started, host, pid)
);
CREATE TABLE series (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY,              -- the order in which the points came
    life INTEGER NOT NULL REFERENCES lives,
    series INTEGER NOT NULL REFERENCES series,
    sealed INTEGER NOT NULL,             -- 1: final; 0: small, to be sealed together with the next ones
    first_step INTEGER NOT NULL,         -- the smallest
    last_step INTEGER NOT NULL,          -- the largest
    count INTEGER NOT NULL,
    minimum REAL,                        -- of the values that are not NaN; NULL where all are
    maximum REAL,
    steps BLOB NOT NULL,                 -- int64, little-endian
    times BLOB NOT NULL,                 -- float64, little-endian
    "values" BLOB NOT NULL               -- float64, little-endian, NaN and infinities as they were
);
CREATE INDEX chunks_of_series ON chunks (series, life, sealed);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    life INTEGER NOT NULL REFERENCES lives,
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL                   -- JSON, in which NaN and Infinity may stand
);
CREATE TABLE notes (
    id INTEGER PRIMARY KEY,
    life INTEGER NOT NULL REFERENCES lives,
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    author TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE VIEW visible_chunks AS
SELECT chunks.*, series.name, ends.last_visible_step
FROM chunks
JOIN series ON series.id = chunks.series
JOIN (
    SELECT id, coalesce(
        (SELECT min(later.start_step) FROM lives AS later WHERE later.id > lives.id), 9223372036854775807
    ) AS last_visible_step
    FROM lives
) AS ends ON ends.id = chunks.life
WHERE chunks.first_step <= ends.last_visible_step;
"""

_ROWS_PER_STATEMENT = 80  # of 11 values each: SQLite before 3.32 takes 999
_CHUNK_COLUMNS = 'life, series, sealed, first_step, last_step, count, minimum, maximum, steps, times, "values"'

MetricRecord = tuple[float, int, tuple[str, ...], tuple[float, ...]]
"""The metrics of one moment: seconds since 1970 (UTC), the step, the names, and as many values."""


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        time: seconds since 1970, UTC.
        step: the optimiser step at which it happened.
        kind: a short name, for instance "nonfinite".
        message: one sentence for a person.
        data: the same for a program; JSON types, among them NaN and infinities.
        life: which life of the run it happened in; set when it is read.
    """

    time: float
    step: int
    kind: str
    message: str
    data: Mapping[str, Any] = MappingProxyType({})
    life: int = 0


class Note(NamedTuple):
    """What a person wrote beside the curves.

    Attributes:
        time: seconds since 1970, UTC.
        step: the optimiser step it is about.
        author: who wrote it.
        text: what.
        life: in which life of the run it was written; set when it is read.
    """

    time: float
    step: int
    author: str
    text: str
    life: int = 0


class Life(NamedTuple):
    """One process that trained the run.

    Attributes:
        id: 1 for the first.
        started: seconds since 1970, UTC.
        start_step: the step it continued from; 0 for the first.
        host: name of the machine.
        pid: id of the process.
    """

    id: int
    started: float
    start_step: int
    host: str
    pid: int


class RunDatabase:
    """Writes `run.db`. Synchronous, for one thread; every method is one transaction: all of it is kept, or nothing.

    A commit survives the death of the process at any instant. A power cut may take the last commits (they are not
    fsynced one by one), but never damages what lies before them.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Opens the database; makes it where its folder exists and it does not.

        Raises:
            RunFolderError: the file is no `run.db`, or one of a newer version of Aetheria.
            sqlite3.Error: the file cannot be made or written.
        """
        self.path = path
        self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
        self._life: int | None = None
        self._series: dict[str, int] = {}
        self._unsealed: dict[int, int] = {}  # points in small chunks, by series
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        self._inode = os.stat(path).st_ino

    def _prepare(self) -> None:
        found = self._read_version()
        if found > SCHEMA_VERSION:
            raise RunFolderError(
                f"{self.path} has schema version {found}; this version of Aetheria writes {SCHEMA_VERSION}. "
                "Continue this run with a newer version."
            )
        # A write-ahead log needs memory shared by all who have the file open; machines share none.
        journal = "DELETE" if filesystem_of(self.path).network else "WAL"
        self._connection.execute(f"PRAGMA journal_mode = {journal}")
        # A log stays whole through a power cut without an fsync per commit; a rollback journal needs it.
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if journal == 'DELETE' else 'NORMAL'}")
        with self._transaction():
            if self._read_version() == 0:
                for statement in _SCHEMA.split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._series = dict(self._connection.execute("SELECT name, id FROM series"))

    def _read_version(self) -> int:
        try:
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
                raise
            raise RunFolderError(
                f"{self.path} is not a run database ({error}). Move it away; the run then starts a new one."
            ) from error
        return int(version)

    def begin_life(self, start_step: int, started: float | None = None) -> int:
        """Registers this process as the one that writes from now on, and seals what earlier lives left unsealed.

        Called again with the same `started`, for instance after the file was opened anew, it finds the same life.

        Args:
            start_step: the step that this life continues from; what earlier lives wrote beyond it is hidden.
            started: seconds since 1970; now, when absent.

        Returns:
            The number of the life, from 1.
        """
        identity = (time.time() if started is None else started, socket.gethostname(), os.getpid())
        with self._transaction():
            self._connection.execute(
                "INSERT OR IGNORE INTO lives (started, host, pid, start_step) VALUES (?, ?, ?, ?)",
                (*identity, start_step),
            )
            query = "SELECT id FROM lives WHERE started = ? AND host = ? AND pid = ?"
            life = int(self._connection.execute(query, identity).fetchone()[0])
            self._seal(self._connection.execute("SELECT DISTINCT life, series FROM chunks WHERE NOT sealed").fetchall())
        self._unsealed.clear()
        self._life = life
        return life

    def write(
        self, metrics: Sequence[MetricRecord] = (), events: Sequence[Event] = (), notes: Sequence[Note] = ()
    ) -> None:
        """Appends metrics, events and notes.

        Raises:
            RunFolderError: `begin_life` was not called, or the file was moved or removed.
            sqlite3.Error: it cannot be written now; nothing of this call was.
        """
        life = self._current_life()
        if not self._is_in_place():
            raise RunFolderError(f"{self.path} was moved or removed while it was being written. Put it back.")
        columns = _columns(metrics)
        with self._transaction():
            series = {name: self._series_id(name) for name in columns}
            self._insert([_chunk(life, series[name], *column) for name, column in columns.items()])
            self._connection.executemany(
                "INSERT INTO events (time, step, kind, message, data, life) VALUES (?, ?, ?, ?, ?, ?)",
                [(*event[:-2], json.dumps(dict(event.data)), life) for event in events],
            )
            self._connection.executemany(
                "INSERT INTO notes (time, step, author, text, life) VALUES (?, ?, ?, ?, ?)",
                [(*note[:-1], life) for note in notes],
            )
            unsealed = {series[name]: len(column[0]) for name, column in columns.items()}
            unsealed = {key: self._unsealed.get(key, 0) + count for key, count in unsealed.items()}
            full = [key for key, count in unsealed.items() if count >= SEALED_POINTS]
            self._seal([(life, key) for key in full])
        self._series |= series
        self._unsealed |= unsealed | dict.fromkeys(full, 0)

    def close(self) -> None:
        """Seals everything and closes the file; where nobody else has it open, as a single file without a log.

        Raises:
            sqlite3.Error: the last points could not be sealed. They are kept as they are, and the file is closed.
        """
        try:
            if self._is_in_place():
                with self._transaction():
                    self._seal([(self._current_life(), key) for key, count in self._unsealed.items() if count])
                self._leave_no_log()
        finally:
            self._connection.close()

    # --- parts -----------------------------------------------------------------------------------------------------
    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some errors, such as a full disk, have rolled back by themselves
                self._connection.execute("ROLLBACK")
            raise

    def _current_life(self) -> int:
        if self._life is None:
            raise RunFolderError(f"nobody said which life of the run writes to {self.path}: call begin_life first.")
        return self._life

    def _is_in_place(self) -> bool:
        """Returns whether the open file still has its name; SQLite would go on writing to one that lost it."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def _leave_no_log(self) -> None:
        """Makes the file readable on media that cannot be written, where a log would need shared memory made first."""
        self._connection.execute("PRAGMA busy_timeout = 0")
        try:
            self._connection.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # somebody reads: the log stays, and is as good
                raise

    def _series_id(self, name: str) -> int:
        known = self._series.get(name)
        if known is None:
            known = self._connection.execute("INSERT INTO series (name) VALUES (?)", (name,)).lastrowid or 0
        return known

    def _insert(self, chunks: Sequence[tuple[object, ...]]) -> None:
        # One statement of many rows rather than `executemany`: every statement gives the interpreter's lock away and
        # takes it again, which a training thread feels.
        for start in range(0, len(chunks), _ROWS_PER_STATEMENT):
            rows = chunks[start : start + _ROWS_PER_STATEMENT]
            places = ", ".join(["(" + ", ".join("?" * len(rows[0])) + ")"] * len(rows))
            values = [value for row in rows for value in row]
            self._connection.execute(f"INSERT INTO chunks ({_CHUNK_COLUMNS}) VALUES {places}", values)

    def _seal(self, keys: Iterable[tuple[int, int]]) -> None:
        """Replaces the small chunks of each (life, series) by a sealed one."""
        for key in keys:
            chosen = "FROM chunks WHERE life = ? AND series = ? AND NOT sealed"
            small = self._connection.execute(f'SELECT id, steps, times, "values" {chosen} ORDER BY id', key).fetchall()
            if small:
                ids, *columns = zip(*small)
                self._connection.execute(
                    f"INSERT INTO chunks ({_CHUNK_COLUMNS}) SELECT life, series, 1, min(first_step), max(last_step), "
                    f"sum(count), min(minimum), max(maximum), ?, ?, ? {chosen}",
                    (*map(b"".join, columns), *key),
                )
                self._connection.execute(f"DELETE {chosen} AND id <= ?", (*key, ids[-1]))


Column = tuple[list[int], list[float], list[float]]
"""Steps, times and values of one series."""


def _columns(records: Iterable[MetricRecord]) -> dict[str, Column]:
    """Returns the points of each series, in the order in which they came."""
    columns: dict[str, Column] = {}
    for names, alike in itertools.groupby(records, key=operator.itemgetter(2)):
        times, steps, _, rows = zip(*alike)
        for name, values in zip(names, zip(*rows)):
            column = columns.setdefault(name, ([], [], []))
            column[0].extend(steps)
            column[1].extend(times)
            column[2].extend(values)
    return columns


def _chunk(life: int, series: int, steps: list[int], times: list[float], values: list[float]) -> tuple[object, ...]:
    """Returns the row of a small chunk, in the order of `_CHUNK_COLUMNS`."""
    numbers = [value for value in values if not math.isnan(value)]
    return (
        *(life, series, 0),
        *(min(steps), max(steps), len(steps)),
        *(min(numbers, default=None), max(numbers, default=None)),
        struct.pack(f"<{len(steps)}q", *steps),
        struct.pack(f"<{len(times)}d", *times),
        struct.pack(f"<{len(values)}d", *values),
    )
