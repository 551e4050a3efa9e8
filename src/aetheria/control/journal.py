"""`journal.jsonl`: every command and what came of it, in the order in which it happened. The truth for replay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from aetheria.errors import RunFolderError
from aetheria.protocol import AnyCommand, Outcome, Rewind, Stop
from aetheria.runs import fsync_directory

__all__ = ["Entry", "Journal", "effective", "read_journal"]


class Entry(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One line.

    Attributes:
        seq: counts the lines from 1.
        outcome: how far a command got.
        command: the command, in its first line only.
        position: for a rewind that took effect, the journal position of the snapshot that it went back to.
    """

    seq: int
    outcome: Outcome
    command: AnyCommand | None = None
    position: int | None = None


class Journal:
    """The journal of a run, open for writing. Nothing in it is ever changed; lines are added.

    A line torn by a crash is cut off when it is opened: what it would have said had not taken effect.

    Args:
        path: `journal.jsonl`; made if it is not there.
        copy: what is in the file, for a rank that does not write it: then nothing is written here.

    Attributes:
        repaired: what had to be repaired, for people; empty when nothing had to be.

    Raises:
        RunFolderError: a line in the middle cannot be read.
    """

    def __init__(self, path: Path, copy: bytes | None = None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.repaired = ""
        self._durable = True  # whether every line is on the disk
        self._outcomes: dict[str, Outcome] = {}
        self._commands: dict[str, tuple[int, AnyCommand]] = {}
        good = 0
        self._file = -1
        if copy is not None or path.exists():
            data = path.read_bytes() if copy is None else copy
            for entry, end in _entries(data, path):
                self._remember(entry)
                good = end
            if good < len(data):
                self.repaired = f"the last line of {path.name} was torn ({len(data) - good} bytes); it is cut off."
        if copy is not None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if self.repaired:
            os.ftruncate(self._file, good)
            os.fsync(self._file)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        if not good:
            fsync_directory(path.parent)

    def append(
        self, outcome: Outcome, command: AnyCommand | None = None, *, position: int | None = None, durable: bool = True
    ) -> Entry:
        """Adds a line.

        Args:
            outcome: how far a command got.
            command: the command, when it appears for the first time.
            position: see `Entry`.
            durable: returns only when the line is on the disk.

        Raises:
            OSError: it could not be written; then it is not in the journal, and the command must not take effect.
        """
        entry = Entry(seq=self.position + 1, outcome=outcome, command=command, position=position)
        if self._file == -1:
            self._remember(entry)
            return entry
        line = memoryview(msgspec.json.encode(entry) + b"\n")
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            if durable:
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)  # a torn line must not have others after it
            raise
        self._end += len(line)
        self._durable = durable
        self._remember(entry)
        return entry

    def take_back(self, command_id: str) -> None:
        """Forgets the last line of a copy, where it is this command's: the journal itself could not be written."""
        if self._file == -1 and self.entries and self.entries[-1].outcome.command == command_id:
            del self.entries[-1], self._outcomes[command_id], self._commands[command_id]

    def sync(self) -> None:
        """Returns when every line is on the disk: before a snapshot remembers how many there are.

        Raises:
            OSError: they could not be written.
        """
        if not self._durable:
            os.fsync(self._file)
            self._durable = True

    def _remember(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._outcomes[entry.outcome.command] = entry.outcome
        if entry.command is not None:
            self._commands[entry.command.id] = (entry.seq, entry.command)

    @property
    def position(self) -> int:
        """The number of lines: what a snapshot remembers."""
        return len(self.entries)

    @property
    def revision(self) -> int:
        """How often the training has been changed."""
        return max((entry.outcome.revision for entry in self.entries), default=0)

    def outcome(self, command_id: str) -> Outcome | None:
        """Returns how far a command got, or None for one that never came."""
        return self._outcomes.get(command_id)

    def command(self, command_id: str) -> AnyCommand | None:
        """Returns a command that has come, or None."""
        found = self._commands.get(command_id)
        return None if found is None else found[1]

    def behind(self, position: int, stops_passed: int = 0) -> list[tuple[Outcome, AnyCommand, Outcome]]:
        """Returns what must be done again, or finished, by a run that continues from a snapshot.

        Args:
            position: the journal position of the snapshot.
            stops_passed: a stop among so many lines has had its effect: the run ended, and somebody went on with it.

        Returns:
            For each command accepted after it and neither refused nor failed: its acceptance, which says the boundary
            at which it takes effect; the command; and how far it got in the earlier life. Commands that do not change
            the training are among them only if they had not been finished. What a rewind undid is not.
        """
        found = []
        for entry in effective(self.entries, position):
            command = entry.command
            assert command is not None
            latest = self._outcomes[command.id]
            if isinstance(command, Stop) and entry.seq <= stops_passed and latest.state == "applied":
                continue
            if latest.state == "accepted" or (latest.state == "applied" and command.changes_training):
                found.append((entry.outcome, command, latest))
        for seq, command in self._commands.values():
            latest = self._outcomes[command.id]
            if isinstance(command, Rewind) and latest.state == "accepted" and seq > position:
                found.append((latest, command, latest))
        return found

    def close(self) -> None:
        """Closes the file."""
        if self._file != -1:
            os.close(self._file)


def effective(entries: list[Entry], position: int = 0) -> list[Entry]:
    """Returns the entries of accepted commands that a run which is at `position` still has before it.

    A rewind that took effect went back to a snapshot, and so undid everything between that snapshot and itself. What
    remains, in its order, leads to the same weights without going back.

    Args:
        entries: of a whole journal.
        position: what has been done already: the position that a snapshot remembers.
    """
    kept: list[Entry] = []
    for entry in entries:
        command = entry.command
        if entry.position is not None:
            target = entry.position
            kept = [earlier for earlier in kept if earlier.seq <= target]
        elif command is not None and entry.outcome.state == "accepted" and not isinstance(command, Rewind):
            kept.append(entry)
    return [entry for entry in kept if entry.seq > position]


def read_journal(path: Path) -> list[Entry]:
    """Returns all whole lines of a journal, changing nothing; none where there is no file.

    Raises:
        RunFolderError: a line in the middle cannot be read.
    """
    return [entry for entry, _ in _entries(path.read_bytes(), path)] if path.exists() else []


def _entries(data: bytes, path: Path) -> Iterator[tuple[Entry, int]]:
    decoder = msgspec.json.Decoder(Entry)
    start = number = 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start) + 1
        last = not end or end == len(data)
        try:
            if not end:
                return
            entry = decoder.decode(data[start:end])
            if entry.seq != number:
                raise RunFolderError(f"{path}, line {number} says that it is number {entry.seq}: lines are missing.")
            yield entry, end
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if last:  # torn: the machine went down while its blocks were written
                return
            raise RunFolderError(
                f"{path}, line {number} cannot be read: {error}. The journal is damaged; restore it from a copy, or "
                "start a new run from a snapshot."
            ) from error
        start = end
