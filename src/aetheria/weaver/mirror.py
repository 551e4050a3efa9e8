"""Copies of the folders of runs whose own the hub cannot look into: what they send, kept in the shape of a run folder.

A copy is never more than a copy: what does not fit together with what there is, is not taken, and the run, which is
told what the hub has, sends it again. So a hub that was killed goes on where it was, and damage is mended by setting
aside what is damaged. No trouble with the disk reaches anything else that the hub does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from loguru import logger

from aetheria.errors import RunFolderError
from aetheria.loom.database_copy import CopiedDatabase, DamagedDatabaseError, DatabasePart
from aetheria.loom.parts import (
    PART_BYTES,
    Have,
    JournalPart,
    Parcel,
    Part,
    RunFilePart,
    checksum,
    decode_parcel,
    encode_have,
)
from aetheria.loom.private_files import private_folder, write_private
from aetheria.loom.subjects import token_of

__all__ = ["MIRROR_BYTES", "Mirrors", "folder_of"]

MIRROR_BYTES = 1_000_000_000
_OPEN_DATABASES = 32  # that are kept open
Result = TypeVar("Result")
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _RunFile(msgspec.Struct):
    """What of a `run.json` the hub looks at; the rest may be anything."""

    format: int = 1
    name: str = ""
    status: str = ""
    status_detail: str = ""
    global_step: int | None = None
    created: str = ""
    host: str = ""
    pid: int | None = None


def folder_of(mirrors: Path, run: str) -> Path:
    """Returns where the copy of a run's folder lies: under its name, if no harm can come from that.

    Raises:
        HubError: the name is empty or too long.
    """
    token = token_of(run)  # in which everything but letters, digits, "-", "_" and "=" is spelled out
    return mirrors / (run if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._@-]*", run) else token)


class _Mirror:
    """The copy of one run's folder. For one thread."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.said: list[str] = []  # what is to be told to whoever watches the run
        self._limit = limit
        self._database: CopiedDatabase | None = None
        self._checked = False  # whether the database was looked through since the hub was started
        self._journal: tuple[int, int] | None = None  # its size, and the checksum of all of it
        self._full = False
        self._last = "", 0  # session and number of the last parcel
        self._troubled = False
        self._refused = 0
        self._missed = 0  # times that something could not be written

    # --- what there is ---------------------------------------------------------------------------------------------
    def have(self) -> Have:
        """Returns what there is, after a look at whether it can be read and written."""
        try:
            journal, journal_checksum = self._known_journal()
            run = checksum(self._read("run.json"))
            copied = self._open().copied
        except (OSError, sqlite3.Error, RunFolderError) as error:
            self._note_trouble(error)
            return Have()  # it is asked for again later
        session, number = self._last
        return Have(
            wanted=True,
            room=not self._full,
            run=run,
            journal=journal,
            journal_checksum=journal_checksum,
            database=copied,
            session=session,
            number=number,
        )

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return b""

    def _known_journal(self) -> tuple[int, int]:
        file = self.path / "journal.jsonl"
        size = file.stat().st_size if file.exists() else 0
        if self._journal is None or self._journal[0] != size:
            content = self._read("journal.jsonl")
            self._journal = len(content), checksum(content)
        return self._journal

    def _size(self) -> int:
        run_file = self.path / "run.json"
        other = run_file.stat().st_size if run_file.exists() else 0
        return self._open().bytes + self._known_journal()[0] + other

    # --- what comes ------------------------------------------------------------------------------------------------
    def take(self, parcel: Parcel) -> bool:
        """Adds what is new in the parts; returns False where something before them is missing, or the disk fails."""
        session, number = self._last
        self._last = parcel.session, max(parcel.number, number if session == parcel.session else 0)
        complete, parts = True, parcel.parts
        try:
            for part in parts:
                if isinstance(part, RunFilePart):
                    self._take_run_file(part)
            if not self._has_room(parts):
                return True
            for part in parts:
                if isinstance(part, JournalPart):
                    complete &= self._take_journal(part)
            rows: list[DatabasePart] = [part for part in parts if not isinstance(part, RunFilePart | JournalPart)]
            if rows:
                complete &= self._open().take(rows)
        except ValueError as error:
            self._refused += 1
            if self._refused == 1:
                self._say(f"The run sent something for its copy that is none: {error} Others like it are not told.")
        except (OSError, sqlite3.Error, RunFolderError) as error:
            self._missed += 1
            self._note_trouble(error)
            return False
        else:
            if self._troubled:
                self._say(
                    f"The copy in {self.path} can be written again. That failed {self._missed} times; what is missing "
                    "is asked for again."
                )
            self._troubled = False
        return complete

    def _has_room(self, parts: list[Part]) -> bool:
        if self._full:  # it stays so: with parts missing, later ones that are small enough are worth nothing
            return False
        coming = sum(len(msgspec.msgpack.encode(part)) for part in parts if not isinstance(part, RunFilePart))
        self._full = coming > 0 and self._size() + coming > self._limit
        if self._full:
            self._say(
                f"The copy of the run's folder has {self._size():,} bytes, and would exceed the {self._limit:,} that "
                "are allowed for one run (mirror_bytes in the hub's settings.json). Its curves and its journal end "
                "here; all of them are in its own folder."
            )
        return not self._full

    def _take_run_file(self, part: RunFilePart) -> None:
        if len(part.content) > PART_BYTES:
            raise ValueError(f"a run.json of {len(part.content):,} bytes; at most {PART_BYTES:,} are taken.")
        try:
            msgspec.convert(json.loads(part.content), _RunFile)
        except (ValueError, RecursionError) as error:  # msgspec's errors are among them
            raise ValueError(f"a run.json that is none: {error}.") from error
        if part.content != self._read("run.json"):
            write_private(private_folder(self.path) / "run.json", part.content)

    def _take_journal(self, part: JournalPart) -> bool:
        """Returns whether the part follows what there is."""
        size, known_checksum = self._known_journal()
        if not 0 <= part.offset <= size:
            return False  # what is before it was lost on the way
        descriptor = os.open(private_folder(self.path) / "journal.jsonl", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            known = os.pread(descriptor, len(part.content), part.offset)
            if known == part.content[: len(known)]:
                new = part.content[len(known) :]
                self._journal = None  # until it is written
                self._append(descriptor, new, size)
                self._journal = size + len(new), checksum(new, known_checksum)
                return True
            self._journal = None
            same = next(index for index, byte in enumerate(known) if part.content[index] != byte)
            self._say(
                f"The copy of the journal differs from what the run sends, from byte {part.offset + same:,} on; what "
                "the run sends is right."
            )
            os.ftruncate(descriptor, part.offset + same)
            self._append(descriptor, part.content[same:], part.offset + same)
        finally:
            os.close(descriptor)
        return True

    @staticmethod
    def _append(descriptor: int, content: bytes, end: int) -> None:
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], end + written)
        except OSError:
            os.ftruncate(descriptor, end)
            raise

    # --- the database ----------------------------------------------------------------------------------------------
    def _open(self) -> CopiedDatabase:
        if self._database is None:
            file = private_folder(self.path) / "run.db"
            try:
                self._database = CopiedDatabase(file, check=not self._checked)
            except (sqlite3.Error, RunFolderError) as error:
                if not _is_damage(error):
                    raise
                self._set_aside(error)
                self._database = CopiedDatabase(file)
            self._checked = True
        return self._database

    def _set_aside(self, error: Exception) -> None:
        """Gives a damaged database another name; the run sends everything again."""
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                Path(f"{self.path / 'run.db'}{suffix}").replace(f"{self.path / 'run.db.damaged'}{suffix}")
        Path(f"{self.path / 'run.db'}-shm").unlink(missing_ok=True)
        self._say(
            f"The copy of run.db was damaged ({str(error).rstrip('.')}). It is now {self.path / 'run.db.damaged'}, and "
            "a new one is made from what the run sends; of a run that has ended nothing more comes."
        )

    @property
    def is_open(self) -> bool:
        """Whether its database is open."""
        return self._database is not None

    def close(self) -> None:
        """Closes the database."""
        database, self._database = self._database, None
        if database is not None:
            try:
                database.close()
            except (OSError, sqlite3.Error) as error:  # what is committed stays; it is opened again when it is needed
                logger.debug("{}: {!r}", self.path, error)

    # --- what is said ----------------------------------------------------------------------------------------------
    def _note_trouble(self, error: Exception) -> None:
        self.close()  # what is opened next may be another file, or the same one in better health
        if _is_damage(error):
            self._checked = False  # it is found again when it is opened, and set aside
        if not self._troubled:
            self._say(f"The copy in {self.path} cannot be written: {str(error).rstrip('.')}. This is tried again.")
        self._troubled = True

    def _say(self, sentence: str) -> None:
        logger.warning("{}: {}", self.path.name, sentence)
        self.said.append(sentence)


