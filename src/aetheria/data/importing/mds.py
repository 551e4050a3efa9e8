"""MDS, the shards of MosaicML Streaming, read from their format alone.

index.json names the shards and the columns. A shard is: the number of samples (uint32); where each begins, and where
the last one ends (uint32 each, from the beginning of the file); a description of the columns, which index.json has too;
the samples. A sample is the sizes (uint32) of those columns that have no fixed one, and then all columns, one behind
the other. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import xxhash

from aetheria.data.fields import Array, Bytes, Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit, as_number
from aetheria.data.importing.rows import BadRow, Progress, Rows, check_image
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["MdsFolder"]

_NUMBERS = (
    "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
)  # fmt: skip
_CODES = {np.dtype(name).itemsize * 8 + "uif".index(name[0]): name for name in _NUMBERS}  # 32 uint32, 33 int32, ...
_UNPACKED = {"zstd": "zstd", "gz": "gzip", "br": "brotli", "bz2": "bz2"}
_LEFT_OUT = "Leave the column out, by naming those that you want."


class MdsFolder(Rows):
    """Samples of a folder in MDS format, packed or not. Each shard is checked against the hashes that index.json has.

    JSON stays JSON, as text. Nothing is unpickled.

    Args:
        folder: with index.json in it.
        choices: of the user; of types only "image", for columns of bytes that are such.
        progress: is told how far the shapes of arrays have been looked at, where index.json does not say them.

    Raises:
        DataError: it is no such folder, a shard is missing or damaged, or a column has no field.
    """

    kind: ClassVar[str] = "mds"

    def __init__(self, folder: Path | str, choices: Choices | None = None, progress: Progress | None = None) -> None:
        self._folder = Path(folder)
        choices = choices or Choices()
        self._shards = _shards(self._folder)
        first = self._shards[0]
        self._all = [
            _Column(name, encoding, size)
            for name, encoding, size in zip(first["column_names"], first["column_encodings"], first["column_sizes"])
        ]
        for shard in self._shards:
            for key in ("column_names", "column_encodings", "column_sizes"):
                if shard[key] != first[key]:
                    raise DataError(f"{folder}: shards have different {key}: {first[key]} and {shard[key]}.")
        wanted = choices.selected(first["column_names"], folder)
        self._columns = [self._all[first["column_names"].index(name)] for name in wanted]
        for column in self._columns:
            column.decide(choices, self._folder)
        self._starts = np.concatenate([[0], np.cumsum([shard["samples"] for shard in self._shards], dtype=np.int64)])
        if not len(self):
            raise DataError(f"{folder}: there are no samples in it. Check the source.")
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))
        self._measure(progress)
        self.schema = Schema({column.name: column.field() for column in self._columns})
        self.notes: dict[str, Any] = {}

    def _measure(self, progress: Progress | None) -> None:
        unknown = [column for column in self._columns if column.is_unknown]
        for row in range(len(self) if unknown else 0):
            parts, place = self._parts(row)
            for column in unknown:
                try:
                    column.look(parts[column.name])
                except Unfit as error:
                    raise BadRow(f"{place}: column {column.name!r}: {error}.") from error
            if progress is not None and not row % 1024:
                progress("looking", row, len(self))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": (-1, None)}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        parts, place = self._parts(row)
        sample = {}
        for column in self._columns:
            try:
                sample[column.name] = column.decode(parts[column.name])
            except (Unfit, ValueError) as error:
                raise BadRow(f"{place}: column {column.name!r}: {error}.") from error
        return sample

    def _parts(self, row: int) -> tuple[dict[str, memoryview], str]:
        """Returns the bytes of each column of a sample, and where it is, in words."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        if self._held[0] != shard:
            self._held = shard, self._read(shard)
        content, within = self._held[1], row - int(self._starts[shard])
        place = f"{self._folder / self._shards[shard]['raw_data']['basename']}, sample {within}"
        try:
            return self._cut(content, within), place
        except (ValueError, StopIteration) as error:
            raise DataError(f"{place}: its columns do not make up the sample. The shard is damaged.") from error

    def _cut(self, content: memoryview, within: int) -> dict[str, memoryview]:
        begin, end = np.frombuffer(content[4 * within + 4 : 4 * within + 12], "<u4").tolist()
        varying = [column for column in self._all if column.size is None]
        sizes = iter(np.frombuffer(content[begin : begin + 4 * len(varying)], "<u4").tolist())
        begin += 4 * len(varying)
        parts = {}
        for column in self._all:
            size = next(sizes) if column.size is None else column.size
            parts[column.name] = content[begin : begin + size]
            begin += size
        if begin != end or end > len(content):
            raise ValueError(f"it ends at {begin:,}, and not at {end:,}")
        return parts

    def _read(self, number: int) -> memoryview:
        shard = self._shards[number]
        raw, packed = shard["raw_data"], shard.get("zip_data")
        content: Any = None
        if (self._folder / raw["basename"]).is_file() or not packed:
            content = _checked(self._folder / raw["basename"], raw)
        else:
            path = self._folder / packed["basename"]
            content = _unpacked(_checked(path, packed), str(shard["compression"]), path)
            if len(content) != raw["bytes"]:
                raise DataError(f"{path} unpacks to {len(content):,} bytes; index.json says {raw['bytes']:,}.")
        if len(content) < 4 or int.from_bytes(content[:4], "little") != shard["samples"]:
            raise DataError(f"{self._folder / raw['basename']} has another number of samples than index.json says.")
        return memoryview(content)


