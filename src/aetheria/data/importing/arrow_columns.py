"""Columns of Arrow as samples: what Parquet files and saved datasets have in common.

Many rows are converted at once, column by column. What is wrong with single rows is kept until these are asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aetheria.data.fields import Array, Bytes, Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit, missing
from aetheria.data.importing.rows import check_image
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["ArrowColumns"]

_Bad = dict[int, str]  # what is wrong with which row
_PICTURE = {"bytes", "path"}  # how Hugging Face keeps pictures


class ArrowColumns:
    """How the columns of an Arrow schema become the fields of samples.

    Args:
        arrow: the schema.
        choices: of the user.
        where: it is from, for errors.
        features: what Hugging Face says of the columns, where it does: which hold pictures, which are classes.

    Attributes:
        names: of the columns that are taken.
        lists: those of them that are lists, whose lengths are to be told to `measure`.
        classes: the names of a column's classes.

    Raises:
        DataError: a column is not there, or has no field.
    """

    def __init__(
        self, arrow: pa.Schema, choices: Choices, where: Any, features: Mapping[str, Any] | None = None
    ) -> None:
        self._choices = choices
        self._where = where
        self.names = choices.selected(arrow.names, where)
        self._tree: dict[str, Any] = {}
        self._shapes: dict[str, list[set[int]]] = {}
        self.classes: dict[str, list[str]] = {}
        for name in self.names:
            feature = (features or {}).get(name)
            told = feature if isinstance(feature, dict) else {}
            self._tree[name] = self._field(arrow.field(name).type, name, told.get("_type"))
            if told.get("_type") == "ClassLabel" and told.get("names"):
                self.classes[name] = told["names"]
        self.lists = [name for name in self.names if any(path.split("/")[0] == name for path in self._shapes)]

    def _field(self, kind: pa.DataType, path: str, feature: str | None = None) -> Any:
        kind = _plain(kind)
        chosen = self._choices.chosen(path)
        if feature == "Image" and chosen is None:
            chosen = Image(self._choices.image_mode)
        if _is_list(kind) and (chosen is None or isinstance(chosen, Number)):
            return self._array(kind, path, chosen)
        if chosen is not None:
            if self._choices.types.get(path) != "json":
                self._check_cast(kind, chosen, path)
            return chosen
        if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            return Number(_number_name(kind))
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return Text()
        if _is_binary(kind):
            return Bytes()
        if feature == "Audio" and _is_picture(kind):
            return Bytes()
        if pa.types.is_struct(kind) and kind.num_fields:
            return {field.name: self._field(field.type, f"{path}/{field.name}") for field in kind}
        raise self._no_field(kind, path)

    def _array(self, kind: pa.DataType, path: str, chosen: Field | None) -> Array:
        shape: list[int | None] = []
        inner = kind
        while _is_list(inner):
            shape.append(inner.list_size if pa.types.is_fixed_size_list(inner) else None)
            inner = _plain(inner.value_type)
        if not (pa.types.is_boolean(inner) or pa.types.is_integer(inner) or pa.types.is_floating(inner)):
            raise self._no_field(kind, path)
        if None in shape:
            self._shapes[path] = [set() for _ in shape]
        dtype = chosen.dtype if isinstance(chosen, Number) else _number_name(inner)
        return Array(dtype, tuple(size or None for size in shape))

    def _check_cast(self, kind: pa.DataType, field: Field, path: str) -> None:
        if isinstance(field, Image):
            if not (_is_binary(kind) or _is_picture(kind)):
                raise DataError(f"{self._where}, column {path!r}: expected the bytes of images; found {kind}.")
            return
        if type(field) is Bytes and _is_picture(kind):
            return
        try:
            _cast(pa.nulls(0, kind), field)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise self._no_field(kind, path) from error

    def _no_field(self, kind: pa.DataType, path: str) -> DataError:
        return DataError(
            f"{self._where}, column {path!r}: there is no field for {kind}. Choose its type, for instance {path}=json, "
            f"{path}=text or {path}=int64; or leave the column out."
        )

    def measure(self, batch: pa.RecordBatch) -> None:
        """Takes notice of how long the lists of some rows are."""
        for path, sizes in self._shapes.items():
            first, *rest = path.split("/")
            column = _decoded(batch.column(first))
            for name in rest:
                column = _decoded(pc.struct_field(column, name))
            for level in sizes:
                if len(level) < 2:  # beyond, it varies
                    found = pc.min_max(pc.list_value_length(column.drop_null()))
                    level |= {size for size in (found["min"].as_py(), found["max"].as_py()) if size is not None}
                column = _decoded(pc.list_flatten(column))

    def schema(self) -> Schema:
        """Returns the schema of the samples, after all rows have been measured."""
        for path, levels in self._shapes.items():
            *outer, name = path.split("/")
            tree = self._tree
            for key in outer:
                tree = tree[key]
            shape = tuple(size.copy().pop() or None if len(size) == 1 else None for size in levels)
            tree[name] = Array(tree[name].dtype, shape)
        return Schema(self._tree)

    def samples(self, batch: pa.RecordBatch) -> tuple[list[Any], _Bad]:
        """Returns the samples in some rows, and which of these are bad, and why."""
        bad: _Bad = {}
        columns = [self._values(batch.column(name), self._tree[name], name, bad) for name in self.names]
        return [dict(zip(self.names, row)) for row in zip(*columns)], bad

    def _values(self, column: pa.Array, tree: Any, path: str, bad: _Bad) -> list[Any]:
        column = _decoded(column)
        if isinstance(tree, dict):
            _note_nulls(column, path, bad)
            parts = [
                self._values(pc.struct_field(column, name), part, f"{path}/{name}", bad) for name, part in tree.items()
            ]
            return [dict(zip(tree, row)) for row in zip(*parts)]
        chosen = self._choices.types.get(path)
        if chosen == "json":
            return [json.dumps(value, ensure_ascii=False, default=str) for value in column.to_pylist()]
        if isinstance(tree, Image | Bytes) and _is_picture(column.type):
            return self._pictures(column, tree, path, bad)
        nulls = _stand_in(tree) if column.null_count and chosen is not None else None
        if nulls is None:
            _note_nulls(column, path, bad)
        if isinstance(tree, Number):
            return _numbers(column, tree, path, bad, nulls)
        if isinstance(tree, Array):
            return _arrays(column, tree, path, bad)
        values = _cast(column, tree).to_pylist()
        if isinstance(tree, Image):
            return [_picture(value, row, path, bad) for row, value in enumerate(values)]
        return [nulls if value is None else value for value in values] if column.null_count else values

    def _pictures(self, column: pa.Array, field: Field, path: str, bad: _Bad) -> list[Any]:
        found = []
        for row, value in enumerate(column.to_pylist()):
            content = None if value is None else value["bytes"]
            if content is None:
                bad.setdefault(
                    row, f"column {path!r}: the bytes are not in the file ({(value or {}).get('path')!r} is)"
                )
            found.append(_picture(content, row, path, bad) if isinstance(field, Image) else content)
        return found


def _stand_in(field: Field) -> Any:
    """Returns what stands for a missing value; None if nothing does."""
    try:
        return missing(field)
    except Unfit:
        return None


def _note_nulls(column: pa.Array, path: str, bad: _Bad) -> None:
    if column.null_count:
        for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            bad.setdefault(row, f"column {path!r}: the value is missing (null)")


def _numbers(column: pa.Array, field: Number, path: str, bad: _Bad, nulls: Any) -> list[Any]:
    wanted = _arrow_number(field.dtype)
    try:
        cast = _cast(column, field)
        if pa.types.is_floating(wanted) and pa.types.is_floating(column.type) and wanted != column.type:
            _refuse_infinite(column, cast)
    except pa.ArrowInvalid:
        cast = pa.nulls(len(column), wanted)
        return [_one(column[row], field, path, row, bad) for row in range(len(cast))]
    if not column.null_count:
        return cast.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]
    return [nulls if value is None else value for value in cast.to_pylist()]


def _refuse_infinite(before: pa.Array, after: pa.Array) -> None:
    if pc.sum(pc.is_inf(before)).as_py() != pc.sum(pc.is_inf(after)).as_py():
        raise pa.ArrowInvalid("too large for it")


def _one(value: pa.Scalar, field: Number, path: str, row: int, bad: _Bad) -> Any:
    """Returns a single number, of a column that does not fit as a whole."""
    try:
        one = pa.array([value.as_py()], value.type)
        cast = _cast(one, field)
        if pa.types.is_floating(cast.type) and pa.types.is_floating(one.type):
            _refuse_infinite(one, cast)
    except pa.ArrowInvalid as error:
        bad.setdefault(row, f"column {path!r}: expected {field.dtype}; found {value.as_py()!r:.60} ({error})")
        return 0
    found = cast[0].as_py()
    return math.nan if found is None and field.dtype.startswith("float") else found


def _arrays(column: pa.Array, field: Array, path: str, bad: _Bad) -> list[Any]:
    flat = column
    if len(field.shape) == 1 and not column.null_count and not column.flatten().null_count:
        fixed = pa.types.is_fixed_size_list(column.type)
        flat = column.flatten().to_numpy(zero_copy_only=False)
        if fixed:
            offsets = np.arange(len(column) + 1) * column.type.list_size
        else:
            offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))])
        rows: Iterable[Any] = (flat[begin:end] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()))
    else:
        rows = column.to_pylist()
    return [_array(value, field, path, row, bad) for row, value in enumerate(rows)]


def _array(value: Any, field: Array, path: str, row: int, bad: _Bad) -> Any:
    wanted = np.dtype(field.dtype)
    try:
        array = np.asarray(value)
        if not array.size:
            return np.empty([0 if size is None else size for size in field.shape], wanted)
        with np.errstate(over="ignore", invalid="ignore"):
            found = array.astype(wanted)
        if wanted.kind in "iub" and not np.array_equal(found, array):
            raise ValueError(f"they are not {field.dtype}")
        if wanted.kind == "f" and not np.array_equal(np.isinf(found), np.isinf(array.astype(np.float64))):
            raise ValueError(f"one is too large for {field.dtype}")
    except (TypeError, ValueError, OverflowError) as error:
        bad.setdefault(row, f"column {path!r}: expected numbers in {len(field.shape)} dimensions: {error}")
        return None
    if found.ndim != len(field.shape):
        bad.setdefault(row, f"column {path!r}: expected {len(field.shape)} dimensions; found {found.ndim}")
    return found


def _picture(content: bytes | None, row: int, path: str, bad: _Bad) -> bytes | None:
    if content is not None:
        try:
            return check_image(content)
        except Unfit as error:
            bad.setdefault(row, f"column {path!r}: {error}")
    return None


def _cast(column: pa.Array, field: Field) -> pa.Array:
    if isinstance(field, Number):
        wanted = _arrow_number(field.dtype)
        if pa.types.is_date32(column.type) or pa.types.is_time32(column.type):
            column = column.cast(pa.int32())
        exact = not (pa.types.is_floating(wanted) and pa.types.is_floating(column.type))
        return column.cast(wanted, safe=exact)
    kind = pa.large_string() if isinstance(field, Text) else pa.large_binary()
    return column if column.type == kind else column.cast(kind)


def _decoded(column: pa.Array) -> pa.Array:
    """Returns a column without dictionaries, extensions and views."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    plain = _plain(column.type)
    return column if plain == column.type else column.cast(plain)


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_picture(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} == _PICTURE


def _arrow_number(dtype: str) -> pa.DataType:
    return pa.bool_() if dtype == "bool" else pa.from_numpy_dtype(np.dtype(dtype))


def _number_name(kind: pa.DataType) -> str:
    return "bool" if pa.types.is_boolean(kind) else np.dtype(kind.to_pandas_dtype()).name
