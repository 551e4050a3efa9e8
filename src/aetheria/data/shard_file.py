"""Writing one shard, and remembering those that are finished while others are still to be written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.manifest import BLOCKS, SHARDS, WRITING, encode_table, hash_of, shard_name
from aetheria.runs import fsync_directory, write_atomically

__all__ = ["FinishedShards", "ShardFile"]


class _Sink:
    """What Arrow writes into: keeps it until it is taken, because a block is hashed as it goes to the disk."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class ShardFile:
    """A shard that is being written, under another name until it is whole.

    Args:
        folder: of the data.
        number: of the shard.
        schema: of its columns.
        compression: None, "zstd" or "lz4".

    Attributes:
        bytes: written so far.
        rows: samples in them.
    """

    def __init__(self, folder: Path, number: int, schema: pa.Schema, compression: str | None) -> None:
        self.number = number
        self.rows = 0
        self.bytes = 0
        self._folder = folder
        self._temporary = folder / WRITING / f"shard-{number:08d}.arrow"
        self._sink = _Sink()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        self._arrow = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), schema, options=options)
        self._blocks: list[tuple[int, int, int, int]] = []
        self._head = b""
        self._file = self._temporary.open("wb")

    def add(self, batch: pa.RecordBatch) -> None:
        """Writes a block."""
        self._arrow.write_batch(batch)
        message = self._sink.take()
        if not self._blocks:  # before the first block Arrow writes its magic and the schema
            end = 8 + 8 + int.from_bytes(message[12:16], "little")
            self._head, message = message[:end], message[end:]
            self._write(self._head)
        self._blocks.append((self.bytes, len(message), batch.num_rows, hash_of(message)))
        self._write(message)
        self.rows += batch.num_rows

    def finish(self) -> dict[str, Any]:
        """Makes the shard durable under its name, and returns what the tables say of it."""
        self._arrow.close()
        tail = self._sink.take()
        self._write(tail)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = self._folder / shard_name(self.number)
        self._temporary.replace(final)
        fsync_directory(final.parent)
        frame = hash_of(self._head, tail)
        return {"bytes": self.bytes, "rows": self.rows, "frame": frame, "blocks": self._blocks}

    def abandon(self) -> None:
        """Leaves nothing of it, if it was not finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)


class FinishedShards:
    """The shards of a part that are whole. Each is noted in a file of its own, which is written after the shard.

    Args:
        folder: of the data.
        first: number of the part's first shard.

    Attributes:
        entries: what `ShardFile.finish` returned, of each from the first one on.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._folder = folder
        self._first = first
        self.entries: list[dict[str, Any]] = []
        while (entry := self._noted(first + len(self.entries))) is not None:
            self.entries.append(entry)

    def _noted(self, number: int) -> dict[str, Any] | None:
        try:
            entry: dict[str, Any] = json.loads(self._note(number).read_bytes())
            size = (self._folder / shard_name(number)).stat().st_size
        except FileNotFoundError:
            return None
        return entry if size == entry["bytes"] else None  # of another size: it is written anew

    def _note(self, number: int) -> Path:
        return self._folder / WRITING / f"shard-{number:08d}.json"

    @property
    def next(self) -> int:
        """Number of the shard that comes next."""
        return self._first + len(self.entries)

    @property
    def rows(self) -> int:
        """Samples in them."""
        return sum(entry["rows"] for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Bytes in them."""
        return sum(entry["bytes"] for entry in self.entries)

    def add(self, shard: ShardFile) -> None:
        """Finishes a shard, and notes it."""
        entry = shard.finish()
        write_atomically(self._note(shard.number), json.dumps(entry).encode())
        self.entries.append(entry)

    def tables(self) -> dict[str, Any]:
        """Returns the contents of the tables' files, by what they are of."""
        blocks = [(self._first + at, *block) for at, entry in enumerate(self.entries) for block in entry["blocks"]]
        shards = [(entry["bytes"], entry["rows"], entry["frame"]) for entry in self.entries]
        return {
            "blocks": encode_table(_columns(blocks, BLOCKS), BLOCKS),
            "shards": encode_table(_columns(shards, SHARDS), SHARDS),
        }


def _columns(rows: list[Any], types: dict[str, pa.DataType]) -> dict[str, NDArray[Any]]:
    return {
        name: np.array([row[place] for row in rows], dtype=kind.to_pandas_dtype())
        for place, (name, kind) in enumerate(types.items())
    }
