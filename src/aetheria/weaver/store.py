"""`hub.db`: what the hub must still know after it was killed. SQLite, for one thread, one transaction a method.

A commit survives the death of the process at any instant. A power cut may take the last ones; what they said is in the
journals of the runs and, for commands, in the message server's own store, too.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aetheria.errors import HubError
from aetheria.protocol import AnyCommand, Outcome, Set, decode_command, encode

__all__ = ["KnobState", "Message", "Replica", "Store", "StoredRun"]

SCHEMA_VERSION = 1
FEED_LENGTH = 50_000  # messages that a client that was away can still catch up with

_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    folder TEXT NOT NULL,                -- absolute; on another machine it may mean nothing here
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    registered REAL NOT NULL,            -- seconds since 1970, like every time in this file
    last_seen REAL NOT NULL,
    step INTEGER NOT NULL
);
CREATE TABLE replicas (
    id TEXT NOT NULL,
    run TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    devices TEXT NOT NULL,               -- JSON, a list of names
    last_seen REAL NOT NULL,
    PRIMARY KEY (id, run)
);
CREATE TABLE knobs (
    run TEXT PRIMARY KEY,
    schema TEXT NOT NULL,                -- JSON Schema
    observed TEXT NOT NULL,              -- JSON: the value of each knob, as the run told it last
    revision INTEGER NOT NULL,
    time REAL NOT NULL
);
CREATE TABLE desired (
    run TEXT NOT NULL,
    knob TEXT NOT NULL,
    value TEXT NOT NULL,                 -- JSON
    command TEXT NOT NULL,
    PRIMARY KEY (run, knob)
);
CREATE TABLE commands (
    number INTEGER PRIMARY KEY,          -- the order in which they were accepted
    id TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL,
    data BLOB NOT NULL,
    received REAL NOT NULL,
    delivery TEXT NOT NULL               -- "unknown": to be published again; "published"; "unconfirmed": given up
);
CREATE INDEX commands_of_run ON commands (run, number);
CREATE TABLE outcomes (
    number INTEGER PRIMARY KEY,
    command TEXT NOT NULL,
    run TEXT NOT NULL,
    state TEXT NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (command, run, data)
);
CREATE TABLE feed (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL,
    type TEXT NOT NULL,
    time REAL NOT NULL,
    data TEXT NOT NULL                   -- JSON
);
CREATE INDEX feed_of_run ON feed (run, type, seq);
CREATE TABLE sessions (
    secret TEXT PRIMARY KEY,             -- SHA-256 of a browser's cookie
    role TEXT NOT NULL,
    expires REAL NOT NULL
);
"""


class StoredRun(NamedTuple):
    """A run that has registered."""

    id: str
    folder: str
    host: str
    pid: int
    registered: float
    last_seen: float
    step: int


class Replica(NamedTuple):
    """A process that trains, and its devices."""

    id: str
    run: str
    host: str
    pid: int
    devices: list[str]
    last_seen: float


class KnobState(NamedTuple):
    """The knobs of a run as it told them last."""

    schema: dict[str, Any]
    observed: dict[str, Any]
    revision: int
    time: float


class Message(NamedTuple):
    """One message of the live feed.

    Attributes:
        seq: counts the messages, from 1, over all restarts of the hub; 0 for what is not kept.
        run: which run it is about.
        type: "outcome", "event", "knobs", "status"; not kept: "metrics", "beat".
        time: seconds since 1970.
        data: JSON.
    """

    seq: int
    run: str
    type: str
    time: float
    data: str


