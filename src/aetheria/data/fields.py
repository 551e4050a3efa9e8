"""What one field of a sample can be, and how it lies in a column. Nothing in here makes an object for each number.

A field writes the values of many samples as one Arrow array, sees an array of a block as a column without copying it,
and gathers rows of many columns at once. Columns are of two forms: rows of equal size are one NumPy array, others a
`Ragged`.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.ragged import Column, Ragged
from aetheria.data.values import as_array, described, holds, is_bfloat16
from aetheria.errors import DataError

__all__ = [
    "Array",
    "Boundaries",
    "Bytes",
    "Field",
    "Image",
    "Number",
    "RefusedValue",
    "Text",
    "field_from_state",
]

Rows = Column | Sequence[NDArray[Any]]  # gathered; or each by itself, where it lies, for a field that takes views
_NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
)  # fmt: skip
_STORED = {"bool": "uint8", "bfloat16": "uint16"}  # as which numbers these lie on the disk


class Field(ABC):
    """One leaf of a sample: what its values must be, and how they are written and read."""

    kind: ClassVar[str]
    takes_views: ClassVar[bool] = False  # whether `values` copies what it needs, so that rows need not be gathered
    copies_only: ClassVar[bool] = False  # whether that is all it does: in another thread it would hold up this one

    @abstractmethod
    def arrow_type(self) -> pa.DataType:
        """Returns the type of the column on the disk."""

    @abstractmethod
    def encode(self, values: Sequence[Any]) -> pa.Array:
        """Returns the values of many samples as one Arrow array.

        Raises:
            RefusedValue: one of them is not what this field holds.
        """

    @abstractmethod
    def column(self, array: pa.Array) -> Column:
        """Returns what lies in a block, without copying it."""

    @abstractmethod
    def values(self, gathered: Rows) -> Sequence[Any]:
        """Returns the values of gathered rows one by one, as they were before they were written."""

    def batch(self, gathered: Rows) -> Any:
        """Returns gathered rows as a batch: stacked where they can be, otherwise one by one."""
        return self.values(gathered)

    def state(self) -> dict[str, Any]:
        """Returns what the manifest says of this field; see `field_from_state`."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


