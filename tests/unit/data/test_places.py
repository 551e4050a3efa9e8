"""Blocks come from where they lie, or from a cache; and hints neither wait nor raise."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aetheria.data import Shards, write_shards
from aetheria.data.fields import Number
from aetheria.data.hints import Hints
from aetheria.data.once import Once
from aetheria.data.places import CachedPlace, LocalPlace
from aetheria.errors import DataDamagedError, DataError

COUNT = 200


def write(folder: Path, compression: Any = None) -> Path:
    samples = [{"number": number, "values": np.full(100, number)} for number in range(COUNT)]
    write_shards(samples, folder, shard_bytes=60_000, block_bytes=8_000, uid=2, compression=compression)
    return folder


def right(shards: Shards) -> bool:
    rows = np.random.default_rng(0).permutation(COUNT)
    columns: dict[str, Any] = shards.columns(rows)
    return np.array_equal(columns["number"], rows) and bool((columns["values"] == rows[:, None]).all())


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


# --- on this machine -------------------------------------------------------------------------------------------------
def test_a_folder_needs_no_cache(tmp_path: Path) -> None:
    shards = Shards(write(tmp_path / "data"), cache=tmp_path / "cache")
    assert isinstance(shards._blocks._place, LocalPlace)
    assert not (tmp_path / "cache").exists()
    shards.prefetch(range(len(shards.block_rows)))
    assert right(shards)


def test_compressed_blocks_of_a_folder_are_unpacked_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "zstd")
    assert isinstance(Shards(folder)._blocks._place, LocalPlace), "without a cache each is unpacked in memory"
    assert right(Shards(folder, cache=tmp_path / "cache"))
    blocks = tmp_path / "cache/blocks"
    before = {path.name: path.stat().st_ino for path in blocks.iterdir()}
    shards = Shards(folder, cache=tmp_path / "cache")
    assert isinstance(shards._blocks._place, CachedPlace)
    assert right(shards)
    assert len(before) == len(shards.block_rows)
    assert {path.name: path.stat().st_ino for path in blocks.iterdir()} == before
    assert not shards._blocks._in_memory


def test_parts_that_are_compressed_beside_others_that_are_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    more = [{"number": COUNT + number, "values": np.full(100, number)} for number in range(50)]
    write_shards(more, folder, append="more", compression="lz4", block_bytes=8_000)
    shards = Shards(folder, cache=tmp_path / "cache", keep=2)
    assert right(shards)
    assert not os.listdir(tmp_path / "cache/blocks")
    assert shards.columns([COUNT + 7, 3])["number"].tolist() == [COUNT + 7, 3]  # type: ignore[union-attr]
    shards.prefetch(range(len(shards.block_rows)))
    packed = int(shards.manifest.parts[1].blocks)
    wait_for(lambda: len(os.listdir(tmp_path / "cache/blocks")) == packed, "they were not unpacked ahead")


def test_data_without_samples(tmp_path: Path) -> None:
    write_shards([], tmp_path / "data", {"number": Number("int64")}, compression="zstd")
    for place in (tmp_path / "data", f"file://{tmp_path}/data"):
        shards = Shards(place, cache=tmp_path / "cache", cache_bytes=1000, keep=3)
        assert len(shards) == 0
        shards.prefetch([0])
        assert shards.blocks_of([]).shape == (0,)


def test_hints_about_what_cannot_be_had_say_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    shards = Shards(folder)
    (folder / "shards/shard-00000001.arrow").unlink()
    shards.prefetch([-1, 10**9, *range(len(shards.block_rows))])
    shards.prefetch(iter([]))
    with pytest.raises(DataDamagedError, match=r"shard-00000001.arrow is missing"):
        shards.columns(np.arange(COUNT))


def test_a_cache_must_hold_what_is_in_use(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "zstd")
    with pytest.raises(
        DataError, match=r"the largest block has [\d,]+ bytes, and 8 that are kept with it; .* hold 100\."
    ):
        Shards(folder, cache=tmp_path / "cache", cache_bytes=100)
    shards = Shards(folder, cache=tmp_path / "cache", cache_bytes=4000)
    assert right(shards)
    with pytest.raises(DataError, match=r"of up to [\d,]+ bytes; .* may hold 4,000. Give it more"):
        shards.keep(1000)
    with pytest.raises(DataError, match="at least one block is kept; found 0"):
        shards.keep(0)


# --- hints -----------------------------------------------------------------------------------------------------------
class Fetcher:
    """Fetches when it may."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.may = threading.Semaphore(0)
        self.waiting = threading.Event()

    def fetch(self, number: int) -> None:
        self.waiting.set()
        assert self.may.acquire(timeout=30.0)
        self.fetched.append(number)
        if number == 13:
            raise DataError("nobody hears this")