class Store:
    """The hub's database.

    Raises:
        HubError: the file cannot be opened, or is of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise HubError(f"{path} was written by a newer version of Aetheria (schema {version}). Use that one.")
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";\n"):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise HubError(
                f"cannot open {path}: {error}. Move it away; the hub then starts a new one, and the runs' own folders "
                "still know everything."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # --- runs ------------------------------------------------------------------------------------------------------
    def register(self, run: StoredRun) -> None:
        """Remembers a run; one of that name is replaced."""
        self._connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", run)

    def seen(self, runs: Iterable[StoredRun], replicas: Iterable[Replica]) -> None:
        """Remembers who was last seen when."""
        with self._transaction():
            self._connection.executemany(
                "UPDATE runs SET last_seen = ?, step = ? WHERE id = ?",
                [(run.last_seen, run.step, run.id) for run in runs],
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO replicas VALUES (?, ?, ?, ?, ?, ?)",
                [(*replica[:4], json.dumps(replica.devices), replica.last_seen) for replica in replicas],
            )

    def runs(self) -> list[StoredRun]:
        """Returns all runs that ever registered, the newest first."""
        return [StoredRun(*row) for row in self._connection.execute("SELECT * FROM runs ORDER BY registered DESC")]

    def replicas(self) -> list[Replica]:
        """Returns all replicas, the one seen last first."""
        rows = self._connection.execute("SELECT * FROM replicas ORDER BY last_seen DESC")
        return [Replica(*row)._replace(devices=json.loads(row[4])) for row in rows]

    # --- knobs -----------------------------------------------------------------------------------------------------
    def set_knobs(self, run: str, state: KnobState) -> None:
        """Remembers what a run told about its knobs; the newest counts."""
        row = (run, json.dumps(state.schema), json.dumps(state.observed), state.revision, state.time)
        self._connection.execute("INSERT OR REPLACE INTO knobs VALUES (?, ?, ?, ?, ?)", row)

    def knobs(self, run: str) -> KnobState | None:
        """Returns a run's knobs; None where it has not told them yet."""
        query = "SELECT schema, observed, revision, time FROM knobs WHERE run = ?"
        row = self._connection.execute(query, (run,)).fetchone()
        return None if row is None else KnobState(json.loads(row[0]), json.loads(row[1]), row[2], row[3])

    def desired(self, run: str) -> dict[str, Any]:
        """Returns the value that was asked for last, by knob; what was refused does not count."""
        rows = self._connection.execute("SELECT knob, value FROM desired WHERE run = ? ORDER BY knob", (run,))
        return {knob: json.loads(value) for knob, value in rows}

    # --- commands --------------------------------------------------------------------------------------------------
    def accept(self, command: AnyCommand, now: float) -> None:
        """Remembers a command before it is published."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO commands (id, run, data, received, delivery) VALUES (?, ?, ?, ?, 'unknown')",
                (command.id, command.run, encode(command), now),
            )
            if isinstance(command, Set) and not command.dry_run:
                self._connection.executemany(
                    "INSERT OR REPLACE INTO desired VALUES (?, ?, ?, ?)",
                    [(command.run, key, json.dumps(value), command.id) for key, value in command.args.values.items()],
                )

    def delivered(self, command_id: str, delivery: str) -> None:
        """Remembers whether a command was published: "published", or "unconfirmed"."""
        self._connection.execute("UPDATE commands SET delivery = ? WHERE id = ?", (delivery, command_id))

    def command(self, command_id: str) -> AnyCommand | None:
        """Returns a command that was accepted."""
        row = self._connection.execute("SELECT data FROM commands WHERE id = ?", (command_id,)).fetchone()
        return None if row is None else decode_command(row[0])

    def delivery(self, command_id: str) -> str:
        """Returns whether an accepted command was published."""
        row = self._connection.execute("SELECT delivery FROM commands WHERE id = ?", (command_id,)).fetchone()
        return "" if row is None else str(row[0])

    def unanswered(self) -> list[AnyCommand]:
        """Returns the commands that were accepted and never answered, in their order."""
        rows = self._connection.execute(
            "SELECT data FROM commands WHERE delivery != 'unconfirmed' AND NOT EXISTS "
            "(SELECT * FROM outcomes WHERE command = commands.id) ORDER BY number LIMIT 1000"
        )
        return [decode_command(data) for (data,) in rows.fetchall()]

    def commands(self, run: str, last: int) -> list[AnyCommand]:
        """Returns the newest commands that were accepted for a run, oldest first."""
        query = "SELECT data FROM commands WHERE run = ? ORDER BY number DESC LIMIT ?"
        return [decode_command(data) for (data,) in self._connection.execute(query, (run, last)).fetchall()][::-1]

    def outcome(self, run: str, command_id: str) -> Outcome | None:
        """Returns how far a command got: its final outcome, else the newest."""
        query = "SELECT data FROM outcomes WHERE run = ? AND command = ? ORDER BY number"
        outcomes = [
            msgspec.json.decode(data, type=Outcome) for (data,) in self._connection.execute(query, (run, command_id))
        ]
        return next((outcome for outcome in outcomes if outcome.is_final), outcomes[-1] if outcomes else None)

    def add_outcome(self, run: str, outcome: Outcome) -> Message | None:
        """Remembers an outcome; returns its message for the feed, or None for one that was known."""
        data = encode(outcome)
        with self._transaction():
            added = self._connection.execute(
                "INSERT OR IGNORE INTO outcomes (command, run, state, data) VALUES (?, ?, ?, ?)",
                (outcome.command, run, outcome.state, data),
            )
            if not added.rowcount:
                return None
            if outcome.state in ("rejected", "failed"):
                self._connection.execute("DELETE FROM desired WHERE command = ?", (outcome.command,))
            return self._append(run, "outcome", outcome.time, data.decode())

    # --- the live feed ---------------------------------------------------------------------------------------------
    def append(self, run: str, kind: str, data: str, when: float) -> Message:
        """Adds a message to the feed."""
        with self._transaction():
            return self._append(run, kind, when, data)

    def _append(self, run: str, kind: str, when: float, data: str) -> Message:
        query = "INSERT INTO feed (run, type, time, data) VALUES (?, ?, ?, ?)"
        seq = self._connection.execute(query, (run, kind, when, data)).lastrowid or 0
        if seq % 1000 == 0:
            self._connection.execute("DELETE FROM feed WHERE seq <= ?", (seq - FEED_LENGTH,))
        return Message(seq, run, kind, when, data)

    def feed(self, after: int, limit: int) -> list[Message]:
        """Returns messages behind a sequence number, in their order."""
        rows = self._connection.execute("SELECT * FROM feed WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))
        return [Message(*row) for row in rows]

    def newest(self, run: str, kind: str, last: int) -> list[Message]:
        """Returns the newest messages of one type about a run, oldest first."""
        query = "SELECT * FROM feed WHERE run = ? AND type = ? ORDER BY seq DESC LIMIT ?"
        return [Message(*row) for row in self._connection.execute(query, (run, kind, last))][::-1]

    def feed_range(self) -> tuple[int, int]:
        """Returns the first and the last sequence number there is; (1, 0) where there is none yet."""
        first, last = self._connection.execute("SELECT min(seq), max(seq) FROM feed").fetchone()
        return (1, 0) if last is None else (first, last)

    # --- browsers --------------------------------------------------------------------------------------------------
    def add_session(self, secret: str, role: str, expires: float) -> None:
        """Remembers the hash of a browser's cookie, and what it may do."""
        with self._transaction():
            self._connection.execute("DELETE FROM sessions WHERE expires < ?", (time.time(),))
            self._connection.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (secret, role, expires))

    def sessions(self) -> Mapping[str, tuple[str, float]]:
        """Returns the role and the end of all sessions, by the hash of their cookie."""
        rows = self._connection.execute("SELECT secret, role, expires FROM sessions")
        return {secret: (role, expires) for secret, role, expires in rows}
