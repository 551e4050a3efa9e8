"""What can be trained on: one class for each way of finding a position again."""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from aetheria.core import MicroBatch
from aetheria.data.cursor import Cursor
from aetheria.data.keyed import KeyedBatchSampler, ReplayedSampler
from aetheria.data.order import mix
from aetheria.data.randomness import GeneratorStates, GeneratorStream
from aetheria.errors import DataError

__all__ = ["BatchSource", "DatasetSource", "FixedSource", "IterableSource", "SequenceSource", "batch_size_of"]

ITERABLE_STREAM, WORKER_STREAM = 2, 3  # parts of keys, so that no two uses share a stream


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
        self.batches_per_epoch = _length_of(sampler)
        if isinstance(sampler, ReplayedSampler):
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
        batches = iter(self.loader)
        issued = self.sampler.issued
        for data in batches:
            ids = issued.popleft()
            yield MicroBatch(data, len(ids), ids) if self.batched else MicroBatch(data, batch_size_of(data))


class SequenceSource(BatchSource):
    """Batches that can be asked for by number, such as a list of them, in the order in which they stand.

    Args:
        batches: the sequence.
        limit: how many of them make an epoch; None takes them all.
    """

    def __init__(self, batches: Sequence[Any], limit: int | None = None) -> None:
        self.batches = batches
        self.batches_per_epoch = len(batches) if limit is None else min(limit, len(batches))

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        batches = self.batches
        for number in range(cursor.batches, self.batches_per_epoch or 0):
            data = batches[number]
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
            yield MicroBatch(batch.data, batch.size, batch.ids)


class IterableSource(BatchSource):
    """An iterable: resumed through its own `state_dict` where it has one, skipped forward where it has none.

    Args:
        batches: what is iterated, once an epoch.
        seed: of the run.
        limit: batches in an epoch at most; None leaves that to the iterable.
        stateful: whichever of the loader and its dataset has `state_dict` and `load_state_dict`, or None.
        reads_here: whether this process does the reading; worker processes have generators of their own.
    """

    def __init__(
        self, batches: Iterable[Any], seed: int, limit: int | None, stateful: Any = None, reads_here: bool = True
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.limit = limit
        self.stateful = stateful
        self.reads_here = reads_here
        self.looks_ahead = stateful is None  # its state must be that of what has been consumed
        length = _length_of(batches)
        self.batches_per_epoch = min((count for count in (length, limit) if count is not None), default=None)
        self._stream = GeneratorStream(mix(seed, ITERABLE_STREAM, 0))
        self._resumed: dict[str, Any] | None = None
        if stateful is None:
            dataset = type(getattr(batches, "dataset", batches)).__name__
            self.warning = (
                f"{dataset} is iterable and has no state_dict: resuming in the middle of an epoch reads again, and "
                "throws away, everything before that point. Give it state_dict and load_state_dict, or use a "
                "map-style dataset."
            )

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        skip = cursor.batches
        self._stream = GeneratorStream(mix(self.seed, ITERABLE_STREAM, cursor.epoch))
        if self._resumed is not None:
            self.stateful.load_state_dict(self._resumed["state"])
            self._stream.states = GeneratorStates.from_plain(self._resumed["generators"])
            self._resumed, skip = None, 0
        for part in (self.batches, getattr(self.batches, "dataset", None)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(cursor.epoch)
        remaining = None if self.limit is None else self.limit - cursor.batches
        return itertools.islice(self._read(skip), remaining)

    def _read(self, skip: int) -> Iterator[MicroBatch]:
        with self._stream.borrowed():  # a DataLoader draws its workers' seed here
            batches = iter(self.batches)
        end = object()
        while True:
            with self._stream.borrowed() if self.reads_here else contextlib.nullcontext():
                data = next(batches, end)
            if data is end:
                return
            if skip:
                skip -= 1
            else:
                yield MicroBatch(data, batch_size_of(data))

    def state_dict(self) -> dict[str, Any]:
        if self.stateful is None:
            return {}
        return {"state": self.stateful.state_dict(), "generators": self._stream.states.to_plain()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state or None


def _length_of(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def batch_size_of(batch: Any) -> int:
    """Returns the number of samples in a batch: the first dimension of the first tensor or array found in it.

    Raises:
        DataError: there is none.
    """
    stack = [batch]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor | np.ndarray):
            return int(item.shape[0]) if item.ndim else 1
        if isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))
        elif hasattr(item, "__dataclass_fields__"):
            stack.extend(getattr(item, name) for name in reversed(item.__dataclass_fields__))
        elif hasattr(item, "__len__") and not isinstance(item, str | bytes):
            return len(item)
    raise DataError(
        f"cannot tell how many samples a batch of type {type(batch).__name__} holds: there is no tensor in it. "
        "Collate it into tensors whose first dimension is the batch."
    )
