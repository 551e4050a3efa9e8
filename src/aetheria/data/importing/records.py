"""Rows that are lines of text files, or a few lines each: found again by where every 64th of them begins."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aetheria.data.importing.choices import Choices, Unfit
from aetheria.data.importing.rows import READ_ERRORS, BadRow, OpenFile, Progress, Rows, existing, open_file
from aetheria.errors import DataError

__all__ = ["Record", "RecordFiles"]

Record = tuple[int, int, bytes]  # number of its first line, from 1; where it begins; its bytes
_GROUP = 64  # rows that are read at once; of what lies in between nothing is remembered
_TOLD = 1 << 23  # bytes after which progress is told


class RecordFiles(Rows):
    """The records of some text files. All are read once before the first sample is made, to know what they are.

    Args:
        files: one or more.
        choices: of the user.
        progress: is told how far the first reading is.

    Raises:
        DataError: a file is not there, cannot be read, or has nothing in it; the columns are not there.
        BadRow: a record is bad, unless these are to be skipped.
    """

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        choices: Choices | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._choices = choices or Choices()
        self._files = existing(files)
        self._open = OpenFile()
        self._group: tuple[int, list[tuple[int, bytes]]] = (-1, [])
        self.notes: dict[str, Any] = {}
        places = self._scan(progress)
        self._length = places.pop()
        self._file, self._offset, self._line, self._first = (
            np.array(places[column::4], dtype=np.int64) for column in range(4)
        )
        if not self._length:
            told = self._files[0] if len(self._files) == 1 else f"{self._files[0]} and {len(self._files) - 1} others"
            raise DataError(f"{told}: there are no rows in it. Check the source.")

    def _scan(self, progress: Progress | None) -> array[int]:
        """Reads everything once; returns file, offset, line and row of each group, and at last the number of rows."""
        groups, rows = array("q"), 0
        total, before = sum(path.stat().st_size for path in self._files), 0
        for number, path in enumerate(self._files):
            with open_file(path) as file:
                rest, told = 0, 0
                try:
                    for line, offset, raw in self._records(file, path, *self._begin(file, path)):
                        if not rest:
                            groups.extend((number, offset, line, rows))
                        rest = (rest + 1) % _GROUP
                        rows += 1
                        self._looked_at(raw, path, line)
                        if rows == self._choices.limit:
                            groups.append(rows)
                            return groups
                        if progress is not None and offset - told >= _TOLD:
                            told = offset
                            progress("looking", before + _place(file), total)
                except READ_ERRORS as error:
                    raise DataError(f"cannot read {path}: {error}.") from error
            before += path.stat().st_size
        groups.append(rows)
        return groups

    def _looked_at(self, raw: bytes, path: Path, line: int) -> None:
        try:
            self._look(raw, path, line)
        except Unfit as error:
            if not self._choices.skip:
                raise BadRow(f"{path}, line {line}: {error}.") from error

    def _begin(self, file: BinaryIO, path: Path) -> tuple[int, int]:
        """Reads what comes before the first record; returns line and offset of that."""
        return 1, 0

    @abstractmethod
    def _records(self, file: BinaryIO, path: Path, line: int, offset: int) -> Iterator[Record]:
        """Yields the records of a file from where it is read now."""

    @abstractmethod
    def _look(self, raw: bytes, path: Path, line: int) -> None:
        """Takes notice of a record, when everything is read for the first time; raises `Unfit`."""

    @abstractmethod
    def _sample(self, raw: bytes, path: Path) -> Any:
        """Returns what a record is as a sample; raises `Unfit`."""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < self._length:
            raise IndexError(row)
        group = int(np.searchsorted(self._first, row, side="right")) - 1
        path = self._files[self._file[group]]
        if self._group[0] != group:
            self._group = group, self._read(group, path)
        within = row - int(self._first[group])
        if within >= len(self._group[1]):
            raise DataError(f"{path} has become shorter since it was looked at. Begin anew.")
        line, raw = self._group[1][within]
        try:
            return self._sample(raw, path)
        except Unfit as error:
            raise BadRow(f"{path}, line {line}: {error}.") from error

    def _read(self, group: int, path: Path) -> list[tuple[int, bytes]]:
        line, offset = int(self._line[group]), int(self._offset[group])
        try:
            records = self._records(self._open.at(path, offset), path, line, offset)
            return [(line, raw) for line, _, raw in islice(records, _GROUP)]
        except READ_ERRORS as error:
            raise DataError(f"cannot read {path}: {error}.") from error


def decoded(raw: bytes) -> str:
    """Returns bytes as text.

    Raises:
        Unfit: they are none.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Unfit(f"it is no UTF-8: {error.reason} at byte {error.start}. Convert the file to UTF-8") from error


def _place(file: BinaryIO) -> int:
    """Returns how much of a file has been read, of what lies on the disk."""
    return os.lseek(file.fileno(), 0, os.SEEK_CUR)
