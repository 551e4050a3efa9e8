"""What a sample looks like: dictionaries and tuples, nested as they like, with fields for leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.fields import Array, Bytes, Field, Image, Number, RefusedValue, Text, field_from_state
from aetheria.data.values import as_array, described, is_bfloat16, is_tensor
from aetheria.errors import DataError

__all__ = ["Schema"]

Tree = Any  # a Field, or a dict or tuple of trees
_ALONE = "value"  # the column of a sample that is a single value


class Schema:
    """The fields of a sample, each under the path that leads to it: "image", "target/boxes", "0".

    Args:
        tree: a field, or a dictionary or tuple of such.

    Attributes:
        fields: by path, in the order of the columns.

    Raises:
        DataError: there is no field in it, or a key that cannot be part of a path.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.fields: dict[str, Field] = {}
        self._collect(tree, ())
        if not self.fields:
            raise DataError("a sample has at least one field; this schema has none.")

    def _collect(self, tree: Tree, path: tuple[str, ...]) -> None:
        if isinstance(tree, Field):
            self.fields["/".join(path) or _ALONE] = tree
        elif isinstance(tree, dict):
            for key, part in tree.items():
                if not isinstance(key, str) or not key or "/" in key:
                    raise DataError(f"a key of a sample is a string without a slash; found {key!r}. Rename it.")
                self._collect(part, (*path, key))
        elif isinstance(tree, tuple):
            for index, part in enumerate(tree):
                self._collect(part, (*path, str(index)))
        else:
            raise DataError(f"a schema is made of fields, dictionaries and tuples; found {type(tree).__name__}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.state() == other.state()

    def __hash__(self) -> int:
        return hash(tuple(self.fields.items()))

    def arrow(self) -> pa.Schema:
        """Returns the schema of the files: one column for each field, none of them with nulls."""
        return pa.schema([pa.field(path, field.arrow_type(), nullable=False) for path, field in self.fields.items()])

    def encode(self, samples: Sequence[Any], first: int = 0) -> pa.RecordBatch:
        """Returns samples as columns.

        Args:
            samples: at least one.
            first: number of the first one, for the error.

        Raises:
            DataError: one of them is not of this schema; the message says which, and in which field.
        """
        rows: list[list[Any]] = []
        for index, sample in enumerate(samples):
            leaves: list[Any] = []
            self._flatten(self.tree, sample, leaves, first + index, ())
            rows.append(leaves)
        arrays = []
        for (path, field), values in zip(self.fields.items(), zip(*rows)):
            try:
                arrays.append(field.encode(values))
            except RefusedValue as error:
                raise DataError(f"sample {first + error.index}, field {path!r}: {error}.") from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.arrow())

    def _flatten(self, tree: Tree, sample: Any, into: list[Any], number: int, path: tuple[str, ...]) -> None:
        if isinstance(tree, Field):
            into.append(sample)
            return
        place = f", in {'/'.join(path)!r}" if path else ""
        if isinstance(tree, dict):
            if not isinstance(sample, dict) or sample.keys() != tree.keys():
                found = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
                raise DataError(
                    f"sample {number}{place}: expected a dictionary with the keys {sorted(tree)}; found {found}. "
                    "All samples have the same fields; give what is missing a value of its own."
                )
            for key, part in tree.items():
                self._flatten(part, sample[key], into, number, (*path, key))
        else:
            if not isinstance(sample, tuple) or len(sample) != len(tree):
                size = f"one of {len(sample)}" if isinstance(sample, tuple) else type(sample).__name__
                raise DataError(f"sample {number}{place}: expected a tuple of {len(tree)}; found {size}.")
            for index, part in enumerate(tree):
                self._flatten(part, sample[index], into, number, (*path, str(index)))

    def nest(self, leaves: dict[str, Any]) -> Any:
        """Returns what stands under each path as one nested value, as the samples were."""
        return _nested(self.tree, leaves, ())

    def state(self) -> Any:
        """Returns the tree in JSON's types."""
        return _tree_state(self.tree)

    @classmethod
    def from_state(cls, state: Any) -> Schema:
        """Takes back what `state` returned.

        Raises:
            DataError: it holds a field that this version does not know.
        """
        return cls(_tree_from_state(state))

    @classmethod
    def inferred(cls, samples: Sequence[Any]) -> Schema:
        """Returns the schema of some samples, of which there is at least one.

        Raises:
            DataError: there is something in them that has no column, or they do not look alike.
        """
        return cls(_inferred(list(samples), ()))


