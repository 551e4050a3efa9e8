"""What can be trained on: one class for each way of finding a position again. Iterables: see `iterables`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from aetheria.core import MicroBatch
from aetheria.data.cursor import Cursor
from aetheria.data.keyed import KeyedBatchSampler, ReplayedSampler
from aetheria.data.order import mix
from aetheria.data.randomness import isolated_generators
from aetheria.data.workers import begin
from aetheria.errors import DataError

__all__ = ["BatchSource", "DatasetSource", "FixedSource", "SequenceSource", "batch_size_of", "length_of"]

WORKER_STREAM, SEQUENCE_STREAM = 3, 9  # parts of keys, so that no two uses share a stream


class BatchSource(ABC):
    """A loader as the loop sees it: micro-batches from any cursor.

    Attributes:
        batches_per_epoch: micro-batches in an epoch, or None where nobody knows.
        looks_ahead: whether micro-batches may be fetched before the previous ones are consumed.
        warning: what the user should know about resuming this loader; empty when there is nothing.
    """

    batches_per_epoch: int | None = None
    looks_ahead: bool = True
    warning: str = ""

    @abstractmethod
    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        """Yields the rest of the cursor's epoch, beginning right after what the cursor has consumed."""

    def continued(self, cursor: Cursor, ranks: int) -> None:
        """Puts a cursor right that another number of ranks has left behind.

        Args:
            cursor: is changed: `batches` becomes what it would be here.
            ranks: that have trained until then.

        Raises:
            DataError: between their last micro-batch and the next there is no place where these could begin.
        """
        if ranks != 1:
            raise DataError(
                f"the snapshot is of {ranks} ranks, in the middle of an epoch of data that are not addressed by "
                "position. Continue it with as many ranks, or from the end of an epoch."
            )

    def follow(self, cursor: Cursor) -> None:  # noqa: B027 - a hook
        """Is told, before anything else, which cursor will move on while it is read."""

    def is_over(self, cursor: Cursor) -> bool:
        """Returns whether a cursor has consumed all of its epoch."""
        return cursor.batches == self.batches_per_epoch

    def notices(self) -> list[str]:
        """Returns what is to be told of the data since it was asked last: samples that cannot be read."""
        return []

    def close(self) -> None:  # noqa: B027 - a hook
        """Ends worker processes that outlive an epoch, here and now; left to the garbage collector they linger."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what the cursor alone does not tell; empty for everything that is addressed by position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a hook
        """Takes back what `state_dict` returned, before `iterate`."""


class DatasetSource(BatchSource):
    """A map-style dataset behind a DataLoader whose sampler can begin at any position.

    Args:
        loader: the user's DataLoader, rebuilt around the sampler.
        sampler: a `KeyedBatchSampler` (any position in constant time) or a `ReplayedSampler`.
        seed: of the run.
        batched: False where each item of the dataset is a batch already.
    """

    def __init__(
        self, loader: DataLoader[Any], sampler: KeyedBatchSampler | ReplayedSampler, seed: int, batched: bool = True
    ) -> None:
        self.loader = loader
        self.sampler = sampler
        self.seed = seed
        self.batched = batched
        self.batches_per_epoch = length_of(sampler)
        if isinstance(sampler, ReplayedSampler):
            self.batches_per_epoch = length_of(sampler) or sampler.limit
            self.warning = (
                f"your own {type(sampler.told[-1]).__name__} is kept: resuming replays its indices from the first "
                "epoch (no data is loaded), and its order depends on the batch size and on the number of ranks."
            )

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        by_samples = self.batched and isinstance(self.sampler, KeyedBatchSampler)
        self.sampler.epoch = cursor.epoch
        self.sampler.start = cursor.samples if by_samples else cursor.batches
        # Iterating a DataLoader draws a seed for its workers; from a generator of its own, that moves nobody else's.
        self.loader.generator.manual_seed(mix(self.seed, WORKER_STREAM, cursor.epoch))
        batches = begin(self.loader)
        issued = self.sampler.issued
        for data in batches:
            ids, together = issued.popleft()
            if self.batched:
                yield MicroBatch(data, len(ids), ids, len(together), together)
            else:
                yield MicroBatch(data, batch_size_of(data))

    def continued(self, cursor: Cursor, ranks: int) -> None:
        if isinstance(self.sampler, KeyedBatchSampler) and self.batched:
            left = -(-(self.sampler.stop - cursor.samples) // self.sampler.row)
            cursor.batches = len(self.sampler) - left
        else:
            super().continued(cursor, ranks)

    def close(self) -> None:
        self.loader._iterator = None  # a DataLoader with persistent workers keeps them for as long as it keeps this


class SequenceSource(BatchSource):
    """Batches that can be asked for by number, such as a list of them, in the order in which they stand.

    Args:
        batches: the sequence.
        seed: of the run.
        seeded: whether a batch is made when it is asked for, and so may draw: from generators seeded for it, then.
        limit: how many of them make an epoch; None takes them all.
    """

    def __init__(self, batches: Sequence[Any], seed: int, seeded: bool, limit: int | None = None) -> None:
        self.batches = batches
        self.seed = seed
        self.seeded = seeded
        self.batches_per_epoch = len(batches) if limit is None else min(limit, len(batches))

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        epoch = cursor.epoch  # the cursor moves on while this is read
        for number in range(cursor.batches, self.batches_per_epoch or 0):
            if self.seeded:
                with isolated_generators(mix(self.seed, SEQUENCE_STREAM, epoch, number)):
                    data = self.batches[number]
            else:
                data = self.batches[number]
            yield MicroBatch(data, batch_size_of(data))


class FixedSource(BatchSource):
    """The same few micro-batches in every epoch, held in memory (`overfit_batches`).

    Args:
        source: where they come from.
        count: how many.
    """

    def __init__(self, source: BatchSource, count: int) -> None:
        self.batches = list(itertools.islice(source.iterate(Cursor()), count))
        self.batches_per_epoch = len(self.batches)

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        for batch in self.batches[cursor.batches :]:
            yield MicroBatch(batch.data, batch.size, batch.ids, batch.total, batch.all_ids)


def length_of(batches: Any) -> int | None:
    """Returns the length of something, or None where it does not say."""
    try:
        return len(batches)
    except TypeError:
        return None


def batch_size_of(batch: Any) -> int:
    """Returns the number of samples in a batch: the first dimension of the first tensor or array found in it.

    Scalars do not count, unless there is nothing else: then the batch is one sample. A packed sequence says its own
    batch size.

    Raises:
        DataError: there is none.
    """
    first = batch[0] if type(batch) in (list, tuple) and batch else batch
    if type(first) is torch.Tensor and first.ndim:  # nearly every batch there is, without a walk
        return len(first)
    stack, scalars = [batch], False
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor | np.ndarray):
            if item.ndim:
                return len(item)
            scalars = True
        elif isinstance(item, PackedSequence):
            return int(item.batch_sizes[0])
        elif isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))
        elif hasattr(item, "__dataclass_fields__"):
            stack.extend(getattr(item, name) for name in reversed(item.__dataclass_fields__))
        elif hasattr(item, "__len__") and not isinstance(item, str | bytes):
            return len(item)
    if scalars:
        return 1
    raise DataError(
        f"cannot tell how many samples a batch of type {type(batch).__name__} holds: there is no tensor in it. "
        "Collate it into tensors whose first dimension is the batch."
    )
