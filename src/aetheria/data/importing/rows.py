"""What every kind of source is: rows that are asked for by number, and that know from which file they come."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from aetheria.data.importing.choices import Choices, Unfit
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = [
    "READ_ERRORS",
    "BadRow",
    "Limited",
    "OpenFile",
    "Progress",
    "Rows",
    "Skipping",
    "Tally",
    "check_image",
    "open_file",
]

Progress = Callable[[str, int, int | None], object]  # what is done, how much of it, out of how much
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a file raises, packed or not
_NAMED = 1000  # bad rows that are remembered by name; the others are counted


class BadRow(DataError):  # noqa: N818 - what can be skipped, and is an error where it is not
    """A row that is not what its file, or the user, says it is; the message names file and line."""


class Rows(ABC):
    """The rows of a source. They can be sent to other processes, which open the files themselves.

    Attributes:
        kind: what such a source is called.
        schema: of a sample; found by looking at all of the source where its files do not say it.
        notes: for the manifest.
    """

    kind: ClassVar[str]
    schema: Schema
    notes: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Returns how many rows there are, the bad ones included."""

    @abstractmethod
    def __getitem__(self, row: int) -> Any:
        """Returns a sample.

        Raises:
            BadRow: there is none in this row.
            DataError: the source cannot be read.
        """

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))


class Limited(Rows):
    """The first rows of a source.

    Args:
        rows: all of them.
        limit: how many are left.
    """

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows = rows
        self._length = min(limit, len(rows))
        self.schema, self.notes = rows.schema, rows.notes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:
        return self._rows[row]


class Tally:
    """Bad rows that were left out.

    Attributes:
        count: how many.
        named: what is wrong with the first thousand of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.named: list[str] = []

    def add(self, error: Exception | str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(str(error))

    def clear(self) -> None:
        """Begins anew."""
        self.count = 0
        self.named.clear()


class Skipping:
    """The rows of a source without the bad ones. Which are bad is known when they are read, so these are no sequence.

    Args:
        rows: of the source.

    Attributes:
        schema: of a sample.
        bad: those that were left out so far.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.schema = rows.schema
        self.bad = Tally()

    def __iter__(self) -> Iterator[Any]:
        self.bad.clear()
        for row in range(len(self._rows)):
            try:
                sample = self._rows[row]
            except BadRow as error:
                self.bad.add(error)
                continue
            yield sample
        if self.bad.count == len(self._rows):
            raise DataError(
                f"all {self.bad.count:,} rows are bad, so that nothing is left. The first one: {self.bad.named[0]}"
            )


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading; one that is called .gz, .bz2 or .xz is unpacked on the way.

    Such a file can be read from any place, too, though what lies before is unpacked for it.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return cast(BinaryIO, _COMPRESSED.get(path.suffix.lower(), open)(path, "rb"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


class OpenFile:
    """One file at a time, kept open while it is read. Another process opens it anew."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        OpenFile.__init__(self)

    def at(self, path: Path, offset: int) -> BinaryIO:
        """Returns a file, to be read from a place on."""
        if self._file is None or path != self._path:
            self.close()
            self._path, self._file = path, open_file(path)
        if self._file.tell() != offset:
            self._file.seek(offset)
        return self._file

    def close(self) -> None:
        """Closes the file, if one is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()


def check_image(content: bytes) -> bytes:
    """Returns the bytes of an image file, after all of it has been decoded once: half a picture begins like a whole.

    Raises:
        Unfit: they are none.
    """
    from PIL import Image as Pictures  # noqa: PLC0415 - only where there are pictures

    try:
        with Pictures.open(io.BytesIO(content)) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Pictures.DecompressionBombError) as error:
        told = "it is no image file that can be read" if "cannot identify" in str(error) else str(error)
        raise Unfit(f"the image cannot be decoded: {told}") from error
    return content


def limited(rows: Rows, choices: Choices) -> Rows:
    """Returns the rows that are wanted; at least one.

    Raises:
        DataError: there are none.
    """
    return rows if choices.limit is None or choices.limit >= len(rows) else Limited(rows, choices.limit)


def existing(files: Sequence[Path | str] | Path | str) -> list[Path]:
    """Returns files as a list of paths.

    Raises:
        DataError: there are none, or one is not there.
    """
    found = [Path(file) for file in ([files] if isinstance(files, Path | str) else files)]
    if not found:
        raise DataError("there are no files to read. Check the source.")
    for path in found:
        if not path.is_file():
            raise DataError(f"there is no file {path}. Correct the path.")
    return found
