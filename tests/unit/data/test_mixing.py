"""Streams mixed by weight: each near its share everywhere, the same order from any position, debts kept by changes."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aetheria.data import BlockOrder, KeyedOrder, MixedOrder
from aetheria.data.apportioning import MOST, PARTS, POSITIONS, Apportionment
from aetheria.data.mixing import shares_of_epoch
from aetheria.errors import DataError

BOUND = 1.68  # samples: half the sum of the reciprocal Fibonacci numbers
LENGTHS = (7, 1, 40, 300)

weight = st.one_of(
    st.integers(0, 20).map(float),
    st.floats(0, 1),
    st.floats(0, 1e6),
    st.integers(0, 12).map(lambda power: 10.0**-power),
    st.integers(0, 40).map(lambda power: ((1 + 5**0.5) / 2) ** power),  # what makes the deepest trees
)


def weights_of(streams: int) -> st.SearchStrategy[list[float]]:
    return st.lists(weight, min_size=streams, max_size=streams).filter(any)


some_weights = st.integers(1, 24).flatmap(weights_of)
changes = st.lists(st.tuples(st.integers(0, 50), weights_of(4)), max_size=12)


def streams_of(weights: list[float], start: int, count: int) -> NDArray[np.int16]:
    found = np.full(count, -1, dtype=np.int16)
    Apportionment(tuple(weights), (0,) * len(weights)).fill(found, start)
    return found


def mixed(weights: list[float] | None = None, lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> MixedOrder:
    return MixedOrder([KeyedOrder(length, seed + number) for number, length in enumerate(lengths)], weights)


def with_changes(order: MixedOrder, made: list[tuple[int, list[float]]]) -> MixedOrder:
    position = 0
    for further, weights in made:
        position += further
        order = order.changed(position, weights)
    return order


def errors(streams: NDArray[np.int16], weights: list[float]) -> NDArray[np.float64]:
    """Returns by how much each stream is ahead of its share, behind each position, of shape [positions, streams]."""
    had = np.cumsum(streams[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / math.fsum(weights)
    return had - share * np.arange(1, len(streams) + 1)[:, None]


# --- the rule --------------------------------------------------------------------------------------------------------
@settings(max_examples=150)
@given(weights=some_weights)
def test_every_stream_is_near_its_share_everywhere(weights: list[float]) -> None:
    streams = streams_of(weights, 0, 600)
    bound = {1: 0.0, 2: 0.5, 3: 1.0}.get(np.count_nonzero(weights), BOUND)
    assert np.abs(errors(streams, weights)).max() <= bound + 1e-9
    assert not np.isin(streams, np.flatnonzero(np.array(weights) == 0)).any(), "a weight of 0 is none of it"


def test_many_small_streams_do_not_come_in_one_burst() -> None:
    weights = [0.5] + [0.005] * 100
    assert np.abs(errors(streams_of(weights, 0, 1000), weights)).max() < BOUND


@given(pair=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_of_two_the_one_furthest_behind_comes_next_and_ties_go_to_the_lower_number(pair: tuple[int, int]) -> None:
    wanted, had = [], [0, 0]
    for position in range(200):
        behind = [Fraction(weight * (position + 1), sum(pair)) - count for weight, count in zip(pair, had)]
        wanted.append(0 if behind[0] >= behind[1] else 1)
        had[wanted[-1]] += 1
    assert streams_of([float(weight) for weight in pair], 0, 200).tolist() == wanted


@settings(max_examples=60)
@given(
    weights=some_weights,
    start=st.one_of(st.integers(0, 10_000), st.integers(0, POSITIONS - 10_000)),
    cut=st.integers(0, 9_000),
)
def test_any_part_can_be_asked_for_and_counts_agree_with_what_is_served(
    weights: list[float], start: int, cut: int
) -> None:
    division = Apportionment(tuple(weights), (0,) * len(weights))
    whole = streams_of(weights, start, 9_000)  # over several chunks
    assert np.array_equal(streams_of(weights, start + cut, 9_000 - cut), whole[cut:])
    before, after = (np.array(division.counts(position)) for position in (start, start + cut))
    assert np.array_equal(after - before, np.bincount(whole[:cut], minlength=len(weights)))
    assert before.sum() == start
    share = [Fraction(repr(weight)) / sum(Fraction(repr(weight)) for weight in weights) for weight in weights]
    furthest = max(abs(count - start * part) for count, part in zip(before.tolist(), share))
    assert furthest < BOUND + 0.5, "the half is what weights are rounded by, after 2^48 positions"


def test_weights_are_the_numbers_they_are_printed_as() -> None:
    tenths = streams_of([0.1, 0.2, 0.7], 0, 1000)
    assert np.array_equal(tenths, streams_of([1.0, 2.0, 7.0], 0, 1000))
    assert np.array_equal(np.sort(tenths.reshape(100, 10)), np.tile([0, 1, 1, 2, 2, 2, 2, 2, 2, 2], (100, 1)))
    assert np.array_equal(tenths, streams_of([1e-300, 2e-300, 7e-300], 0, 1000))
    assert set(streams_of([1e300, 1e-300], 0, 1000).tolist()) == {0}


def test_golden_mixtures() -> None:
    """If one of these changes, every run over a mixture continues with other data. Do not adapt the values."""
    assert streams_of([1.0] * 4, 0, 8).tolist() == [0, 2, 1, 3, 0, 2, 1, 3]
    assert streams_of([0.5, 0.3, 0.2], 0, 10).tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    far = streams_of([math.pi, math.e, 0.1, 7.0, 0.0, 1e-3, 2.0], 123_456_789_012, 20_000)
    order = mixed([0.4, 0.1, 0.2, 0.3]).changed(333, [0.1, 0.0, 0.2, 0.9]).changed(1001, [3, 2, 1, 0])
    streams, rows = order.rows(0, 2000)
    digests = [hashlib.sha256(array.astype("<i8").tobytes()).hexdigest() for array in (far, streams, rows)]
    assert digests == [
        "4f55af4040d9e67cfb0bd8b85866f29bbcc162b214d1ebce1fd3e53308f11ef3",
        "a75f8a577130b362f87195bc92a0c9bf60f16b57a015837cd472a00214cfb344",
        "3748c22e23ddb73ada86f1d15af60a1dd1bbe9878dff716fa196e8556c7c45e8",
    ]


# --- rows ------------------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(made=changes, start=st.integers(0, 250), count=st.integers(0, 150))
def test_each_stream_goes_through_its_own_epochs(made: list[tuple[int, list[float]]], start: int, count: int) -> None:
    order = with_changes(mixed(), made)
    streams, rows = order.rows(0, 400)
    for number, own in enumerate(order.orders):
        found = rows[streams == number]
        epochs = [own.ids(epoch, 0, own.length) for epoch in range(len(found) // own.length + 1)]
        assert np.array_equal(found, np.concatenate(epochs)[: len(found)])
    part = order.rows(start, start + count)
    assert part[0].dtype == np.int16
    assert part[1].dtype == np.int64
    assert np.array_equal(part[0], streams[start : start + count])
    assert np.array_equal(part[1], rows[start : start + count])
    numbers = order.numbers(start, start + count)[1]
    for number in range(len(LENGTHS)):
        first = order.served(start)[number]
        assert numbers[part[0] == number].tolist() == list(range(first, first + int((part[0] == number).sum())))


def test_orders_by_blocks_are_mixed_like_any_other() -> None:
    orders = [BlockOrder(np.array([4, 5, 6]), 1, lanes=2, window=3), BlockOrder(np.array([3]), 2)]
    streams, rows = MixedOrder(orders).rows(0, 36)
    for number, length in ((0, 15), (1, 3)):
        assert np.array_equal(np.sort(rows[:18][streams[:18] == number]), np.arange(length))
    assert (rows >= 0).all(), "nothing is padded between the epochs of a stream"


@settings(max_examples=50)
@given(
    shares=st.lists(st.integers(0, 120), min_size=1, max_size=9).filter(any),
    epoch=st.one_of(st.integers(0, 3), st.integers(0, 10**10)),
)
def test_an_epoch_serves_exactly_the_shares(shares: list[int], epoch: int) -> None:
    orders = [KeyedOrder(5, number) for number in range(len(shares))]
    length = sum(shares)
    order = MixedOrder(orders, shares)
    streams = order.streams(epoch * length, (epoch + 1) * length)
    assert np.bincount(streams, minlength=len(shares)).tolist() == shares
    assert order.served(epoch * length) == tuple(epoch * share for share in shares)


# --- changes ---------------------------------------------------------------------------------------------------------
@settings(max_examples=40)
@given(made=changes, cut=st.integers(0, 800))
def test_changes_leave_what_came_before_and_pruning_what_comes_after(
    made: list[tuple[int, list[float]]], cut: int
) -> None:
    order, position = mixed(), 0
    for further, weights in made:
        position += further
        after = order.changed(position, weights)
        assert np.array_equal(after.streams(0, position), order.streams(0, position))
        assert after.weights == tuple(weights)
        order = after
    streams = order.streams(0, 800)
    assert order.served(cut) == tuple(np.bincount(streams[:cut], minlength=4))
    pruned = order.pruned(cut)
    assert len(pruned.segments) <= len(order.segments)
    assert np.array_equal(pruned.streams(cut, 800), streams[cut:])
    again = MixedOrder.from_state(order.orders, json.loads(json.dumps(pruned.state())))
    assert again.segments == pruned.segments
    later = max(position, cut)
    assert again.changed(later, [1, 2, 3, 4]).segments[-1] == order.changed(later, [1, 2, 3, 4]).segments[-1]
    for (first, weights), until in zip(
        [(segment.start, segment.weights) for segment in order.segments],
        [*(segment.start for segment in order.segments[1:]), 800],
    ):
        assert not np.isin(streams[first:until], np.flatnonzero(np.array(weights) == 0)).any()


@settings(max_examples=25)
@given(made=changes, between=weights_of(4), last=weights_of(4))
def test_a_change_at_the_same_position_replaces_the_one_before_without_a_trace(
    made: list[tuple[int, list[float]]], between: list[float], last: list[float]
) -> None:
    order = with_changes(mixed(), made)
    position = order.segments[-1].start + 17
    assert order.changed(position, between).changed(position, last).segments == order.changed(position, last).segments


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_a_small_stream_is_not_forgotten_when_weights_change_with_every_batch(streams: int) -> None:
    order, due, batch = mixed(lengths=(100,) * streams), np.zeros(streams), 4
    for step in range(800):
        weights = np.full(streams, 0.01)
        weights[0] = 1 + step / 800
        order = order.pruned(step * batch).changed(step * batch, weights.tolist())
        due += batch * weights / weights.sum()
        assert np.abs(np.array(order.served((step + 1) * batch)) - due).max() < BOUND
    assert len(order.segments) == 2
    assert due[1] > 20


@settings(max_examples=20)
@given(made=st.lists(st.tuples(st.integers(1, 12), weights_of(4)), min_size=20, max_size=30))
def test_whatever_weights_change_to_what_streams_are_owed_stays_small(made: list[tuple[int, list[float]]]) -> None:
    order = with_changes(mixed(), made)
    for segment in order.segments:
        assert abs(sum(segment.behind)) <= 1000, "together, in 2^-32 samples"
        assert max(map(abs, segment.behind)) < 4 * PARTS


def test_the_same_weights_again_go_on_as_if_nothing_had_been_said() -> None:
    weights = [0.5, 0.25, 0.125, 0.125]
    order = mixed(weights)
    assert np.array_equal(order.changed(37, weights).streams(0, 500), order.streams(0, 500))


def test_by_default_each_sample_comes_equally_often() -> None:
    assert mixed().weights == LENGTHS
    streams, rows = mixed().rows(0, sum(LENGTHS))
    assert len({*zip(streams.tolist(), rows.tolist())}) == sum(LENGTHS)


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0, 0, 0], "all are 0"),
        ([1, -0.5, 1], "found -0.5 for stream 1"),
        ([1, 1, math.nan], "found nan for stream 2"),
        ([math.inf, 1, 1], "found inf for stream 0"),
        ([1, 1], "3 streams has as many weights; found 2"),
        ([1, 1, "1"], "a list of numbers; found \\[1, 1, '1'\\]"),
        ([1, 1, True], "a list of numbers"),
        ([1, 1, 10**400], "a list of numbers"),
        (5, "a list of numbers; found 5"),
        ([1, 1, 1, 1], "found 4"),
    ],
)
def test_what_are_no_weights_is_refused(weights: Any, said: str) -> None:
    order = mixed(lengths=(3, 4, 5))
    for make in (lambda: mixed(weights, (3, 4, 5)), lambda: order.changed(10, weights)):
        with pytest.raises(DataError, match=said):
            make()


def test_a_stream_without_samples_has_no_weight() -> None:
    with pytest.raises(DataError, match="stream 1 has no samples"):
        mixed([1, 1], (3, 0))
    assert set(mixed([1, 0], (3, 0)).streams(0, 10).tolist()) == {0}
    assert set(mixed(None, (3, 0)).streams(0, 10).tolist()) == {0}
    for streams in (0, (1 << 15) + 1):
        with pytest.raises(DataError, match=f"1 to 32,768 streams; found {streams}"):
            MixedOrder([KeyedOrder(1, 0)] * streams)


def test_positions_that_are_not_known_are_refused() -> None:
    order = mixed().changed(100, [1, 1, 1, 1]).pruned(100)
    assert len(order.streams(POSITIONS - 5, POSITIONS)) == 5
    assert len(order.streams(100, 100)) == 0
    assert order.served(np.int64(POSITIONS)) == order.served(POSITIONS)
    for ask in (
        lambda: order.streams(99, 105),
        lambda: order.streams(POSITIONS, POSITIONS + 1),
        lambda: order.served(0),
    ):
        with pytest.raises(DataError, match=r"has the positions 100 to 2\^48"):
            ask()
    with pytest.raises(DataError, match="changed at position 100 last; 99 lies before it"):
        order.changed(99, [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["lengths"].append(3), "had .*300, 3.* samples; found"),
        (lambda state: state.pop("segments"), "KeyError: 'segments'"),
        (lambda state: state["segments"].clear(), "no segments"),
        (lambda state: state["segments"][0].pop("served"), "KeyError: 'served'"),
        (lambda state: state["segments"].__setitem__(0, 7), "TypeError"),
        (lambda state: state["segments"][0].update(weights=[1, 1, 1, -1]), "found -1.0 for stream 3"),
        (lambda state: state["segments"][0].update(served=[1, 0, 0, 0]), "no such segment can be"),
        (lambda state: state["segments"][0].update(start=0.0), "no such segment can be"),
        (lambda state: state["segments"][0].update(behind=[0, 0, 0]), "no such segment can be"),
        (lambda state: state["segments"][0].update(behind=[2**60, 0, 0, -(2**60)]), "no such segment can be"),
        (lambda state: state["segments"].reverse(), "contradicts itself.*position 0"),
        (lambda state: state["segments"][0].update(weights=[1, 1, 1, 9]), "contradicts itself.*position 40"),
        (lambda state: state["segments"][1]["behind"].reverse(), "contradicts itself"),
    ],
)
def test_what_is_no_state_is_refused(change: Any, said: str) -> None:
    state = mixed().changed(40, [0.3, 0.3, 0.2, 0.2]).state()
    change(state)
    with pytest.raises(DataError, match=said):
        MixedOrder.from_state(mixed().orders, state)


# --- epochs ----------------------------------------------------------------------------------------------------------
def test_shares_of_an_epoch() -> None:
    assert shares_of_epoch([10, 20, 30]) == (10, 20, 30)
    assert shares_of_epoch([10, 20, 30, 0], repeat={0: 2.0, 1: 0.1}, choose={2: 10_000}) == (20, 2, 10_000, 0)
    assert shares_of_epoch([10, 5], repeat={0: 0.25}, choose={1: np.int64(0)}) == (3, 0), "a half goes upwards"
    assert shares_of_epoch([10**9], repeat={0: 0.1}) == (10**8,)


def test_what_is_repeated_comes_so_often() -> None:
    shares = shares_of_epoch([7, 1, 40, 300], repeat={0: 3.0, 2: 0.5}, choose={3: 30})
    streams, rows = mixed([*shares]).rows(0, 2 * sum(shares))
    assert np.bincount(rows[streams == 0]).tolist() == [6] * 7
    assert np.bincount(rows[streams == 2]).tolist() == [1] * 40, "a half in one epoch, the others in the next"
    assert np.bincount(rows[streams == 3]).max() == 1


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("streams 0 to 1; a share is given for 2", {"repeat": {2: 1.0}}),
        ("stream 0 has `repeat` and `choose`", {"repeat": {0: 1.0}, "choose": {0: 3}}),
        ("found -1 for stream 1", {"choose": {1: -1}}),
        ("found 1.5 for stream 1", {"choose": {1: 1.5}}),
        ("found True for stream 1", {"choose": {1: True}}),
        ("found nan for stream 0", {"repeat": {0: math.nan}}),
        ("found -2.0 for stream 0", {"repeat": {0: -2}}),
        ("0.01 of 3 samples, of stream 0, is none", {"repeat": {0: 0.01}}),
        ("5 samples of stream 1 are to be chosen; it has none", {"choose": {1: 5}}),
        ("these shares make 0", {"repeat": {0: 0.0}}),
        ("these shares make", {"choose": {0: MOST + 1}}),
    ],
)
def test_what_are_no_shares_is_refused(said: str, arguments: Any) -> None:
    with pytest.raises(DataError, match=said):
        shares_of_epoch([3, 0], **arguments)
