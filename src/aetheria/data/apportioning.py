"""Dividing positions among several, by weight: who has which is a function of the position, not a state.

**The rule** is that of the largest error: each position goes to what is furthest behind its share, ties to the lower
number. Applied to all streams at once, it has to be played through from the beginning. So it is applied to two at a
time, down a binary tree: the position goes to one of two groups of streams, then to one of the two that this one is
made of. Of two, the rule has a closed form: of the first m samples the left one gets `floor(m * left / both + 1/2)`.
So any position is found in one walk down the tree, and thousands of positions in a few array operations.

The tree is that of Huffman (the two lightest are joined, again and again), which keeps heavy streams near the root.
Then what a stream has had differs from its share by less than half the sum of the reciprocal Fibonacci numbers, 1.68
samples, at every position and for any number of streams: each group adds its own rounding, at most a half, times the
stream's part of the group; and an ancestor weighs at least as much as the two before it. For two streams it is 1/2, for
three less than 1. (No rule does better than 1 - 1/(2n - 2): Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32, 1980. His needs what came before.)

Apportionment by divisors, the k-th sample of a stream at (k + 1/2) / weight, would be simpler, but has no such bound:
of a stream with half the weight and a hundred that share the other half, it serves fifty of the one, and then a hundred
of the others.

**Debts**: what a stream is behind by when others weights begin to hold is added to its share. It may then get all at
first, or nothing, until that is made good. So weights may change with every batch, and nothing is lost by rounding;
only the bound becomes one for each stretch of constant weights, to be counted from where it stood.

**The same everywhere**: a weight is taken as the number that it is printed as (0.1 is a tenth), and from there on all
is integer arithmetic. No rounding of a machine or of a library takes part.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST", "PARTS", "POSITIONS", "Apportionment", "apportionment"]

POSITIONS = 1 << 48  # positions that there are: at a million samples a second, nine years
PARTS = 1 << 32  # of a sample, in which it is counted by how much a stream is behind
# Weights become integers with this sum. Where they must be rounded for it, that moves a stream by less than a sample in
# all positions. A chunk of positions, times twice the sum, still fits into 63 bits.
MOST = 1 << 49
_CHUNK = 4096


@dataclass(frozen=True)
class _Group:
    """A stream, or two groups that share what they are given.

    Attributes:
        first: the lowest number of a stream in it.
        weight: of all streams in it.
        behind: by how much they are behind together.
        left: the group with the lower number; None in a stream.
        right: the other.
    """

    first: int
    weight: int
    behind: int
    left: _Group | None = None
    right: _Group | None = None

    def line(self, count: int) -> tuple[int, int, int]:
        """Returns a, b and c: of `count + n` samples the left group gets floor((a + b * n) / c), but not below none."""
        assert self.left is not None
        owed = 2 * (self.weight * self.left.behind - self.left.weight * self.behind) // PARTS
        return 2 * self.left.weight * count + self.weight + owed, 2 * self.left.weight, 2 * self.weight


@lru_cache(maxsize=64)
def apportionment(weights: tuple[float, ...], behind: tuple[int, ...]) -> Apportionment:
    """Returns the one of these weights and debts, which may have been made before."""
    return Apportionment(weights, behind)


class Apportionment:
    """How samples, counted from 0, are divided among streams.

    Args:
        weights: of the streams: finite, none negative, and not all 0.
        behind: by how much each is behind at first, in 2^-32 samples; negative if it is ahead.
    """

    def __init__(self, weights: tuple[float, ...], behind: tuple[int, ...]) -> None:
        self._weights = _integers(weights)
        self._sum = sum(self._weights)
        self._begun = behind
        found = [(weight, stream) for stream, weight in enumerate(self._weights) if weight]
        heap = [(weight, stream, _Group(stream, weight, behind[stream])) for weight, stream in found]
        heapq.heapify(heap)  # no two have the same first stream: groups are never compared
        while len(heap) > 1:
            left, right = sorted((heapq.heappop(heap)[2], heapq.heappop(heap)[2]), key=lambda group: group.first)
            joined = _Group(left.first, left.weight + right.weight, left.behind + right.behind, left, right)
            heapq.heappush(heap, (joined.weight, joined.first, joined))
        self._root = heap[0][2]

    def counts(self, count: int) -> list[int]:
        """Returns how many of the first `count` samples each stream gives."""
        found = [0] * len(self._weights)
        todo = [(self._root, count)]
        while todo:
            group, given = todo.pop()
            if group.left is None or group.right is None:
                found[group.first] = given
            else:
                ahead = _left(group, given)
                todo += [(group.left, ahead), (group.right, given - ahead)]
        return found

    def behind(self, count: int) -> tuple[int, ...]:
        """Returns by how much each stream is behind after `count` samples.

        What streams with a weight of 0 were behind by is forgotten, and shared out to the others: together they are
        behind by nothing.
        """
        forgotten = sum(behind for behind, weight in zip(self._begun, self._weights) if not weight)
        due = count * PARTS + forgotten
        return tuple(
            behind + (2 * weight * due + self._sum) // (2 * self._sum) - given * PARTS if weight else 0
            for behind, weight, given in zip(self._begun, self._weights, self.counts(count))
        )

    def fill(self, found: NDArray[np.int16], first: int) -> None:
        """Says which stream gives the samples from number `first` on, by writing it into an array of any length."""
        for begin in range(0, len(found), _CHUNK):
            self._fill(found[begin : begin + _CHUNK], first + begin)

    def _fill(self, found: NDArray[np.int16], first: int) -> None:
        todo = [(self._root, first, np.arange(len(found)))]
        while todo:
            group, given, places = todo.pop()
            if group.left is None or group.right is None:
                found[places] = group.first
                continue
            begin, step, both = group.line(given)
            whole, rest = divmod(begin, both)
            ahead = (rest + step * np.arange(len(places) + 1)) // both  # than it was here
            # A group that is far behind, or far ahead, when all begins, is given everything at first, or nothing.
            if not 0 <= whole <= given:
                ahead = np.clip(ahead + whole, 0, np.arange(given, given + len(places) + 1))
            to_left, before = ahead[1:] > ahead[:-1], _left(group, given)
            for part, taken, chosen in ((group.left, before, to_left), (group.right, given - before, ~to_left)):
                if len(going := places[chosen]):
                    todo.append((part, taken, going))


def _left(group: _Group, count: int) -> int:
    begin, _, both = group.line(count)
    return min(max(begin // both, 0), count)


def _integers(weights: tuple[float, ...]) -> list[int]:
    """Returns integers in the proportions of the weights: exactly so, if the sum of the smallest such is up to 2^49."""
    exact = [Fraction(repr(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    total = sum(whole)
    if total <= MOST:
        return [weight * (MOST // total) for weight in whole]
    ends = [(2 * end * MOST + total) // (2 * total) for end in accumulate(whole, initial=0)]  # so that the sum is exact
    return [end - begin for begin, end in pairwise(ends)]
