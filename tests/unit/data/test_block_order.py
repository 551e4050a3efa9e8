"""The order of samples that lie in blocks: each once, the same on any number of ranks, few blocks in use at a time."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aetheria.data import BlockOrder
from aetheria.data import order as order_module
from aetheria.errors import DataError

seeds = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw: st.DrawFn, most: int = 60) -> BlockOrder:
    """Draws blocks of any sizes, empty ones too, and any lanes and windows."""
    rows = draw(st.lists(st.integers(0, most), max_size=60))
    return BlockOrder(
        np.array(rows, dtype=np.int32), draw(seeds), lanes=draw(st.integers(1, 70)), window=draw(st.integers(1, 300))
    )


def blocks_of(ids: NDArray[np.int64], rows: NDArray[Any]) -> NDArray[np.int64]:
    return np.searchsorted(np.cumsum(rows), ids, side="right")


# --- each sample once ------------------------------------------------------------------------------------------------
@settings(max_examples=150)
@given(order=orders(), epoch=st.integers(0, 2**40), beyond=st.integers(0, 100))
def test_every_sample_comes_once_and_only_the_tail_is_padded(order: BlockOrder, epoch: int, beyond: int) -> None:
    ids = order.ids(epoch, 0, order.length + beyond)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids[: order.length]), np.arange(order.length))
    assert (ids[order.length :] == -1).all()


@pytest.mark.parametrize("length", [65_535, 65_536, 65_537])
@pytest.mark.parametrize(("lanes", "window"), [(1, 65_537), (1, 4096), (64, 1000), (7, 1)])
def test_lengths_around_a_power_of_two(length: int, lanes: int, window: int) -> None:
    order = BlockOrder(np.diff([*range(0, length, 100), length]), 5, lanes=lanes, window=window)
    assert np.array_equal(np.sort(order.ids(3, 0, length)), np.arange(length))


@settings(max_examples=60)
@given(
    order=orders(), parts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4000), st.integers(0, 600)), max_size=6)
)
def test_any_part_can_be_asked_for_in_any_order(order: BlockOrder, parts: list[tuple[int, int, int]]) -> None:
    for epoch, start, count in parts:
        fresh = BlockOrder(order._rows, order.seed, lanes=order.lanes, window=order.window)
        whole = fresh.ids(epoch, 0, max(order.length, start + count))
        assert np.array_equal(order.ids(epoch, start, start + count), whole[start : start + count])


def test_parts_are_alike_over_many_chunks() -> None:
    order = BlockOrder(np.full(300, 123), 9, lanes=8, window=1000)
    whole = order.ids(2, 0, order.length)
    pieces = [order.ids(2, start, min(start + 777, order.length)) for start in range(0, order.length, 777)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    order = BlockOrder(np.array([3, 0, 4]), 1, lanes=2, window=4, shuffle=False)
    assert order.ids(5, 2, 9).tolist() == [2, 3, 4, 5, 6, -1, -1]


def test_no_blocks_and_nothing_asked_for() -> None:
    empty = BlockOrder(np.zeros(0, dtype=np.int64), 1, lanes=4, window=10)
    assert empty.length == 0
    assert empty.ids(0, 0, 3).tolist() == [-1, -1, -1]
    assert BlockOrder(np.array([0, 0]), 1).ids(0, 0, 1).tolist() == [-1]
    assert BlockOrder(np.array([5]), 1).ids(0, 2, 2).shape == (0,)


# --- the same on any number of ranks ---------------------------------------------------------------------------------
@settings(max_examples=60)
@given(order=orders(), ranks=st.integers(1, 64), each=st.integers(1, 5), start=st.integers(0, 300))
def test_all_ranks_together_have_the_global_batch_and_each_as_many(
    order: BlockOrder, ranks: int, each: int, start: int
) -> None:
    batch, steps = ranks * each, 3
    expected = order.ids(1, start, start + steps * batch).reshape(steps, batch)
    shares = [order.shares(1, start, steps, batch, rank, ranks) for rank in range(ranks)]
    assert {share.shape for share in shares} == {(steps, each)}
    assert np.array_equal(np.sort(np.concatenate(shares, axis=1)), np.sort(expected))


def test_ranks_read_their_own_lanes() -> None:
    rows = np.full(64, 50)
    order = BlockOrder(rows, 3, lanes=16, window=100)
    used = [set(blocks_of(order.shares(0, 0, 50, 64, rank, 4).ravel(), rows)) for rank in range(4)]
    assert all(not used[a] & used[b] for a in range(4) for b in range(a)), "sixteen blocks make up a rank's four lanes"


def test_a_short_last_batch_is_shared_by_all_ranks() -> None:
    order = BlockOrder(np.array([10, 11]), 3, lanes=8, window=4)
    last = [order.shares(0, 16, 1, 16, rank, 4) for rank in range(4)]
    assert [int((share >= 0).sum()) for share in last] == [2, 2, 1, 0]


def test_batches_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(DataError, match="16 cannot be divided evenly among 3 ranks"):
        BlockOrder(np.array([50]), 0).shares(0, 0, 1, 16, 0, 3)


@pytest.mark.parametrize(
    ("rows", "lanes", "window", "said"),
    [
        ([1, -1], 1, 1, "from 0 on.*the smallest -1"),
        ([1.5], 1, 1, "found float64"),
        ([[1]], 1, 1, r"shape \(1, 1\)"),
        ([1], 0, 1, "at least one lane.*found 0 and 1"),
        ([1], 1, 0, "found 1 and 0"),
    ],
)
def test_what_is_no_order_is_refused(rows: list[Any], lanes: int, window: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        BlockOrder(np.array(rows), 0, lanes=lanes, window=window)


# --- the same one for ever -------------------------------------------------------------------------------------------
def test_golden_orders() -> None:
    """If one of these changes, every run over shards continues with other data. Do not adapt the values."""
    small = BlockOrder(np.array([3, 4, 0, 5]), 42, lanes=2, window=4)
    assert small.ids(0, 0, 12).tolist() == [2, 10, 1, 3, 0, 4, 7, 11, 9, 6, 8, 5]
    assert small.ids(1, 0, 12).tolist() == [8, 3, 9, 2, 10, 1, 7, 4, 11, 6, 0, 5]
    rows = np.arange(1000) % 97
    order = BlockOrder(rows, 2**63 - 1, lanes=12, window=301)
    digest = hashlib.sha256(order.ids(7, 0, order.length).astype("<i8").tobytes()).hexdigest()
    assert digest == "21c522375780327a441a2627799914bc0283169a1bddfdb9226c81e04c5ccf1f"


def test_golden_order_of_very_many_blocks() -> None:
    order = BlockOrder(np.ones(2**20 + 1, dtype=np.int8), 3, lanes=2, window=64)
    assert order.ids(1, 500_000, 500_006).tolist() == [860024, 850414, 420124, 626496, 420125, 114364]


def test_the_type_of_the_rows_does_not_matter() -> None:
    rows = [5, 100, 70]
    wanted = BlockOrder(np.array(rows, dtype=np.uint8), 1, lanes=2, window=9).ids(0, 0, 175)
    for dtype in (np.int16, np.uint32, np.int64, np.uint64):
        assert np.array_equal(BlockOrder(np.array(rows, dtype=dtype), 1, lanes=2, window=9).ids(0, 0, 175), wanted)


# --- shuffled, with few blocks in use --------------------------------------------------------------------------------
def test_few_blocks_are_in_use_at_a_time_and_each_for_one_stretch() -> None:
    rows, lanes, window = np.full(500, 40), 8, 100
    order = BlockOrder(rows, 1, lanes=lanes, window=window)
    used = blocks_of(order.ids(0, 0, order.length), rows)
    for start in range(0, order.length, lanes * window):
        at_once = len(set(used[start : start + lanes * window]))
        assert at_once <= lanes * (window // 40 + 2)
    spans = [np.ptp(np.flatnonzero(used == block)) for block in range(500)]
    twice = sum(span > lanes * 2 * window for span in spans)
    assert twice < lanes, "where one lane ends and the next begins, a block is used by both; any other in two windows"


def test_windows_and_epochs_and_seeds_differ() -> None:
    rows = np.full(100, 64)
    order = BlockOrder(rows, 1, lanes=1, window=64)
    inside = order.ids(0, 0, order.length).reshape(-1, 64) % 64
    assert len({tuple(row) for row in inside.tolist()}) == 100
    other = [BlockOrder(rows, seed, lanes=4, window=64).ids(epoch, 0, 6400) for seed in (1, 2) for epoch in (0, 1)]
    for a in range(4):
        for b in range(a):
            assert (other[a] == other[b]).sum() < 30, "two shuffles agree in about one place"


def test_every_block_is_as_likely_to_come_first_and_every_row() -> None:
    order = BlockOrder(np.full(10, 10), 3, lanes=1, window=10)
    first = np.array([order.ids(epoch, 0, 1)[0] for epoch in range(600)])
    for counts in (np.bincount(first // 10, minlength=10), np.bincount(first % 10, minlength=10)):
        chi_square = float(((counts - 60) ** 2 / 60).sum())
        assert chi_square < 9 + 4 * 18**0.5, "four standard deviations above the nine degrees of freedom"


# --- very many blocks --------------------------------------------------------------------------------------------
def test_a_billion_samples_fit_into_a_hundred_megabytes() -> None:
    rows = np.full(3_000_000, 333, dtype=np.int32)
    rows[::3] = 334
    tracemalloc.start()
    order = BlockOrder(rows, 1, lanes=64, window=4096)
    ids = np.concatenate([order.ids(4, start, start + 64) for start in (0, 500_000_000, order.length - 64)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.length == 1_000_000_000
    assert len(np.unique(ids)) == len(ids)
    assert 0 <= ids.min() <= ids.max() < order.length
    assert peak < 100e6


@settings(max_examples=60)
@given(rows=st.lists(st.integers(0, 9), min_size=1, max_size=200), pieces=st.integers(1, 50), lanes=st.integers(1, 9))
def test_of_very_many_blocks_runs_are_permuted(rows: list[int], pieces: int, lanes: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order_module, "_PIECES", pieces)
        order = BlockOrder(np.array(rows, dtype=np.uint8), 1, lanes=lanes, window=5)
    assert len(order._rows) <= pieces
    assert order.length == sum(rows)
    assert np.array_equal(np.sort(order.ids(1, 0, order.length)), np.arange(order.length))
