"""What the user decides about the samples that are made of a source, and how single values become what was decided."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aetheria.data.fields import Bytes, Field, Image, Number, Text
from aetheria.errors import DataError, did_you_mean

__all__ = ["NUMBERS", "TYPES", "Choices", "Unfit", "as_number", "missing"]

NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
)  # fmt: skip
TYPES = (*NUMBERS, "text", "bytes", "json", "image")
_MODES = ("RGB", "RGBA", "L")


class Unfit(ValueError):  # noqa: N818 - becomes a BadRow that names file and line
    """A value that is not of its column's type; says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user decides about a source.

    Args:
        columns: the columns that are taken, in this order; None takes all.
        types: of columns, by name ("a/b" for what is nested): a number type of NumPy's, "text", "bytes", "json" (any
            value, stored as its JSON) or "image". A missing value in such a column is NaN, or empty text; in others it
            is an error.
        image_mode: as which images are decoded: "RGB", "RGBA" or "L".
        limit: take only the first rows.
        skip: leave out bad rows, instead of ending with the first one.
        delimiter: between the values of a CSV file; None goes by its name.
        classes: names of the labels, where they are settled: those of the data that are added to.

    Raises:
        DataError: one of them is not possible.
    """

    columns: tuple[str, ...] | None = None
    types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    image_mode: str = "RGB"
    limit: int | None = None
    skip: bool = False
    delimiter: str | None = None
    classes: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, chosen in self.types.items():
            if chosen not in TYPES:
                raise DataError(f"column {name!r}: there is no type {chosen!r}. {did_you_mean(chosen, TYPES)}")
        if self.image_mode not in _MODES:
            raise DataError(f"images are decoded as one of {', '.join(_MODES)}; found {self.image_mode!r}.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"the limit is at least one row; found {self.limit}.")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise DataError(f"the delimiter is a single character; found {self.delimiter!r}.")

    def selected(self, available: Iterable[str], where: Any) -> list[str]:
        """Returns the columns that are taken of those that there are.

        Raises:
            DataError: one that was asked for is not there.
        """
        available = list(available)
        wanted = available if self.columns is None else list(dict.fromkeys(self.columns))
        for name in (*wanted, *(name.partition("/")[0] for name in self.types)):
            if name not in available:
                raise DataError(f"{where} has no column {name!r}. {did_you_mean(name, available)}")
        return wanted

    def chosen(self, path: str) -> Field | None:
        """Returns the field that the user has decided on for a column, if so."""
        match self.types.get(path):
            case None:
                return None
            case "text" | "json":
                return Text()
            case "bytes":
                return Bytes()
            case "image":
                return Image(self.image_mode)
            case number:
                return Number(number)


def as_number(value: Any, dtype: str) -> bool | int | float:
    """Returns one of Python's numbers as it is to be stored.

    Raises:
        Unfit: it is none, or the type does not hold it.
    """
    kind, least, most = _limits(dtype)
    single = isinstance(value, bool)
    if kind == "b" and single:
        return bool(value)
    if kind in "iu" and isinstance(value, int) and not single and least <= value <= most:
        return value
    if kind == "f" and isinstance(value, int | float) and not single:
        try:
            found = float(value)
            too_large = math.isfinite(found) and abs(found) > most
        except OverflowError:
            too_large = True
        if too_large:
            raise Unfit(f"expected {dtype}; found {value!r:.60}, which is too large for it")
        return found
    raise Unfit(f"expected {dtype}; found {shown(value)}")


@functools.cache
def _limits(dtype: str) -> tuple[str, float, float]:
    """Returns the kind of a type, and what it holds at least and at most."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return kind, 0, 1
    limits = np.finfo(dtype) if kind == "f" else np.iinfo(dtype)
    number = float if kind == "f" else int
    return kind, number(limits.min), number(limits.max)


def missing(field: Field) -> Any:
    """Returns what stands for a missing value in a column whose type the user has chosen.

    Raises:
        Unfit: nothing does.
    """
    if isinstance(field, Number) and field.dtype.startswith("float"):
        return math.nan
    if type(field) is Text:
        return ""
    if type(field) is Bytes:
        return b""
    raise Unfit("the value is missing, and this type has nothing that says so")


def shown(value: Any) -> str:
    """Returns a value as it looks in an error."""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
