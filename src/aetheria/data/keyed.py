"""Reading map-style datasets so that neither workers nor interruptions can be seen in what is read."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, get_worker_info

from aetheria.data.order import KeyedOrder, mix
from aetheria.data.randomness import GeneratorStream, kept_generators, seed_generators
from aetheria.errors import DataError

__all__ = ["KeyedBatchSampler", "KeyedDataset", "ReplayedSampler", "draws_nothing"]

Key = tuple[int, Any]  # (epoch, sample id); the id is an int unless the user's own sampler says otherwise
SAMPLER_STREAM = 1  # part of a sampler's key, so that it shares no stream with anything else


class KeyedDataset(Dataset[Any]):
    """A dataset and its collate function, both drawing from generators that are seeded by what is read.

    So an augmentation that uses the global generators gives the same sample whichever worker reads it, in whichever
    batch, before or after an interruption; and a collate function that draws (to mask tokens, to mix images) gives the
    same batch. The training process's own generators are not moved.

    Without seeding the dataset is read as it is: the order stays exact, but what it draws comes from the training
    process, or from a worker seeded by (seed, epoch). A run that is left alone can then be repeated, one that is
    resumed in the middle of an epoch draws differently.

    Args:
        dataset: the user's map-style dataset.
        collate: what makes a batch of a list of samples, or converts a single item.
        seed: of the run.
        seed_samples: whether to seed by (seed, epoch, sample id) before each sample is read.
        seed_collate: whether to seed by (seed, epoch, first id, last id) before a batch is collated.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[Any], Any], seed: int, seed_samples: bool, seed_collate: bool
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.seed_samples = seed_samples
        self.seed_collate = seed_collate

    def __getitem__(self, keys: list[Key] | Key) -> Any:
        """Returns the batch of some keys; for a single key, the item, which is a batch already."""
        moves = self.seed_samples or self.seed_collate
        with kept_generators() if moves and get_worker_info() is None else contextlib.nullcontext():
            data = self._samples(keys) if isinstance(keys, list) else self.dataset[self._seeded_for(keys)]
            if self.seed_collate:
                (epoch, first), (_, last) = (keys[0], keys[-1]) if isinstance(keys, list) else (keys, keys)
                seed_generators(mix(self.seed, epoch, _as_integer(first), _as_integer(last)))
            return self.collate(data)

    def _samples(self, keys: list[Key]) -> Any:
        several = getattr(self.dataset, "__getitems__", None)  # where there is one, a DataLoader asks that
        if not callable(several):
            return [self.dataset[self._seeded_for(key)] for key in keys]
        if not self.seed_samples:
            return several([identity for _, identity in keys])
        return [several([self._seeded_for(key)])[0] for key in keys]

    def _seeded_for(self, key: Key) -> Any:
        """Seeds the generators for a sample, if they are to be, and returns its id."""
        epoch, identity = key
        if self.seed_samples:
            seed_generators(mix(self.seed, epoch, _as_integer(identity)))
        return identity


def _as_integer(identity: Any) -> int:
    try:
        return operator.index(identity)
    except TypeError:  # a dataset that is indexed by names
        return int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "little")


def draws_nothing(dataset: Any) -> bool:
    """Returns whether a dataset is known to use no randomness, so that seeding it would be wasted."""
    if type(dataset) is TensorDataset:
        return True
    if type(dataset) is Subset:
        return draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(draws_nothing(part) for part in dataset.datasets)
    if type(dataset) is StackDataset:
        parts = dataset.datasets.values() if isinstance(dataset.datasets, dict) else dataset.datasets
        return all(draws_nothing(part) for part in parts)
    return False


