"""Inputs and predictions as files: .npy, .npz, .csv, .parquet and .jsonl, in any combination.

Rows are samples. What a file holds becomes one array of shape [samples, ...], or a dictionary of arrays by name:

- .npy: the array. Pickled objects are refused.
- .npz: the array, if it holds one; otherwise all of them, by name.
- .csv: the numeric columns, in order, as the features of one array [samples, columns]. The first line names them.
- .parquet: the same; a column of lists is an array [samples, ...] by itself, alone or by name among others.
- .jsonl: one sample a line, either a list (of lists) of numbers, or an object, whose keys are treated as columns.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from loguru import logger
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from aetheria.errors import DataError
from aetheria.runs import write_atomically

__all__ = ["NumberType", "prepare_output", "read_inputs", "write_output", "write_predictions"]

Array = NDArray[Any]
Inputs = Array | dict[str, Array]
NumberType = Literal["float32", "int64"]

FORMATS = (".npy", ".npz", ".csv", ".parquet", ".jsonl")
_UNTYPED = (".csv", ".jsonl")


def read_inputs(path: Path, columns: Sequence[str] = (), dtype: NumberType | None = None) -> Inputs:
    """Reads the samples of a file.

    Whole numbers stay whole numbers, except in .csv and .jsonl: text does not say whether 3 is a measurement or an
    index, so that its numbers are floating-point unless `dtype` says otherwise.

    Args:
        path: the file.
        columns: the columns, keys or arrays to take, in this order, instead of all that hold numbers.
        dtype: what all numbers are converted to.

    Raises:
        DataError: the file cannot be read, has no samples, or holds something else than numbers.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: found the ending '{path.suffix}', expected one of {', '.join(FORMATS)}.")
    try:
        inputs = read(path, columns)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}. Correct the path.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        raise DataError(f"{path} does not read as {path.suffix}: {error}") from error
    wanted = dtype or ("float32" if path.suffix.lower() in _UNTYPED else None)
    arrays = inputs if isinstance(inputs, dict) else {"": inputs}
    if not arrays:
        raise DataError(f"{path}: found nothing in it, expected at least one array.")
    checked = {name: _checked(f"{path}{name and f', {name}'}", array, wanted) for name, array in arrays.items()}
    if len({len(array) for array in checked.values()}) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in checked.items())
        raise DataError(f"{path}: found arrays of {shapes}, expected one row for each sample in all of them.")
    return checked if isinstance(inputs, dict) else checked[""]


def _checked(place: str, array: Array, dtype: NumberType | None) -> Array:
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{place}: found the shape {list(array.shape)}, expected at least one sample.")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{place}: found values of NumPy type {array.dtype}, expected numbers.")
    if dtype is None:
        return array
    if dtype == "int64" and array.dtype.kind == "f" and not np.all(np.isfinite(array) & (array == np.trunc(array))):
        raise DataError(f"{place}: found numbers that are not whole, which int64 cannot hold. Choose float32.")
    return array.astype(dtype, copy=False)


# --- readers ---------------------------------------------------------------------------------------------------------


def _read_npy(path: Path, columns: Sequence[str]) -> Inputs:
    if columns:
        raise DataError(f"{path}: columns were asked for, but a .npy file names none. Leave them out.")
    with path.open("rb") as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_npz(path: Path, columns: Sequence[str]) -> Inputs:
    with path.open("rb") as file, NpzFile(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in _chosen(path, columns or archive.files, archive.files)}
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _read_csv(path: Path, columns: Sequence[str]) -> Inputs:
    table = pyarrow.csv.read_csv(path)
    if _all_numbers(table.column_names):
        raise DataError(
            f"{path}: found only numbers in the first line ({', '.join(table.column_names[:4])}, ...), expected the "
            "names of the columns. Put such a line in front."
        )
    return _from_table(path, table, columns)


def _all_numbers(names: Sequence[str]) -> bool:
    if list(names) == [str(index) for index in range(len(names))]:
        return False  # positions as names, as pandas writes them
    try:
        return bool([float(name) for name in names])
    except ValueError:
        return False


def _read_parquet(path: Path, columns: Sequence[str]) -> Inputs:
    return _from_table(path, pyarrow.parquet.read_table(path), columns)


def _from_table(path: Path, table: pa.Table, columns: Sequence[str]) -> Inputs:
    names = table.column_names
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: found the columns {', '.join(sorted(repeated))} twice. Rename one of each.")
    chosen = columns or [field.name for field in table.schema if _is_numeric(field.type)]
    arrays = {name: _column(path, name, table[name]) for name in _chosen(path, chosen, names)}
    return _features(path, columns, names, arrays)


def _is_numeric(kind: pa.DataType) -> bool:
    while _is_list(kind):
        kind = kind.value_type
    # A column without a single value may have been meant to hold numbers: it is refused rather than left out.
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _column(path: Path, name: str, column: pa.ChunkedArray) -> Array:
    shape = [len(column)]
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    while _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if values.null_count or len(lengths) > 1:
            raise DataError(
                f"{path}: found lists of different lengths, or none at all, in column {name}; expected one."
            )
        shape.append(lengths[0] if lengths else 0)
        values = values.flatten()
    if values.null_count:
        raise DataError(f"{path}: found {values.null_count} empty cells in column {name}, expected numbers. Fill them.")
    array: Array = values.to_numpy(zero_copy_only=False)
    return array.reshape(shape)


