"""Blocks as columns: each checked before anything of it is used, and kept as long as there is room."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.manifest import BLOCKS, SHARDS, Manifest, hash_of, read_table, shard_name
from aetheria.data.once import Once, begins_anew_in_child
from aetheria.data.ragged import Column
from aetheria.data.schema import Schema
from aetheria.errors import DataDamagedError, DataError

if TYPE_CHECKING:
    from aetheria.data.places import Place

__all__ = ["Blocks", "Message", "Tables", "damaged", "map_file"]

_KEPT_UNPACKED = 16  # blocks that do not lie in a file and so take memory; unless somebody says how many


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


@dataclass(frozen=True, slots=True)
class Message:
    """The bytes of a block, as Arrow reads them.

    Attributes:
        content: the bytes.
        hash: that they must have; None where they have just been checked.
        mapped: whether they lie in a file, so that keeping them takes no memory of this process alone.
    """

    content: Any
    hash: int | None
    mapped: bool


class _Columns(dict[str, Column]):
    """The columns of a block; unlike other dictionaries it can be watched until nobody uses it any more."""


class Blocks:
    """The blocks of some data, as columns. May be used by several threads: one of them checks a block for all.

    Args:
        place: where their bytes come from.
        tables: which blocks there are.
        schema: of the samples.
        quarantined: numbers of blocks that are not to be read.
        keep: blocks that are kept at most; None for a default.

    Raises:
        DataError: there is not enough room for as many.
    """

    def __init__(
        self,
        place: Place,
        tables: Tables,
        schema: Schema,
        quarantined: frozenset[int] = frozenset(),
        keep: int | None = None,
    ) -> None:
        self._place = place
        self._tables = tables
        self._schema = schema
        self._arrow = schema.arrow()
        self._quarantined = quarantined
        self._checked = np.zeros(len(tables.blocks["rows"]), dtype=bool)
        self._kept: OrderedDict[int, dict[str, Column]] = OrderedDict()
        self._in_memory: set[int] = set()  # those kept that lie in memory of this process alone
        self._limit, self._memory_limit = place.at_most(None), _KEPT_UNPACKED
        self._once: Once[dict[str, Column]] = Once()
        self.begin_anew()
        begins_anew_in_child(self)
        if keep is not None:
            self.keep(keep)

    def begin_anew(self) -> None:
        """Makes the lock anew, in a process that was forked."""
        self._lock = threading.Lock()

    def keep(self, blocks: int) -> None:
        """Sets how many blocks are kept at most; those that were used last stay.

        Raises:
            DataError: there is not enough room for as many.
        """
        if blocks < 1:
            raise DataError(f"at least one block is kept; found {blocks}.")
        self._limit, self._memory_limit = self._place.at_most(blocks), blocks
        self._trim()

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begins to fetch blocks that are not kept; see `Place.prefetch`."""
        known = len(self._checked)
        self._place.prefetch(
            [
                block
                for block in blocks
                if 0 <= block < known and block not in self._quarantined and block not in self._kept
            ]
        )

    def several(self, blocks: Sequence[int]) -> list[dict[str, Column]]:
        """Returns the columns of some blocks; raises what `columns` does."""
        if self._place.slow and len(missing := [block for block in blocks if block not in self._kept]) > 1:
            self.prefetch(missing)
        return [self.columns(block) for block in blocks]

    def columns(self, block: int) -> dict[str, Column]:
        """Returns the columns of a block by path, read-only.

        Raises:
            DataDamagedError: its bytes are not those that were written; nothing of them has been used.
            DataError: it is in quarantine, or cannot be fetched.
        """
        found = self._found(block)
        return self._once(block, lambda: self._load(block)) if found is None else found

    def _found(self, block: int) -> dict[str, Column] | None:
        with self._lock:
            if (found := self._kept.get(block)) is not None:
                self._kept.move_to_end(block)
            return found

    def _load(self, block: int) -> dict[str, Column]:
        if (found := self._found(block)) is not None:  # another thread has just finished with it
            return found
        if block in self._quarantined:
            raise DataError(
                f"{self._place.name}: {self._tables.describe(block)} is in quarantine. Leave its samples out."
            )
        message = self._message(block)
        batch = self._batch(block, message)
        columns = _Columns(
            {path: field.column(batch.column(index)) for index, (path, field) in enumerate(self._schema.fields.items())}
        )
        # Not when they are no longer kept: whoever is still gathering from them would bring them back.
        weakref.finalize(columns, self._place.let_go, block).atexit = False
        with self._lock:
            self._kept[block] = columns
            if not (message.mapped and batch.nbytes <= len(message.content)):  # unpacked, or never in a file
                self._in_memory.add(block)
        self._trim()
        return columns

    def _trim(self) -> None:
        gone = []  # to be let go of without the lock
        with self._lock:
            while len(self._kept) > self._limit:
                block, columns = self._kept.popitem(last=False)
                self._in_memory.discard(block)
                gone.append(columns)
            while len(self._in_memory) > self._memory_limit:
                block = next(block for block in self._kept if block in self._in_memory)
                self._in_memory.discard(block)
                gone.append(self._kept.pop(block))

    def _message(self, block: int) -> Message:
        """Returns the bytes of a block, checked; fetches those anew that were damaged in a cache."""
        while True:
            message = self._place.message(block)
            if message.hash is None or (self._place.lasting and self._checked[block]):
                return message
            if hash_of(message.content) == message.hash:
                return message
            if not self._place.discard(block):
                raise damaged(self._place.name, self._tables, block)

    def _batch(self, block: int, message: Message) -> pa.RecordBatch:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(message.content), self._arrow)
            if not self._checked[block]:
                batch.validate(full=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataDamagedError(
                f"{self._place.name}: {self._tables.describe(block)} was written so that it cannot be read: {error}"
            ) from error
        if batch.num_rows != int(self._tables.blocks["rows"][block]) or any(
            column.null_count for column in batch.columns
        ):
            raise DataDamagedError(f"{self._place.name}: {self._tables.describe(block)} is not what the manifest says.")
        self._checked[block] = True
        return batch


def damaged(where: str, tables: Tables, block: int) -> DataDamagedError:
    """Returns the error that says so of a block."""
    return DataDamagedError(
        f"{where}: {tables.describe(block)} is damaged: its hash is not the one that was written. "
        "Put the shard back from a copy, or write the data anew. aetheria.data.verify(folder) names every "
        "damaged block."
    )
