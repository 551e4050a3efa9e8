"""The order of the samples: a permutation, the same one for ever, as even as shuffling, and found at any position."""

from __future__ import annotations

import hashlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aetheria.data.order import KeyedOrder, mix, permute

seeds = st.integers(0, 2**63 - 1)


def whole(length: int, seed: int = 0, epoch: int = 0) -> NDArray[np.int64]:
    return KeyedOrder(length, seed).ids(epoch, 0, length)


def excess(counts: NDArray[np.int64], freedom: int) -> float:
    """Returns Pearson's chi-square against equal counts, in standard deviations above what is expected."""
    expected = counts.sum() / counts.size
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


# --- a permutation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [*range(1, 70), *(2**k + d for k in range(7, 15) for d in (-1, 0, 1))])
def test_every_sample_comes_exactly_once(length: int) -> None:
    assert np.array_equal(np.sort(whole(length, seed=length)), np.arange(length))


@given(length=st.integers(1, 20_000), seed=seeds, epoch=st.integers(0, 2**40))
def test_every_sample_comes_exactly_once_whatever_the_key(length: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(length, seed, epoch)), np.arange(length))


@pytest.mark.parametrize("length", [10**9, 2**31, 2**31 + 1, 10**12, 2**62])
def test_huge_data_is_permuted_too(length: int) -> None:
    step = length // 50_000
    positions = np.arange(0, length, step, dtype=np.int64)
    places = permute(positions, length, mix(3, 1))
    assert places.min() >= 0
    assert places.max() < length
    assert len(np.unique(places)) == len(positions)
    assert abs(places.mean() / length - 0.5) < 0.01


def test_shape_and_type_are_those_of_the_positions() -> None:
    places = permute(np.arange(6, dtype=np.int64).reshape(2, 3), 6, 1)
    assert places.shape == (2, 3)
    assert places.dtype == np.int64
    assert KeyedOrder(5, 0).ids(0, 2, 2).shape == (0,)


# --- the same one for ever -------------------------------------------------------------------------------------------
def test_golden_orders() -> None:
    """If one of these changes, every run that was ever made continues with other data. Do not adapt the values."""
    assert mix() == 0
    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of splitmix64 seeded with 0
    assert mix(1, 2, 3) == 0xD0734750FDE362B3
    assert mix(-1) == mix(2**64 - 1)
    assert whole(2, seed=0).tolist() == [1, 0]
    assert whole(10, seed=0).tolist() == [8, 7, 3, 2, 1, 6, 9, 5, 0, 4]
    assert whole(10, seed=42, epoch=7).tolist() == [2, 1, 6, 7, 5, 0, 8, 9, 3, 4]
    assert permute(np.array([0, 1, 123_456_789]), 10**9, 5).tolist() == [615166676, 925981619, 336579399]
    digest = hashlib.sha256(whole(100_003, seed=2**63 - 1, epoch=3).astype("<i8").tobytes()).hexdigest()
    assert digest == "72ccd11ec25112a320bbcdd81168f48f6ddc86e1530c5191430896744f9c17c5"


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    order = KeyedOrder(100, seed=5, shuffle=False)
    assert order.ids(3, 10, 14).tolist() == [10, 11, 12, 13]


# --- found at any position -------------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(
    length=st.integers(1, 40_000),
    seed=seeds,
    slices=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.integers(0, 20_000)), min_size=1, max_size=5),
)
def test_any_part_can_be_asked_for_in_any_order(length: int, seed: int, slices: list[tuple[int, float, int]]) -> None:
    order = KeyedOrder(length, seed)  # one object for all slices: what it remembers must not show
    for epoch, begin, count in slices:
        start = int(begin * length)
        stop = min(start + count, length)
        assert np.array_equal(order.ids(epoch, start, stop), whole(length, seed, epoch)[start:stop])


def test_a_part_of_a_huge_order_takes_little_memory() -> None:
    order = KeyedOrder(10**12, seed=1)
    order.ids(0, 0, 1)
    tracemalloc.start()
    order.ids(5, 10**11, 10**11 + 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


# --- as even as shuffling --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bit", range(63))
def test_every_bit_of_seed_and_epoch_changes_the_order(bit: int) -> None:
    reference = whole(1000, seed=12345, epoch=6789)
    for other in (whole(1000, 12345 ^ (1 << bit), 6789), whole(1000, 12345, 6789 ^ (1 << bit))):
        assert (reference == other).sum() < 12, "two shuffles agree in about one place"


def test_neighbouring_seeds_and_epochs_do_not_share_an_order() -> None:
    orders = {tuple(whole(20, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize(("length", "each"), [(2, 200), (3, 60), (4, 40), (5, 20), (6, 5)])
def test_every_permutation_of_a_few_is_as_likely(length: int, each: int) -> None:
    numbers = {permutation: number for number, permutation in enumerate(itertools.permutations(range(length)))}
    counts = np.zeros(len(numbers), dtype=np.int64)
    for epoch in range(each * len(numbers)):
        counts[numbers[tuple(whole(length, seed=0, epoch=epoch).tolist())]] += 1
    assert excess(counts, len(numbers) - 1) < 4


def test_every_sample_is_as_likely_at_every_position() -> None:
    length = 50
    counts = np.zeros((length, length), dtype=np.int64)
    for epoch in range(1000):
        counts[np.arange(length), whole(length, seed=1, epoch=epoch)] += 1
    assert abs(excess(counts, (length - 1) ** 2)) < 4


@pytest.mark.parametrize("length", [50, 64, 1000])
def test_neighbours_are_independent(length: int) -> None:
    """How far one sample is from the next, and from that of the next epoch: every distance is as likely."""
    within = np.zeros(length, dtype=np.int64)
    across = np.zeros(length, dtype=np.int64)
    before = whole(length, seed=2)
    for epoch in range(1, 300):
        ids = whole(length, seed=2, epoch=epoch)
        within += np.bincount(np.diff(ids) % length, minlength=length)
        across += np.bincount((ids - before) % length, minlength=length)
        before = ids
    assert within[0] == 0
    assert abs(excess(within[1:], length - 2)) < 4
    assert abs(excess(across, length - 1)) < 4


def test_parts_of_a_key_are_not_interchangeable() -> None:
    keys = [mix(1, 2), mix(2, 1), mix(3), mix(0, 3), mix(3, 0), mix(1), mix(0, 1), mix(1, 0), mix(0), mix(0, 0)]
    assert len(set(keys)) == len(keys)


@given(
    parts=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), which=st.integers(0, 3), bit=st.integers(0, 63)
)
def test_every_bit_of_every_part_reaches_the_key(parts: list[int], which: int, bit: int) -> None:
    other = list(parts)
    other[which % len(parts)] ^= 1 << bit
    changed = (mix(*parts) ^ mix(*other)).bit_count()
    assert 8 < changed < 56, "about half of the 64 bits"