class _Column:
    """One column: how its bytes become a value.

    Args:
        name: of the column.
        encoding: as index.json says.
        size: in bytes, if all values have the same.
    """

    def __init__(self, name: str, encoding: str, size: int | None) -> None:
        self.name = name
        self.size = size
        self._encoding, _, config = encoding.partition(":")
        given = config.split(":") if config else []
        self._dtype = given[0] if given else None
        self._shape = tuple(map(int, given[1].split(","))) if len(given) > 1 else None
        self._seen: list[set[int]] | None = None
        self._first = ""
        self._field: Field | None = None

    @property
    def is_unknown(self) -> bool:
        """Whether its values have to be looked at to know its shape."""
        return self._encoding == "ndarray" and self._shape is None

    def decide(self, choices: Choices, folder: Path) -> None:
        """Settles what field it has; of an array, as far as it is known."""
        chosen, encoding = choices.types.get(self.name), self._encoding
        if chosen is not None and not (chosen == "image" and encoding == "bytes"):
            raise DataError(
                f"{folder}, column {self.name!r}: it is {encoding}; of such only bytes become another type, 'image'; "
                f"found {chosen!r}."
            )
        if chosen or encoding in ("jpeg", "png", "pil"):
            self._field = Image(choices.image_mode)
        elif encoding in ("int", "str_int"):
            self._field = Number("int64")
        elif encoding in _NUMBERS:
            self._field = Number(encoding)
        elif encoding == "str_float":
            self._field = Number("float64")
        elif encoding in ("str", "str_decimal", "json"):
            self._field = Text()
        elif encoding == "bytes":
            self._field = Bytes()
        elif encoding != "ndarray":
            told = "it may run any code when it is read" if encoding == "pkl" else "there is no field for it"
            raise DataError(f"{folder}, column {self.name!r} is {encoding!r}: {told}. {_LEFT_OUT}")

    def look(self, raw: memoryview) -> None:
        """Takes notice of an array."""
        array = self._array(raw)
        if self._seen is None:
            self._seen, self._first = [set() for _ in array.shape], array.dtype.name
        if len(self._seen) != array.ndim or self._first != array.dtype.name:
            raise Unfit(
                f"expected {self._first} in {len(self._seen)} dimensions, as in the first sample; found "
                f"{array.dtype.name} {array.shape}"
            )
        for sizes, size in zip(self._seen, array.shape):
            if len(sizes) < 2:  # beyond, it varies
                sizes.add(size)

    def field(self) -> Field:
        """Returns its field, after all values have been looked at, if they had to."""
        if self._field is None:
            if self._seen is not None:
                shape = tuple(next(iter(sizes)) or None if len(sizes) == 1 else None for sizes in self._seen)
            else:
                shape = tuple(size or None for size in self._shape or ())
            self._field = Array(self._dtype or self._first, shape)
        return self._field

    def decode(self, raw: memoryview) -> Any:
        """Returns a value; raises `Unfit` or a ValueError."""
        field, encoding = self._field, self._encoding
        if encoding == "pil":
            return _picture(raw)
        if isinstance(field, Image):
            return check_image(bytes(raw))
        if encoding in ("str", "str_decimal", "json"):
            return str(raw, "utf-8")
        if encoding == "bytes":
            return bytes(raw)
        if encoding == "str_int":
            return as_number(int(str(raw, "ascii")), "int64")
        if encoding == "str_float":
            return float(str(raw, "ascii"))
        if encoding == "ndarray":
            return self._array(raw)
        [number] = np.frombuffer(raw, np.dtype("int64" if encoding == "int" else encoding).newbyteorder("<")).tolist()
        return number

    def _array(self, raw: memoryview) -> Any:
        """Returns an array: [code of its dtype] [dimensions * 4 + how large their sizes are] [sizes] values."""
        dtype, shape = self._dtype, self._shape
        if dtype is None:
            dtype, raw = _CODES.get(raw[0]), raw[1:]
            if dtype is None:
                raise Unfit("its type is unknown")
        if shape is None:
            dimensions, width = raw[0] >> 2, 1 << (raw[0] & 3)
            end = 1 + dimensions * width
            shape, raw = tuple(np.frombuffer(raw[1:end], f"<u{width}").tolist()), raw[end:]
        return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def _picture(raw: memoryview) -> Any:
    """Returns a Pillow image: [width] [height] [length of the mode's name] mode pixels."""
    from PIL import Image as Pictures  # noqa: PLC0415 - only where there are pictures

    width, height, name = np.frombuffer(raw[:12], "<u4").tolist()
    return Pictures.frombytes(str(raw[12 : 12 + name], "ascii"), (width, height), bytes(raw[12 + name :]))