class RefusedValue(ValueError):  # noqa: N818 - becomes a DataError that names sample and field
    """A value that a field does not hold.

    Attributes:
        index: which one of those that were to be encoded.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Array(Field):
    """Numbers of a shape; dimensions that are None vary from sample to sample.

    Args:
        dtype: by NumPy's name; "bfloat16" for tensors.
        shape: without a dimension for the batch.
        tensor: whether values come back as torch tensors; otherwise as NumPy arrays.
    """

    kind: ClassVar[str] = "array"
    dtype: str
    shape: tuple[int | None, ...] = ()
    tensor: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _NUMBERS and not (self.dtype == "bfloat16" and self.tensor):
            raise DataError(
                f"there are no columns of {self.dtype!r}{'' if self.tensor else ' as NumPy arrays'}. Use one of "
                f"{', '.join(_NUMBERS)}, or bfloat16 for tensors."
            )
        if any(size is not None and size < 1 for size in self.shape):
            raise DataError(f"a fixed dimension has at least one element; found the shape {self.shape}. None varies.")

    @property
    def _fixed(self) -> bool:
        return None not in self.shape

    @property
    def _shapes_are_kept(self) -> bool:
        """Whether the length alone does not tell the shape."""
        return self.shape.count(None) > 1

    @property
    def _stored(self) -> np.dtype[Any]:
        return np.dtype(_STORED.get(self.dtype, self.dtype))

    @property
    def _seen(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def arrow_type(self) -> pa.DataType:
        numbers = pa.from_numpy_dtype(self._stored)
        if self._fixed:
            return pa.list_(numbers, math.prod(s or 1 for s in self.shape)) if self.shape else numbers
        if self._shapes_are_kept:
            return pa.struct({"data": pa.large_list(numbers), "shape": pa.list_(pa.int32(), len(self.shape))})
        return pa.large_list(numbers)

    def encode(self, values: Sequence[Any]) -> pa.Array:
        arrays = [self._checked(index, value) for index, value in enumerate(values)]
        if self._fixed:
            flat = np.stack(arrays).reshape(-1) if arrays else np.empty(0, self._seen)
            numbers = pa.array(flat.view(self._stored))
            if not self.shape:
                return numbers
            return pa.FixedSizeListArray.from_arrays(numbers, type=self.arrow_type())
        flat = np.concatenate([np.empty(0, self._seen), *(array.reshape(-1) for array in arrays)])
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([array.size for array in arrays], out=offsets[1:])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.view(self._stored)))
        if not self._shapes_are_kept:
            return lists
        shapes = np.array([array.shape for array in arrays], dtype=np.int32).reshape(-1)
        kept = pa.FixedSizeListArray.from_arrays(pa.array(shapes), len(self.shape))
        return pa.StructArray.from_arrays([lists, kept], fields=list(self.arrow_type()))

    def _checked(self, index: int, value: Any) -> NDArray[Any]:
        array = as_array(value)
        if array is None or array.dtype.kind not in "biuf":
            raise RefusedValue(index, f"expected numbers ({self.dtype}); found {described(value)}")
        if array.dtype != self._seen or is_bfloat16(value) != (self.dtype == "bfloat16"):
            if hasattr(value, "dtype"):  # a tensor or an array means what it says
                raise RefusedValue(index, f"expected {self.dtype}; found {str(value.dtype).removeprefix('torch.')}")
            if not holds(self._seen, array):
                raise RefusedValue(index, f"expected {self.dtype}; found {value!r:.80}")
            array = array.astype(self._seen)
        if array.ndim != len(self.shape) or any(
            wanted not in (None, found) for wanted, found in zip(self.shape, array.shape)
        ):
            raise RefusedValue(index, f"expected the shape {self.shape}; found {array.shape}")
        return array

    def column(self, array: pa.Array) -> Column:
        if self._shapes_are_kept:
            ragged = self._lists(array.field("data"))
            shapes = _numbers(array.field("shape").values, np.dtype("int32"))
            return Ragged(ragged.values, ragged.offsets, shapes.reshape(len(array), len(self.shape)))
        if not self._fixed:
            return self._lists(array)
        values = array.values if self.shape else array
        return _numbers(values, self._stored).view(self._seen).reshape(len(array), *self.shape)

    def _lists(self, array: pa.Array) -> Ragged:
        offsets = _numbers(array.offsets, np.dtype("int64"))
        return Ragged(_numbers(array.values, self._stored).view(self._seen), offsets)

    def values(self, gathered: Rows) -> Sequence[Any]:
        if isinstance(gathered, Ragged):
            return [self._finished(self._reshaped(gathered, row)) for row in range(len(gathered))]
        return self._finished(np.asarray(gathered)) if self.shape or self.tensor else list(gathered)

    def batch(self, gathered: Rows) -> Any:
        """Returns [rows, *shape]; where the shape varies, a list of each row's array."""
        return self.values(gathered) if isinstance(gathered, Ragged) else self._finished(np.asarray(gathered))

    def _reshaped(self, gathered: Ragged, row: int) -> NDArray[Any]:
        if gathered.shapes is not None:
            return gathered[row].reshape(gathered.shapes[row])
        return gathered[row].reshape([-1 if size is None else size for size in self.shape])

    def _finished(self, array: NDArray[Any]) -> Any:
        if not self.tensor:
            return array
        import torch  # noqa: PLC0415 - who reads arrays does not wait for it

        if self.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


@dataclass(frozen=True)
class Number(Array):
    """A single number of Python's; batches of it are tensors, as torch's own collation makes them.

    Args:
        dtype: by NumPy's name.
    """

    kind: ClassVar[str] = "number"

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "dtype": self.dtype}

    def values(self, gathered: Rows) -> Sequence[Any]:
        return gathered.tolist()  # type: ignore[no-any-return, union-attr]


@dataclass(frozen=True)
class Bytes(Field):
    """Bytes of any length."""

    kind: ClassVar[str] = "bytes"
    takes_views: ClassVar[bool] = True
    copies_only: ClassVar[bool] = True

    def arrow_type(self) -> pa.DataType:
        return pa.large_binary()

    def encode(self, values: Sequence[Any]) -> pa.Array:
        return pa.array([self._encoded(index, value) for index, value in enumerate(values)], type=self.arrow_type())

    def _encoded(self, index: int, value: Any) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise RefusedValue(index, f"expected bytes; found {described(value)}")
        return bytes(value)

    def column(self, array: pa.Array) -> Column:
        _, offsets, values = array.buffers()
        found = np.frombuffer(offsets, np.int64, len(array) + 1, offset=8 * array.offset)
        return Ragged(np.frombuffer(values, np.uint8) if values is not None else np.empty(0, np.uint8), found)

    def values(self, gathered: Rows) -> Sequence[Any]:
        return [gathered[row].tobytes() for row in range(len(gathered))]


