"""Tables as text: CSV, TSV. What a column is, all of its values decide together, and where they leave a doubt, nobody.

A record may go over several lines where a value in quotes does; it ends at a line behind which the quotes so far are
even, because a quote within quotes is doubled (RFC 4180).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from aetheria.data.fields import Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit, as_number, missing, shown
from aetheria.data.importing.records import Record, RecordFiles, decoded
from aetheria.data.importing.rows import Progress, check_image
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["CsvFiles"]

_LONGEST = 1 << 26  # bytes of a record; beyond, a quote has been opened and not closed
_MARK = b"\xef\xbb\xbf"  # some programs begin a file of UTF-8 with it
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")  # nothing that would be written otherwise than it was: 007 and +49 are text
_REAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?|-?\.[0-9]+([eE][+-]?[0-9]+)?")
_SPECIAL = ("nan", "NaN", "inf", "-inf")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_EXACT = 2**53  # whole numbers up to this are the same as float64


class CsvFiles(RecordFiles):
    """Rows of CSV files, whose first line names the columns.

    A column in which every value is a whole number becomes int64; numbers float64; true and false bool; else text. An
    empty value among numbers is an error, unless the user has chosen the column's type. A column of the type "image"
    holds the paths of image files, from the folder of the CSV file.

    Args:
        files: one or more, with the same columns.
        choices: of the user.
        progress: is told how far the first reading is.

    Raises:
        DataError: as `RecordFiles`; or the files have not the same columns, or no names of columns.
        BadRow: a row has more or fewer values than there are columns, or one that does not fit.
    """

    kind: ClassVar[str] = "csv"

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        choices: Choices | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._header: list[str] = []
        self._guesses: dict[str, _Guess] = {}
        super().__init__(files, choices, progress)
        fields: dict[str, Field] = {}
        for name in self._wanted:
            chosen = self._choices.chosen(name)
            fields[name] = self._guesses[name].field(name, self._choices.skip) if chosen is None else chosen
        self._guesses = {}
        self._fields = [(self._header.index(name), name, field) for name, field in fields.items()]
        self.schema = Schema(fields)

    def _begin(self, file: BinaryIO, path: Path) -> tuple[int, int]:
        raw, line, offset = b"", 1, 0
        for first, begin, found in _split(file, path, 1, 0):
            raw, offset, line = found, begin + len(found), first + found.count(b"\n")
            break
        self._delimiter = self._choices.delimiter or ("\t" if ".tsv" in path.suffixes else ",")
        try:
            header = [name.strip() for name in _values(raw.removeprefix(_MARK), self._delimiter)] if raw.strip() else []
        except Unfit as error:
            raise DataError(f"{path}, line 1: {error}.") from error
        self._check_header(header, path)
        if not self._header:
            self._header = header
            self._wanted = self._choices.selected(header, path)
            for name in self._wanted:
                if self._choices.types.get(name) == "bytes":
                    raise DataError(f"column {name!r}: text has no type 'bytes'. Choose 'text'.")
                if name not in self._choices.types:
                    self._guesses[name] = _Guess(header.index(name))
        elif header != self._header:
            raise DataError(f"{path} has the columns {header}; {self._files[0]} has {self._header}. They must agree.")
        return line, offset

    def _check_header(self, header: list[str], path: Path) -> None:
        if not header:
            raise DataError(f"{path} is empty: there is no line that names the columns.")
        if all(_REAL.fullmatch(name) for name in header) and header != [str(at) for at in range(len(header))]:
            raise DataError(
                f"{path}: found only numbers in the first line ({', '.join(header[:4])}), expected the names of the "
                "columns. Put such a line in front."
            )
        for name in header:
            if not name or "/" in name or header.count(name) > 1:
                told = "two columns are called" if header.count(name) > 1 and name else "a column is called"
                raise DataError(
                    f"{path}, line 1: {told} {name!r}. Give each column a name of its own, without a slash."
                )
        for other in ";\t|":
            if len(header) == 1 and other in header[0]:
                raise DataError(
                    f"{path} has a single column, {header[0]!r:.60}. If its values are divided by {other!r}, say so: "
                    "the delimiter."
                )

    def _records(self, file: BinaryIO, path: Path, line: int, offset: int) -> Iterator[Record]:
        return (record for record in _split(file, path, line, offset) if record[2].strip(b"\r\n"))

    def _row(self, raw: bytes) -> list[str]:
        values = _values(raw, self._delimiter)
        if len(values) != len(self._header):
            raise Unfit(f"expected {len(self._header)} values, as many as there are columns; found {len(values)}")
        return values

    def _look(self, raw: bytes, path: Path, line: int) -> None:
        values = self._row(raw)
        for guess in self._guesses.values():
            guess.add(values[guess.column], path, line)

    def _sample(self, raw: bytes, path: Path) -> Any:
        values = self._row(raw)
        sample = {}
        for column, name, field in self._fields:
            try:
                sample[name] = _value(values[column], field, path, name in self._choices.types)
            except Unfit as error:
                raise Unfit(f"column {name!r}: {error}") from error
        return sample


class _Guess:
    """What a column may be, after all that has been seen of it."""

    def __init__(self, column: int) -> None:
        self.column = column
        self._left = ["bool", "int64", "float64"]
        self._seen = False
        self._empty = ""

    def add(self, text: str, path: Path, line: int) -> None:
        if not text:
            self._empty = self._empty or f"{path}, line {line}"
        elif self._left:
            self._seen = True
            self._left = [kind for kind in self._left if _FITS[kind](text)]

    def field(self, name: str, skip: bool) -> Field:
        if not (self._seen and self._left):
            return Text()
        kind = self._left[0]
        if self._empty and not skip:
            raise DataError(
                f"{self._empty}: column {name!r} is empty here, and {kind} elsewhere. Choose its type: {name}=float64 "
                f"takes what is empty as NaN, {name}=text keeps all as it is written."
            )
        return Number(kind)


def _fits_float(text: str) -> bool:
    if text in _SPECIAL:
        return True
    if not _REAL.fullmatch(text) or math.isinf(float(text)):
        return False
    return not _WHOLE.fullmatch(text) or abs(int(text)) <= _EXACT


def _fits_int(text: str) -> bool:
    return bool(_WHOLE.fullmatch(text)) and (len(text) < 19 or -(2**63) <= int(text) < 2**63)


_FITS = {"bool": _BOOL.__contains__, "int64": _fits_int, "float64": _fits_float}


def _value(text: str, field: Field, path: Path, chosen: bool) -> Any:
    if isinstance(field, Image):
        return _image(path, text)
    if isinstance(field, Text):
        return text
    assert isinstance(field, Number)
    if not text.strip():
        if chosen:
            return missing(field)
        raise Unfit(f"expected {field.dtype}; the value is empty")
    try:
        if field.dtype == "bool":
            number: Any = _BOOL[text.strip()] if text.strip() in _BOOL else {"0": False, "1": True}[text.strip()]
        elif field.dtype.startswith("float"):
            number = float(text)
        else:
            number = int(text)
        if "_" in text:  # Python reads 1_000
            raise ValueError(text)
    except (ValueError, KeyError):
        raise Unfit(f"expected {field.dtype}; found {shown(text)}") from None
    return as_number(number, field.dtype)


def _image(path: Path, name: str) -> bytes:
    file = path.parent / name
    try:
        return check_image(file.read_bytes())
    except OSError as error:
        raise Unfit(f"there is no image {file} ({error.strerror})") from error


def _split(file: BinaryIO, path: Path, line: int, offset: int) -> Iterator[Record]:
    """Yields records, blank lines among them."""
    parts: list[bytes] = []
    odd, size = False, 0
    for part in file:
        parts.append(part)
        size += len(part)
        odd ^= bool(part.count(b'"') % 2)
        if odd and size < _LONGEST:
            continue
        if odd:
            raise DataError(f"{path}, line {line}: a quote is opened there, and not closed in {size:,} bytes.")
        yield line, offset, b"".join(parts) if len(parts) > 1 else part
        line, offset, size = line + len(parts), offset + size, 0
        parts.clear()
    if parts:
        yield line, offset, b"".join(parts)  # a quote that is never closed; whoever reads it says so


def _values(raw: bytes, delimiter: str) -> list[str]:
    """Returns the values of a record."""
    text = decoded(raw).rstrip("\r\n")
    if len(text) > csv.field_size_limit():
        csv.field_size_limit(_LONGEST)
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise Unfit(f"it does not read as CSV ({error}); is a quote within a value not doubled?") from error
    if len(rows) != 1:
        raise Unfit("it does not read as one row; is a quote within a value not doubled?")
    return rows[0]
