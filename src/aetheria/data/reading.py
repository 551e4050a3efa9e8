"""Reading batches out of shards: several at once, from one stream of data or from several, whatever is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import default_collate

from aetheria.data.fields import RefusedValue, Rows
from aetheria.data.order import mix
from aetheria.data.ragged import Part, gather, views
from aetheria.data.randomness import kept_generators, seed_generators
from aetheria.data.shards import Shards
from aetheria.errors import DataDamagedError, DataError

__all__ = ["Lost", "Read", "Reader", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """Batches that are read at once.

    Attributes:
        epoch: in which they are.
        rows: samples of all of them, by their numbers in their streams; int64 of shape [n].
        streams: number of the stream of each, of shape [n]; None where there is one.
        ids: of the samples, int64 of shape [n].
        cuts: where each batch begins in `rows`, and at last where the last one ends.
    """

    epoch: int
    rows: NDArray[np.int64]
    streams: NDArray[Any] | None
    ids: NDArray[np.int64]
    cuts: Sequence[int]


@dataclass(frozen=True, slots=True)
class Lost:
    """Samples that could not be read.

    Attributes:
        what: why, naming file and block, or the sample.
        ids: of the samples.
    """

    what: str
    ids: tuple[int, ...]


@dataclass(slots=True)
class Read:
    """A batch as it was read.

    Attributes:
        leaves: the fields of its samples, by their paths, bytes and strings where they lie; None where not one sample
            could be read, or it is finished.
        ids: of its samples, int64 of shape [n].
        kept: which samples of the batch these are, of shape [n]; None for all of them.
        lost: those that are missing, and why.
        data: what a finished batch is; None where not one sample could be read.
    """

    leaves: dict[str, Any] | None
    ids: NDArray[np.int64]
    kept: NDArray[np.int64] | None = None
    lost: list[Lost] = field(default_factory=list)
    data: Any = None


class Reader:
    """Reads runs of batches. It can be sent to another process; `read` may be called by several threads.

    Args:
        shards: of each stream; all have the same fields.
        seed: of the run: what is drawn while a sample is transformed depends on it, on the epoch, and on the sample.
        transform: is given each sample, and returns what it becomes.
        collate: makes a batch of a list of samples; None puts batches together from columns, without making samples,
            or, behind a `transform`, takes torch's `default_collate`.
        batch_transform: is given each batch, and returns what it becomes.
        damaged: what is done where samples are damaged or cannot be decoded: "raise", or "quarantine": they are left
            out, counted, and named.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        *,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        damaged: Literal["raise", "quarantine"] = "raise",
    ) -> None:
        self.shards = shards
        self.seed = seed
        self.transform = transform
        self.collate = default_collate if collate is None and transform is not None else collate
        self.batch_transform = batch_transform
        self.damaged = damaged

    def read(self, run: Run) -> list[Read]:
        """Returns the batches of a run, as fields.

        Raises:
            DataDamagedError: a block that is needed is damaged; the message names it.
            DataError: a sample cannot be decoded; the message has its id.
        """
        try:
            leaves = self._leaves(run.rows, run.streams)
        except DataError as error:
            if self.damaged == "raise" or not _is_of_the_data(error):
                raise
            return [self._read_without_damaged(run, begin, end) for begin, end in pairwise(run.cuts)]
        return [
            Read({path: _sliced(values, begin, end) for path, values in leaves.items()}, run.ids[begin:end])
            for begin, end in pairwise(run.cuts)
        ]

    def finish(self, read: Read, epoch: int) -> None:
        """Makes a batch of what was read: nested as the samples are, transformed, collated.

        What a transform draws depends on seed, epoch, and the sample (for one of batches: on its first and its last):
        the global generators are seeded for it, and are afterwards as they were.
        """
        if read.leaves is None:
            return
        leaves, read.leaves = read.leaves, None
        schema, ids = self.shards[0].schema, read.ids.tolist()
        for path, kind in schema.fields.items():
            if kind.copies_only:
                leaves[path] = kind.values(leaves[path])
        draws = self.transform is not None or self.batch_transform is not None
        with kept_generators() if draws else nullcontext():
            if self.collate is None:
                read.data = schema.nest(leaves)
            else:
                samples = []
                for index, identity in enumerate(ids):
                    sample = schema.nest({path: values[index] for path, values in leaves.items()})
                    if self.transform is not None:
                        seed_generators(mix(self.seed, epoch, identity))
                        sample = self.transform(sample)
                    samples.append(sample)
                if draws:
                    seed_generators(mix(self.seed, epoch, ids[0], ids[-1]))
                read.data = self.collate(samples)
            if self.batch_transform is not None:
                seed_generators(mix(self.seed, epoch, ids[0], ids[-1]))
                read.data = self.batch_transform(read.data)

    def ids(self, rows: NDArray[np.int64], streams: NDArray[Any] | None) -> NDArray[np.int64]:
        """Returns the stable ids of some samples, int64 of shape [n]."""
        if streams is None:
            return self.shards[0].sample_ids(rows)
        found = np.empty(len(rows), dtype=np.int64)
        for number, shards in enumerate(self.shards):
            if len(places := np.flatnonzero(streams == number)):
                found[places] = shards.sample_ids(rows[places])
        return found

    def prefetch(self, rows: NDArray[np.int64], streams: NDArray[Any] | None) -> None:
        """Says which samples will be read soon."""
        for number, shards in enumerate(self.shards):
            of_it = rows if streams is None else rows[streams == number]
            if len(of_it):
                shards.prefetch(np.unique(shards.blocks_of(of_it)).tolist())

    @property
    def by_samples(self) -> bool:
        """Whether batches are made of samples, one by one."""
        return self.collate is not None

    def _leaves(self, rows: NDArray[np.int64], streams: NDArray[Any] | None) -> dict[str, Any]:
        blocks, parts = self._located(rows, streams)
        leaves = {}
        for path, kind in self.shards[0].schema.fields.items():
            columns = [block[path] for block in blocks]
            found: Rows = (views if kind.takes_views else gather)(columns, parts, len(rows))
            if kind.copies_only:  # left to `finish`: made in a thread, objects of Python are slow to make and to free
                leaves[path] = found
                continue
            try:
                leaves[path] = kind.values(found) if self.by_samples else kind.batch(found)
            except RefusedValue as error:
                number = 0 if streams is None else int(streams[error.index])
                raise self.shards[number].undecodable(int(rows[error.index]), path, error) from error
        return leaves

    def _located(
        self, rows: NDArray[np.int64], streams: NDArray[Any] | None
    ) -> tuple[list[dict[str, Any]], list[Part]]:
        if streams is None:
            return self.shards[0].located(rows)
        blocks: list[dict[str, Any]] = []
        parts: list[Part] = []
        for number, shards in enumerate(self.shards):
            if len(places := np.flatnonzero(streams == number)):
                found, taken = shards.located(rows[places])
                blocks += found
                parts += [Part(part.rows, places[part.places]) for part in taken]
        return blocks, parts

    def _read_without_damaged(self, run: Run, begin: int, end: int) -> Read:
        """Returns a batch of what of it can be read: block by block, and then, if need be, sample by sample."""
        rows = run.rows[begin:end]
        streams = None if run.streams is None else run.streams[begin:end]
        kept = np.ones(len(rows), dtype=bool)
        lost: list[Lost] = []

        def try_those(places: NDArray[np.int64]) -> bool:
            try:
                self._leaves(rows[places], None if streams is None else streams[places])
            except DataError as error:
                if not _is_of_the_data(error):
                    raise
                if len(places) > 1 and not isinstance(error, DataDamagedError):
                    return False  # one of them cannot be decoded
                kept[places] = False
                lost.append(Lost(str(error), tuple(run.ids[begin:end][places].tolist())))
            return True

        for number, shards in enumerate(self.shards):
            of_it = np.arange(len(rows)) if streams is None else np.flatnonzero(streams == number)
            blocks = shards.blocks_of(rows[of_it])
            for block in np.unique(blocks):
                places = of_it[blocks == block]
                if not try_those(places):
                    for place in places:
                        try_those(np.array([place]))
        places = np.flatnonzero(kept)
        leaves = self._leaves(rows[places], None if streams is None else streams[places]) if len(places) else None
        return Read(leaves, run.ids[begin:end][places], places if lost else None, lost)


def _is_of_the_data(error: DataError) -> bool:
    """Returns whether it is the data that are at fault, and not the way to them, which may be better the next time."""
    return isinstance(error, DataDamagedError) or isinstance(error.__cause__, RefusedValue)


def _sliced(values: Any, begin: int, end: int) -> Any:
    if isinstance(values, dict):  # one field that is read as several
        return {name: part[begin:end] for name, part in values.items()}
    return values[begin:end]
