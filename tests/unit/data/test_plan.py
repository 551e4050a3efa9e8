"""What comes next is found from any place, whatever is selected there, and however streams are mixed by then."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.data import BlockOrder, Selection
from aetheria.data.plan import Plan
from aetheria.data.selecting import _packed
from aetheria.errors import DataError


def of_rows(rows: list[int], name: str = "chosen") -> Selection:
    unique = np.unique(np.array(rows, dtype=np.int64))
    return Selection(name, 1, 1, "", _packed(unique), len(unique))


def order(blocks: int = 25, lanes: int = 4, window: int = 30, seed: int = 5) -> BlockOrder:
    return BlockOrder(np.full(blocks, 100), seed, lanes=lanes, window=window)


@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(0, 2499), min_size=1, max_size=200),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    start=st.integers(0, 2000),
    further=st.integers(0, 2500),
    changed=st.integers(0, 2500),
)
def test_what_is_taken_piece_by_piece_is_what_is_selected_of_the_order(
    rows: list[int], counts: list[int], start: int, further: int, changed: int
) -> None:
    plan, stop = Plan([order()], ["data"]), min(2500, start + further)
    plan.change_selections(2 * 2500 + changed, (of_rows(rows),))
    whole = order().ids(2, start, stop).tolist()
    wanted = [row for place, row in enumerate(whole, start) if place < changed or row in set(rows)]
    found, position = [], start
    for count in counts:
        taken = plan.take(2, position, count, stop)
        assert len(taken.rows) <= count
        for row, after in zip(taken.rows.tolist(), taken.after.tolist(), strict=True):
            assert whole[after - 1 - start] == row, "the position behind a sample is the one behind it"
            position = after
        found += taken.rows.tolist()
        if len(taken.rows) < count:
            assert plan.is_over(2, position, stop)
            break
    assert found == wanted[: sum(counts)]


def test_few_selected_samples_are_found_anywhere() -> None:
    whole = order(4000, 8, 500)
    plan = Plan([whole], ["data"])
    plan.change_selections(0, (of_rows([399_999]),))
    taken = plan.take(0, 0, 5, whole.length)
    assert taken.rows.tolist() == [399_999] == whole.ids(0, int(taken.after[0]) - 1, int(taken.after[0])).tolist()
    assert plan.is_over(0, int(taken.after[0]), whole.length)
    assert not plan.is_over(0, 0, whole.length)
    assert plan.expected(whole.length) == 1


def test_of_mixed_streams_each_has_its_own_selection() -> None:
    plan = Plan([order(), order(3, seed=6)], ["a", "b"], [1, 1], 600)
    plan.change_selections(0, (of_rows(list(range(0, 2500, 2))), None))
    taken = plan.take(0, 0, 200, 600)
    assert taken.streams is not None
    of_a = taken.rows[taken.streams == 0]
    assert (of_a % 2 == 0).all()
    assert 60 < len(of_a) < 75  # half of what comes from there, and all of the other
    assert plan.expected(600) == 450


def test_it_is_put_back_as_it_was() -> None:
    def fresh() -> Plan:
        return Plan([order(), order(3, seed=6)], ["a", "b"], [1, 1], 600)

    chosen = of_rows([1, 2, 3], "few")
    plan = fresh()
    plan.change_weights(100, [3, 1])
    plan.change_selections(200, (chosen, None))
    plan.change_weights(700, [1, 0])
    state = plan.state_dict()
    again = fresh()
    again.load_state_dict(state, [{"few": chosen}, {}])
    for epoch in (0, 1, 2):
        one, other = plan.take(epoch, 0, 50, 600), again.take(epoch, 0, 50, 600)
        assert one.rows.tolist() == other.rows.tolist()
        assert one.streams.tolist() == other.streams.tolist()  # type: ignore[union-attr]
    plan.forget(800)
    assert plan.take(1, 200, 50, 600).rows.tolist() == again.take(1, 200, 50, 600).rows.tolist()
    assert len(str(plan.state_dict())) < len(str(state))
    with pytest.raises(DataError, match="'few' has other samples"):
        fresh().load_state_dict(state, [{"few": of_rows([1, 2], "few")}, {}])


def test_one_stream_is_not_mixed() -> None:
    with pytest.raises(DataError, match="one stream"):
        Plan([order()], ["data"]).change_weights(0, [1.0])


def test_blocks_that_are_left_out_do_not_come_and_the_others_keep_their_numbers() -> None:
    sizes = np.arange(1, 30)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    out = [0, 7, 8, 28]
    kept = BlockOrder(sizes, 3, lanes=4, window=16, left_out=out)
    expected = [row for block in range(29) if block not in out for row in range(starts[block], starts[block + 1])]
    assert kept.length == len(expected)
    assert sorted(kept.ids(1, 0, kept.length).tolist()) == expected
    ordered = BlockOrder(sizes, 3, shuffle=False, left_out=out)
    assert ordered.ids(0, 0, ordered.length + 2).tolist() == [*expected, -1, -1]
    with pytest.raises(DataError, match="29 was to be left out"):
        BlockOrder(sizes, 3, left_out=[29])
