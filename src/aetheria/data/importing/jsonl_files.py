"""JSON, one value in each line. Of what type a key is, all lines decide together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from aetheria.data.fields import Array, Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit, as_number, missing, shown
from aetheria.data.importing.csv_files import _image
from aetheria.data.importing.records import Record, RecordFiles, decoded
from aetheria.data.importing.rows import Progress
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["JsonlFiles"]

_EXACT = 2**53


class JsonlFiles(RecordFiles):
    """Lines of JSONL files, each an object (whose keys are the columns), or each any other value.

    Whole numbers become int64, numbers float64, lists of numbers tensors; a dimension in which they differ varies. All
    lines have the same keys.

    Args:
        files: one or more.
        choices: of the user; the types also of nested keys, as "a/b".
        progress: is told how far the first reading is.

    Raises:
        DataError: as `RecordFiles`; or the lines do not look alike.
        BadRow: a line is no JSON, or not what the others are.
    """

    kind: ClassVar[str] = "jsonl"

    def __init__(
        self,
        files: Sequence[Path | str] | Path | str,
        choices: Choices | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._guess = _Guess()
        super().__init__(files, choices, progress)
        guess = self._guess
        if guess.keys is not None:
            wanted = self._choices.selected(guess.keys, self._files[0])
            guess.keys = {name: guess.keys[name] for name in wanted}
        elif self._choices.columns is not None or self._choices.types:
            raise DataError(f"{self._files[0]}: its lines are no objects, so that there are no columns to choose.")
        self._tree = guess.tree((), self._choices)
        self._guess = _Guess()
        self.schema = Schema(self._tree)

    def _records(self, file: BinaryIO, path: Path, line: int, offset: int) -> Iterator[Record]:
        for raw in file:
            if raw.strip():
                yield line, offset, raw
            line, offset = line + 1, offset + len(raw)

    def _look(self, raw: bytes, path: Path, line: int) -> None:
        self._guess.add(_parsed(raw), f"{path}, line {line}")

    def _sample(self, raw: bytes, path: Path) -> Any:
        value = _parsed(raw)
        if isinstance(self._tree, dict) and isinstance(value, dict) and self._choices.columns is not None:
            value = {name: value[name] for name in self._tree if name in value}
        return _fitted(value, self._tree, (), self._choices, path)


def _parsed(raw: bytes) -> Any:
    text = decoded(raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is no JSON: {error}") from error


class _Guess:
    """What stands in a place of all lines that were seen."""

    def __init__(self) -> None:
        self.keys: dict[str, _Guess] | None = None  # of objects
        self._first: dict[str, str] = {}  # where each kind of value was seen first
        self._large = ""  # where a whole number was that float64 does not hold
        self._huge = ""  # or int64
        self._dtype: np.dtype[Any] | None = None  # of lists
        self._shape: list[int | None] | None = None
        self._empty_list = False

    def add(self, value: Any, where: str) -> None:
        kind = _kind(value)
        if kind not in self._first:
            self._first[kind] = where
        if kind == "whole number":
            if abs(value) > _EXACT:
                self._large = self._large or where
                self._huge = self._huge or ("" if -(2**63) <= value < 2**63 else where)
        elif kind == "object":
            self._add_keys(value, where)
        elif kind == "list":
            self._add_list(value, where)

    def _add_keys(self, value: dict[str, Any], where: str) -> None:
        if self.keys is None:
            self.keys = {key: _Guess() for key in value}
        elif value.keys() != self.keys.keys():
            for key in value:
                if key not in self.keys:
                    self.keys[key] = _Guess()
                    self.keys[key]._first["missing"] = self._first["object"]
            for key in self.keys:
                if key not in value:
                    self.keys[key]._first.setdefault("missing", where)
        for key, item in value.items():
            self.keys[key].add(item, where)

    def _add_list(self, value: list[Any], where: str) -> None:
        array = _as_numbers(value)
        if array is None:
            self._first.setdefault("list that is no array of numbers", where)
        elif not value:
            self._empty_list = True  # which says nothing of type or dimensions
        else:
            if array.size:
                self._dtype = array.dtype if self._dtype is None else np.result_type(self._dtype, array.dtype)
            if self._shape is None:
                self._shape = list(array.shape)
            elif len(self._shape) != array.ndim:
                self._first.setdefault("list of other dimensions", where)
            else:
                self._shape = [a if a == b else None for a, b in zip(self._shape, array.shape)]

    def tree(self, path: tuple[str, ...], choices: Choices) -> Any:
        """Returns the field, or the dictionary of such, for what was seen here.

        Raises:
            DataError: there is none for all of it.
        """
        name = "/".join(path)
        chosen = choices.chosen(name) if path else None
        if chosen is not None and not (isinstance(chosen, Number) and "list" in self._first):
            return chosen
        kinds = dict(self._first)
        if chosen is None:
            self._check_whole(kinds, name)
        if not kinds.keys() - {"missing"}:
            raise DataError(f"there is a value for {name!r} in no line. Choose its type, or leave it out.")
        kinds.pop("missing", None)
        found = set(kinds)
        if found == {"truth value"}:
            return Number("bool")
        if found == {"whole number"} and not self._huge:
            return Number("int64")
        if found <= {"whole number", "number"} and not self._large:
            return Number("float64")
        if found == {"text"}:
            return Text()
        if found == {"object"} and self.keys:
            return {key: guess.tree((*path, key), choices) for key, guess in self.keys.items()}
        if found == {"list"} and (chosen is not None or self._dtype is not None):
            dtype = chosen.dtype if isinstance(chosen, Number) else str(self._dtype)
            shape = [size or None for size in self._shape or (None,)]
            return Array(dtype, (None if self._empty_list else shape[0], *shape[1:]))
        seen = "; ".join(f"{kind} ({where})" for kind, where in kinds.items())
        if self._large:
            seen += f"; a number that is too large ({self._huge or self._large})"
        raise DataError(
            f"{name or 'a line'!r}: there is no column for what was found: {seen}. "
            f"Choose its type: {name}=json keeps any value as text."
        )

    def _check_whole(self, kinds: dict[str, str], name: str) -> None:
        if "missing" in kinds and len(kinds) > 1:
            other, where = next((kind, where) for kind, where in kinds.items() if kind != "missing")
            raise DataError(
                f"{kinds['missing']}: {name!r} is missing here, and a {other} elsewhere ({where}). Choose its type: "
                f"{name}=float64 takes what is missing as NaN, {name}=text as empty; or leave it out."
            )


def _kind(value: Any) -> str:
    match value:
        case None:
            return "missing"
        case bool():
            return "truth value"
        case int():
            return "whole number"
        case float():
            return "number"
        case str():
            return "text"
        case dict():
            return "object"
        case _:
            return "list"


def _as_numbers(value: list[Any]) -> np.ndarray[Any, Any] | None:
    """Returns a list as an array of bool, int64 or float64; None if it is none, or would not be the same numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # of unequal lists
        return None
    kinds = set(map(type, _flat(value)))
    if array.dtype.kind not in "bif" or (bool in kinds and len(kinds) > 1):
        return None
    if kinds == {int, float} and any(type(item) is int and abs(item) > _EXACT for item in _flat(value)):
        return None
    return array if array.size else array.astype(np.int64)


