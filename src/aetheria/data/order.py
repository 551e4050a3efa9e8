"""The order of the samples: a function of (seed, epoch, position), not a state.

A keyed permutation of [0, length) is computed for any positions at once, in constant memory: an unbalanced Feistel
network over the smallest power of two that holds the length, walked on until it lands inside (cycle walking; Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 5). Its round function is the finaliser of
splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Only integer arithmetic
modulo 2**64 is used, so the order is the same on every machine and in every version of NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["KeyedOrder", "mix", "permute"]

_ROUNDS = 12  # fewer leave the permutations of a handful of samples visibly uneven (tests/unit/data/test_order.py)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_CHUNK = 8192  # positions computed at once: the fixed cost of forty small array operations is shared by them all


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


def _network(values: NDArray[np.uint64], low: int, high: int, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    left_bits, right_bits = high, low
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in round_keys:
        mixed = _mix_array(right * np.uint64(_GOLDEN) + key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


class KeyedOrder:
    """The order in which a map-style dataset is read.

    Args:
        length: the number of samples in the dataset.
        seed: of the run.
        shuffle: False gives the order of the dataset itself.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self._cached: tuple[int, int, NDArray[np.int64]] | None = None

    def ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the sample ids at the positions [start, stop) of an epoch, int64 of shape [stop - start]."""
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
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
            self._cached = (epoch, chunk, permute(positions, self.length, mix(self.seed, epoch)))
        return self._cached[2]