def _shards(folder: Path) -> list[dict[str, Any]]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        shards: list[dict[str, Any]] = index["shards"]
        formats = {shard["format"] for shard in shards}
        version = index["version"]
    except FileNotFoundError:
        raise DataError(f"{folder} is no MDS: there is no index.json in it.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not read as an index of MDS: {error!r}.") from error
    if version != 2 or formats - {"mds"}:
        raise DataError(f"{path}: found version {version} and the formats {sorted(formats)}; MDS of version 2 is read.")
    if not shards:
        raise DataError(f"{folder}: there are no shards in it. Check the source.")
    for shard in shards:
        wanted = [shard["raw_data"], *([shard["zip_data"]] if shard.get("zip_data") else [])]
        if not any((folder / data["basename"]).is_file() for data in wanted):
            raise DataError(f"{folder}: the shard {wanted[-1]['basename']} is missing. Put it back.")
    return shards


def _checked(path: Path, told: dict[str, Any]) -> bytes:
    """Returns a file, if it is what index.json says of it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    if len(content) != told["bytes"]:
        raise DataError(f"{path} is damaged: it has {len(content):,} bytes; index.json says {told['bytes']:,}.")
    for name, expected in (told.get("hashes") or {}).items():
        for digest in _digests(name, content):
            if digest != expected:
                raise DataError(f"{path} is damaged: its {name} is {digest}; index.json says {expected}.")
    return content


def _digests(name: str, content: bytes) -> Iterator[str]:
    """Yields the hash of that name, if there is one here."""
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        yield hashlib.new(name, content, usedforsecurity=False).hexdigest()
    elif name in xxhash.algorithms_available:
        yield getattr(xxhash, name)(content).hexdigest()


def _unpacked(content: bytes, compression: str, path: Path) -> bytes:
    name = _UNPACKED.get(compression.partition(":")[0])
    if name is None:
        raise DataError(f"{path} is packed with {compression!r}; read are {', '.join(_UNPACKED)}. Unpack it first.")
    try:
        with pa.CompressedInputStream(pa.BufferReader(content), name) as stream:
            return stream.read()  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.") from error
