"""Selections: which samples they hold, that their names keep their meaning, and what is left of an order."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.data import Selection, Shards, read_selection, write_selection, write_shards
from aetheria.data.fields import Number
from aetheria.data.selecting import _packed, selections
from aetheria.errors import DataDamagedError, DataError

ROWS = 1000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selecting") / "data"
    write_shards(range(ROWS), folder, Number("int64"), block_bytes=400, shard_bytes=2000, uid=7)
    return folder


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "data"))


def of_rows(rows: Any) -> Selection:
    """Returns a selection of data that are not there."""
    bits = np.packbits(np.isin(np.arange(max(rows) + 1), rows), bitorder="little")
    return Selection("some", 1, 1, "", bits, len(set(rows)))


# --- what it holds ---------------------------------------------------------------------------------------------------
@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=60), dtype=st.sampled_from(["int64", "int16", "u8"])
)
def test_ids_rows_and_booleans_make_the_same_selection(written: Path, rows: list[int], dtype: str) -> None:
    shards = Shards(written)
    mask = np.zeros(ROWS, dtype=bool)
    mask[rows] = True
    made = [
        Selection.of(shards, "some", shards.sample_ids(rows)),
        Selection.of(shards, "some", mask),
        Selection.of(shards, "some", rows=np.array(rows, dtype=dtype)),
    ]
    for selection in made:
        assert selection.rows().tolist() == sorted(set(rows))
        assert selection.count == len(set(rows))
        asked = np.arange(-1, ROWS + 20)
        assert np.array_equal(asked[selection.contains(asked)], selection.rows())
        assert selection.contains(np.array([[rows[0], -1], [10**12, ROWS]])).tolist() == [[True, False], [False] * 2]
    assert len({selection.digest for selection in made}) == 1
    assert Selection.of(shards, "other", rows=[*{*range(ROWS)} - {*rows}]).digest != made[0].digest


def test_it_is_of_the_samples_whatever_their_key(tmp_path: Path) -> None:
    samples = [{"key": 10 * number + 3, "value": number} for number in range(100)]
    write_shards(samples, tmp_path / "keyed", key="key")
    kept = write_selection(tmp_path / "keyed", "two", [503, 13])
    assert kept.rows().tolist() == [1, 50]
    with pytest.raises(DataError, match="no sample with the id 504"):
        write_selection(tmp_path / "keyed", "other", [13, 504])


def test_many_rows_are_packed_piece_by_piece() -> None:
    rows = np.concatenate([np.arange(5, 3 << 20, 7), np.array([9 << 20, (9 << 20) + 8, (20 << 20) - 1])])
    mask = np.zeros(20 << 20, dtype=bool)
    mask[rows] = True
    bits = np.packbits(mask, bitorder="little")
    tracemalloc.start()
    packed = _packed(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(packed, bits)
    assert peak < len(bits) + (4 << 20), "not a byte for each of twenty million"
    assert np.array_equal(Selection("many", 1, 1, "", packed, len(rows)).rows(), rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ids": []}, "would hold no sample"),
        ({"ids": np.zeros(ROWS, dtype=bool)}, "would hold no sample"),
        ({"ids": np.ones(ROWS - 1, dtype=bool)}, r"holds 1,000 samples.*found shape \(999,\)"),
        ({"ids": [0.5]}, "found float64"),
        ({"ids": ["a"]}, "found <U1"),
        ({"ids": [12]}, "no sample with the id 12"),
        ({"rows": [0.5]}, "rows are integers; found float64"),
        ({"rows": [3, ROWS]}, "samples 0 to 999; found 1000"),
        ({"rows": [3, -1]}, "samples 0 to 999; found -1"),
        ({}, "ids or of rows"),
        ({"rows": [1], "ids": [1]}, "ids or of rows"),
        ({"rows": [1], "note": "a" * 10_001}, "10,000 characters at most; found 10,001"),
    ],
)
def test_what_is_no_selection_is_refused(written: Path, arguments: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Selection.of(Shards(written), "some", **arguments)


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "-x", "a/b", "a b", "ä", "a" * 129, "line\n"])
def test_names_that_are_no_file_are_refused(written: Path, name: str) -> None:
    for ask in (lambda: write_selection(written, name, [1]), lambda: read_selection(written, name)):
        with pytest.raises(DataError, match="a selection is called by"):
            ask()


# --- kept beside the data --------------------------------------------------------------------------------------------
def test_what_is_written_is_read(data: Path) -> None:
    shards = Shards(data)
    assert selections(data) == []
    kept = write_selection(data, "hard", shards.sample_ids([5, 900, 17]), note="loss > 3 – “hard”\nby hand")
    assert kept.created
    write_selection(data, "Easy.2", shards.sample_ids([0]))
    assert selections(data) == ["Easy.2", "hard"]
    found = read_selection(data, "hard")
    assert (found.digest, found.note, found.created, found.count) == (kept.digest, kept.note, kept.created, 3)
    assert found.rows().tolist() == [5, 17, 900]
    assert (found.uid, found.version, found.manifest) == (7, 1, shards.manifest.digest)
    line, _, bits = (data / "selections" / "hard.bits").read_bytes().partition(b"\n")
    assert json.loads(line)["count"] == 3
    assert len(bits) == 900 // 8 + 1


def test_a_name_keeps_its_meaning(data: Path) -> None:
    ids = Shards(data).sample_ids([5, 17])
    write_selection(data, "hard", ids, note="first")
    before = (data / "selections" / "hard.bits").read_bytes()
    assert write_selection(data, "hard", ids[::-1], note="again").note == "first"
    with pytest.raises(DataError, match=r"'hard' already, of 2 other samples than these 1.*another name"):
        write_selection(data, "hard", ids[:1])
    assert (data / "selections" / "hard.bits").read_bytes() == before


def test_samples_that_are_added_later_are_not_selected(data: Path) -> None:
    everything = np.ones(ROWS, dtype=bool)
    write_selection(data, "all", everything)
    write_shards(range(50), data, append="more")
    found = read_selection(data, "all")
    assert found.contains(np.arange(ROWS + 50)).tolist() == [True] * ROWS + [False] * 50
    again = np.append(everything, np.zeros(50, dtype=bool))
    assert write_selection(data, "all", again).version == 1, "the same samples, so the same meaning"


def test_a_name_that_nobody_wrote_says_which_there_are(data: Path) -> None:
    with pytest.raises(DataError, match=r"no selection 'hard'. None is known"):
        read_selection(data, "hard")
    write_selection(data, "hard", Shards(data).sample_ids([1]))
    with pytest.raises(DataError, match=r"no selection 'hart'. Did you mean 'hard'?"):
        read_selection(data, "hart")
    with pytest.raises(DataError, match=r"no selection 'xyz'. Known: hard"):
        read_selection(data, "xyz")


def test_a_selection_of_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    write_selection(data, "hard", Shards(data).sample_ids([1, 2]))
    for name, uid in (("uid", 8), ("digest", 7)):
        other = tmp_path / name
        write_shards(range(500), other, Number("int64"), uid=uid)
        shutil.copytree(data / "selections", other / "selections")
        with pytest.raises(DataError, match="made of other data: of uid 7 and version 1"):
            read_selection(other, "hard")
        same = Selection.of(Shards(other), "hard", rows=[1, 2]).digest == read_selection(data, "hard").digest
        assert same == (uid == 7), "what a selection means is of the uid, as the ids of its samples are"
    write_shards(range(50), data, append="more")
    write_selection(data, "new", Shards(data).sample_ids([1, 1001]))
    (data / "selections" / "new.bits").rename(tmp_path / "digest" / "selections" / "new.bits")
    with pytest.raises(DataError, match=r"of uid 7 and version 2.*versions up to 1"):
        read_selection(tmp_path / "digest", "new")
    (data / "selections" / "hard.bits").rename(data / "selections" / "soft.bits")
    with pytest.raises(DataError, match="is the selection 'hard'"):
        read_selection(data, "soft")


def test_any_byte_that_changed_is_noticed(data: Path) -> None:
    write_selection(data, "hard", Shards(data).sample_ids([5, 17, 40]), note="a")
    path = data / "selections" / "hard.bits"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flipped in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            with pytest.raises(DataDamagedError, match=r"hard.bits is damaged"):
                read_selection(data, "hard")
    for other in (b"", whole[:-1], whole[:50], whole + b"\0", whole.partition(b"\n")[0], b"[1]\n", b"{}\n"):
        path.write_bytes(other)
        with pytest.raises(DataDamagedError, match=r"hard.bits is damaged"):
            read_selection(data, "hard")
    with pytest.raises(DataDamagedError):
        write_selection(data, "hard", Shards(data).sample_ids([5, 17, 40]))


def test_a_newer_format_is_told_from_damage(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aetheria.data import selecting

    monkeypatch.setattr(selecting, "FORMAT", 2)
    write_selection(data, "hard", Shards(data).sample_ids([5]))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"is in format 2; this version of Aetheria reads up to 1. Upgrade"):
        read_selection(data, "hard")


def test_who_writes_while_another_does_waits_and_then_finds_the_name_taken(data: Path) -> None:
    ids = Shards(data).sample_ids([1, 2])
    write_selection(data, "one", ids[:1])
    path = data / "selections" / "one.bits"
    first, lock = path.read_bytes(), data / "selections" / ".lock"
    path.unlink()
    with ThreadPoolExecutor(1) as pool, lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = pool.submit(write_selection, data, "one", ids[1:])
        waits, deadline = re.compile(rf"-> FLOCK .*:{lock.stat().st_ino} "), time.monotonic() + 20
        while not waits.search(Path("/proc/locks").read_text()):
            assert not second.done(), "it did not wait"
            assert time.monotonic() < deadline
        path.write_bytes(first)
        fcntl.flock(held, fcntl.LOCK_UN)
        with pytest.raises(DataError, match="has a selection 'one' already"):
            second.result(20)
    assert path.read_bytes() == first
    assert sorted(path.name for path in path.parent.iterdir()) == [".lock", "one.bits"]


@pytest.mark.parametrize("url", ["https://example.org/data", "s3://bucket/data"])
def test_beside_data_elsewhere_there_are_none(url: str) -> None:
    for ask in (
        lambda: write_selection(url, "one", [1]),
        lambda: read_selection(url, "one"),
        lambda: selections(url),
    ):
        with pytest.raises(DataError, match="in a folder on this machine; these have a URL"):
            ask()


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_full_disk_leaves_nothing_half_done(written: Path, small_disk: Path) -> None:
    data = Path(shutil.copytree(written, small_disk / "data"))
    write_selection(data, "before", Shards(data).sample_ids([1]))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(DataError, match=r"cannot write the selection 'full'.*No space left.*Nothing has changed"):
        write_selection(data, "full", Shards(data).sample_ids([2]))
    assert selections(data) == ["before"]
    assert read_selection(data, "before").count == 1
    (small_disk / "filler").unlink()
    assert write_selection(data, "full", Shards(data).sample_ids([2])).count == 1
