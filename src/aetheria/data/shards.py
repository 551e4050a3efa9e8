"""Reading samples out of shards: any rows at once, as columns, without an object for each sample on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from aetheria.data.blocks import Blocks, Tables, map_file
from aetheria.data.fields import RefusedValue, Rows
from aetheria.data.manifest import Manifest, hash_of, pack_ids, shard_name, unpack_ids
from aetheria.data.ragged import Column, Part, gather, views
from aetheria.data.schema import Schema
from aetheria.errors import DataDamagedError, DataError

__all__ = ["Damage", "Shards", "verify"]


class Shards(Dataset[Any]):
    """The samples in a folder that `write_shards` has written, by their numbers in the order of writing.

    It is a map-style dataset: a DataLoader reads it like any other. `batch` gives whole batches without collating.

    Args:
        folder: of the data.
        version: of the manifest; None takes the newest there is now. It stays that one, whatever is appended.

    Attributes:
        manifest: what the data are.
        schema: of a sample.

    Raises:
        DataError: there are no shards here.
        DataDamagedError: manifest or tables are damaged, or a shard is missing; the message names it.
    """

    def __init__(self, folder: Path | str, version: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.manifest = Manifest.read(self.folder, version)
        self.schema = Schema.from_state(self.manifest.schema)
        self._tables = Tables(self.folder, self.manifest)
        self._check_names()
        compressed = any(part.compression for part in self.manifest.parts)
        self._blocks = Blocks(self.folder, self._tables, self.schema, compressed, frozenset(self.quarantined))

    def __getstate__(self) -> dict[str, Any]:
        """Sends a worker where the data are; it maps them itself."""
        return {"folder": self.folder, "version": self.manifest.version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Shards.__init__(self, state["folder"], state["version"])

    def _check_names(self) -> None:
        wanted = {Path(shard_name(number)).name for number in range(len(self._tables.shards["rows"]))}
        if wanted and (missing := sorted(wanted - set(_listed(self.folder / "shards")))):
            raise DataDamagedError(
                f"{self.folder}: {len(missing)} of {len(wanted)} shards are missing: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}. Put them back from a copy, or write the data anew."
            )

    def __len__(self) -> int:
        return int(self._tables.block_starts[-1])

    @property
    def block_rows(self) -> NDArray[np.int32]:
        """Samples in each block, of shape [blocks]: what a `BlockOrder` is made of."""
        return self._tables.blocks["rows"]

    @cached_property
    def quarantined(self) -> tuple[int, ...]:
        """Numbers of the blocks that are not to be read."""
        firsts = np.cumsum([0, *(part.blocks for part in self.manifest.parts)])
        return tuple(int(firsts[entry["part"]]) + entry["block"] for entry in self.manifest.quarantined)

    def columns(self, rows: Sequence[int] | NDArray[np.int64], paths: Sequence[str] | None = None) -> dict[str, Column]:
        """Returns some samples as columns, by the paths of their fields.

        Args:
            rows: numbers of samples, in any order, of shape [n].
            paths: of the fields that are wanted; None for all.

        Returns:
            For each path an array of shape [n, ...], or a `Ragged` of n rows; in memory of their own.

        Raises:
            DataError: there is no such sample, or it is in quarantine.
            DataDamagedError: a block that is needed is damaged; the message names it.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        paths = list(self.schema.fields) if paths is None else paths
        if not len(wanted):
            return {path: self._nothing(path) for path in paths}
        blocks, parts = self._located(wanted)
        return {path: gather([columns[path] for columns in blocks], parts, len(wanted)) for path in paths}

    def _located(self, rows: NDArray[np.int64]) -> tuple[list[dict[str, Column]], list[Part]]:
        """Returns the columns of the blocks in which some rows lie, at least one, and what is taken from each."""
        if int(rows.min()) < 0 or int(rows.max()) >= len(self):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise DataError(f"{self.folder} holds samples 0 to {len(self) - 1}; {wrong} was asked for.")
        blocks = np.searchsorted(self._tables.block_starts, rows, side="right") - 1
        places = np.argsort(blocks, kind="stable")
        blocks = blocks[places]
        within = rows[places] - self._tables.block_starts[blocks]
        cuts = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(rows)]
        parts = [Part(within[begin:end], places[begin:end]) for begin, end in pairwise(cuts)]
        return [self._blocks.columns(block) for block in blocks[cuts[:-1]].tolist()], parts

    def _nothing(self, path: str) -> Column:
        field = self.schema.fields[path]
        return field.column(field.encode([]))

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Any:
        """Returns some samples as one batch, nested as they are.

        Numbers and arrays of one shape are stacked; arrays of different shapes, bytes, strings and images are lists.

        Raises:
            DataError: as `columns`; or an image cannot be decoded, of the sample that the message names.
        """
        return self._finished(rows, "batch")

    def samples(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """Returns some samples one by one, as they were given to `write_shards`; raises what `batch` does."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        leaves = self._leaves(rows, "values")
        return [
            self.schema.nest({path: values[place] for path, values in leaves.items()}) for place in range(len(rows))
        ]

    def _finished(self, rows: Sequence[int] | NDArray[np.int64], how: str) -> Any:
        return self.schema.nest(self._leaves(np.asarray(rows, dtype=np.int64).reshape(-1), how))

    def _leaves(self, rows: NDArray[np.int64], how: str) -> dict[str, Any]:
        blocks, parts = self._located(rows) if len(rows) else ([], [])
        leaves = {}
        for path, field in self.schema.fields.items():
            columns = [block[path] for block in blocks]
            if not columns:
                found: Rows = self._nothing(path)
            else:
                found = (views if field.takes_views else gather)(columns, parts, len(rows))
            try:
                leaves[path] = getattr(field, how)(found)
            except RefusedValue as error:
                row = int(rows[error.index])
                identity = int(self.sample_ids([row])[0])
                raise DataError(f"{self.folder}: sample {row} (id {identity}), field {path!r}: {error}.") from error
        return leaves

    def __getitem__(self, row: int) -> Any:
        """Returns one sample; see `samples`."""
        return self.samples([row])[0]

    def __getitems__(self, rows: list[int]) -> list[Any]:
        """Returns several samples; what a DataLoader asks for."""
        return self.samples(rows)

    def sample_ids(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the ids of some samples, int64 of shape [n]: whatever is appended, a sample keeps its own.

        They are the values of the key, where the data have one; otherwise made of uid, shard and row in the shard.

        Raises:
            DataError: there is no such sample.
        """
        if self.manifest.key is not None:
            column = self.columns(rows, [self.manifest.key])[self.manifest.key]
            return np.asarray(column, dtype=np.int64)
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            raise DataError(f"{self.folder} holds samples 0 to {len(self) - 1}; others were asked for.")
        shards = np.searchsorted(self._tables.shard_starts, wanted, side="right") - 1
        return pack_ids(self.manifest.uid, shards, wanted - self._tables.shard_starts[shards])

    def rows_of(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of the samples that have some ids, int64 of shape [n].

        Raises:
            DataError: an id is not of these data; or they have a key, and two samples share it.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        if self.manifest.key is None:
            uids, shards, rows = unpack_ids(wanted)
            known = (uids == self.manifest.uid) & (shards < len(self._tables.shards["rows"]))
            held = np.where(known, shards, 0)
            known &= rows < (self._tables.shards["rows"][held] if len(self) else 0)
            found = np.where(known, self._tables.shard_starts[held] + rows, 0)
        else:
            keys, order = self._keys
            at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
            known = keys[at] == wanted if len(keys) else np.zeros(len(wanted), dtype=bool)
            found = order[at] if len(keys) else np.zeros(len(wanted), dtype=np.int64)
        if not known.all():
            raise DataError(f"{self.folder} has no sample with the id {int(wanted[~known][0])}.")
        return found

    @cached_property
    def _keys(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        keys = self.sample_ids(np.arange(len(self)))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if len(twice := np.flatnonzero(keys[1:] == keys[:-1])):
            first, second = order[twice[0] : twice[0] + 2].tolist()
            raise DataError(
                f"{self.folder}: the samples {first} and {second} have the same key, {keys[twice[0]]}: it does not "
                "tell them apart. Write them with another key, or with none."
            )
        return keys, order


@dataclass(frozen=True)
class Damage:
    """Something in a folder of shards that is not as it was written.

    Attributes:
        file: its path, from the folder.
        what: in words.
        shard: number of the shard; None if it is another file.
        block: number of the block, among all; None if it is the file as a whole, or what stands around the blocks.
        first_row: number of its first sample.
        rows: how many samples cannot be read.
    """

    file: str
    what: str
    shard: int | None = None
    block: int | None = None
    first_row: int = 0
    rows: int = 0

    def __str__(self) -> str:
        lost = f" (samples {self.first_row} to {self.first_row + self.rows - 1})" if self.rows else ""
        return f"{self.file}: {self.what}{lost}"


def verify(folder: Path | str, version: int | None = None) -> list[Damage]:
    """Reads every byte of a folder of shards, and names all that is damaged: an empty list says that nothing is.

    Args:
        folder: of the data.
        version: of the manifest; None for the newest.

    Raises:
        DataError: there are no shards here.
        DataDamagedError: the manifest or a table is damaged, so that nothing more can be said.
    """
    folder = Path(folder).absolute()
    manifest = Manifest.read(folder, version)
    tables = Tables(folder, manifest)
    found = []
    for number in range(1, manifest.version + 1):
        try:
            Manifest.read(folder, number)
        except DataError as error:
            found.append(Damage(f"versions/{number:08d}.json", str(error)))
    for shard in range(len(tables.shards["rows"])):
        found += _damages(folder, tables, shard)
    return found


def _damages(folder: Path, tables: Tables, shard: int) -> list[Damage]:
    name, first, rows = shard_name(shard), int(tables.shard_starts[shard]), int(tables.shards["rows"][shard])
    begin, end = np.searchsorted(tables.blocks["shard"], [shard, shard + 1]).tolist()
    size = int(tables.shards["bytes"][shard])
    try:
        content = map_file(folder / name)
    except DataDamagedError:
        return [Damage(name, "missing", shard, None, first, rows)]
    found, frame, place = [], [], 0
    for block in range(begin, end):
        offset, length = int(tables.blocks["offset"][block]), int(tables.blocks["bytes"][block])
        frame.append(content[place:offset])
        place = offset + length
        if hash_of(content[offset:place]) != int(tables.blocks["hash"][block]):
            what = f"block {block - begin} is {'cut off' if place > len(content) else 'damaged'}"
            lost = int(tables.blocks["rows"][block])
            found.append(Damage(name, what, shard, block, int(tables.block_starts[block]), lost))
    if len(content) != size:
        found.append(Damage(name, f"{len(content):,} bytes instead of {size:,}: none of it is read", shard))
    elif hash_of(*frame, content[place:]) != int(tables.shards["frame"][shard]):
        found.append(Damage(name, "damaged before or behind its blocks, which are whole", shard))
    return found


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