class KeyedBatchSampler:
    """Yields the keys of one batch after the other, from any position of any epoch.

    It is the `sampler` of a DataLoader over a `KeyedDataset`. `epoch` and `start` are read whenever an iteration
    begins, so that a loader with persistent workers can be reused.

    Args:
        order: the order to follow.
        batch_size: samples in a batch; None when each item is a batch: single keys are then yielded.
        stop: position at which every epoch ends.
        share: which rank's part of them, and of how many. The ranks' batches lie side by side in the order.

    Attributes:
        epoch: which epoch's order to follow.
        start: position in the epoch at which to begin, of all ranks together.
        issued: what was handed out and not taken yet, oldest first: the ids of the batch, and of those of all ranks.
    """

    def __init__(self, order: KeyedOrder, batch_size: int | None, stop: int, share: tuple[int, int] = (0, 1)) -> None:
        self.order = order
        self.batch_size = batch_size
        self.stop = stop
        self.share = share
        self.epoch = 0
        self.start = 0
        self.issued: deque[tuple[NDArray[np.int64], NDArray[np.int64]]] = deque()

    def __iter__(self) -> Iterator[list[Key] | Key]:
        self.issued = deque()
        return self._batches(self.epoch, self.start, self.issued)

    @property
    def row(self) -> int:
        """The samples in the batches that all ranks take side by side."""
        return (self.batch_size or 1) * self.share[1]

    def _batches(
        self, epoch: int, start: int, issued: deque[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> Iterator[list[Key] | Key]:
        rank, ranks = self.share
        for first in range(start, self.stop, self.row):
            together = self.order.ids(epoch, first, min(first + self.row, self.stop))
            ids = together
            if ranks > 1:  # as evenly as they go: a short row is shared by all, not taken by the first
                count = len(together)
                ids = together[count * rank // ranks : count * (rank + 1) // ranks]
            issued.append((ids, together))
            keys = [(epoch, identity) for identity in (ids if len(ids) else together[:1]).tolist()]
            yield keys[0] if self.batch_size is None else keys

    def __len__(self) -> int:
        return math.ceil(self.stop / self.row)


class ReplayedSampler:
    """A user's own sampler or batch sampler that can begin anywhere, by drawing its indices again.

    A sampler may remember anything from one epoch to the next, so it is replayed from the first epoch on. It draws
    from a stream of its own, never from the training's generators.

    Args:
        batches: what yields the indices: lists of them (a batch sampler), or single ones with `batched=False`.
        told: the objects whose `set_epoch`, where they have one, is called before an epoch.
        seed: of the run.
        limit: batches in an epoch at most; None leaves that to the sampler.
        batched: whether `batches` yields lists.
        shared: what a copy of the sampler must not copy: the dataset. With it every iteration is made by a fresh copy
            of the sampler, so that all of them are alike: for evaluation, which begins at the beginning every time.

    Raises:
        DataError: a sampler that is to be copied cannot be.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        told: Sequence[Any],
        seed: int,
        limit: int | None,
        batched: bool = True,
        shared: Any = None,
    ) -> None:
        self.batches = batches
        self.told = told
        self.seed = seed
        self.limit = limit
        self.batched = batched
        self.shared = shared
        self.epoch = 0
        self.start = 0
        self.issued: deque[tuple[NDArray[Any], NDArray[Any]]] = deque()
        self._finished_epochs = 0

    def __iter__(self) -> Iterator[Any]:
        while self._finished_epochs < self.epoch:
            for _ in self._draw(self._finished_epochs):
                pass
            self._finished_epochs += 1
        self.issued = deque()
        return self._keys(self.epoch, self.start, self.issued)

    def _keys(self, epoch: int, start: int, issued: deque[tuple[NDArray[Any], NDArray[Any]]]) -> Iterator[Any]:
        for drawn in itertools.islice(self._draw(epoch), start, None):
            indices = list(drawn) if self.batched else [drawn]
            ids = _as_ids(indices)
            issued.append((ids, ids))
            keys = [(epoch, index) for index in indices]
            yield keys if self.batched else keys[0]
        self._finished_epochs = max(self._finished_epochs, epoch + 1)

    def _draw(self, epoch: int) -> Iterator[Any]:
        stream = GeneratorStream(mix(self.seed, SAMPLER_STREAM, epoch))
        batches, told = self.batches, self.told
        if self.shared is not None:
            batches, told = self._copied()
        for part in told:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        with stream.borrowed():
            indices = itertools.islice(batches, self.limit)
        while True:
            with stream.borrowed():  # many at a time: lending the generators costs more than drawing does
                drawn = list(itertools.islice(indices, 256))
            if not drawn:
                return
            yield from drawn

    def _copied(self) -> tuple[Iterable[Any], Sequence[Any]]:
        try:
            return copy.deepcopy((self.batches, self.told), {id(self.shared): self.shared})
        except TypeError as error:
            raise DataError(
                f"the {type(self.told[-1]).__name__} of an evaluation loader cannot be copied ({error}), so it would "
                "give other batches the second time. Give it a __deepcopy__, or use one without such an attribute."
            ) from error

    def __len__(self) -> int:
        length = len(self.batches)  # type: ignore[arg-type]
        return length if self.limit is None else min(length, self.limit)


def _as_ids(indices: list[Any]) -> NDArray[Any]:
    """Returns the ids of a batch, of shape [batch]: int64 where they are integers, else the objects that they are."""
    try:
        return np.asarray([operator.index(index) for index in indices], dtype=np.int64)
    except TypeError:
        return np.fromiter(indices, dtype=object, count=len(indices))