def _read_jsonl(path: Path, columns: Sequence[str]) -> Inputs:
    samples: list[Any] = []
    places: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                places.append(f"{path}, line {number}")
                try:
                    samples.append(json.loads(line))
                except ValueError as error:
                    raise DataError(f"{places[-1]}: found something else than JSON ({error}).") from None
    if not samples:
        raise DataError(f"{path}: found no lines, expected at least one sample.")
    if not isinstance(samples[0], dict):
        if columns:
            raise DataError(f"{path}: columns were asked for, but its lines are no objects. Leave them out.")
        return _stacked(samples, places)
    for sample, place in zip(samples, places, strict=True):
        if not isinstance(sample, dict) or sample.keys() != samples[0].keys():
            raise DataError(f"{place}: expected an object with the keys of the first line: {', '.join(samples[0])}.")
    names = list(samples[0])
    chosen = columns or [name for name in names if isinstance(samples[0][name], int | float | list)]
    arrays = {name: _stacked([sample[name] for sample in samples], places) for name in _chosen(path, chosen, names)}
    return _features(path, columns, names, arrays)


def _stacked(values: list[Any], places: Sequence[str]) -> Array:
    """Returns lists of numbers, one for each line, as one array; or says which line is different."""

    def array(value: Any) -> Array | None:
        try:
            made = np.array(value)
        except ValueError:
            return None
        return made if made.dtype.kind in "biuf" else None

    if (stacked := array(values)) is not None:
        return stacked
    first = array(values[0])
    for value, place in zip(values, places, strict=True):
        if (made := array(value)) is None or first is None or made.shape != first.shape:
            found = "something else than numbers" if made is None else f"numbers of shape {list(made.shape)}"
            like = "" if first is None else f" of shape {list(first.shape)}, like the first line"
            raise DataError(f"{place}: found {found}, expected numbers{like}.")
    raise DataError(f"{places[0]}: the numbers of this file are too large for an array.")


def _chosen(path: Path, wanted: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    if unknown := [name for name in wanted if name not in names]:
        raise DataError(f"{path}: there is no column {unknown[0]!r}. It has: {', '.join(names)}.")
    return wanted


def _features(path: Path, asked_for: Sequence[str], names: Sequence[str], columns: dict[str, Array]) -> Inputs:
    """Returns columns of numbers side by side, as one array; what is not as simple stays by name."""
    if not columns:
        raise DataError(f"{path}: found no column of numbers, expected at least one. It has: {', '.join(names)}.")
    if not asked_for and (left_out := [name for name in names if name not in columns]):
        logger.info(f"{path}: the columns {', '.join(left_out)} hold no numbers and are left out")
    arrays = list(columns.values())
    if all(array.ndim == 1 for array in arrays):
        return np.column_stack(arrays)
    return arrays[0] if len(arrays) == 1 else columns


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Inputs]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
}


# --- writers ---------------------------------------------------------------------------------------------------------


def prepare_output(path: Path, endings: Sequence[str], force: bool) -> None:
    """Refuses, before any work is done, a file that cannot or must not be written.

    Raises:
        DataError: it exists and `force` is not set, it has another ending, or its folder does not exist.
    """
    if endings and path.suffix.lower() not in endings:
        raise DataError(f"{path}: found the ending '{path.suffix}', expected one of {', '.join(endings)}.")
    if path.exists() and not (force and path.is_file()):
        raise DataError(
            f"{path} exists already. Choose another name" + (", or use --force." if path.is_file() else ".")
        )
    if not path.absolute().parent.is_dir():
        raise DataError(f"there is no folder {path.absolute().parent} to write {path.name} into. Make it first.")


def write_output(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        write_atomically(path.absolute(), content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}.") from error


def write_predictions(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes predictions, in one instant, in the format that the file's ending names.

    - .npy: the array itself; there must be one only.
    - .npz: the arrays by name.
    - .csv: a column for each number of a sample; those of an array [samples, 10] are called `name_0` to `name_9`.
    - .parquet: a column for each array, of lists where there are several numbers in a sample.
    - .jsonl: an object a line, the arrays' names its keys.

    Args:
        path: the file; one that exists is replaced.
        arrays: by name, [samples, ...] each, of numbers or strings.

    Raises:
        DataError: the format cannot hold them, or the file cannot be written.
    """
    try:
        write_output(path, _WRITERS[path.suffix.lower()](arrays))
    except pa.ArrowException as error:
        raise DataError(f"cannot write {path}: {error} Choose .npz.") from error


def _npy(arrays: Mapping[str, Array]) -> bytes:
    if len(arrays) != 1:
        raise DataError(f"the model makes several predictions ({', '.join(arrays)}), a .npy file holds one. Use .npz.")
    buffer = io.BytesIO()
    np.save(buffer, next(iter(arrays.values())), allow_pickle=False)
    return buffer.getvalue()


def _npz(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # np.savez cannot store an array called "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def _csv(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(pa.table(dict(_flat_columns(arrays))), buffer)
    return buffer.getvalue()


def _flat_columns(arrays: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    for name, array in arrays.items():
        for index in np.ndindex(array.shape[1:]):
            yield "_".join([name, *map(str, index)]), array[(slice(None), *index)]


def _parquet(arrays: Mapping[str, Array]) -> bytes:
    def column(array: Array) -> pa.Array:
        values = pa.array(array.reshape(-1))
        for length in reversed(array.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        return values

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({name: column(array) for name, array in arrays.items()}), buffer)
    return buffer.getvalue()


def _jsonl(arrays: Mapping[str, Array]) -> bytes:
    rows: Iterable[tuple[Any, ...]] = zip(*(array.tolist() for array in arrays.values()), strict=True)
    return "".join(json.dumps(dict(zip(arrays, row, strict=True)), ensure_ascii=False) + "\n" for row in rows).encode()


_WRITERS: Mapping[str, Callable[[Mapping[str, Array]], bytes]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}
