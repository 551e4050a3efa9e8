"""`hub.db`: what the hub must still know after it was killed. SQLite, for one thread, one transaction a method.

A commit survives the death of the process at any instant. A power cut may take the last ones; what they said is in the
journals of the runs and, for commands, in the message server's own store, too.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aetheria.errors import HubError
from aetheria.protocol import AnyCommand, Outcome, Set, decode_command, encode
from aetheria.weaver.schema import prepare

__all__ = ["KnobState", "Message", "Part", "Request", "Store", "StoredRun"]

FEED_LENGTH = 50_000  # messages that a client that was away can still catch up with


class StoredRun(NamedTuple):
    """A run that has registered.

    Attributes:
        id: its name.
        folder: where it lives, absolute; on another machine it may mean nothing here.
        host: the machine.
        pid: the training process.
        registered: when, in seconds since 1970.
        last_seen: when something was last heard of it.
        step: the optimiser steps taken then.
        group: the name that it has in common with the other replicas of a run; "" where it has no others.
        replica: which of them it is.
        devices: what it trains on.
    """

    id: str
    folder: str
    host: str
    pid: int
    registered: float
    last_seen: float
    step: int
    group: str = ""
    replica: str = ""
    devices: Sequence[str] = ()


class Part(NamedTuple):
    """What of a request to several replicas goes to one of them.

    Attributes:
        replica: its id.
        run: by which name it is addressed alone.
        command: the id of the command that it gets, which follows from that of the request.
    """

    replica: str
    run: str
    command: str


class Request(NamedTuple):
    """A command to several replicas at once.

    Attributes:
        command: as it was sent.
        wanted: the replicas that were named; none where all were meant.
        parts: those that it went to.
    """

    command: AnyCommand
    wanted: Sequence[str]
    parts: Sequence[Part]


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
            with self._transaction():
                prepare(self._connection, path)
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
        row = (*run[:9], json.dumps(list(run.devices)))
        self._connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def seen(self, runs: Iterable[StoredRun]) -> None:
        """Remembers who was last seen when."""
        with self._transaction():
            self._connection.executemany(
                "UPDATE runs SET last_seen = ?, step = ? WHERE id = ?",
                [(run.last_seen, run.step, run.id) for run in runs],
            )

    def runs(self) -> list[StoredRun]:
        """Returns all runs that ever registered, the newest first."""
        rows = self._connection.execute("SELECT * FROM runs ORDER BY registered DESC")
        return [StoredRun(*row)._replace(devices=json.loads(row[9])) for row in rows]

    # --- knobs -----------------------------------------------------------------------------------------------------
    def set_knobs(self, run: str, state: KnobState) -> None:
        """Remembers what a run told about its knobs; the newest counts."""
        row = (run, json.dumps(state.schema), json.dumps(state.observed), state.revision, state.time)
        self._connection.execute("INSERT OR REPLACE INTO knobs VALUES (?, ?, ?, ?, ?)", row)

    def forget_revision(self, run: str) -> None:
        """Lets what is told next about a run's knobs count, whatever its revision: it is told by another process."""
        self._connection.execute("UPDATE knobs SET revision = 0 WHERE run = ?", (run,))

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
            self._accept(command, now)

    def _accept(self, command: AnyCommand, now: float) -> None:
        self._connection.execute(
            "INSERT INTO commands (id, run, data, received, delivery) VALUES (?, ?, ?, ?, 'unknown')",
            (command.id, command.run, encode(command), now),
        )
        if isinstance(command, Set) and not command.dry_run:
            self._connection.executemany(
                "INSERT OR REPLACE INTO desired VALUES (?, ?, ?, ?)",
                [(command.run, key, json.dumps(value), command.id) for key, value in command.args.values.items()],
            )

    def accept_all(
        self, request: Request, commands: Iterable[AnyCommand], refused: Iterable[Outcome], now: float
    ) -> list[Message]:
        """Remembers a request to several replicas, with all that follows from it, or nothing of it.

        Args:
            request: what was asked for.
            commands: those that are to be published.
            refused: what came of the others.
            now: seconds since 1970.

        Returns:
            The messages about those that were refused, for the feed.
        """
        row = (request.command.id, encode(request.command), json.dumps([*request.wanted]), json.dumps(request.parts))
        with self._transaction():
            self._connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", row)
            for command in commands:
                self._accept(command, now)
            messages = [self._add_outcome(outcome.run, outcome) for outcome in refused]
        return [message for message in messages if message is not None]

    def request(self, request_id: str) -> Request | None:
        """Returns a request to several replicas that was accepted."""
        query = "SELECT data, wanted, parts FROM requests WHERE id = ?"
        row = self._connection.execute(query, (request_id,)).fetchone()
        if row is None:
            return None
        parts = [Part(*part) for part in json.loads(row[2])]
        return Request(decode_command(row[0]), json.loads(row[1]), parts)

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
        return self.commands_of([run], last)

    def commands_of(self, runs: Sequence[str], last: int) -> list[AnyCommand]:
        """Returns the newest commands that were accepted for any of some runs, oldest first."""
        places = ", ".join("?" * len(runs))
        query = f"SELECT data FROM commands WHERE run IN ({places}) ORDER BY number DESC LIMIT ?"
        return [decode_command(data) for (data,) in self._connection.execute(query, (*runs, last)).fetchall()][::-1]

    def outcome(self, run: str, command_id: str) -> Outcome | None:
        """Returns how far a command got: its final outcome, else the newest."""
        query = "SELECT data FROM outcomes WHERE run = ? AND command = ? ORDER BY number"
        outcomes = [
            msgspec.json.decode(data, type=Outcome) for (data,) in self._connection.execute(query, (run, command_id))
        ]
        return next((outcome for outcome in outcomes if outcome.is_final), outcomes[-1] if outcomes else None)

    def add_outcome(self, run: str, outcome: Outcome) -> Message | None:
        """Remembers an outcome; returns its message for the feed, or None for one that was known."""
        with self._transaction():
            return self._add_outcome(run, outcome)

    def _add_outcome(self, run: str, outcome: Outcome) -> Message | None:
        data = encode(outcome)
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
