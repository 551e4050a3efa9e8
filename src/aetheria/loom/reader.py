"""Reading `run.db`, while it is written, after a crash, from media that cannot be written."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aetheria.errors import RunFolderError
from aetheria.loom.database import SCHEMA_VERSION, Event, Life, Note

__all__ = ["Curve", "RunReader"]


class Curve(NamedTuple):
    """The points of one series, in the order in which they came; steps rise unless somebody logged them otherwise.

    Attributes:
        steps: int64 of shape [points].
        values: float64 of shape [points]; NaN and infinities as they were.
        times: float64 of shape [points]: seconds since 1970, UTC.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    times: NDArray[np.float64]

    def best(self, mode: Literal["min", "max"]) -> tuple[int, float] | None:
        """Returns the step and the value of the best point, the first of several; None where no value is a number."""
        numbers = np.flatnonzero(~np.isnan(self.values))
        if not numbers.size:
            return None
        values = self.values[numbers]
        index = numbers[values.argmin() if mode == "min" else values.argmax()]
        return int(self.steps[index]), float(self.values[index])


class RunReader:
    """Reads the `run.db` of a run and changes nothing in it. A file that is not there yet reads as an empty one.

    Every method opens the file anew, so that a reader may outlive it and never keeps a writer waiting. Where a run was
    resumed at an earlier step than it had reached, the points that were written again are left out in their first
    version; see `aetheria.loom.database`.

    Every method raises `RunFolderError` where the file is damaged, or of a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def series(self) -> list[str]:
        """Returns the names of all metrics, sorted."""
        return [name for (name,) in self._query("SELECT DISTINCT name FROM visible_chunks ORDER BY name")]

    def metric(self, name: str) -> Curve:
        """Returns the points of one metric; none where nobody logged it."""
        chunks = self._query(
            'SELECT steps, "values", times, last_visible_step FROM visible_chunks WHERE name = ? ORDER BY id', (name,)
        )
        return _join(chunks)

    def last(self) -> dict[str, tuple[int, float]]:
        """Returns the step and the value of the last point of every metric."""
        chunks = self._query(
            'SELECT name, steps, "values", times, last_visible_step FROM visible_chunks '
            "WHERE id IN (SELECT max(id) FROM visible_chunks GROUP BY series) ORDER BY name"
        )
        curves = {name: _join([chunk]) for name, *chunk in chunks}
        return {name: (int(curve.steps[-1]), float(curve.values[-1])) for name, curve in curves.items()}

    def best(self, name: str, mode: Literal["min", "max"]) -> tuple[int, float] | None:
        """Returns the step and the value of the best point of a metric, the first of several.

        Args:
            name: the metric.
            mode: whether the smallest or the largest value is the best.

        Returns:
            None where there is no value that is a number.
        """
        return self.metric(name).best(mode)

    def events(self, kind: str | None = None) -> list[Event]:
        """Returns what happened, oldest first, in all lives; only the events of one kind where it is given."""
        rows = self._query(
            "SELECT time, step, kind, message, data, life FROM events WHERE ? IS NULL OR kind = ? ORDER BY id",
            (kind, kind),
        )
        return [
            Event(when, step, name, message, json.loads(data), life) for when, step, name, message, data, life in rows
        ]

    def notes(self) -> list[Note]:
        """Returns the notes, oldest first."""
        return [Note(*row) for row in self._query("SELECT time, step, author, text, life FROM notes ORDER BY id")]

    def lives(self) -> list[Life]:
        """Returns the processes that trained the run, the first one first."""
        return [Life(*row) for row in self._query("SELECT id, started, start_step, host, pid FROM lives ORDER BY id")]

    # --- parts -----------------------------------------------------------------------------------------------------
    def _query(self, query: str, parameters: Sequence[str | None] = ()) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        try:
            with self._connection() as connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version > SCHEMA_VERSION:
                    raise RunFolderError(
                        f"{self.path} has schema version {version}; this version of Aetheria reads {SCHEMA_VERSION}. "
                        "Open it with a newer version."
                    )
                # Version 0: somebody is just making it.
                return connection.execute(query, parameters).fetchall() if version else []
        except sqlite3.Error as error:
            raise RunFolderError(f"cannot read {self.path}: {error}. Is it a run database, and whole?") from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = _open_read_only(self.path)
        if connection is not None:
            with closing(connection):
                yield connection
            return
        # A process died here and left its log, and the folder cannot hold the shared memory that reading the log needs.
        with tempfile.TemporaryDirectory(prefix="aetheria-") as folder:
            copy = Path(folder) / self.path.name
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{self.path}{suffix}", f"{copy}{suffix}")
            with closing(sqlite3.connect(copy)) as connection:
                yield connection


def _open_read_only(path: Path) -> sqlite3.Connection | None:
    """Returns a connection that works; None where there is a log that cannot be read in its place."""
    uri = path.absolute().as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=5.0)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        log = Path(f"{path}-wal")
        if log.exists() and log.stat().st_size:
            return None
        return sqlite3.connect(uri + "&immutable=1", uri=True)
    except BaseException:
        connection.close()
        raise
    return connection


def _join(chunks: Sequence[Sequence[Any]]) -> Curve:
    """Returns the points of chunks, given as (steps, values, times, last visible step), that are visible."""
    parts: list[Curve] = []
    for steps, values, times, last_visible_step in chunks:
        part = Curve(np.frombuffer(steps, "<i8"), np.frombuffer(values, "<f8"), np.frombuffer(times, "<f8"))
        visible = part.steps <= last_visible_step
        parts.append(part if visible.all() else Curve(*(column[visible] for column in part)))
    return Curve(
        np.concatenate([part.steps for part in parts], dtype=np.int64) if parts else np.empty(0, np.int64),
        np.concatenate([part.values for part in parts], dtype=np.float64) if parts else np.empty(0),
        np.concatenate([part.times for part in parts], dtype=np.float64) if parts else np.empty(0),
    )
