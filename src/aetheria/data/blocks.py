"""Blocks where they lie: shards mapped into memory, each block checked before anything of it is used."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.manifest import BLOCKS, SHARDS, Manifest, hash_of, read_table, shard_name
from aetheria.data.ragged import Column
from aetheria.data.schema import Schema
from aetheria.errors import DataDamagedError, DataError

__all__ = ["Blocks", "Tables"]

_MAPS = 256  # shards that are mapped at a time; each holds a file descriptor
_KEPT, _KEPT_UNPACKED = 4096, 16  # blocks that are remembered; those that were compressed take memory


class Tables:
    """Where all blocks lie, and what their bytes must hash to.

    Args:
        folder: of the data.
        manifest: the version that is read.

    Attributes:
        blocks: the columns of `manifest.BLOCKS`, of all parts; "offset" and "bytes" are places in the shard.
        shards: the columns of `manifest.SHARDS`, of all parts.
        block_starts: number of the first sample of each block, and at last the number of samples: int64 [blocks + 1].
        shard_starts: the same of shards.

    Raises:
        DataDamagedError: a table is missing, or a byte of it changed.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        found: dict[str, list[dict[str, NDArray[Any]]]] = {"blocks": [], "shards": []}
        for number, part in enumerate(manifest.parts):
            for kind, types in (("blocks", BLOCKS), ("shards", SHARDS)):
                path = folder / part.table(number, kind)
                found[kind].append(read_table(map_file(path), types, str(path), part.tables[kind]))
            lost = len(found["blocks"][-1]["rows"]), len(found["shards"][-1]["rows"])
            if lost != (part.blocks, part.shards):
                raise DataDamagedError(
                    f"{folder}: the tables of part {number} have other lengths than the manifest says."
                )
        self.blocks = _joined(found["blocks"], list(BLOCKS))
        self.shards = _joined(found["shards"], list(SHARDS))
        self.block_starts = _starts(self.blocks["rows"])
        self.shard_starts = _starts(self.shards["rows"])

    def block_in_shard(self, block: int) -> int:
        """Returns a block's number among those of its shard, from 0."""
        return block - int(np.searchsorted(self.blocks["shard"], self.blocks["shard"][block]))

    def describe(self, block: int) -> str:
        """Returns what a block is called in an error: its shard, its number there, its samples."""
        first, end = int(self.block_starts[block]), int(self.block_starts[block + 1])
        shard = shard_name(int(self.blocks["shard"][block]))
        return f"{shard}, block {self.block_in_shard(block)} (samples {first} to {end - 1})"


def _joined(tables: Sequence[dict[str, NDArray[Any]]], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    if len(tables) == 1:  # as it lies in the file
        return tables[0]
    return {name: np.concatenate([table[name] for table in tables]) for name in names}


def _starts(rows: NDArray[Any]) -> NDArray[np.int64]:
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(rows, out=starts[1:])
    return starts


def map_file(path: Path, size: int | None = None) -> memoryview:
    """Returns a file's content, mapped.

    Args:
        path: of the file.
        size: that it must have.

    Raises:
        DataDamagedError: it is not there, or not of this size.
    """
    try:
        with path.open("rb") as file:
            found = file.seek(0, 2)
            if size is not None and found != size:
                raise DataDamagedError(
                    f"{path} is damaged: it has {found:,} bytes, {size:,} were written. Put it back from a copy, or "
                    "write the data anew."
                )
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found else b"")
    except FileNotFoundError:
        raise DataDamagedError(f"{path} is missing. Put it back from a copy, or write the data anew.") from None


class Blocks:
    """The blocks of a folder of shards, as columns. May be used by several threads.

    Args:
        folder: of the data.
        tables: where the blocks lie.
        schema: of the samples.
        compressed: whether any block is compressed; it is then unpacked in memory, and fewer are remembered.
        quarantined: numbers of blocks that are not to be read.
    """

    def __init__(
        self, folder: Path, tables: Tables, schema: Schema, compressed: bool, quarantined: frozenset[int] = frozenset()
    ) -> None:
        self._folder = folder
        self._tables = tables
        self._schema = schema
        self._arrow = schema.arrow()
        self._quarantined = quarantined
        self._limit = _KEPT_UNPACKED if compressed else _KEPT
        self._checked = np.zeros(len(tables.blocks["rows"]), dtype=bool)
        self._maps: OrderedDict[int, memoryview] = OrderedDict()
        self._kept: OrderedDict[int, dict[str, Column]] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, block: int) -> dict[str, Column]:
        """Returns the columns of a block by path, read-only.

        Raises:
            DataDamagedError: its bytes are not those that were written; nothing of them has been used.
            DataError: it is in quarantine.
        """
        with self._lock:
            if (found := self._kept.get(block)) is not None:
                self._kept.move_to_end(block)
                return found
        if block in self._quarantined:
            raise DataError(f"{self._folder}: {self._tables.describe(block)} is in quarantine. Leave its samples out.")
        batch = self._batch(block)
        columns = {
            path: field.column(batch.column(index)) for index, (path, field) in enumerate(self._schema.fields.items())
        }
        with self._lock:
            self._kept[block] = columns
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return columns

    def _batch(self, block: int) -> pa.RecordBatch:
        table = self._tables.blocks
        shard, offset, size = int(table["shard"][block]), int(table["offset"][block]), int(table["bytes"][block])
        message = pa.py_buffer(self._map(shard)[offset : offset + size])
        if not self._checked[block] and hash_of(message) != int(table["hash"][block]):
            raise DataDamagedError(
                f"{self._folder}: {self._tables.describe(block)} is damaged: its hash is not the one that was written. "
                "Put the shard back from a copy, or write the data anew. aetheria.data.verify(folder) names every "
                "damaged block."
            )
        try:
            batch = pa.ipc.read_record_batch(message, self._arrow)
            if not self._checked[block]:
                batch.validate(full=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataDamagedError(
                f"{self._folder}: {self._tables.describe(block)} was written so that it cannot be read: {error}"
            ) from error
        if batch.num_rows != int(table["rows"][block]) or any(column.null_count for column in batch.columns):
            raise DataDamagedError(f"{self._folder}: {self._tables.describe(block)} is not what the manifest says.")
        self._checked[block] = True
        return batch

    def _map(self, shard: int) -> memoryview:
        with self._lock:
            if shard not in self._maps:
                size = int(self._tables.shards["bytes"][shard])
                self._maps[shard] = map_file(self._folder / shard_name(shard), size)
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)  # what is still in use of it keeps it mapped
            self._maps.move_to_end(shard)
            return self._maps[shard]
