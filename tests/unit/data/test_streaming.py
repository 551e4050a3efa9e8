"""What a stream gives is a function of seed, epoch and position: nothing that reads it can be seen in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from aetheria.core import MicroBatch
from aetheria.data import Cursor, Shards, StreamingDataset, prepare_loader, write_selection, write_shards
from aetheria.data.fields import Image
from aetheria.data.repairing import repair, verify
from aetheria.errors import DataDamagedError, DataError

COUNT = 997


def sample(number: int) -> dict[str, Any]:
    return {"number": number, "x": np.full(8, number, np.int32), "name": f"sample {number}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_shards(map(sample, range(COUNT)), path, block_bytes=2000, shard_bytes=10_000, uid=3)
    return path


def stream(folder: Any, batch_size: int | None = 10, **options: Any) -> StreamingDataset:
    return StreamingDataset(folder, batch_size, **({"lanes": 4, "window": 32, "seed": 1} | options))


def numbers(batches: Iterator[Any] | Any) -> list[int]:
    return [int(number) for batch in batches for number in batch["number"]]


def test_every_sample_comes_once_and_the_epochs_are_in_different_orders(folder: Path) -> None:
    data = stream(folder)
    first, second = list(data), list(data)
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(COUNT))
    assert numbers(first) != numbers(second)
    assert [len(batch["number"]) for batch in first] == [10] * 99 + [7]
    assert len(data) == 100
    again = stream(folder)
    assert numbers(again) == numbers(first)
    again.set_epoch(1)
    assert numbers(again) == numbers(second)


def test_a_batch_holds_the_columns_of_its_samples(folder: Path) -> None:
    for batch in stream(folder):
        rows = batch["number"].tolist()
        assert np.array_equal(batch["x"], np.array(rows, np.int32)[:, None].repeat(8, axis=1))
        assert batch["name"] == [f"sample {number}" for number in rows]


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_threads_change_nothing(folder: Path, readers: int) -> None:
    assert numbers(stream(folder, readers=readers)) == numbers(stream(folder, readers=0))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(folder: Path, workers: int) -> None:
    data = stream(folder)
    expected = [numbers(data), numbers(data)]
    data = stream(folder)
    loader = DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=True)
    assert numbers(loader) == expected[0]
    data.set_epoch(1)
    assert numbers(loader) == expected[1]


def test_single_samples_are_what_was_written(folder: Path) -> None:
    found = list(stream(folder, None))
    assert len(found) == COUNT
    assert [one["number"] for one in found] == numbers(stream(folder))
    for one in found:
        assert (one["name"], one["x"].tolist()) == (f"sample {one['number']}", [one["number"]] * 8)
    batches = list(DataLoader(stream(folder, None), batch_size=10))
    assert numbers(batches) == numbers(stream(folder))
    assert isinstance(batches[0]["x"], torch.Tensor)


def test_ids_are_those_of_the_samples(folder: Path) -> None:
    shards = Shards(folder)
    for ids, batch in stream(folder, with_ids=True):
        assert shards.rows_of(ids.numpy()).tolist() == batch["number"].tolist()


@pytest.mark.parametrize("taken", [0, 1, 37, 99, 100])
@pytest.mark.parametrize("readers", [0, 2])
def test_it_goes_on_where_it_was(folder: Path, taken: int, readers: int) -> None:
    data = stream(folder, readers=readers)
    whole = [*data, *data]
    begun = stream(folder, readers=readers)
    batches = iter(begun)
    for _ in range(taken):
        next(batches)
    state = begun.state_dict()
    later = stream(folder, readers=readers)
    later.load_state_dict(state)
    assert numbers([*later, *later]) == numbers(whole[taken:])


def test_it_goes_on_with_batches_of_another_size_or_with_workers(folder: Path) -> None:
    begun = stream(folder)
    batches = iter(begun)
    head = [next(batches) for _ in range(40)]
    for later in (stream(folder, 25), stream(folder, None)):
        later.load_state_dict(begun.state_dict())
        loader = DataLoader(later, batch_size=None, num_workers=2)
        rest = [one["number"] for one in loader] if later.batch_size is None else numbers(loader)
        assert numbers(head) + rest == numbers(stream(folder))
    counted = stream(folder)  # as one does whose workers have read, who knows what he has consumed
    assert counted.state_dict(batches=40) == begun.state_dict()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    batch=st.integers(1, 40),
    ranks=st.integers(1, 9),
    start=st.integers(0, 8),
    lanes=st.integers(1, 8),
    drop_last=st.booleans(),
)
def test_ranks_share_every_global_batch(
    folder: Path, count: int, batch: int, ranks: int, start: int, lanes: int, drop_last: bool
) -> None:
    found: list[list[MicroBatch]] = []
    for rank in range(ranks):
        data = stream(folder, batch, lanes=lanes, readers=0, drop_last=drop_last)
        data.streams.plan.length = count  # of the same data, only so many
        try:
            source = prepare_loader(data, role="val", seed=1, share=(rank, ranks))
        except DataError:
            pytest.fail("a validation may be smaller than a batch")
        found.append(list(source.iterate(Cursor(position=min(start * batch * ranks, count)))))
    alone = stream(folder, 1, lanes=lanes, readers=0)
    expected = [identity for micro in _source(alone).iterate(Cursor()) for identity in micro.ids][
        min(start * batch * ranks, count) : count - (count % (batch * ranks) if drop_last else 0)
    ]
    assert len({len(batches) for batches in found}) == 1  # as many for every rank
    for step, row in enumerate(zip(*found, strict=True)):
        together = [identity for micro in row for identity in micro.ids.tolist()]
        assert sorted(together) == sorted(expected[step * batch * ranks : (step + 1) * batch * ranks])
        assert {micro.total for micro in row} == {len(together)}
        assert all(sorted(micro.all_ids.tolist()) == sorted(together) for micro in row)
        assert all(micro.size == len(micro.ids) <= batch and len(micro.data["number"]) >= 1 for micro in row)
        assert max(micro.size for micro in row) - min(micro.size for micro in row) <= 1
    assert sum(micro.size for batches in found for micro in batches) == len(expected)


def _source(data: StreamingDataset, **options: Any) -> Any:
    return prepare_loader(data, role="val", seed=1, **options)


def test_the_loop_reads_the_same_with_processes(folder: Path) -> None:
    def read(workers: int) -> list[tuple[list[int], list[int]]]:
        loader = DataLoader(stream(folder), batch_size=None, num_workers=workers)
        return [(one.ids.tolist(), one.data["number"].tolist()) for one in _source(loader).iterate(Cursor())]

    assert read(0) == read(2)


def test_what_a_transform_draws_depends_on_the_sample_alone(folder: Path) -> None:
    def noisy(one: dict[str, Any]) -> tuple[int, float, float]:
        return one["number"], float(torch.rand(())), float(np.random.rand())

    def read(**options: Any) -> dict[int, tuple[float, float]]:
        workers = options.pop("workers", 0)
        loader = DataLoader(stream(folder, transform=noisy, **options), batch_size=None, num_workers=workers)
        return {
            int(number): (float(one), float(other))
            for batch in loader
            for number, one, other in zip(*batch, strict=True)
        }

    before = torch.get_rng_state()
    list(stream(folder, transform=noisy))
    assert torch.equal(before, torch.get_rng_state())
    found = read()
    assert len(set(found.values())) == COUNT
    assert found == read(readers=3) == read(workers=2) == read(batch_size=7)


def test_a_batch_is_transformed_as_a_whole(folder: Path) -> None:
    found = list(stream(folder, batch_transform=lambda batch: batch["number"] * 2))
    assert [one for batch in found for one in batch.tolist()] == [2 * one for one in numbers(stream(folder))]


def test_a_list_of_samples_goes_to_ones_own_collate_function(folder: Path) -> None:
    found = list(stream(folder, collate_fn=lambda samples: [one["name"] for one in samples]))
    assert [name for names in found for name in names] == [f"sample {one}" for one in numbers(stream(folder))]


# --- mixtures and selections -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other")
    write_shards(map(sample, range(5000, 5300)), path, block_bytes=2000, shard_bytes=10_000, uid=4)
    return path


def shares(batches: list[Any]) -> float:
    found = numbers(batches)
    return sum(number >= 5000 for number in found) / len(found)


def test_streams_are_mixed_by_what_they_have(folder: Path, other: Path) -> None:
    found = list(stream({"a": folder, "b": other}))
    assert sorted(numbers(found)) == [*range(COUNT), *range(5000, 5300)]
    assert shares(found[:20]) == pytest.approx(300 / 1297, abs=0.01)
    assert [batch["name"] == [f"sample {one}" for one in batch["number"].tolist()] for batch in found].count(False) == 0


def test_streams_are_repeated_and_chosen_from(folder: Path, other: Path) -> None:
    found = numbers(stream({"a": folder, "b": other}, repeat={"b": 2.0}, choose={"a": 100}))
    assert len(found) == 700
    assert sorted(one for one in found if one >= 5000) == sorted([*range(5000, 5300)] * 2)
    assert len({one for one in found if one < 5000}) == 100


def test_weights_change_behind_the_horizon(folder: Path, other: Path) -> None:
    data = stream({"a": folder, "b": other}, weights={"a": 3, "b": 1}, horizon=100)
    batches = iter(data)
    before = [next(batches) for _ in range(30)]
    place = data.set_weights({"a": 0, "b": 1})
    assert place == 400
    assert data.weights == {"a": 0.0, "b": 1.0}
    state = data.state_dict()
    after = list(batches)
    assert shares(before) == shares(after[:10]) == 0.25
    assert shares(after[10:]) == 1.0
    later = stream({"a": folder, "b": other}, weights={"a": 3, "b": 1}, horizon=100)
    later.load_state_dict(state)
    assert numbers(later) == numbers(after)


def test_only_what_is_selected_is_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    write_shards(map(sample, range(COUNT)), path, block_bytes=2000, shard_bytes=10_000, uid=3)
    ids = Shards(path).sample_ids(np.arange(0, COUNT, 3))
    write_selection(path, "thirds", ids)
    everything = numbers(stream(path))
    data = stream(path, selection="thirds")
    found = list(data)
    assert numbers(found) == [one for one in everything if one % 3 == 0]
    assert {len(batch["number"]) for batch in found[:-1]} == {10}
    assert len(data) == len(found) == 34
    data = stream(path, horizon=50)
    batches = iter(data)
    head = [next(batches) for _ in range(20)]
    assert data.set_selection("thirds") == 250
    state = data.state_dict()
    rest = numbers(batches)
    assert numbers(head) + rest == everything[:250] + [one for one in everything[250:] if one % 3 == 0]
    later = stream(path, 7)
    later.load_state_dict(state)
    assert later.selection == "thirds"
    assert numbers(later) == rest
    with pytest.raises(DataError, match="thirds"):
        data.set_selection("thrids")


def test_single_shards_are_read(folder: Path) -> None:
    rows = Shards(folder)
    names = [folder / "shards" / f"shard-{number:08d}.arrow" for number in (1, 3)]
    data = StreamingDataset(shards=names, batch_size=10, lanes=2, seed=1)
    starts = rows._tables.shard_starts
    assert sorted(numbers(data)) == [*range(starts[1], starts[2]), *range(starts[3], starts[4])]


def test_the_constructor_of_before_still_works(folder: Path, other: Path) -> None:
    data = StreamingDataset(shards=[str(folder), str(other)], buffer_size=64, batch_size=10)
    found = numbers(data)
    assert sorted(found) == [*range(COUNT), *range(5000, 5300)]
    assert found != sorted(found)
    for size in (10, 32):
        assert numbers(StreamingDataset(shards=[str(folder)], buffer_size=1, batch_size=size)) == list(range(COUNT))


# --- what is damaged -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, set[int]]:
    write_shards(map(sample, range(COUNT)), tmp_path, block_bytes=2000, shard_bytes=10_000, uid=3)
    path = tmp_path / "shards" / "shard-00000002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (found,) = verify(tmp_path)
    return tmp_path, set(range(found.first_row, found.first_row + found.rows))


@pytest.mark.parametrize("readers", [0, 2])
def test_a_flipped_byte_is_never_trained_on(damaged: tuple[Path, set[int]], readers: int) -> None:
    folder, lost = damaged
    read: list[int] = []
    batches = stream(folder, readers=readers)
    with pytest.raises(DataDamagedError, match="shard-00000002"):
        read.extend(number for batch in batches for number in batch["number"].tolist())
    assert not lost & set(read)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_left_out_counted_and_named(damaged: tuple[Path, set[int]], workers: int) -> None:
    folder, lost = damaged
    loader = DataLoader(stream(folder, damaged="quarantine"), batch_size=None, num_workers=workers)
    source = prepare_loader(loader, role="train", seed=1)
    found = list(source.iterate(cursor := Cursor()))
    assert {number for one in found for number in one.data["number"].tolist()} == set(range(COUNT)) - lost
    assert sum(one.size for one in found) == sum(one.total for one in found) == COUNT - len(lost)
    assert sum(one.positions for one in found) == COUNT
    notices = source.notices()
    assert notices
    assert all("shard-00000002" in notice for notice in notices)
    assert source.data.lost == len(lost)  # type: ignore[attr-defined]
    assert source.notices() == []
    assert cursor == Cursor()


def test_a_picture_that_is_none_is_named_by_its_id(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image as Pictures

    file = BytesIO()
    Pictures.new("RGB", (20, 20), (1, 2, 3)).save(file, "PNG")
    good = file.getvalue()
    pictures = [good] * 50
    pictures[17] = good[: len(good) // 2]  # opened it looks like one
    write_shards(pictures, tmp_path, Image("RGB"), uid=1)
    identity = int(Shards(tmp_path).sample_ids([17])[0])
    with pytest.raises(DataError, match=f"id {identity}"):
        list(stream(tmp_path))
    data = stream(tmp_path, damaged="quarantine", with_ids=True)
    ids = torch.cat([ids for ids, _ in data]).tolist()
    assert len(ids) == 49
    assert identity not in ids
    assert data.lost == 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is an integer from 1 on; found 0"),
        ({"readers": -1}, "readers"),
        ({"damaged": "ignore"}, "'raise' or 'quarantine'"),
        ({"buffer_size": 10}, "say the same"),
        ({"weights": {"data": 1.0}}, "for several streams"),
        ({"selection": "unknown"}, "unknown"),
        ({"version": 9}, "no version 9"),
    ],
)
def test_impossible_arguments_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream(folder, **options)


def test_streams_of_other_samples_cannot_be_mixed(folder: Path, tmp_path: Path) -> None:
    write_shards(range(10), tmp_path)
    with pytest.raises(DataError, match="the same fields"):
        stream({"a": folder, "b": tmp_path})


def test_it_does_not_go_on_with_other_data_or_in_another_order(folder: Path, other: Path) -> None:
    state = stream(folder).state_dict()
    with pytest.raises(DataError, match="uid 3"):
        stream(other).load_state_dict(state)
    with pytest.raises(DataError, match="lanes was 4, is 5"):
        stream(folder, lanes=5).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 1, is 2"):
        stream(folder, seed=2).load_state_dict(state)


def test_what_is_added_while_it_is_read_is_for_the_next_run(tmp_path: Path) -> None:
    write_shards(map(sample, range(100)), tmp_path, uid=3)
    begun = stream(tmp_path)
    batches = iter(begun)
    head = [next(batches) for _ in range(3)]
    write_shards(map(sample, range(100, 150)), tmp_path, append="more")
    state = begun.state_dict()
    assert sorted(numbers(head) + numbers(batches)) == list(range(100))
    later = stream(tmp_path)
    assert len(later) == 15
    later.load_state_dict(state)
    assert len(later) == 10
    assert sorted(numbers(head) + numbers(later)) == list(range(100))


def test_the_loop_refuses_what_cannot_be_trained_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size 64 x 40 ranks = 2560 is larger than the data"):
        prepare_loader(stream(folder, 64), role="train", seed=0, share=(0, 40))
    with pytest.raises(DataError, match="has batch_size 10, the configuration says 12"):
        prepare_loader(stream(folder), role="train", seed=0, expected_batch_size=12)
    with pytest.raises(DataError, match="batches of 4 of the batches of 10"):
        prepare_loader(DataLoader(stream(folder), batch_size=4), role="train", seed=0)
    with pytest.raises(DataError, match="single samples"):
        prepare_loader(stream(folder, None), role="train", seed=0)
    write_shards([], tmp_path, Image("RGB"))
    with pytest.raises(DataError, match="has no samples"):
        prepare_loader(stream(tmp_path), role="val", seed=0)


def test_data_that_are_all_in_quarantine_say_so(tmp_path: Path) -> None:
    write_shards(map(sample, range(20)), tmp_path)
    (path,) = (tmp_path / "shards").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    repair(tmp_path)
    with pytest.raises(DataError, match="all 20 samples are in quarantine"):
        prepare_loader(stream(tmp_path), role="train", seed=0)


def test_what_is_rarely_selected_can_be_changed_too(tmp_path: Path) -> None:
    write_shards(map(sample, range(COUNT)), tmp_path, block_bytes=2000, shard_bytes=10_000, uid=3)
    write_selection(tmp_path, "rare", Shards(tmp_path).sample_ids(np.arange(0, COUNT, 25)))
    everything = numbers(stream(tmp_path))
    rare = [one for one in everything if one % 25 == 0]
    data = stream(tmp_path, 2, selection="rare", horizon=8)
    batches = iter(data)
    head = [next(batches) for _ in range(3)]
    place = data.set_selection(None)
    assert place == everything.index(rare[13]) + 1  # six are consumed, and eight are read ahead
    found = numbers(head) + numbers(batches)
    assert found == rare[:14] + everything[place:]
    last = stream(tmp_path, 2, selection="rare", horizon=8)
    batches = iter(last)
    for _ in range(18):
        next(batches)
    assert last.set_selection(None) == COUNT  # the epoch has fewer than eight left: from the next one on
    assert len(numbers(batches)) == len(rare) - 36
    assert len(numbers(last)) == COUNT