@dataclass(frozen=True)
class Text(Bytes):
    """Strings."""

    kind: ClassVar[str] = "text"

    def arrow_type(self) -> pa.DataType:
        return pa.large_string()

    def _encoded(self, index: int, value: Any) -> bytes:
        if not isinstance(value, str):
            raise RefusedValue(index, f"expected a string; found {described(value)}")
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise RefusedValue(index, f"found a string that is no text: {error}") from error

    def values(self, gathered: Rows) -> Sequence[Any]:
        return [gathered[row].tobytes().decode() for row in range(len(gathered))]


@dataclass(frozen=True)
class Image(Bytes):
    """Pictures, stored as the bytes of their files and decoded when they are read, to uint8 [height, width, channels].

    Given as such bytes, or as Pillow images, which are stored as PNG, without loss.

    Args:
        mode: of Pillow: "RGB", "L" (then [height, width]), "RGBA". Images of other modes are converted.
    """

    kind: ClassVar[str] = "image"
    copies_only: ClassVar[bool] = False
    mode: str = "RGB"

    def _encoded(self, index: int, value: Any) -> bytes:
        from PIL import Image as Pictures  # noqa: PLC0415 - only where there are pictures

        if isinstance(value, Pictures.Image):
            file = io.BytesIO()
            value.save(file, format="PNG")
            return file.getvalue()
        encoded = super()._encoded(index, value)
        try:
            Pictures.open(io.BytesIO(encoded)).close()
        except OSError as error:
            raise RefusedValue(index, f"expected the bytes of an image file; {error}") from error
        return encoded

    def values(self, gathered: Rows) -> Sequence[Any]:
        from PIL import Image as Pictures  # noqa: PLC0415

        pictures = []
        for row in range(len(gathered)):
            try:
                with Pictures.open(io.BytesIO(gathered[row].data)) as picture:
                    pictures.append(np.array(picture.convert(self.mode)))
            except (OSError, SyntaxError, ValueError) as error:  # Pillow says SyntaxError of some damaged files
                raise RefusedValue(row, f"the image cannot be decoded: {error}") from error
        return pictures


@dataclass(frozen=True)
class Boundaries(Array):
    """Where documents begin and end in a row of packed tokens; see `packing`, which makes its values.

    A value holds the place at which each document begins, the first one's negative by as many tokens as went into the
    row before; and then how many tokens there are. Read, it says of every token what attention needs to know.

    Args:
        length: of a row.
    """

    kind: ClassVar[str] = "boundaries"
    dtype: str = "int32"
    shape: tuple[int | None, ...] = (None,)
    length: int = 1

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "length": self.length}

    def values(self, gathered: Rows) -> Sequence[Any]:
        told = self.batch(gathered)
        return [{name: rows[row] for name, rows in told.items()} for row in range(len(gathered))]

    def batch(self, gathered: Rows) -> Any:
        """Returns, each of shape [rows, length]:

        - "positions": int64, of each token in its document, counted from where the document begins in this row.
        - "documents": int64, the number of its document in this row; -1 where there is none. Attention is reset where
          it changes: a token sees those before it that have the same number.
        """
        assert isinstance(gathered, Ragged)
        begins = np.zeros((len(gathered), self.length), dtype=bool)
        rows = np.repeat(np.arange(len(gathered)), gathered.lengths)
        inner = (gathered.values > 0) & (gathered.values < self.length)
        begins[rows[inner], gathered.values[inner]] = True
        places = np.arange(self.length)
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        documents = np.cumsum(begins, axis=1)
        filled = gathered.values[gathered.offsets[1:] - 1]
        documents[places >= filled[:, None]] = -1
        return {"positions": self._finished(positions), "documents": self._finished(documents)}


_KINDS: dict[str, type[Field]] = {kind.kind: kind for kind in (Array, Number, Bytes, Text, Image, Boundaries)}


def field_from_state(state: dict[str, Any]) -> Field:
    """Returns the field that said this of itself.

    Raises:
        DataError: no such field is known.
    """
    try:
        given = dict(state)
        kind = _KINDS[given.pop("kind")]
        if "shape" in given:
            given["shape"] = tuple(given["shape"])
        return kind(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"this version of Aetheria does not know the field {state!r:.200} ({error!r}); upgrade Aetheria to read it."
        ) from error


def _numbers(array: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Returns the numbers of a primitive array without copying them; read-only."""
    values = array.buffers()[1]
    if values is None or not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(values, dtype, len(array), offset=array.offset * dtype.itemsize)