def _flat(value: list[Any]) -> Iterator[Any]:
    for item in value:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _fitted(value: Any, tree: Any, path: tuple[str, ...], choices: Choices, file: Path) -> Any:
    """Returns a value as its field takes it."""
    name = "/".join(path)
    if isinstance(tree, dict):
        if not isinstance(value, dict):
            raise Unfit(f"{name or 'the line'!r}: expected an object; found {shown(value)}")
        if unknown := sorted(value.keys() - tree.keys()):
            raise Unfit(f"there is a key {'/'.join((*path, unknown[0]))!r} that the other lines have not")
        return {key: _fitted(value.get(key), part, (*path, key), choices, file) for key, part in tree.items()}
    try:
        return _fitted_leaf(value, tree, choices.types.get(name), file)
    except Unfit as error:
        raise Unfit(f"{name!r}: {error}" if name else str(error)) from error


def _fitted_leaf(value: Any, field: Field, chosen: str | None, file: Path) -> Any:
    if chosen == "json":
        return _text(json.dumps(value, ensure_ascii=False))
    if value is None:
        if chosen is None:
            raise Unfit("the value is missing")
        return missing(field)
    if isinstance(field, Image):
        return _image(file, value) if isinstance(value, str) else _wrong("the path of an image", value)
    if isinstance(field, Text):
        return _text(value) if isinstance(value, str) else _wrong("text", value)
    if isinstance(field, Number):
        return as_number(value, field.dtype)
    if not isinstance(field, Array):  # bytes
        return value.encode() if isinstance(value, str) else _wrong("text", value)
    array = _as_numbers(value) if isinstance(value, list) else None
    if array is None:
        return _wrong("a list of numbers", value)
    wanted = np.dtype(field.dtype)
    if not array.size and array.ndim < len(field.shape):  # [] of any dimensions
        array = np.empty([size or 0 for size in field.shape], wanted)
    if array.size and wanted != array.dtype:
        if wanted.kind in "iu" and (array.dtype.kind != "i" or not _within(array, wanted)):
            return _wrong(f"a list of {field.dtype}", value)
        if wanted.kind == "b":
            return _wrong("a list of true and false", value)
    array = array.astype(wanted)
    if array.ndim != len(field.shape) or any(a not in (None, b) for a, b in zip(field.shape, array.shape)):
        raise Unfit(f"expected the shape {field.shape}; found {array.shape}")
    return array


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair, as JSON can write it
        raise Unfit(f"found a string that is no text: {error.reason} at character {error.start}") from error
    return value


def _within(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= array.min() and array.max() <= limits.max)


def _wrong(expected: str, value: Any) -> Any:
    raise Unfit(f"expected {expected}; found {shown(value)}")
