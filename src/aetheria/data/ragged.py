"""Columns whose rows are of different lengths, and gathering rows out of the columns of many blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Column", "Part", "Ragged", "gather", "views"]

_LONG = 64  # elements in a row from which on copying it by itself is quicker than an index for each element
_FEW = 8  # rows of a block up to which copying each by itself is quicker than an index of them


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths, one behind the other.

    Attributes:
        values: all elements, of shape [elements].
        offsets: where each row begins, and at last where the last one ends; int64 of shape [rows + 1].
        shapes: of each row, int32 [rows, dimensions], where its length alone does not tell it.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Returns a view of one row, flat."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Elements in each row, of shape [rows]."""
        return np.diff(self.offsets)


Column = NDArray[Any] | Ragged


@dataclass(frozen=True, slots=True)
class Part:
    """What is taken from one block.

    Attributes:
        rows: of the block, of shape [n].
        places: where they go in what is gathered, of shape [n].
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]


def gather(columns: Sequence[Column], parts: Sequence[Part], count: int) -> Column:
    """Returns rows of several blocks as one new column, in the order of their places.

    Args:
        columns: the same field's column in each block, at least one.
        parts: what is taken from each; all places together are 0 to count - 1.
        count: rows that are gathered.
    """
    first = columns[0]
    if isinstance(first, Ragged):
        return _gather_ragged(columns, parts, count, first)  # type: ignore[arg-type]
    if len(columns) == 1 and np.array_equal(parts[0].places, np.arange(count)):
        return first.take(parts[0].rows, axis=0)
    found = np.empty((count, *first.shape[1:]), dtype=first.dtype)
    for column, part in zip(columns, parts):
        if len(part.rows) < _FEW:
            for place, row in zip(part.places.tolist(), part.rows.tolist()):
                found[place] = column[row]
        else:
            found[part.places] = column[part.rows]  # type: ignore[index]
    return found


def _gather_ragged(columns: Sequence[Ragged], parts: Sequence[Part], count: int, first: Ragged) -> Ragged:
    lengths = np.empty(count, dtype=np.int64)
    for column, part in zip(columns, parts):
        lengths[part.places] = column.offsets[part.rows + 1] - column.offsets[part.rows]
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.empty(int(offsets[-1]), dtype=first.values.dtype)
    for column, part in zip(columns, parts):
        starts, ends, targets = column.offsets[part.rows], column.offsets[part.rows + 1], offsets[part.places]
        elements = int((ends - starts).sum())
        if elements >= _LONG * len(starts):
            for start, end, target in zip(starts.tolist(), ends.tolist(), targets.tolist()):
                values[target : target + end - start] = column.values[start:end]
        else:
            each = ends - starts
            within = np.arange(elements) - np.repeat(np.cumsum(each) - each, each)
            values[np.repeat(targets, each) + within] = column.values[np.repeat(starts, each) + within]
    if first.shapes is None:
        return Ragged(values, offsets)
    shapes = np.empty((count, first.shapes.shape[1]), dtype=np.int32)
    for column, part in zip(columns, parts):
        shapes[part.places] = column.shapes[part.rows]  # type: ignore[index]
    return Ragged(values, offsets, shapes)


def views(columns: Sequence[Column], parts: Sequence[Part], count: int) -> list[NDArray[Any]]:
    """Returns rows of several blocks where they lie, in the order of their places; see `gather`."""
    found: list[NDArray[Any]] = [np.empty(0)] * count
    for column, part in zip(columns, parts):
        for place, row in zip(part.places.tolist(), part.rows.tolist()):
            found[place] = column[row]
    return found
