"""Which samples are read, and when: for any place in any epoch, of one stream of data or of several.

A *base position* counts what the order holds, whether or not it is selected. So a place in the data means the same
whatever is selected; and what comes next is known without reading what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aetheria.data.mixing import MixedOrder
from aetheria.data.order import BlockOrder, SampleOrder
from aetheria.data.selecting import Selection
from aetheria.errors import DataError

__all__ = ["Plan", "Taken"]

_FEWEST, _MOST = 256, 1 << 16  # base positions that are looked through at once for selected samples

Selections = tuple[Selection | None, ...]  # of each stream


@dataclass(frozen=True, slots=True)
class Taken:
    """Samples that follow one another.

    Attributes:
        rows: their numbers in their streams, int64 of shape [n].
        streams: number of the stream of each, of shape [n]; None where there is one.
        after: the base position behind each, int64 of shape [n].
    """

    rows: NDArray[np.int64]
    streams: NDArray[Any] | None
    after: NDArray[np.int64]


class Plan:
    """What is read at which place: orders, how they are mixed, and what is selected; and since when.

    Mixture and selection may change while a run goes on. A change holds from a place on that nobody has read ahead to.

    Args:
        orders: of each stream, at least one.
        names: of the streams.
        weights: how much of each is read, of any sum; None reads as much of each as it has.
        epoch_length: base positions in an epoch; None for as many as the streams have.

    Attributes:
        length: base positions in an epoch.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        epoch_length: int | None = None,
    ) -> None:
        self.names = tuple(names)
        self._order = orders[0]
        self._mixed: MixedOrder | None = None
        self.length = orders[0].length
        if len(orders) > 1:
            self._mixed = MixedOrder(orders, weights)
            self.length = sum(order.length for order in orders)
        if epoch_length is not None:
            self.length = epoch_length
        nothing: Selections = (None,) * len(self.names)
        self._selections: list[tuple[int, Selections]] = [(0, nothing)]

    # --- what is read ----------------------------------------------------------------------------------------------

    def take(self, epoch: int, start: int, count: int, stop: int) -> Taken:
        """Returns the next samples that are selected.

        Args:
            epoch: from 0.
            start: base position from which on they are looked for.
            count: how many, at most; fewer where the end is reached.
            stop: base position at which to end.
        """
        found: list[Taken] = []
        span = max(_FEWEST, count)
        while count and start < stop:
            chosen, until = self._selected_at(epoch, start)
            until = min(until, stop)
            if chosen is None:
                end = min(until, start + count)
                rows, streams = self._rows(epoch, start, end)
                taken = Taken(rows, streams, np.arange(start + 1, end + 1))
            else:
                end = min(until, start + span)
                span = min(2 * span, max(_MOST, count))
                rows, streams = self._rows(epoch, start, end)
                kept = np.flatnonzero(_are_selected(rows, streams, chosen))[:count]
                taken = Taken(rows[kept], None if streams is None else streams[kept], start + kept + 1)
                if len(kept) == count:
                    end = int(taken.after[-1])
            found.append(taken)
            count -= len(taken.rows)
            start = end
        if len(found) == 1:
            return found[0]
        if not found:
            return Taken(np.empty(0, np.int64), None, np.empty(0, np.int64))
        streams = None if self._mixed is None else np.concatenate([taken.streams for taken in found])
        return Taken(
            np.concatenate([taken.rows for taken in found]), streams, np.concatenate([taken.after for taken in found])
        )

    def behind(self, epoch: int, position: int, count: int, stop: int) -> int:
        """Returns the place, counted over all epochs, behind the next samples that are selected.

        Args:
            epoch: from 0.
            position: base position behind which they come.
            count: of samples. Where the epoch has fewer, it is the beginning of the next one.
            stop: base position at which the epoch ends.
        """
        after = self.take(epoch, position, count, stop).after
        return epoch * self.length + int(after[-1]) if len(after) == count else (epoch + 1) * self.length

    def is_over(self, epoch: int, position: int, stop: int) -> bool:
        """Returns whether nothing that is selected is left between a base position and the end of an epoch."""
        return not len(self.take(epoch, position, 1, stop).rows)

    def by_lanes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rows of global batches, of shape [batches, samples], so that neighbours share a lane.

        A rank that takes a slice of them then reads few blocks. Where lanes do not come out evenly they stay as they
        are.
        """
        order = self._order
        return order.by_lanes(rows) if self._mixed is None and isinstance(order, BlockOrder) else rows

    def _rows(self, epoch: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[Any] | None]:
        if self._mixed is None:
            return self._order.ids(epoch, start, stop), None
        streams, rows = self._mixed.rows(epoch * self.length + start, epoch * self.length + stop)
        return rows, streams

    def _selected_at(self, epoch: int, position: int) -> tuple[Selections | None, int]:
        """Returns what is selected at a base position, None for everything, and where in the epoch that ends."""
        place, chosen, until = epoch * self.length + position, self._selections[0][1], self.length
        for begins, selections in self._selections:
            if begins > place:
                until = min(until, begins - epoch * self.length)
                break
            chosen = selections
        return (None if all(one is None for one in chosen) else chosen), until

    def expected(self, stop: int) -> int:
        """Returns how many samples an epoch has by what is selected now; an estimate where streams are mixed."""
        chosen = self._selections[-1][1]
        if all(one is None for one in chosen):
            return stop
        if self._mixed is None:
            assert chosen[0] is not None
            return min(stop, chosen[0].count)
        weights = self._mixed.segments[-1].weights
        shares = [
            weight * (1.0 if one is None else one.count / max(order.length, 1))
            for weight, one, order in zip(weights, chosen, self._mixed.orders, strict=True)
        ]
        return round(stop * sum(shares) / sum(weights))

    # --- changing it -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> tuple[float, ...]:
        """How much of each stream is read, as it was last asked for."""
        return (1.0,) if self._mixed is None else self._mixed.segments[-1].weights

    @property
    def selections(self) -> Selections:
        """What is selected of each stream, as it was last asked for."""
        return self._selections[-1][1]

    def change_weights(self, place: int, weights: Sequence[float]) -> None:
        """Mixes otherwise from a place on, which counts the base positions of all epochs.

        Raises:
            DataError: there is one stream, or these are no weights.
        """
        if self._mixed is None:
            raise DataError("there is one stream of data; nothing is mixed.")
        self._mixed = self._mixed.changed(place, tuple(weights))

    def change_selections(self, place: int, selections: Selections) -> None:
        """Selects otherwise from a place on, which counts the base positions of all epochs."""
        kept = [(begins, chosen) for begins, chosen in self._selections if begins < place]
        self._selections = [*kept, (place, selections)]

    def forget(self, place: int) -> None:
        """Forgets what held before a place that nobody will come back to."""
        last = max(index for index, (begins, _) in enumerate(self._selections) if begins <= place or index == 0)
        self._selections = self._selections[last:]
        if self._mixed is not None:
            self._mixed = self._mixed.pruned(place)

    def state_dict(self) -> dict[str, Any]:
        """Returns what was changed since the beginning, as plain containers; selections by their names."""
        names = [
            [begins, [None if one is None else [one.name, one.digest] for one in chosen]]
            for begins, chosen in self._selections
        ]
        return {"mixed": None if self._mixed is None else self._mixed.state(), "selections": names}

    def load_state_dict(self, state: dict[str, Any], found: Sequence[dict[str, Selection]]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: what it returned.
            found: for each stream the selections that the state names.
        """
        if self._mixed is not None:
            self._mixed = MixedOrder.from_state(self._mixed.orders, state["mixed"])
        self._selections = [
            (
                begins,
                tuple(None if name is None else _held(held, *name) for name, held in zip(names, found, strict=True)),
            )
            for begins, names in state["selections"]
        ]


def _held(selections: dict[str, Selection], name: str, digest: str) -> Selection:
    if selections[name].digest != digest:
        raise DataError(
            f"the selection {name!r} has other samples than when this was saved. Put the file back as it was: what a "
            "name means never changes."
        )
    return selections[name]


def _are_selected(rows: NDArray[np.int64], streams: NDArray[Any] | None, chosen: Selections) -> NDArray[np.bool_]:
    if streams is None:
        assert chosen[0] is not None
        return chosen[0].contains(rows)
    found = np.ones(len(rows), dtype=bool)
    for number, selection in enumerate(chosen):
        if selection is not None:
            of_it = streams == number
            found[of_it] = selection.contains(rows[of_it])
    return found
