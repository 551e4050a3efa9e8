"""One stream of batches for several ranks: each takes its own out of every row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from aetheria.core import MicroBatch
from aetheria.data.cursor import Cursor
from aetheria.data.sources import BatchSource
from aetheria.errors import DataError

__all__ = ["RankedSource"]


class RankedSource(BatchSource):
    """A source that is read whole by every rank, because only its batches themselves say how large they are.

    Of as many batches as there are ranks each takes one. Where the last ones are fewer, the ranks that are left without
    one get the first of them, to count for nothing.

    Args:
        source: of the whole stream.
        rank: which one takes part.
        ranks: of how many.
    """

    def __init__(self, source: BatchSource, rank: int, ranks: int) -> None:
        self.source = source
        self.rank = rank
        self.ranks = ranks
        self.looks_ahead = source.looks_ahead
        self.warning = source.warning
        whole = source.batches_per_epoch
        self.batches_per_epoch = None if whole is None else math.ceil(whole / ranks)

    def iterate(self, cursor: Cursor) -> Iterator[MicroBatch]:
        batches = self.source.iterate(replace(cursor, batches=cursor.batches * self.ranks))
        while row := list(itertools.islice(batches, self.ranks)):
            mine = row[self.rank] if self.rank < len(row) else row[0]
            counts = self.rank < len(row)
            known = [batch.ids for batch in row if batch.ids is not None]
            yield MicroBatch(
                mine.data,
                mine.size if counts else 0,
                None if mine.ids is None else mine.ids[: mine.size if counts else 0],
                sum(batch.size for batch in row),
                np.concatenate(known) if known else None,
            )

    def continued(self, cursor: Cursor, ranks: int) -> None:
        batches, rest = divmod(cursor.batches * ranks, self.ranks)
        if rest:
            raise DataError(
                f"the snapshot is of {ranks} ranks, {cursor.batches * ranks} batches into an epoch; {self.ranks} ranks "
                "take these data in rows of as many batches, and cannot begin there. Continue with a number of ranks "
                f"that divides {cursor.batches * ranks}, or from the end of an epoch."
            )
        cursor.batches = batches

    def close(self) -> None:
        self.source.close()

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