def test_the_newest_hints_win_and_old_ones_are_forgotten() -> None:
    fetcher = Fetcher()
    hints = Hints(fetcher.fetch, threads=1, most=4)
    hints.add([0])
    assert fetcher.waiting.wait(30.0)
    hints.add([1, 2, 3, 13])
    hints.add([7, 2, 7])
    fetcher.may.release(10)
    wait_for(lambda: len(fetcher.fetched) == 5, "not all were fetched")
    assert fetcher.fetched == [0, 7, 2, 1, 3], "13 was one too many"
    hints.add([13, 5])
    wait_for(lambda: fetcher.fetched[5:] == [13, 5], "one that fails ends nothing")
    wait_for(lambda: hints._threads == 0, "a thread without work ends")


def test_hints_do_not_keep_what_they_are_of() -> None:
    fetcher = Fetcher()
    hints = Hints(fetcher.fetch, threads=2, most=100)
    hints.add(range(50))
    fetcher.may.release(2)
    gone, may, fetched = weakref.ref(fetcher), fetcher.may, fetcher.fetched
    wait_for(lambda: len(fetched) == 2, "nothing was fetched")
    del fetcher
    may.release(100)
    wait_for(lambda: (gc.collect(), gone() is None)[1], "it is kept alive")
    wait_for(lambda: hints._threads == 0, "its threads go on")


# --- once ------------------------------------------------------------------------------------------------------------
def test_of_several_threads_one_does_the_work() -> None:
    once: Once[int] = Once()
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []
    found: list[Any] = []

    def work() -> int:
        done.append(1)
        begun.set()
        assert go_on.wait(30.0)
        if len(done) == 2:
            raise DataError("the second one fails")
        return 7

    def ask() -> None:
        try:
            found.append(once("key", work))
        except DataError as error:
            found.append(str(error))

    for wanted in (7, "the second one fails"):
        begun.clear()
        go_on.clear()
        found.clear()
        threads = [threading.Thread(target=ask) for _ in range(4)]
        threads[0].start()
        assert begun.wait(30.0)
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda threads=threads: all(map(waits, threads)), "somebody does not wait")
        go_on.set()
        for thread in threads:
            thread.join(30.0)
        assert found == [wanted] * 4
    assert len(done) == 2


def waits(thread: threading.Thread) -> bool:
    import sys

    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "wait"


def test_who_waits_for_one_that_was_interrupted_does_it() -> None:
    once: Once[int] = Once()
    begun, go_on = threading.Event(), threading.Event()
    found: list[Any] = []

    def interrupted() -> int:
        begun.set()
        assert go_on.wait(30.0)
        raise KeyboardInterrupt

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            once("key", interrupted)

    threads = [threading.Thread(target=first), threading.Thread(target=lambda: found.append(once("key", lambda: 3)))]
    threads[0].start()
    assert begun.wait(30.0)
    threads[1].start()
    wait_for(lambda: waits(threads[1]), "it does not wait")
    go_on.set()
    for thread in threads:
        thread.join(30.0)
    assert found == [3]
