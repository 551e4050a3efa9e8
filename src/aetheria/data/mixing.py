"""Several streams of samples as one, by weight: which stream comes next is a function of the position, not a state.

How positions are divided by weight: `apportioning`. Changed weights hold from a position on, for a segment of the run.
It begins with what each stream was behind by, so that nothing is lost by rounding, even if weights change with every
batch. Segments are all that there is to keep.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aetheria.data.apportioning import MOST, PARTS, POSITIONS, apportionment
from aetheria.data.order import SampleOrder
from aetheria.errors import DataError

__all__ = ["MixedOrder", "Segment", "shares_of_epoch"]

_STREAMS = 1 << 15
_BEHIND = 1 << 16  # samples that a stream is never behind by


@dataclass(frozen=True)
class Segment:
    """From a position on, these weights hold.

    Attributes:
        start: the position, counted from the beginning of the run.
        weights: of each stream.
        served: samples that each stream has given before.
        behind: by how much each stream is behind its share at the start, in 2^-32 samples; negative if it is ahead.
    """

    start: int
    weights: tuple[float, ...]
    served: tuple[int, ...]
    behind: tuple[int, ...]


class MixedOrder:
    """Several streams as one, by weight. Each goes through its own epochs, one after the other, as its samples run out.

    Positions are counted from the beginning of the run, over all epochs. It does not change: what weights are changed
    to is another order, which is the same one up to there.

    Args:
        orders: of each stream's samples.
        weights: of each stream, from 0 on; only their proportions count. A weight of 0 is none of it. None goes by the
            number of samples.

    Attributes:
        orders: as they were given.
        segments: where which weights hold, one behind the other.

    Raises:
        DataError: no streams, or weights that are none.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float] | None = None) -> None:
        self.orders = tuple(orders)
        if not 1 <= len(self.orders) <= _STREAMS:
            raise DataError(f"a mixture has 1 to {_STREAMS:,} streams; found {len(self.orders)}.")
        lengths = [order.length for order in self.orders]
        nothing = (0,) * len(lengths)
        chosen = _checked(lengths if weights is None else weights, lengths)
        self.segments: tuple[Segment, ...] = (Segment(0, chosen, nothing, nothing),)

    @property
    def weights(self) -> tuple[float, ...]:
        """What holds at last."""
        return self.segments[-1].weights

    def streams(self, start: int, stop: int) -> NDArray[np.int16]:
        """Returns which stream stands at each of the positions [start, stop), int16 of shape [stop - start].

        Raises:
            DataError: a position that is not of this order: pruned, or beyond 2^48.
        """
        start, stop = int(start), int(stop)
        number = self._segment_at(start)
        found = np.empty(max(0, stop - start), dtype=np.int16)
        if len(found):
            self._segment_at(stop)
        begin = start
        while begin < stop:
            segment = self.segments[number]
            number += 1
            end = min(stop, self.segments[number].start) if number < len(self.segments) else stop
            division = apportionment(segment.weights, segment.behind)
            division.fill(found[begin - start : end - start], begin - segment.start)
            begin = end
        return found

    def numbers(self, start: int, stop: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Returns the stream at each of the positions [start, stop), and which of its samples that is.

        Samples are counted from the first that the stream has given: number k is in its epoch `k // length`.

        Returns:
            int16 and int64 of shape [stop - start].

        Raises:
            DataError: as `streams`.
        """
        return self._gathered(start, stop, lambda _, first, count: np.arange(first, first + count, dtype=np.int64))

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Returns the stream at each of the positions [start, stop), and the sample's id in that stream's own order.

        Returns:
            int16 and int64 of shape [stop - start].

        Raises:
            DataError: as `streams`.
        """
        return self._gathered(start, stop, self._own)

    def _gathered(
        self, start: int, stop: int, own: Callable[[int, int, int], NDArray[np.int64]]
    ) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        streams = self.streams(start, stop)
        found = np.empty(len(streams), dtype=np.int64)
        places = np.argsort(streams, kind="stable")
        counts = np.bincount(streams, minlength=len(self.orders)).tolist()
        begin = 0
        for stream, (before, count) in enumerate(zip(self.served(start), counts)):
            if count:
                found[places[begin : begin + count]] = own(stream, before, count)
                begin += count
        return streams, found

    def _own(self, stream: int, first: int, count: int) -> NDArray[np.int64]:
        """Returns ids of one stream, over its epochs."""
        order, pieces, end = self.orders[stream], [], first + count
        while first < end:
            epoch, position = divmod(first, order.length)
            taken = min(end - first, order.length - position)
            pieces.append(order.ids(epoch, position, position + taken))
            first += taken
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def served(self, position: int) -> tuple[int, ...]:
        """Returns how many samples each stream has given before a position; together they are the position.

        Raises:
            DataError: as `streams`.
        """
        position = int(position)
        segment = self.segments[self._segment_at(position)]
        counts = apportionment(segment.weights, segment.behind).counts(position - segment.start)
        return tuple(before + count for before, count in zip(segment.served, counts))

    def changed(self, position: int, weights: Sequence[float]) -> MixedOrder:
        """Returns the order in which other weights hold from a position on.

        Args:
            position: not before the last change. At the same one, that change is replaced, as if it had not been.
            weights: as at the beginning.

        Raises:
            DataError: an earlier position, or weights that are none.
        """
        position, last = int(position), self.segments[-1]
        if position < last.start:
            raise DataError(f"weights changed at position {last.start:,} last; {position:,} lies before it.")
        served = self.served(position)
        chosen = _checked(weights, [order.length for order in self.orders])
        kept = self.segments[:-1] if position == last.start else self.segments
        return self._with((*kept, Segment(position, chosen, served, _behind(last, position))))

    def pruned(self, position: int) -> MixedOrder:
        """Returns the order without what only matters for positions before this one.

        Raises:
            DataError: as `streams`.
        """
        return self._with(self.segments[self._segment_at(position) :])

    def _with(self, segments: tuple[Segment, ...]) -> MixedOrder:
        other = object.__new__(type(self))
        other.orders, other.segments = self.orders, segments
        return other

    def _segment_at(self, position: int) -> int:
        if not self.segments[0].start <= position <= POSITIONS:
            raise DataError(
                f"this mixture has the positions {self.segments[0].start:,} to 2^48; {position:,} was asked for."
            )
        return bisect_right(self.segments, position, key=lambda segment: segment.start) - 1

    def state(self) -> dict[str, Any]:
        """Returns lists and numbers."""
        return {
            "lengths": [order.length for order in self.orders],
            "segments": [
                {
                    "start": segment.start,
                    "weights": list(segment.weights),
                    "served": list(segment.served),
                    "behind": list(segment.behind),
                }
                for segment in self.segments
            ],
        }

    @classmethod
    def from_state(cls, orders: Sequence[SampleOrder], state: Mapping[str, Any]) -> MixedOrder:
        """Returns the order that had a state.

        Args:
            orders: of the same streams.
            state: what `state` returned.

        Raises:
            DataError: the streams have other lengths, or this is no such state.
        """
        lengths = [order.length for order in orders]
        try:
            before, entries = list(state["lengths"]), list(state["segments"])
            segments = tuple(
                Segment(entry["start"], *(tuple(entry[name]) for name in ("weights", "served", "behind")))
                for entry in entries
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"this is not the state of a mixture: {type(error).__name__}: {error}.") from error
        if before != lengths:
            raise DataError(
                f"the streams of this mixture had {before} samples; found {lengths}. Continue with the same data, in "
                "the same versions."
            )
        if not segments:
            raise DataError("this is not the state of a mixture: it has no segments.")
        for segment in segments:
            _checked(segment.weights, lengths)
            _check_counts(segment)
        order = cls(orders, segments[0].weights)
        for first, second in pairwise(segments):
            known = order._with((first,))
            if second.start <= first.start or (second.served, second.behind) != (
                known.served(second.start),
                _behind(first, second.start),
            ):
                raise DataError(
                    f"this state of a mixture contradicts itself: what was served by position {second.start} does not "
                    "follow from the weights before. Continue from another snapshot."
                )
        return order._with(segments)


def _checked(weights: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """Returns weights as plain numbers; raises DataError where they are none for streams of these lengths."""
    try:
        given = tuple(weights)
        if not all(isinstance(weight, Real) and not isinstance(weight, bool) for weight in given):
            raise TypeError
        found = tuple(float(weight) for weight in given)
    except (TypeError, OverflowError) as error:
        raise DataError(f"the weights of a mixture are a list of numbers; found {weights!s:.200}.") from error
    if len(found) != len(lengths):
        raise DataError(f"a mixture of {len(lengths)} streams has as many weights; found {len(found)}.")
    for stream, (weight, length) in enumerate(zip(found, lengths)):
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"a weight is a finite number from 0 on; found {weight} for stream {stream}.")
        if weight and not length:
            raise DataError(f"stream {stream} has no samples; its weight can only be 0, found {weight}.")
    if not any(found):
        raise DataError("a mixture needs a stream with a weight above 0; all are 0.")
    return found


def _check_counts(segment: Segment) -> None:
    counts = (segment.start, *segment.served, *segment.behind)
    if not (
        len(segment.served) == len(segment.behind) == len(segment.weights)
        and all(type(count) is int for count in counts)
        and 0 <= segment.start <= POSITIONS
        and min(segment.served) >= 0
        and sum(segment.served) == segment.start
        and max(map(abs, segment.behind)) <= _BEHIND * PARTS
    ):
        raise DataError(f"this is not the state of a mixture: no such segment can be, {segment!r:.300}.")


def _behind(segment: Segment, position: int) -> tuple[int, ...]:
    """Returns by how much each stream is behind its share at a position, in parts of a sample."""
    if position == segment.start:
        return segment.behind
    return apportionment(segment.weights, segment.behind).behind(position - segment.start)


def shares_of_epoch(
    lengths: Sequence[int], *, repeat: Mapping[int, float] | None = None, choose: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """Returns how many samples of each stream make up an epoch of a mixture.

    Taken as weights, they give each stream exactly so many in every epoch whose length is their sum. An epoch in which
    the weights are changed keeps its length.

    Args:
        lengths: samples of each stream.
        repeat: how many times each sample of a stream comes, by the stream's number: 2.0 is twice, 0.5 is half of them
            in one epoch and the others in the next. Rounded to whole samples, half of one upwards.
        choose: how many samples of a stream, whatever it has, by the stream's number.

    Raises:
        DataError: no such stream, both for one stream, less than none, or an epoch of nothing.
    """
    repeat, choose = repeat or {}, choose or {}
    for stream in [*repeat, *choose]:
        if stream not in range(len(lengths)):
            raise DataError(f"there are the streams 0 to {len(lengths) - 1}; a share is given for {stream!r}.")
        if stream in repeat and stream in choose:
            raise DataError(f"stream {stream} has `repeat` and `choose`. Say one of them.")
    shares = [_share(stream, length, repeat, choose) for stream, length in enumerate(lengths)]
    if not 0 < sum(shares) <= MOST:
        raise DataError(f"an epoch has 1 to 2^49 samples; these shares make {sum(shares):,}: {tuple(shares)}.")
    return tuple(shares)


def _share(stream: int, length: int, repeat: Mapping[int, float], choose: Mapping[int, int]) -> int:
    if stream in choose:
        chosen = choose[stream]
        if isinstance(chosen, bool) or not isinstance(chosen, int | np.integer) or chosen < 0:
            raise DataError(f"`choose` is a whole number of samples from 0 on; found {chosen!r} for stream {stream}.")
        if chosen and not length:
            raise DataError(f"{chosen:,} samples of stream {stream} are to be chosen; it has none.")
        return int(chosen)
    times = float(repeat.get(stream, 1.0))
    if not (math.isfinite(times) and times >= 0):
        raise DataError(f"`repeat` is a finite number from 0 on; found {times} for stream {stream}.")
    share = math.floor(Fraction(repr(times)) * length + Fraction(1, 2))
    if times and length and not share:
        raise DataError(
            f"`repeat` {times} of {length} samples, of stream {stream}, is none in an epoch. Say more, or 0."
        )
    return share
