"""A sidecar's part in the mirror of its run's folder: the hub keeps one where it cannot look into the folder itself.

Nothing is sent unless the hub says that it wants it. It says so when it is asked, and what it has; from there on
everything new is sent, and asked for again now and then, so that whatever was lost on the way is sent once more.
"""

from __future__ import annotations

import asyncio
import copy
import secrets
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from aetheria.errors import HubError
from aetheria.loom.database_copy import DatabaseTail
from aetheria.loom.parts import (
    PART_BYTES,
    Have,
    JournalPart,
    Parcel,
    Part,
    RunFilePart,
    checksum,
    decode_have,
    encode_parcel,
)

if TYPE_CHECKING:  # what only a sidecar with a hub loads
    from aetheria.loom.run_end import RunEnd

__all__ = ["FolderTail", "Mirroring"]

_LOOK = 1.0  # seconds between two looks into the folder
_LEISURE = 20  # times as long as a look took is waited until the next one
_ASK = 30.0  # seconds between two questions what the hub has
_ASK_AGAIN = 1.0  # where it did not answer


class FolderTail:
    """Reads what is new in a run folder, while it is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = DatabaseTail(folder / "run.db")
        self._exhausted: dict[str, object] = {}  # files that have nothing new as long as they look like this
        self.too_long = 0  # bytes of a `run.json` that is not sent

    def reset(self) -> None:
        """Looks at everything again: the copy is not as far as it was thought to be."""
        self._exhausted.clear()
        self._database.reset()

    def verify(self, have: Have) -> None:
        """Forgets of a copy of the journal what is not in the original."""
        path = self._folder / "journal.jsonl"
        try:
            with path.open("rb") as file:
                known = checksum(file.read(have.journal))
        except FileNotFoundError:
            known = 0
        if known != have.journal_checksum:
            have.journal = 0

    def parts(self, have: Have) -> list[Part]:
        """Returns what a copy lacks, not too much for one message; nothing where it is complete.

        Raises:
            OSError, sqlite3.Error: a file cannot be read now.
        """
        database = [self._folder / name for name in ("run.db", "run.db-wal")]
        for name, files, read in (
            ("run", [self._folder / "run.json"], self._run_file),
            ("journal", [self._folder / "journal.jsonl"], self._journal),
            ("database", database, lambda have: self._database.parts(have.database)),
        ):
            if name != "run" and not have.room:
                continue
            looks = [_looks(file) for file in files]
            if self._exhausted.get(name) != looks:
                if parts := read(have):
                    return parts
                self._exhausted[name] = looks
        return []

    def _run_file(self, have: Have) -> list[Part]:
        try:
            content = (self._folder / "run.json").read_bytes()
        except FileNotFoundError:
            return []  # a run of another framework has none
        self.too_long = len(content) if len(content) > PART_BYTES else 0
        return [] if self.too_long or checksum(content) == have.run else [RunFilePart(content)]

    def _journal(self, have: Have) -> list[Part]:
        try:
            with (self._folder / "journal.jsonl").open("rb") as file:
                if file.seek(0, 2) < have.journal:  # its machine went down before it was on the disk
                    have.journal = 0
                file.seek(have.journal)
                content = file.read(PART_BYTES)
        except FileNotFoundError:
            return []
        if len(content) < PART_BYTES:
            content = content[: content.rfind(b"\n") + 1]  # a line that is being written, or torn, is none
        return [JournalPart(have.journal, content)] if content else []


def _looks(path: Path) -> object:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class Mirroring:
    """Sends what the hub lacks of the run's folder."""

    def __init__(self, folder: Path) -> None:
        """Sends nothing yet."""
        self._tail = FolderTail(folder)
        self._sent: Have | None = None  # what the hub has, or will have; None where it wants nothing, or was not asked
        self._heard: Have | None = None  # its last answer
        self._session = secrets.token_hex(8)
        self._number = 0  # of the last parcel
        self._before: tuple[int, Have] | None = None  # that number, and what had been sent, when it was last asked
        self._next_question = 0.0
        self._sending = asyncio.Lock()
        self._said = ""
        self._said_too_long = 0

    def ask_again(self) -> None:
        """The hub may be another one, or have lost something: it is asked at once, and believed."""
        self._heard = None
        self._next_question = 0.0

    async def keep_up(self, end: RunEnd) -> None:
        """Sends what is new, until it is cancelled."""
        self.ask_again()
        while True:
            started = time.monotonic()
            await self._attempt(end)
            await asyncio.sleep(max(_LOOK, _LEISURE * (time.monotonic() - started)) if self._sent else _LOOK)

    async def finish(self, end: RunEnd, deadline: float) -> None:
        """Sends what is left, where the hub wants it.

        Args:
            end: connected.
            deadline: until when, on the clock that never jumps.
        """
        if self._sent is None and self._heard is not None:
            return  # the hub has said that it wants nothing
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                self._tail.reset()
                await self._attempt(end)
        except TimeoutError:
            logger.warning("The hub's copy of the run's folder is not complete: there was no time left.")

    async def _attempt(self, end: RunEnd) -> None:
        async with self._sending:
            try:
                if time.monotonic() >= self._next_question:
                    await self._ask(end)
                if self._sent is not None:
                    await self._send(end, self._sent)
                self._said = ""
            except HubError as error:
                self._tail.reset()  # what was read has not been stored
                logger.debug("{}", error)
            except (OSError, sqlite3.Error) as error:
                self._tail.reset()
                if str(error) != self._said:
                    self._said = str(error)
                    logger.warning("The run's folder cannot be copied to the hub: {!r}. Trying again.", error)

    async def _ask(self, end: RunEnd) -> None:
        answer = await end.ask()
        self._next_question = time.monotonic() + (_ASK_AGAIN if answer is None else _ASK)
        if answer is None:
            return  # nobody there at the moment: what is sent waits for the hub
        try:
            have = decode_have(answer)
        except msgspec.MsgspecError as error:
            raise HubError(f"the hub does not say what it has of the run's folder: {error}.") from error
        lost = self._is_lost(have)
        self._heard, before = have, self._sent
        if not have.wanted:
            self._sent = None
        elif lost:
            self._sent = copy.deepcopy(have)
            if before is not None:
                told = {life: counts for life, counts in before.database.points.items() if life < have.told_from}
                self._sent.database.points |= told
            await asyncio.to_thread(self._tail.verify, self._sent)
            self._tail.reset()
        if self._sent is not None:
            self._sent.room = have.room
        self._before = None if self._sent is None else (self._number, copy.deepcopy(self._sent))

    def _is_lost(self, have: Have) -> bool:
        """Returns whether something that was sent is not there, and not on its way."""
        if self._sent is None or self._heard is None:
            return True  # nobody knows
        if have == self._heard:  # nothing has arrived since the last time
            return have.run != self._sent.run or not have.covers(self._sent)
        if self._before is None or have.session != self._session or have.number < self._before[0]:
            return False  # what was sent before the last time has not been looked at yet
        _, sent = self._before
        return have.run not in (sent.run, self._sent.run) or not have.covers(sent)

    async def _send(self, end: RunEnd, sent: Have) -> None:
        while parts := await asyncio.to_thread(self._tail.parts, sent):
            self._number += 1
            await end.report([("mirror", encode_parcel(Parcel(self._session, self._number, parts)), "")])
            sent.add(parts)
        if self._tail.too_long and self._tail.too_long != self._said_too_long:
            self._said_too_long = self._tail.too_long
            message = f"run.json has {self._tail.too_long:,} bytes; more than {PART_BYTES:,} are not copied to the hub."
            logger.warning(message)
            event = {"kind": "mirror", "step": 0, "message": message, "data": {"bytes": self._tail.too_long}}
            await end.report([("event", msgspec.json.encode(event), "")])
