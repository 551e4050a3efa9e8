"""The order of the samples: a function of (seed, epoch, position), not a state.

A keyed permutation of [0, length) is computed for any positions at once, in constant memory: an unbalanced Feistel
network over the smallest power of two that holds the length, walked on until it lands inside (cycle walking; Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 5). Its round function is the finaliser of
splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Only integer arithmetic
modulo 2**64 is used, so the order is the same on every machine and in every version of NumPy.

What can be read at any place has a `KeyedOrder`: any sample may come next to any other. What lies in blocks on a disk
has a `BlockOrder`: it shuffles nearly as well, and reads a few blocks at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aetheria.errors import DataError

__all__ = ["BlockOrder", "KeyedOrder", "SampleOrder", "mix", "permute"]

_ROUNDS = 12  # fewer leave the permutations of a handful of samples visibly uneven (tests/unit/data/test_order.py)
_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_STEP = 0xD1B54A32D192ED03  # odd, and no small multiple of the other: rounds of one key share no inputs
_MASK = 0xFFFFFFFFFFFFFFFF
_CHUNK = 8192  # positions computed at once: the fixed cost of forty small array operations is shared by them all
_PIECES = 1 << 20  # that an epoch permutes at most: sorting more would be noticed when it begins
_BLOCKS, _WINDOWS = 1, 2  # parts of keys, so that the two permutations of an epoch share no stream


def mix(*parts: int) -> int:
    """Returns one 64-bit key from several integers; every bit of each part reaches every bit of the key."""
    key = 0
    for part in parts:
        key = (key ^ (part & _MASK)) + _GOLDEN & _MASK
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: NDArray[np.int64], length: int, key: int) -> NDArray[np.int64]:
    """Returns where a keyed permutation of [0, length) sends each position.

    Args:
        positions: int64 of any shape, each in [0, length).
        length: the size of the set that is permuted, at least 1.
        key: a 64-bit key, see `mix`.

    Returns:
        int64 of the same shape; different positions go to different places.
    """
    if length == 1:
        return np.zeros_like(positions)
    bits = (length - 1).bit_length()
    low, high = bits // 2, bits - bits // 2
    if low == 0:  # two elements: nothing to split
        return positions ^ (key & 1)
    round_keys = [np.uint64(mix(key, number)) for number in range(_ROUNDS)]
    values = _network(positions.astype(np.uint64).reshape(-1), low, high, round_keys)
    outside = np.flatnonzero(values >= length)
    while outside.size:
        walked = _network(values[outside], low, high, round_keys)
        values[outside] = walked
        outside = outside[walked >= length]
    return values.astype(np.int64).reshape(positions.shape)


def _permute_each(positions: NDArray[np.int64], length: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns where each position goes in a permutation of [0, length) of its own key; all three of shape [n]."""
    if length == 1:
        return np.zeros_like(positions)
    bits = (length - 1).bit_length()
    low, high = bits // 2, bits - bits // 2
    if low == 0:
        return positions ^ (keys & np.uint64(1)).astype(np.int64)
    values = _network(positions.astype(np.uint64), low, high, _round_keys(keys))
    outside = np.flatnonzero(values >= length)
    while outside.size:
        walked = _network(values[outside], low, high, _round_keys(keys[outside]))
        values[outside] = walked
        outside = outside[walked >= length]
    return values.astype(np.int64)


