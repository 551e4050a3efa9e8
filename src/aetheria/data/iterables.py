"""What can only be iterated: positions found again by skipping forward, or by the state that an iterable keeps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from aetheria.core import MicroBatch
from aetheria.data.cursor import Cursor
from aetheria.data.order import mix
from aetheria.data.randomness import GeneratorStates, GeneratorStream, isolated_generators, kept_generators
from aetheria.data.sources import WORKER_STREAM, BatchSource, batch_size_of, length_of
from aetheria.data.workers import begin
from aetheria.errors import DataError

__all__ = ["IterableSource", "StatefulSource", "WatchedIterable"]

ITERABLE_STREAM = 2  # part of keys, so that no two uses share a stream


class IterableSource(BatchSource):
    """An iterable without a state of its own: what lies before a position is read again and thrown away.

    What it draws while this process reads it comes from a stream of its own, keyed by (seed, epoch). A generator gives
    its batches once: its epochs follow one another, and so does what it draws.

    Args:
        batches: what is iterated, once an epoch.
        seed: of the run.
        limit: batches in an epoch at most; None leaves that to the iterable.
        borrows: whether reading moves this process's generators, which are then lent and taken back; worker processes
            have their own.
    """

    def __init__(self, batches: Iterable[Any], seed: int, limit: int | None, borrows: bool = True) -> None:
        self.batches = batches
        self.seed = seed
        self.limit = limit
        self.borrows = borrows
        length = length_of(batches)
        self.batches_per_epoch = min((count for count in (length, limit) if count is not None), default=None)
        self.warning = (
            f"{type(getattr(batches, 'dataset', batches)).__name__} is iterable and has no state_dict: resuming in the "
            "middle of an epoch reads again, and throws away, everything before that point. Give it state_dict and "
            "load_state_dict, or use a map-style dataset."
        )
        self._stream = self._fresh_stream(0)
        self._taken = 0
        self._cut = False  # whether the last epoch was ended by the limit

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        skip = cursor.batches
        if _gives_once(self.batches):
            skip += cursor.epoch * (self.limit or 0) - self._taken
        else:
            self._stream = self._fresh_stream(cursor.epoch)
        if skip < 0:
            raise DataError(
                f"a {type(self.batches).__name__} gives its batches once, and is asked for them a second time. Use a "
                "list, or an object whose __iter__ begins anew."
            )
        self._tell(cursor.epoch)
        return self._read(cursor, skip)

    def _fresh_stream(self, epoch: int) -> GeneratorStream:
        return GeneratorStream(mix(self.seed, ITERABLE_STREAM, epoch))

    def _tell(self, epoch: int) -> None:
        for part in (self.batches, getattr(self.batches, "dataset", None)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def _read(self, cursor: Cursor, skip: int = 0) -> Iterator[MicroBatch]:
        left = None if self.limit is None else self.limit - cursor.batches
        self._cut = False
        with isolated_generators(mix(self.seed, WORKER_STREAM, cursor.epoch)):  # a DataLoader draws its workers' seed
            batches = begin(self.batches)
        end = object()
        for number in itertools.count(-skip):
            if number == left:
                self._cut = True
                return
            with self._stream.borrowed() if self.borrows else contextlib.nullcontext():
                data = next(batches, end)
            if data is end:
                return
            self._taken += 1
            if number >= 0:
                yield MicroBatch(data, batch_size_of(data))


class StatefulSource(IterableSource):
    """An iterable with a state: it finds its place by itself, and carries from one epoch into the next what it likes.

    Args:
        batches: what is iterated, once an epoch.
        stateful: whichever of the loader and its dataset has `state_dict` and `load_state_dict`.
        seed: of the run.
        limit: batches in an epoch at most; the next epoch goes on behind them. None leaves that to the iterable.
        borrows: as for an `IterableSource`.
    """

    looks_ahead = False  # the state must be that of what has been consumed

    def __init__(
        self, batches: Iterable[Any], stateful: Any, seed: int, limit: int | None, borrows: bool = True
    ) -> None:
        super().__init__(batches, seed, limit, borrows)
        self.stateful = stateful
        self.warning = ""
        self._begun = False
        self._resumed: dict[str, Any] | None = None

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        resumed, self._resumed = self._resumed, None
        if resumed is None and self._cut:
            resumed = self.state_dict()  # goes on behind the limit, whether or not it is interrupted there
        self._begun = True
        self._stream = self._fresh_stream(cursor.epoch)
        if not cursor.batches:
            if resumed is not None:  # as the epoch before has left it
                self.stateful.load_state_dict(resumed["state"])
            self._tell(cursor.epoch)
            return self._read_from_the_beginning(cursor)
        self._tell(cursor.epoch)
        if resumed is None:  # not this loader's state: that of another one, or none
            return self._read(cursor, skip=cursor.batches)
        self.stateful.load_state_dict(resumed["state"])
        self._stream.states = GeneratorStates.from_plain(resumed["generators"])
        if not resumed["ended"]:
            return self._read(cursor)
        self.stateful.ended = True
        return iter(())

    def _read_from_the_beginning(self, cursor: Cursor) -> Iterator[MicroBatch]:
        batches = self._read(cursor)
        if (first := next(batches, None)) is not None:
            yield first
        else:  # its state was that of an end, which it has passed by now
            batches = self._read(cursor)
        yield from batches

    def state_dict(self) -> dict[str, Any]:
        if self._resumed is not None or not self._begun:  # nobody has read since
            return self._resumed or {}
        with kept_generators():
            state = self.stateful.state_dict()
        ended = isinstance(self.stateful, WatchedIterable) and self.stateful.ended
        return {"state": state, "generators": self._stream.states.to_plain(), "ended": ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state or None


class WatchedIterable(IterableDataset[Any]):
    """A dataset with a state, watched for its end.

    From where it stands that cannot be told: to find out that the last batch is a short one, a DataLoader reads on to
    the end, and many a dataset is then back at its beginning before that batch has been handed out.

    Args:
        dataset: the user's iterable dataset, with `state_dict` and `load_state_dict`.

    Attributes:
        ended: whether it has been read to its end, and not begun again.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.ended = False
        self.state_dict, self.load_state_dict = dataset.state_dict, dataset.load_state_dict
        if callable(set_epoch := getattr(dataset, "set_epoch", None)):
            self.set_epoch = set_epoch

    def __iter__(self) -> Iterator[Any]:
        self.ended = False
        yield from self.dataset
        self.ended = True

    def __len__(self) -> int:
        return len(self.dataset)


def _gives_once(batches: Any) -> bool:
    """Returns whether this is a generator, or another iterator of Python's own: iterating it again goes on with it."""
    return isinstance(batches, Iterator) and type(batches).__module__ in ("builtins", "itertools")
