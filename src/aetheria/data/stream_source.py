"""A `StreamingDataset` as the loop reads it: from any cursor, on any number of ranks, and changed while it is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from loguru import logger

from aetheria.core import MicroBatch
from aetheria.data.ahead import Ahead, Processes, Threads
from aetheria.data.cursor import Cursor
from aetheria.data.sources import BatchSource
from aetheria.data.streaming import StreamingDataset
from aetheria.errors import DataError

__all__ = ["StreamSource"]


class StreamSource(BatchSource):
    """Batches out of shards.

    Args:
        data: what is read.
        batch_size: samples in a micro-batch of one rank.
        window: samples of all ranks that belong together in a step: with `drop_last` fewer are left out.
        share: which rank this is, and of how many.
        limit: micro-batches in an epoch at most, of each rank.
        collate: of the user's DataLoader; None puts batches together from columns.
        by: who reads.
    """

    def __init__(
        self,
        data: StreamingDataset,
        batch_size: int,
        *,
        window: int,
        share: tuple[int, int] = (0, 1),
        limit: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        by: Threads | Processes,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.row = batch_size * share[1]
        self._window = window
        self._share = share
        self._limit = limit
        self._collate = collate
        self._by = by
        self._notices: list[str] = []
        data.attach(self._place)
        self._cursor: Cursor | None = None
        self._ahead: Ahead | None = None
        self._epoch = 0  # which is read

    @property
    def batches_per_epoch(self) -> int:  # type: ignore[override]
        """Micro-batches in an epoch by what is selected now; an estimate where that is changed while it is read."""
        batches = math.ceil(self.data.streams.plan.expected(self._stop) / self.row)
        return batches if self._limit is None else min(self._limit, batches)

    @property
    def _stop(self) -> int:
        return self.data.stop(self._window)

    def follow(self, cursor: Cursor) -> None:
        self._cursor, self._ahead = cursor, None

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        epoch, start = cursor.epoch, cursor.position
        self._epoch = epoch
        self.data.streams.plan.forget(epoch * self.data.streams.plan.length + start)
        left = None if self._limit is None else self._limit - cursor.batches
        ahead = Ahead(
            self.data.streams.plan,
            self.data.reader(self._collate),
            self.batch_size,
            share=self._share,
            horizon=self.data.horizon_of(self.row),
            by=self._by,
        )
        self._ahead = ahead
        begun, handed_out = cursor.batches, [0]

        def consumed() -> int:
            # Whoever only looks at the data, to validate, has consumed what he was given.
            return cursor.batches - begun if self._cursor is cursor else handed_out[0]

        for delivery in itertools.islice(ahead.batches(epoch, start, self._stop, consumed), left):
            handed_out[0] += 1
            for lost in delivery.lost:
                self.data.lost += len(lost.ids)
                self._notices.append(told := _told(lost.what, lost.ids))
                if self._share[0]:  # the first rank's are in the run's record
                    logger.warning("rank {}: {}", self._share[0], told)
            total = delivery.size if self._share[1] == 1 else len(delivery.together)
            together = delivery.ids if self._share[1] == 1 else delivery.together
            yield MicroBatch(delivery.data, delivery.size, delivery.ids, total, together, delivery.positions)

    def is_over(self, cursor: Cursor) -> bool:
        if self._limit is not None and cursor.batches >= self._limit:
            return True
        return self.data.streams.plan.is_over(cursor.epoch, cursor.position, self._stop)

    def continued(self, cursor: Cursor, ranks: int) -> None:
        cursor.batches = math.ceil(cursor.samples / self.row)

    def state_dict(self) -> dict[str, Any]:
        return self.data.streams.arrangement()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.data.streams.take_arrangement(state)

    def notices(self) -> list[str]:
        told, self._notices = self._notices, []
        return told

    def _place(self) -> tuple[int, int]:
        """Returns from which base position on, over all epochs, a change takes effect; and what is planned by now."""
        if self._cursor is None:
            raise DataError("the data are not being read yet: what they begin with stands in their configuration.")
        length = self.data.streams.plan.length
        epoch, position = self._cursor.epoch, self._cursor.position
        planned = 0 if self._ahead is None else self._epoch * length + self._ahead.issued
        return self.data.streams.plan.behind(epoch, position, self.data.horizon_of(self.row), self._stop), planned


def _told(what: str, ids: tuple[int, ...]) -> str:
    first = ", ".join(map(str, ids[:5]))
    return f"{len(ids)} samples were left out (ids {first}{', ...' if len(ids) > 5 else ''}): {what}"
