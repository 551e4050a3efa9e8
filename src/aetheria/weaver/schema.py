"""The tables of `hub.db`, and how those of an older version become those of this one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from aetheria.errors import HubError

__all__ = ["SCHEMA_VERSION", "prepare"]

SCHEMA_VERSION = 2

_FIRST = """
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

# Replicas are runs; what belongs together has a name in common.
_SECOND = """
ALTER TABLE runs ADD COLUMN in_group TEXT NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN replica TEXT NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN devices TEXT NOT NULL DEFAULT '[]';
UPDATE runs SET devices = ifnull((SELECT devices FROM replicas WHERE run = runs.id ORDER BY last_seen DESC), '[]');
DROP TABLE replicas;
CREATE TABLE requests (
    id TEXT PRIMARY KEY,                 -- of a command to several replicas
    data BLOB NOT NULL,
    wanted TEXT NOT NULL,                -- JSON: the replicas that were named; none where all were meant
    parts TEXT NOT NULL                  -- JSON: what it became: replica, run, and the id of its own command
);
"""

_STEPS = (_FIRST, _SECOND)


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables, or brings older ones up to date. Within a transaction of the caller's.

    Raises:
        HubError: they are of a newer version.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise HubError(f"{path} was written by a newer version of Aetheria (schema {version}). Use that one.")
    for step in _STEPS[version:]:
        for statement in step.split(";\n"):
            connection.execute(statement)
    if version < SCHEMA_VERSION:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