def _round_keys(keys: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    return [keys + np.uint64(_ROUND_STEP * number & _MASK) for number in range(_ROUNDS)]


def _network(values: NDArray[np.uint64], low: int, high: int, round_keys: list[Any]) -> NDArray[np.uint64]:
    left_bits, right_bits = high, low
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in round_keys:
        mixed = _mix_array(right * np.uint64(_GOLDEN) + key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


class SampleOrder(ABC):
    """Which sample stands at a position of an epoch. Any part of it can be asked for, in any order.

    Attributes:
        length: the number of samples, and so of positions in an epoch.
    """

    length: int

    def __init__(self) -> None:
        self._cached: tuple[int, int, NDArray[np.int64]] | None = None

    def ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the sample ids at the positions [start, stop) of an epoch, int64 of shape [stop - start]."""
        pieces = []
        while start < stop:
            chunk = start // _CHUNK
            first = chunk * _CHUNK
            end = min(stop, first + _CHUNK)
            pieces.append(self._chunk(epoch, chunk)[start - first : end - first])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])

    def _chunk(self, epoch: int, chunk: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[:2] != (epoch, chunk):
            first = chunk * _CHUNK
            positions = np.arange(first, min(first + _CHUNK, self.length), dtype=np.int64)
            self._cached = (epoch, chunk, self._computed(epoch, positions))
        return self._cached[2]

    @abstractmethod
    def _computed(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the ids at some positions, all of them in [0, length)."""


class KeyedOrder(SampleOrder):
    """The order in which a map-style dataset is read.

    Args:
        length: the number of samples in the dataset.
        seed: of the run.
        shuffle: False gives the order of the dataset itself.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        super().__init__()
        self.length = length
        self.seed = seed
        self.shuffle = shuffle

    def ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        return super().ids(epoch, start, stop)

    def _computed(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return permute(positions, self.length, mix(self.seed, epoch))


class BlockOrder(SampleOrder):
    """The order in which samples are read that lie in blocks, so that few blocks are in use at a time.

    The blocks are permuted, anew in each epoch. What results when they are put one behind the other is cut into lanes
    of equal length (the first ones may be longer by one). Within a lane the samples are permuted in windows. Position p
    is in lane `p % lanes`, at index `p // lanes`: so the samples of a batch come from all over the data, and each lane
    uses the blocks under one of its windows, and then those under the next.

    An id is a sample's number when the blocks lie in their own order. Of more than a million blocks, runs of a few are
    permuted, each as if it were one. It keeps about 22 bytes for each of them.

    Args:
        rows: samples in each block, integers of shape [blocks]; none may be negative.
        seed: of the run.
        lanes: how many places are read from at once. A divisor of the global batch lets every rank read its own lanes.
        window: samples within which a lane is shuffled; 1 leaves them in the order of their blocks.
        shuffle: False gives the order of the data itself.
        left_out: numbers of blocks that are not read: those in quarantine. Ids stay what they are.

    Raises:
        DataError: lanes or window below 1, rows that are no such array, or no such block.
    """

    def __init__(
        self,
        rows: NDArray[np.integer[Any]],
        seed: int,
        *,
        lanes: int = 1,
        window: int = 1,
        shuffle: bool = True,
        left_out: Sequence[int] = (),
    ) -> None:
        super().__init__()
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and (rows.dtype.kind not in "iu" or int(rows.min()) < 0)):
            raise DataError(
                f"rows of blocks are integers from 0 on, of shape [blocks]; found {rows.dtype} of shape {rows.shape}"
                f"{', the smallest ' + str(rows.min()) if rows.size and rows.dtype.kind in 'if' else ''}."
            )
        if lanes < 1 or window < 1:
            raise DataError(f"an order has at least one lane and a window of one sample; found {lanes} and {window}.")
        if len(left_out) and not 0 <= min(left_out) <= max(left_out) < len(rows):
            raise DataError(f"there are blocks 0 to {len(rows) - 1}; {max(left_out)} was to be left out.")
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.shuffle = shuffle
        self._gaps: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        if len(left_out):
            rows = self._without(rows, np.unique(left_out))
        if (run := -(-len(rows) // _PIECES)) > 1:
            rows = np.add.reduceat(rows, np.arange(0, len(rows), run), dtype=np.int64)
        self._base = np.zeros(len(rows) + 1, dtype=np.int64)  # where each piece begins, and at last the length
        np.cumsum(rows, out=self._base[1:])
        self.length = int(self._base[-1])
        # As small as it goes: an epoch begins by looking each of them up at random.
        self._rows = rows.astype(np.min_scalar_type(int(rows.max(initial=0))))
        self._arranged: tuple[int, NDArray[np.int32], NDArray[np.int64]] | None = None

    def ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the sample ids at the positions [start, stop) of an epoch, int64 of shape [stop - start].

        Behind the last sample there is -1: what fills up the last batch, and counts for nothing.
        """
        end = max(start, min(stop, self.length))
        found = super().ids(epoch, start, end) if self.shuffle else np.arange(start, end, dtype=np.int64)
        if self._gaps is not None:
            begins, shifts = self._gaps
            found = found + shifts[np.searchsorted(begins, found, side="right")]
        if end == stop:
            return found
        return np.concatenate([found, np.full(stop - end, -1, dtype=np.int64)])

    def _without(self, rows: NDArray[Any], left_out: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the rows of the blocks that are kept; notes by how much numbers of samples shift behind each gap."""
        kept, lost = rows.astype(np.int64), np.zeros(len(rows), dtype=np.int64)
        kept[left_out], lost[left_out] = 0, rows[left_out]
        self._gaps = np.cumsum(kept)[left_out], np.concatenate([[0], np.cumsum(lost)[left_out]])
        return np.delete(rows, left_out)

    def shares(self, epoch: int, start: int, steps: int, global_batch: int, rank: int, ranks: int) -> NDArray[np.int64]:
        """Returns a rank's samples of some steps, of shape [steps, global_batch / ranks]; padded with -1 at the end.

        All ranks together have the samples at the positions [start, start + steps * global_batch), step by step, each
        once. A rank takes whole lanes where it can: if the number of ranks divides that of the lanes, it never reads
        another rank's lane.

        Args:
            epoch: from 0.
            start: position of the first step; a multiple of the number of lanes, if lanes are to be kept apart.
            steps: how many steps.
            global_batch: samples of all ranks in a step; a multiple of `ranks`.
            rank: which one takes part.
            ranks: of how many.

        Raises:
            DataError: the global batch cannot be divided evenly.
        """
        if global_batch % ranks:
            raise DataError(
                f"a global batch of {global_batch} cannot be divided evenly among {ranks} ranks. Choose a multiple."
            )
        together = self.by_lanes(self.ids(epoch, start, start + steps * global_batch).reshape(steps, global_batch))
        each = global_batch // ranks
        return together[:, rank * each : (rank + 1) * each]

    def by_lanes(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns batches of shape [batches, samples], each sorted by lanes, where its size is a multiple of these."""
        steps, size = batches.shape
        if size % self.lanes or not self.shuffle:  # unshuffled, neighbours lie side by side already
            return batches
        return batches.reshape(steps, size // self.lanes, self.lanes).swapaxes(1, 2).reshape(steps, size)

    def _computed(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        numbers, starts = self._arrangement(epoch)
        index, lane = np.divmod(positions, self.lanes)
        whole, rest = divmod(self.length, self.lanes)
        begin = lane * whole + np.minimum(lane, rest)  # of the lane
        if self.window > 1:
            index = self._within_windows(epoch, lane, index, whole + (lane < rest))
        places: NDArray[np.int64] = begin + index
        found = np.searchsorted(starts, places, side="right") - 1
        ids: NDArray[np.int64] = self._base[numbers[found]] + (places - starts[found])
        return ids

    def _within_windows(
        self, epoch: int, lane: NDArray[np.int64], index: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        number = index // self.window
        first = number * self.window
        inside = index - first
        sizes = np.minimum(self.window, lengths - first)
        windows = -(-self.length // (self.lanes * self.window)) + 1  # more than any lane has
        stream = np.uint64(mix(self.seed, epoch, _WINDOWS))
        keys = _mix_array((lane * windows + number).astype(np.uint64) * np.uint64(_GOLDEN) + stream)
        if sizes.min() == self.window:
            return first + _permute_each(inside, self.window, keys)
        moved = np.empty_like(inside)
        for size in np.unique(sizes).tolist():  # at most three: that of all windows, and of two kinds of last ones
            chosen = sizes == size
            moved[chosen] = _permute_each(inside[chosen], size, keys[chosen])
        return first + moved

    def _arrangement(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns the blocks (or runs of them) in the order of an epoch, and at which place each of them begins."""
        if self._arranged is not None and self._arranged[0] == epoch:
            return self._arranged[1:]
        self._arranged = None
        blocks = len(self._base) - 1
        # Each block has a random number whose last bits are its own. No two are equal, so that any way of sorting
        # them, in any version of NumPy, gives one and the same order.
        own = np.uint64((1 << max(blocks - 1, 1).bit_length()) - 1)
        stream = np.uint64(mix(self.seed, epoch, _BLOCKS))
        drawn = np.empty(blocks, dtype=np.uint64)
        for first in range(0, blocks, _CHUNK):
            own_bits = np.arange(first, min(first + _CHUNK, blocks), dtype=np.uint64)
            drawn[first : first + _CHUNK] = (_mix_array(own_bits * np.uint64(_GOLDEN) + stream) & ~own) | own_bits
        drawn.sort()
        drawn &= own
        numbers = drawn.astype(np.int32)
        del drawn
        starts = np.zeros(blocks + 1, dtype=np.int64)
        for first in range(0, blocks, 8 * _CHUNK):
            part = numbers[first : first + 8 * _CHUNK]
            starts[first + 1 : first + 1 + len(part)] = self._rows[part]
        np.cumsum(starts, out=starts)
        self._arranged = (epoch, numbers, starts)
        return numbers, starts
