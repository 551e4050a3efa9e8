"""Reading map-style datasets so that neither workers nor interruptions can be seen in what is read."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset, get_worker_info

from aetheria.data.order import KeyedOrder, mix
from aetheria.data.randomness import GeneratorStates, GeneratorStream, seed_generators

__all__ = ["KeyedBatchSampler", "KeyedDataset", "ReplayedSampler", "WorkerStart", "draws_nothing"]

Key = tuple[int, Any]  # (epoch, sample id); the id is an int unless the user's own sampler says otherwise
SAMPLER_STREAM = 1  # part of a sampler's key, so that it shares no stream with anything else


class KeyedDataset(Dataset[Any]):
    """A dataset whose samples draw from generators seeded by (seed, epoch, sample id).

    So an augmentation that uses the global generators gives the same sample whichever worker reads it, in whichever
    batch, before or after an interruption. The training process's own generators are not moved.

    Args:
        dataset: the user's map-style dataset.
        seed: of the run.
        seeded: False reads the dataset as it is, without seeding.
    """

    def __init__(self, dataset: Any, seed: int, seeded: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self.seeded = seeded

    def __getitem__(self, key: Key) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        if not self.seeded:
            ids = [identity for _, identity in keys]
            if callable(batched := getattr(self.dataset, "__getitems__", None)):
                return batched(ids)  # type: ignore[no-any-return]
            return [self.dataset[identity] for identity in ids]
        before = GeneratorStates.capture() if get_worker_info() is None else None
        try:
            return [self._read(epoch, identity) for epoch, identity in keys]
        finally:
            if before is not None:
                before.restore()

    def _read(self, epoch: int, identity: Any) -> Any:
        seed_generators(mix(self.seed, epoch, _as_integer(identity)))
        return self.dataset[identity]


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

    It is a DataLoader's `batch_sampler`, or its `sampler` when each item of the dataset is a batch already. `epoch`
    and `start` are read whenever an iteration begins, so that a loader with persistent workers can be reused.

    Args:
        order: the order to follow.
        batch_size: samples in a batch; None when each item is a batch: single keys are then yielded.
        stop: position at which every epoch ends.

    Attributes:
        epoch: which epoch's order to follow.
        start: position in the epoch at which to begin.
        issued: the ids of the batches that were handed out and not taken yet, oldest first: int64 arrays.
    """

    def __init__(self, order: KeyedOrder, batch_size: int | None, stop: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.stop = stop
        self.epoch = 0
        self.start = 0
        self.issued: deque[NDArray[np.int64]] = deque()

    def __iter__(self) -> Iterator[list[Key] | Key]:
        self.issued = deque()
        return self._batches(self.epoch, self.start, self.issued)

    def _batches(self, epoch: int, start: int, issued: deque[NDArray[np.int64]]) -> Iterator[list[Key] | Key]:
        size = self.batch_size or 1
        for first in range(start, self.stop, size):
            ids = self.order.ids(epoch, first, min(first + size, self.stop))
            issued.append(ids)
            keys = [(epoch, identity) for identity in ids.tolist()]
            yield keys[0] if self.batch_size is None else keys

    def __len__(self) -> int:
        return math.ceil(self.stop / (self.batch_size or 1))


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
    """

    def __init__(
        self, batches: Iterable[Any], told: Sequence[Any], seed: int, limit: int | None, batched: bool = True
    ) -> None:
        self.batches = batches
        self.told = told
        self.seed = seed
        self.limit = limit
        self.batched = batched
        self.epoch = 0
        self.start = 0
        self.issued: deque[NDArray[Any]] = deque()
        self._finished_epochs = 0

    def __iter__(self) -> Iterator[Any]:
        while self._finished_epochs < self.epoch:
            for _ in self._draw(self._finished_epochs):
                pass
            self._finished_epochs += 1
        self.issued = deque()
        return self._keys(self.epoch, self.start, self.issued)

    def _keys(self, epoch: int, start: int, issued: deque[NDArray[Any]]) -> Iterator[Any]:
        for indices in itertools.islice(self._draw(epoch), start, None):
            issued.append(np.asarray(indices if self.batched else [indices]))
            yield [(epoch, index) for index in indices] if self.batched else (epoch, indices)
        self._finished_epochs = max(self._finished_epochs, epoch + 1)

    def _draw(self, epoch: int) -> Iterator[Any]:
        stream = GeneratorStream(mix(self.seed, SAMPLER_STREAM, epoch))
        for part in self.told:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        with stream.borrowed():
            indices = itertools.islice(self.batches, self.limit)
        while True:
            with stream.borrowed():  # many at a time: lending the generators costs more than drawing does
                drawn = list(itertools.islice(indices, 256))
            if not drawn:
                return
            yield from drawn

    def __len__(self) -> int:
        length = len(self.batches)  # type: ignore[arg-type]
        return length if self.limit is None else min(length, self.limit)


class WorkerStart:
    """What a worker process does first: leaves Ctrl-C and the first SIGTERM to the training process.

    Both reach the whole process group. A worker that died of them would tear down the step that the training process
    wants to finish before it saves. A second SIGTERM, which is how a stuck worker is ended, works as ever.
    """

    def __init__(self, users_function: Callable[[int], None] | None) -> None:
        self.users_function = users_function

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        if self.users_function is not None:
            self.users_function(worker)