def _nested(tree: Tree, leaves: dict[str, Any], path: tuple[str, ...]) -> Any:
    if isinstance(tree, dict):
        return {key: _nested(part, leaves, (*path, key)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_nested(part, leaves, (*path, str(index))) for index, part in enumerate(tree))
    return leaves["/".join(path) or _ALONE]


def _tree_state(tree: Tree) -> Any:
    if isinstance(tree, dict):
        return {"dict": [[key, _tree_state(part)] for key, part in tree.items()]}  # a list keeps their order
    if isinstance(tree, tuple):
        return {"tuple": [_tree_state(part) for part in tree]}
    return tree.state()


def _tree_from_state(state: Any) -> Tree:
    if "dict" in state:
        return {key: _tree_from_state(part) for key, part in state["dict"]}
    if "tuple" in state:
        return tuple(_tree_from_state(part) for part in state["tuple"])
    return field_from_state(state)


def _inferred(values: list[Any], path: tuple[str, ...]) -> Tree:
    place, first = "/".join(path) or _ALONE, values[0]
    kind = next((kind for kind in (dict, tuple) if isinstance(first, kind)), None)
    if kind is None:
        try:
            return _inferred_field(values)
        except RefusedValue as error:
            raise DataError(f"sample {error.index}, field {place!r}: {error}.") from error
    shape = first.keys() if isinstance(first, dict) else len(first)
    for index, value in enumerate(values):
        found = value.keys() if isinstance(value, dict) else len(value) if isinstance(value, tuple) else None
        if not isinstance(value, kind) or found != shape:
            raise DataError(
                f"sample {index}, {place!r}: it does not look like the first one: {value!r:.80}. All samples have the "
                "same fields; give what is missing a value of its own."
            )
    if isinstance(first, dict):
        return {key: _inferred([value[key] for value in values], (*path, str(key))) for key in first}
    return tuple(_inferred([value[index] for value in values], (*path, str(index))) for index in range(len(first)))


def _inferred_field(values: Sequence[Any]) -> Field:
    """Returns the field that holds some values, of which there is at least one.

    Python's numbers become int64 or float64, lists of them arrays of any length; arrays and tensors keep their dtype,
    and a dimension in which they differ varies.

    Raises:
        RefusedValue: there is none.
    """
    first = values[0]
    if all(isinstance(value, bool) for value in values):
        return Number("bool")
    if all(isinstance(value, int | float) for value in values):
        return Number("int64" if all(isinstance(value, int) for value in values) else "float64")
    if isinstance(first, str):
        return Text()
    if isinstance(first, bytes | bytearray | memoryview):
        return Bytes()
    if type(first).__module__.partition(".")[0] == "PIL":
        return Image(first.mode if first.mode in ("RGB", "RGBA", "L") else "RGB")
    arrays = [as_array(value) for value in values]
    for index, (array, value) in enumerate(zip(arrays, values)):
        if array is None or array.dtype.kind not in "biuf":
            raise RefusedValue(index, f"there is no column for {described(value)}: convert it to an array or to bytes")
        if array.ndim != arrays[0].ndim:  # type: ignore[union-attr]
            raise RefusedValue(
                index,
                f"expected {arrays[0].ndim} dimensions as in the first one; found {array.ndim}",  # type: ignore[union-attr]
            )
    found: list[NDArray[Any]] = arrays  # type: ignore[assignment]
    shape: tuple[int | None, ...] = tuple(
        None if len(set(sizes)) > 1 or not sizes[0] else sizes[0] for sizes in zip(*(array.shape for array in found))
    )
    if isinstance(first, list):
        shape = (None,) * len(shape)
    dtype = "bfloat16" if is_bfloat16(first) else np.result_type(*{array.dtype for array in found}).name
    return Array(dtype, shape, tensor=is_tensor(first))
