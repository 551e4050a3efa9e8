"""Streams of samples out of shards: larger than memory, shuffled, from any position, on any number of ranks.

    loader = DataLoader(StreamingDataset("data/train", batch_size=64), batch_size=None)

gives batches. What comes is a function of seed, epoch and position: neither the number of threads, nor that of worker
processes or ranks changes it, and continuing anywhere reads nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from aetheria.data.ahead import Ahead, Delivery, Threads
from aetheria.data.reading import Reader
from aetheria.data.streams import Source, Streams
from aetheria.errors import DataError

__all__ = ["StreamingDataset"]

_HORIZON = 64  # global batches


class StreamingDataset(IterableDataset[Any]):
    """Samples, or batches of them, out of shards that `write_shards` or `aetheria data prepare` has written.

    Args:
        source: a folder of shards, its URL, or several by the names of their streams, which are then mixed.
        batch_size: samples in a batch of one rank; None yields samples.
        shards: instead of `source`, several folders, or single files of their shards: each of their samples once.
        buffer_size: instead of `window`, how many samples are shuffled among one another; 1 does not shuffle.
        seed: of the order; None takes that of the run, or 0.
        shuffle: False reads in the order in which the samples were written.
        lanes: how many places are read from at once; see `BlockOrder`. Let it divide the global batch.
        window: samples within which a lane is shuffled; None chooses by the size of the samples, for about 64 MB in
            all lanes together.
        drop_last: leaves out the last samples of an epoch if they do not make up a batch on every rank.
        weights: how much of each stream is read, by name.
        repeat: how many times each sample of a stream comes in an epoch, by name; see `mixing.shares_of_epoch`.
        choose: how many samples of a stream come in an epoch, by name.
        selection: the name of a selection (`write_selection`): only its samples are read. Of several streams:
            "stream:name", separated by commas.
        transform: is given each sample, and returns what it becomes. What it draws from the global generators depends
            on seed, epoch and sample alone.
        collate_fn: makes a batch of a list of samples; None puts batches together from columns, without making
            samples, or, behind a `transform`, takes torch's `default_collate`.
        batch_transform: is given each batch, and returns what it becomes.
        readers: threads that read ahead; 0 reads when a batch is asked for.
        horizon: how many samples of all ranks, beyond those that are consumed, may be read ahead; changes of weights
            and selections take effect behind them. None for 64 global batches.
        damaged: what is done where samples are damaged or cannot be decoded: "raise", or "quarantine": they are left
            out, counted, and named.
        version: of the data; None takes the newest there is.
        with_ids: yields (ids, batch): int64 of shape [batch]; -1 stands where a rank has nothing left, so that all
            ranks have as many batches. Without `batch_size` (id, sample).
        options: of `Shards`: cache, cache_bytes, storage_options, ...

    Attributes:
        streams: what is read.
        lost: samples that could not be read, so far, in this process.

    Raises:
        DataError: there are no shards, streams whose samples are not alike, or impossible arguments.
    """

    def __init__(
        self,
        source: Source | Mapping[str, Source] | None = None,
        batch_size: int | None = None,
        *,
        shards: Sequence[str | Path] | None = None,
        buffer_size: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
        lanes: int = 16,
        window: int | None = None,
        drop_last: bool = False,
        weights: Mapping[str, float] | None = None,
        repeat: Mapping[str, float] | None = None,
        choose: Mapping[str, int] | None = None,
        selection: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        readers: int = 1,
        horizon: int | None = None,
        damaged: Literal["raise", "quarantine"] = "raise",
        version: int | None = None,
        with_ids: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if (source is None) == (shards is None):
            raise DataError("a StreamingDataset reads either `source` or `shards`; give one of them.")
        if damaged not in ("raise", "quarantine"):
            raise DataError(f"damaged is 'raise' or 'quarantine'; found {damaged!r}.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("readers", readers, 0),
            ("lanes", lanes, 1),
            ("window", window, 1),
            ("buffer_size", buffer_size, 1),
            ("horizon", horizon, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise DataError(f"{name} is an integer from {least} on; found {value!r}.")
        if window is not None and buffer_size is not None:
            raise DataError("window and buffer_size say the same; give one of them.")
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle and buffer_size != 1
        self.drop_last = drop_last
        self.transform = transform
        self.collate_fn = collate_fn
        self.batch_transform = batch_transform
        self.readers = readers
        self.horizon = horizon
        self.damaged = damaged
        self.with_ids = with_ids
        self.lost = 0
        self._ahead: Ahead | None = None
        self._where = self._own_place
        # Of all processes: a worker that outlives an epoch hears of the next one by this.
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.streams = Streams(
            source,
            shards,
            seed=0 if seed is None else seed,
            shuffle=self.shuffle,
            lanes=lanes,
            window=-(-buffer_size // lanes) if buffer_size is not None else window,
            weights=weights,
            repeat=repeat,
            choose=choose,
            selection=selection,
            version=version,
            options=options,
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    def reader(self, collate: Callable[[list[Any]], Any] | None = None) -> Reader:
        """Returns what reads batches of these data.

        Args:
            collate: of a DataLoader; `collate_fn` goes before it.
        """
        return Reader(
            list(self.streams.shards.values()),
            seed=self.streams.seed,
            transform=self.transform,
            collate=self.collate_fn or collate,
            batch_transform=self.batch_transform,
            damaged=self.damaged,
        )

    def stop(self, row: int) -> int:
        """Returns the base position at which an epoch ends.

        Args:
            row: samples of all ranks that belong together: with `drop_last` fewer are left out.
        """
        return self.streams.plan.length - self.streams.plan.length % row if self.drop_last else self.streams.plan.length

    def horizon_of(self, row: int) -> int:
        """Returns how many samples beyond those that are consumed may be read."""
        return self.horizon or _HORIZON * row

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        part = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, start = self._place.tolist()
        rank, ranks = _share()
        size = self.batch_size or 1
        row = size * ranks
        one_by_one = self.batch_size is None
        ahead = Ahead(
            self.streams.plan,
            self.reader(_only_one if one_by_one else None),
            size,
            share=(rank, ranks),
            part=part,
            horizon=self.horizon_of(row),
            by=Threads(self.readers if worker is None else 0),
        )
        return self._yielded(ahead, epoch, start, self.stop(row), worker is None)

    def _yielded(self, ahead: Ahead, epoch: int, start: int, stop: int, here: bool) -> Iterator[Any]:
        self._ahead = ahead
        handed_out = [0]
        place = self._place.numpy()  # of the same memory; a tensor's elements take thirty times as long to set
        for delivery in ahead.batches(epoch, start, stop, lambda: handed_out[0]):
            handed_out[0] += 1
            self.lost += sum(len(lost.ids) for lost in delivery.lost)
            if here:
                place[1] = delivery.position
            yield self._as_asked(delivery)
        if here:
            self.set_epoch(epoch + 1)

    def _as_asked(self, delivery: Delivery) -> Any:
        if not self.with_ids:
            return delivery.data
        if self.batch_size is None:
            return int(delivery.ids[0]) if delivery.size else -1, delivery.data
        return torch.from_numpy(delivery.ids if delivery.size else np.array([-1])), delivery.data

    def __len__(self) -> int:
        ranks = _share()[1]
        row = (self.batch_size or 1) * ranks
        return math.ceil(self.streams.plan.expected(self.stop(row)) / row)

    # --- where it is -----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that is read next, from its beginning.

        Without worker processes that goes by itself; with them, say it before each epoch.
        """
        self._place[0], self._place[1] = epoch, 0
        self._ahead = None

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Returns where it is: behind what was handed out, on all ranks.

        Args:
            batches: how many were consumed in this epoch; needed with worker processes, whose own the batches are.
        """
        epoch, position = self._place.tolist()
        if batches is not None:
            row = (self.batch_size or 1) * _share()[1]
            position = self._behind(epoch, batches * row, self.stop(row))
        return {"epoch": epoch, "position": position, **self.streams.arrangement()}

    def _behind(self, epoch: int, count: int, stop: int) -> int:
        taken = self.streams.plan.take(epoch, 0, count, stop)
        return int(taken.after[-1]) if len(taken.after) else 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, on any number of ranks and workers.

        Raises:
            DataError: the state is of other data, or of another order.
        """
        self.streams.take_arrangement(state)
        self._place[0], self._place[1] = state["epoch"], state["position"]
        self._ahead = None

    # --- changing it -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """How much of each stream is read, by name; all together are 1."""
        return self.streams.weights

    @property
    def selection(self) -> str | None:
        """What is selected, as it is written for `set_selection`."""
        return self.streams.selection

    def set_weights(self, weights: Mapping[str, float]) -> int:
        """Mixes otherwise from behind the horizon on.

        Args:
            weights: of all streams, by name; of any sum.

        Returns:
            From which base position on, counted over all epochs.

        Raises:
            DataError: there is one stream, or these are no weights of the streams.
        """
        place = self._changes_from()
        self.streams.set_weights(weights, place)
        return place

    def set_selection(self, selection: str | None) -> int:
        """Selects otherwise from behind the horizon on; None reads everything.

        Args:
            selection: as for the constructor.

        Returns:
            From which base position on, counted over all epochs.

        Raises:
            DataError: there is no such selection.
        """
        place = self._changes_from()
        self.streams.set_selection(selection, place)
        return place

    def attach(self, where: Callable[[], tuple[int, int]]) -> None:
        """Lets somebody else read: then it is his place that counts.

        Args:
            where: returns from which base position on, over all epochs, a change takes effect, and up to where
                samples are planned by now.
        """
        self._where = where

    def _changes_from(self) -> int:
        place, planned = self._where()
        if planned > place:
            raise DataError(
                f"more is read ahead than the horizon, behind which changes take effect: {planned - place:,} samples. "
                "Raise horizon when the run is begun, or read with fewer worker processes."
            )
        return place

    def _own_place(self) -> tuple[int, int]:
        row = (self.batch_size or 1) * _share()[1]
        plan, (epoch, position) = self.streams.plan, self._place.tolist()
        first = epoch * plan.length
        if self._ahead is None:
            return first + position, first + position
        return plan.behind(epoch, position, self.horizon_of(row), self.stop(row)), first + self._ahead.issued


def _share() -> tuple[int, int]:
    """Returns which rank this process is, and of how many."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _only_one(samples: list[Any]) -> Any:
    (sample,) = samples
    return sample
