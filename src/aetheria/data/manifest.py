"""What a folder of shards holds, and where. The manifest is small; where the blocks lie stands in tables beside it.

    manifest.json                     the newest version
    versions/00000001.json            every version there has been, each as it was
    tables/part-00000.blocks.arrow    shard, offset, bytes, rows, hash of each block
    tables/part-00000.shards.arrow    bytes, rows, hash of the frame of each shard
    shards/shard-00000000.arrow       Arrow IPC files; a block is a record batch

A part is what was written at once. Appending adds a part, and makes a new version; nothing that an older version names
is changed. The manifest is sealed with its own sha256 and knows the hashes of the tables, these know those of the
blocks: so every byte that is read is checked by what was read before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from aetheria.data.sealing import seal, unseal
from aetheria.errors import DataDamagedError, DataError
from aetheria.runs import fsync_directory, write_atomically

__all__ = [
    "BLOCKS",
    "SHARDS",
    "Manifest",
    "Part",
    "encode_table",
    "hash_of",
    "pack_ids",
    "read_table",
    "shard_name",
    "unpack_ids",
]

FORMAT = 1
MANIFEST = "manifest.json"
WRITING = ".writing"  # what is not finished
BLOCKS: dict[str, pa.DataType] = {
    "shard": pa.int32(), "offset": pa.int64(), "bytes": pa.int64(), "rows": pa.int32(), "hash": pa.uint64()
}  # fmt: skip
SHARDS: dict[str, pa.DataType] = {"bytes": pa.int64(), "rows": pa.int64(), "frame": pa.uint64()}
_ROW_BITS, _SHARD_BITS = 24, 23  # of a sample id; 16 above them are the uid's
MAX_ROWS, MAX_SHARDS, MAX_UID = 1 << _ROW_BITS, 1 << _SHARD_BITS, (1 << 16) - 1


def shard_name(number: int) -> str:
    """Returns the path of a shard, from the folder of the data."""
    return f"shards/shard-{number:08d}.arrow"


def pack_ids(uid: int, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns sample ids: none is negative, and no two samples of data with different uids share one."""
    return (np.int64(uid) << np.int64(_SHARD_BITS + _ROW_BITS)) | (shards << np.int64(_ROW_BITS)) | rows


def unpack_ids(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the uids, shards and rows that sample ids are made of."""
    shards = (ids >> np.int64(_ROW_BITS)) & np.int64(MAX_SHARDS - 1)
    return ids >> np.int64(_SHARD_BITS + _ROW_BITS), shards, ids & np.int64(MAX_ROWS - 1)


def hash_of(*parts: Any) -> int:
    """Returns the xxh3 of some bytes one after the other, 64 bits."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


@dataclasses.dataclass(frozen=True)
class Part:
    """What was written at once.

    Attributes:
        name: by which it is not written twice; empty for the first one.
        first_shard: number of its first shard.
        shards: how many it has.
        blocks: how many.
        rows: samples in it.
        bytes: of its shards.
        compression: of its blocks: None, "zstd" or "lz4".
        tables: hash of "blocks" and of "shards", the tables, by name.
        source: what the samples began with, as a hash: samples that begin otherwise do not continue this writing.
    """

    name: str
    first_shard: int
    shards: int
    blocks: int
    rows: int
    bytes: int
    compression: str | None
    tables: dict[str, str]
    source: str

    def table(self, number: int, kind: str) -> str:
        """Returns the path of a table of the part of this number, from the folder of the data."""
        return f"tables/part-{number:05d}.{kind}.arrow"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the data are.

    Attributes:
        uid: of the data, 1 to 65535; part of every sample id.
        version: counted from 1; each appending makes the next one.
        created: time in UTC, ISO 8601, of this version.
        schema: of the samples, as `Schema.state` returns it.
        parts: what was written, in this order.
        key: path of the field whose value is the sample id; None where it is made of uid, shard and row.
        quarantined: blocks that are not to be read: {"shard", "block" (in its part's table), "part", "rows", "reason",
            "time"}.
        notes: anything else that is worth keeping: where the data come from, the version of what has written them.
        format: of the folder.
    """

    uid: int
    version: int
    created: str
    schema: Any
    parts: Sequence[Part]
    key: str | None = None
    quarantined: Sequence[dict[str, Any]] = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Samples in all parts."""
        return sum(part.rows for part in self.parts)

    def encode(self) -> bytes:
        """Returns the file's content: sorted JSON whose key "seal" is the sha256 of the rest."""
        content = dataclasses.asdict(self)
        return seal(content, indent=1)

    @property
    def digest(self) -> str:
        """What a run notes of the data that it reads: sha256, in hexadecimal."""
        return hashlib.sha256(self.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Makes this the newest version; what it names must be durable by now."""
        versions = folder / "versions"
        versions.mkdir(exist_ok=True)
        fsync_directory(folder)
        write_atomically(versions / f"{self.version:08d}.json", self.encode())
        write_atomically(folder / MANIFEST, self.encode())

    @classmethod
    def read(cls, folder: Path, version: int | None = None) -> Manifest:
        """Reads and checks a version; the newest one, unless another one is asked for.

        Raises:
            DataError: there are no shards here, no such version, or they are in a newer format.
            DataDamagedError: a byte of it changed.
        """
        path = folder / (MANIFEST if version is None else f"versions/{version:08d}.json")
        try:
            return cls.decode(path.read_bytes(), str(path))
        except FileNotFoundError:
            pass
        if version is not None and (folder / MANIFEST).exists():
            newest = cls.read(folder).version
            raise DataError(f"{folder} has no version {version}; there are 1 to {newest}.")
        advice = f"Check the path, or write them: aetheria data prepare SOURCE -o {folder.name}, or write_shards."
        if (folder / WRITING).is_dir():
            advice = "The writing of them was interrupted; the same call of write_shards continues it."
        raise DataError(f"{folder} holds no shards: there is no {path.name}. {advice}")

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Returns a manifest from a file's content.

        Args:
            raw: the content.
            where: it is from, for the error.

        Raises:
            DataError: it is of a newer format.
            DataDamagedError: a byte of it changed.
        """
        content = unseal(raw, "a manifest", where, FORMAT, indent=1)
        content["parts"] = tuple(Part(**part) for part in content["parts"])
        return cls(**content)


def encode_table(columns: dict[str, NDArray[Any]], types: dict[str, pa.DataType]) -> bytes:
    """Returns the content of a table's file."""
    arrays = [pa.array(columns[name], type=kind) for name, kind in types.items()]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(types))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read_table(raw: Any, types: dict[str, pa.DataType], where: str, expected: str) -> dict[str, NDArray[Any]]:
    """Returns the columns of a table, which lie where it lies.

    Args:
        raw: the file's content, or a map of it.
        types: of the columns.
        where: it is from, for the error.
        expected: its hash.

    Raises:
        DataDamagedError: a byte of it changed, or it is no such table.
    """
    buffer = pa.py_buffer(raw)
    found = xxhash.xxh3_128_hexdigest(buffer)
    if found != expected:
        raise DataDamagedError(f"{where} is damaged: its hash is {found}, the manifest says {expected}.")
    batch = pa.ipc.open_file(buffer).get_batch(0)
    return {
        name: np.frombuffer(batch.column(name).buffers()[1], kind.to_pandas_dtype(), len(batch))
        if len(batch)
        else np.empty(0, kind.to_pandas_dtype())
        for name, kind in types.items()
    }