def _is_damage(error: Exception) -> bool:
    """Returns whether a database is no longer one, rather than out of reach for a while."""
    if isinstance(error, RunFolderError):
        cause = error.__cause__
        return isinstance(error, DamagedDatabaseError) or (isinstance(cause, Exception) and _is_damage(cause))
    return isinstance(error, sqlite3.DatabaseError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


class Mirrors:
    """The copies of all folders that the hub cannot look into. For one event loop; the disk has a thread of its own."""

    def __init__(self, folder: Path, limit: int = MIRROR_BYTES) -> None:
        """Opens nothing yet.

        Args:
            folder: in which the copies lie; made when it is needed.
            limit: bytes that the copy of one run may have.
        """
        self.folder = folder
        self._limit = limit
        self._mirrors: OrderedDict[str, _Mirror] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aetheria-mirrors")

    async def take(self, run: str, data: bytes) -> tuple[bool, list[str]]:
        """Takes in what a run sent of its folder.

        Args:
            run: its name.
            data: see `aetheria.loom.parts`.

        Returns:
            Whether nothing was missing before it, and the disk took it; otherwise it should come again. And what there
            is to say about it, in sentences; usually nothing.

        Raises:
            msgspec.MsgspecError: the data say nothing of the kind.
            HubError: nothing can be called like that run.
        """
        parcel = decode_parcel(data)
        return await self._do(run, lambda mirror: mirror.take(parcel))

    async def have(self, run: str) -> tuple[bytes, list[str]]:
        """Returns what there is of a run's folder, as it is told to the run, and what there is to say about it.

        Raises:
            HubError: nothing can be called like that run.
        """
        return await self._do(run, lambda mirror: encode_have(mirror.have()))

    async def _do(self, run: str, work: Callable[[_Mirror], Result]) -> tuple[Result, list[str]]:
        path = folder_of(self.folder, run)

        def do() -> tuple[Result, list[str]]:
            mirror = self._mirrors.setdefault(run, _Mirror(path, self._limit))
            self._mirrors.move_to_end(run)
            result = work(mirror)
            opened = [each for each in self._mirrors.values() if each.is_open]
            for each in opened[:-_OPEN_DATABASES]:
                each.close()
            said, mirror.said = mirror.said, []
            return result, said

        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    async def close(self) -> None:
        """Closes everything."""

        def close() -> None:
            for mirror in self._mirrors.values():
                mirror.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()
