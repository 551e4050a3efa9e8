"""Reading samples out of shards: any rows at once, as columns, without an object for each sample on the way."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from aetheria.data.blocks import Blocks
from aetheria.data.elsewhere import Access, open_data
from aetheria.data.fields import RefusedValue, Rows
from aetheria.data.manifest import pack_ids, shard_name, unpack_ids
from aetheria.data.ragged import Column, Part, gather, views
from aetheria.data.remote import is_url
from aetheria.data.schema import Schema
from aetheria.errors import DataDamagedError, DataError

__all__ = ["Shards"]


class Shards(Dataset[Any]):
    """The samples in a folder that `write_shards` has written, by their numbers in the order of writing.

    It is a map-style dataset: a DataLoader reads it like any other. `batch` gives whole batches without collating.

    Args:
        folder: of the data, or its URL, as fsspec takes it: "https://...", "s3://...". What lies elsewhere is fetched
            block by block, and kept in a cache.
        version: of the manifest; None takes the newest there is now. It stays that one, whatever is appended.
        cache: folder of the cache, which several data and processes may share. None is `~/.cache/aetheria/data` where
            the data lie elsewhere. For a folder on this machine None is none; a cache keeps its compressed blocks
            unpacked.
        cache_bytes: what all blocks in the cache may take; None for three quarters of what is free on its disk.
        keep: blocks that are held and mapped at most; see `keep`.
        retries: how often a request is made again that fails with what may pass.
        timeout: seconds for each request, for each 8 MB of it.
        storage_options: what fsspec takes for this kind of URL: keys, headers, an endpoint.

    Attributes:
        folder: of the data, or the URL without secrets.
        manifest: what the data are.
        schema: of a sample.

    Raises:
        DataError: there are no shards here, they cannot be reached, or the cache is too small.
        DataDamagedError: manifest or tables are damaged, or a shard is missing; the message names it.
        MissingDependencyError: a package is missing to reach them.
    """

    def __init__(
        self,
        folder: Path | str,
        version: int | None = None,
        *,
        cache: Path | str | None = None,
        cache_bytes: int | None = None,
        keep: int | None = None,
        retries: int = 5,
        timeout: float = 30.0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        access = Access(
            None if cache is None else Path(cache).absolute(), cache_bytes, retries, timeout, storage_options
        )
        self._open(folder if is_url(folder) else Path(folder).absolute(), version, access, keep)

    def _open(
        self, source: Path | str, version: int | None, access: Access, keep: int | None, digest: str | None = None
    ) -> None:
        opened = open_data(source, version, access, digest)
        self._source, self._access, self._kept = source, access, keep
        self.folder, self.manifest, self._tables = opened.folder, opened.manifest, opened.tables
        self.schema = Schema.from_state(self.manifest.schema)
        if isinstance(self.folder, Path):
            self._check_names()
        self._blocks = Blocks(opened.place, self._tables, self.schema, frozenset(self.quarantined), keep)

    def __getstate__(self) -> dict[str, Any]:
        """Sends a worker where the data are; it maps or fetches them itself."""
        return {
            "source": self._source, "version": self.manifest.version, "access": self._access, "keep": self._kept,
            "digest": self.manifest.digest,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(**state)

    def _check_names(self) -> None:
        numbers = set(range(len(self._tables.shards["rows"]))) - self._quarantined_shards()
        wanted = {Path(shard_name(number)).name for number in numbers}
        if wanted and (missing := sorted(wanted - set(_listed(Path(self.folder) / "shards")))):
            raise DataDamagedError(
                f"{self.folder}: {len(missing)} of {len(wanted)} shards are missing: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}. Put them back from a copy, or write the data anew."
            )

    def _quarantined_shards(self) -> set[int]:
        """Returns the numbers of the shards that are in quarantine as a whole: their files may be missing."""
        of_blocks = self._tables.blocks["shard"]
        shards, counts = np.unique(of_blocks[list(self.quarantined)], return_counts=True)
        held = np.searchsorted(of_blocks, shards, side="right") - np.searchsorted(of_blocks, shards)
        return set(shards[counts == held].tolist())

    def __len__(self) -> int:
        return int(self._tables.block_starts[-1])

    @property
    def block_rows(self) -> NDArray[np.int32]:
        """Samples in each block, of shape [blocks]: what a `BlockOrder` is made of."""
        return self._tables.blocks["rows"]

    def blocks_of(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the numbers of the blocks in which some samples lie, int64 of shape [n].

        Raises:
            DataError: there is no such sample.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            wrong = wanted[(wanted < 0) | (wanted >= len(self))][0]
            raise DataError(f"{self.folder} holds samples 0 to {len(self) - 1}; {wrong} was asked for.")
        return np.searchsorted(self._tables.block_starts, wanted, side="right") - 1

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Says which blocks will be needed, the first one first: a hint, which neither waits nor raises.

        What was said last is fetched first. If a block cannot be had, whoever reads it is told.
        """
        self._blocks.prefetch(blocks)

    def keep(self, blocks: int) -> None:
        """Sets how many blocks are held and mapped at most; those that were used last stay.

        As many as are in use at a time are enough. The others leave the memory of this process.

        Raises:
            DataError: there is not enough room in the cache for as many.
        """
        self._blocks.keep(blocks)
        self._kept = blocks

    def of_version(self, version: int | None) -> Shards:
        """Returns another version of the same data, got at in the same way; None for the newest.

        Raises:
            DataError: there is no such version.
        """
        other = Shards.__new__(Shards)
        other._open(self._source, version, self._access, self._kept)
        return other

    @cached_property
    def quarantined(self) -> tuple[int, ...]:
        """Numbers of the blocks that are not to be read."""
        firsts = np.cumsum([0, *(part.blocks for part in self.manifest.parts)])
        return tuple(int(firsts[entry["part"]]) + entry["block"] for entry in self.manifest.quarantined)

    def blocks_outside(self, shards: Collection[int]) -> list[int]:
        """Returns the numbers of all blocks that are not in some shards.

        Raises:
            DataError: there is no such shard.
        """
        if unknown := sorted(set(shards) - set(range(len(self._tables.shards["rows"])))):
            raise DataError(
                f"{self.folder} has the shards 0 to {len(self._tables.shards['rows']) - 1}; {unknown[0]} was asked for."
            )
        return np.flatnonzero(~np.isin(self._tables.blocks["shard"], list(shards))).tolist()

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
        blocks, parts = self.located(wanted)
        return {path: gather([columns[path] for columns in blocks], parts, len(wanted)) for path in paths}

    def located(self, rows: NDArray[np.int64]) -> tuple[list[dict[str, Column]], list[Part]]:
        """Returns the columns of the blocks in which some rows lie, at least one, and what is taken from each.

        Raises:
            DataError: as `columns`.
        """
        blocks = self.blocks_of(rows)
        places = np.argsort(blocks, kind="stable")
        blocks = blocks[places]
        within = rows[places] - self._tables.block_starts[blocks]
        cuts = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(rows)]
        parts = [Part(within[begin:end], places[begin:end]) for begin, end in pairwise(cuts)]
        return self._blocks.several(blocks[cuts[:-1]].tolist()), parts

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
        blocks, parts = self.located(rows) if len(rows) else ([], [])
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
                raise self.undecodable(int(rows[error.index]), path, error) from error
        return leaves

    def undecodable(self, row: int, path: str, error: RefusedValue) -> DataError:
        """Returns what to raise where a field of a sample cannot be decoded."""
        identity = int(self.sample_ids([row])[0])
        return DataError(f"{self.folder}: sample {row} (id {identity}), field {path!r}: {error}.")

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


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
