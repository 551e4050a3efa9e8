"""WebDataset: tar files in which the files of a sample stand one behind the other and are called alike up to a dot.

Names are told apart as WebDataset does it: what stands before the first dot behind the last slash is the key of the
sample, what comes after it the column. Files without a dot belong to no sample.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from aetheria.data.fields import Array, Bytes, Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit, as_number, shown
from aetheria.data.importing.images import IMAGES
from aetheria.data.importing.rows import READ_ERRORS, BadRow, OpenFile, Progress, Rows, check_image, existing, open_file
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["TarFiles"]

KEY = "__key__"
_WHOLE = ("cls", "cls2", "class", "count", "index", "inx", "id")
_TEXT = ("txt", "text", "transcript", "json", "jsn")
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
_BLOCK = 512  # bytes


class TarFiles(Rows):
    """Samples of WebDataset's tar files, with a column for each ending, and "__key__".

    Images are stored as they are; .cls and .id are whole numbers, .txt text, .json text too, .npy tensors, everything
    else bytes. Nothing is unpickled.

    Args:
        files: one or more; .tar, or packed (.tar.gz), which is slower where several workers read.
        choices: of the user; of types: a number (of what is text), "text", "bytes", "json" or "image".
        progress: is told how far the first reading is, in which headers are read.

    Raises:
        DataError: a file is not there, is no tar or is cut off; there are no samples.
        BadRow: a sample has not the columns of the first one.
    """

    kind: ClassVar[str] = "webdataset"

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        choices: Choices | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._choices = choices or Choices()
        self._files = existing(files)
        self._wanted: list[str] = []
        self._shapes: dict[str, _Shape] = {}
        self.notes: dict[str, Any] = {}
        places = array("q")
        for number, path in enumerate(self._files):
            for begin, end in self._scan(path, progress):
                places.extend((number, begin, end))
                if len(places) == 3 * (self._choices.limit or 0):
                    break
            else:
                continue
            break
        if not places:
            raise DataError(f"{self._files[0]}: there are no samples in it. Check the source.")
        self._file, self._begin, self._end = (np.array(places[column::3], dtype=np.int64) for column in range(3))
        self._fields = {name: self._field(name) for name in self._wanted}
        self.schema = Schema(self._fields)
        self._open = OpenFile()

    def _scan(self, path: Path, progress: Progress | None) -> Iterator[tuple[int, int]]:
        """Yields where the samples of a file begin and end, after a look at what they have."""
        size = path.stat().st_size
        with open_file(path) as file:
            for key, begin, end, members in _grouped(file, path, 0, None, lambda column: _ending(column) == "npy"):
                try:
                    self._look(key, members)
                except Unfit as error:
                    if not self._choices.skip:
                        raise BadRow(f"{path}, sample {key!r}: {error}.") from error
                if progress is not None:
                    progress("looking", min(end, size), size)
                yield begin, end

    def _look(self, key: str, members: dict[str, bytes]) -> None:
        if not self._wanted:
            self._wanted = self._choices.selected([KEY, *members], f"sample {key!r}")
            for name in self._wanted:
                if name != KEY and self._choices.types.get(name) is None and _ending(name) in _PICKLES:
                    raise DataError(
                        f"column {name!r} is a pickle, which may run any code when it is read. Leave it out, by naming "
                        "the columns that you want."
                    )
                if _ending(name) == "npy" and name not in self._choices.types:
                    self._shapes[name] = _Shape()
        for name in self._present(members):
            if name in self._shapes:
                self._shapes[name].look(members[name])

    def _present(self, members: dict[str, bytes]) -> list[str]:
        """Returns the columns that are wanted, the key left out; they are all there, and no others."""
        wanted = [name for name in self._wanted if name != KEY]
        for name in wanted:
            if name not in members:
                raise Unfit(f"it has no .{name}; it has {', '.join(f'.{other}' for other in members)}")
        if self._choices.columns is None and (more := [name for name in members if name not in wanted]):
            raise Unfit(f"it has a .{more[0]}, which the first sample has not")
        return wanted

    def _field(self, name: str) -> Field:
        chosen = self._choices.chosen(name)
        if chosen is not None:
            return chosen
        ending = _ending(name)
        if name == KEY or ending in _TEXT:
            return Text()
        if f".{ending}" in IMAGES:
            return Image(self._choices.image_mode)
        if ending in _WHOLE:
            return Number("int64")
        return self._shapes[name].field() if name in self._shapes else Bytes()

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        path, begin, end = self._files[self._file[row]], int(self._begin[row]), int(self._end[row])
        for key, _, _, members in _grouped(self._open.at(path, begin), path, begin, end):
            try:
                self._present(members)
                return {name: self._value(name, key, members) for name in self._fields}
            except Unfit as error:
                raise BadRow(f"{path}, sample {key!r}: {error}.") from error
        raise DataError(f"{path} has changed since it was looked at. Begin anew.")

    def _value(self, name: str, key: str, members: dict[str, bytes]) -> Any:
        if name == KEY:
            return key
        raw, field = members[name], self._fields[name]
        try:
            if isinstance(field, Image):
                return check_image(raw)
            if isinstance(field, Number):
                text = str(raw, "utf-8").strip()
                kind = float if field.dtype.startswith("float") else int
                return as_number(kind(text) if field.dtype != "bool" else json.loads(text.lower()), field.dtype)
            if isinstance(field, Text):
                return str(raw, "utf-8")
            if isinstance(field, Array):
                return np.load(io.BytesIO(raw), allow_pickle=False)
        except ValueError as error:  # Unfit among them
            told = error if isinstance(error, Unfit) else f"{error} ({shown(raw[:40])})"
            raise Unfit(f".{name}: {told}") from error
        return raw


class _Shape:
    """The shapes of the arrays in a column."""

    def __init__(self) -> None:
        self._dtype = ""
        self._shape: list[int | None] = []

    def look(self, raw: bytes) -> None:
        """Takes notice of an array."""
        try:
            with np.errstate(all="ignore"):
                found = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise Unfit(f"an array cannot be read: {error}") from error
        if not self._dtype:
            self._dtype, self._shape = found.dtype.name, list(found.shape)
        if found.dtype.name != self._dtype or found.ndim != len(self._shape):
            raise Unfit(
                f"expected an array of {self._dtype} in {len(self._shape)} dimensions, as in the first sample; found "
                f"{found.dtype.name} {found.shape}"
            )
        self._shape = [a if a == b else None for a, b in zip(self._shape, found.shape)]

    def field(self) -> Array:
        """Returns the field of all of them."""
        return Array(self._dtype, tuple(size or None for size in self._shape))


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _grouped(
    file: BinaryIO, path: Path, begin: int, end: int | None, wanted: Callable[[str], bool] = lambda column: True
) -> Iterator[tuple[str, int, int, dict[str, bytes]]]:
    """Yields the samples of a tar file from a place on: key, where it begins and ends, and its files by column.

    Of columns that are not wanted the files are passed over, and empty here. Without an end, the file is read to its
    own, and it is made sure that this is where it was closed.
    """
    key, first = "", begin
    members: dict[str, bytes] = {}
    try:
        tar = tarfile.TarFile(fileobj=file)  # begins where the file is
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember all there are
            found, column = _told_apart(member.name)
            if member.isreg() and column:
                if members and found != key:
                    yield key, first, member.offset, members
                    members = {}
                if not members:
                    key, first = found, member.offset
                if column in members:
                    raise DataError(f"{path}, sample {key!r}: it has two files .{column}. Call them differently.")
                held = tar.extractfile(member) if wanted(column) else None
                members[column] = held.read() if held is not None else b""
                if held is not None and len(members[column]) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
            if end is not None and tar.offset >= end:
                break
        place = tar.offset
        if end is None:
            _check_end(file, place)
    except (tarfile.TarError, *READ_ERRORS) as error:
        raise DataError(f"{path} does not read as a tar file, or is cut off: {error}.") from error
    if members:
        yield key, first, place, members


def _check_end(file: BinaryIO, place: int) -> None:
    """Makes sure that a file is closed by zeros: one that was cut off between two members looks whole otherwise."""
    file.seek(place)
    rest = file.read(_BLOCK)
    if not rest:
        raise tarfile.ReadError("the end of the archive is missing")
    while rest:
        if any(rest):
            raise tarfile.ReadError(f"there is something else behind byte {place:,}")
        rest = file.read(1 << 20)


def _told_apart(name: str) -> tuple[str, str]:
    """Returns the key of a sample and the column for the name of a file; no column where it belongs to none."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, column = base.partition(".")
    if not stem or base.startswith("__"):
        return "", ""
    return f"{folder}{slash}{stem}", column.lower()
