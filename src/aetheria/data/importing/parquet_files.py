"""Parquet: read by row groups, and within one a few megabytes at a time, because there are files that are one group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aetheria.data.importing.arrow_columns import ArrowColumns
from aetheria.data.importing.choices import Choices
from aetheria.data.importing.rows import BadRow, Progress, Rows, existing
from aetheria.errors import DataError

__all__ = ["ParquetFiles"]

_BYTES = 1 << 22  # that are read at once
_BUFFER = 1 << 20  # of each column


class ParquetFiles(Rows):
    """Rows of Parquet files.

    Types are those of the files. Lists of numbers become tensors; in files whose schema does not say how long they are,
    these columns are read once before the first sample is made, to see whether all are alike.

    Args:
        files: one or more, with the same columns.
        choices: of the user.
        progress: is told how far that first reading is.

    Raises:
        DataError: a file is not there, is no Parquet, or has other columns; there are no rows; a column has no field.
    """

    kind: ClassVar[str] = "parquet"

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        choices: Choices | None = None,
        progress: Progress | None = None,
    ) -> None:
        choices = choices or Choices()
        self._files = existing(files)
        self._groups: list[tuple[int, int]] = []  # file, row group
        rows: list[int] = []
        self._at_once: list[int] = []
        first: pa.Schema | None = None
        for number, path in enumerate(self._files):
            metadata, arrow = _opened(path)
            if first is None:
                first = arrow
                self._columns = ArrowColumns(arrow, choices, path, _features(arrow))
            else:
                _check_alike(self._columns.names, first, arrow, self._files[0], path)
            for group in range(metadata.num_row_groups):
                told = metadata.row_group(group)
                if told.num_rows:
                    self._groups.append((number, group))
                    rows.append(told.num_rows)
                    self._at_once.append(max(1, min(told.num_rows * _BYTES // max(told.total_byte_size, 1), 1 << 14)))
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        if not rows:
            raise DataError(f"{self._files[0]}: there are no rows in it. Check the source.")
        self._reading: tuple[int, int, Iterator[pa.RecordBatch]] | None = None  # group, its next row, and from there on
        self._held: tuple[int, list[Any], dict[int, str]] = (0, [], {})  # first row, samples, which of them are bad
        self._measure(progress)
        self.schema = self._columns.schema()
        self.notes = {"classes": self._columns.classes} if self._columns.classes else {}

    def _measure(self, progress: Progress | None) -> None:
        if not self._columns.lists:
            return
        for group in range(len(self._groups)):
            for batch in self._batches(group, self._columns.lists):
                self._columns.measure(batch)
            if progress is not None:
                progress("looking", int(self._starts[group + 1]), len(self))

    def _batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        number, within = self._groups[group]
        path = self._files[number]
        try:
            # As it is otherwise, it holds the columns of a row group whole.
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
                yield from file.iter_batches(self._at_once[group], row_groups=[within], columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}, row group {within}: cannot read it: {error}.") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reading": None, "_held": (0, [], {})}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        first, samples, bad = self._held
        if not first <= row < first + len(samples):
            first, samples, bad = self._held = self._read(row)
        if row - first in bad:
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            number = self._groups[group][0]
            begin = self._starts[next(at for at, (file, _) in enumerate(self._groups) if file == number)]
            raise BadRow(f"{self._files[number]}, row {row - begin}: {bad[row - first]}.")
        return samples[row - first]

    def _read(self, row: int) -> tuple[int, list[Any], dict[int, str]]:
        """Reads on to a row, from where the last one was, or from where its group begins."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._reading is None or self._reading[0] != group or self._reading[1] > row:
            self._reading = group, int(self._starts[group]), self._batches(group, self._columns.names)
        _, place, batches = self._reading
        for batch in batches:
            self._reading = group, place + len(batch), batches
            if row < place + len(batch):
                return place, *self._columns.samples(batch)
            place += len(batch)
        raise DataError(f"{self._files[self._groups[group][0]]} has fewer rows than it says it has. Write it anew.")


def _opened(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} does not read as Parquet: {error}.") from error


def _features(arrow: pa.Schema) -> dict[str, Any]:
    """Returns what a file says that was exported from a Hugging Face dataset."""
    raw = (arrow.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(raw)["info"]["features"]
    except (ValueError, KeyError, TypeError):  # somebody else's use of that name
        return {}
    return found


def _check_alike(names: list[str], first: pa.Schema, other: pa.Schema, kept: Path, path: Path) -> None:
    for name in names:
        if name not in other.names:
            raise DataError(f"{path} has no column {name!r}, which {kept} has. They must have the same.")
        if other.field(name).type != first.field(name).type:
            raise DataError(
                f"{path}: column {name!r} is {other.field(name).type}; in {kept} it is {first.field(name).type}. They "
                "must have the same types."
            )
    if unknown := [name for name in other.names if name not in first.names]:
        raise DataError(f"{path} has a column {unknown[0]!r}, which {kept} has not. They must have the same.")
