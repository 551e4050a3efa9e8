"""Blocks are checked once, kept as long as there is room, and leave the memory of the process when they go."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from aetheria.data import Shards, blocks, write_shards
from aetheria.errors import DataError

ROWS, WIDTH = 512, 64 << 10  # samples, and bytes of each: 32 MB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "data"
    draw = np.random.default_rng(0)
    samples = ({"number": number, "x": draw.integers(0, 256, WIDTH, dtype=np.uint8)} for number in range(ROWS))
    write_shards(samples, folder, shard_bytes=8 << 20, block_bytes=512 << 10)
    return folder


def test_blocks_of_rows(large: Path) -> None:
    shards = Shards(large)
    starts = np.cumsum([0, *shards.block_rows.tolist()])
    rows = np.random.default_rng(1).integers(0, ROWS, 1000)
    found = shards.blocks_of(rows)
    assert found.dtype == np.int64
    assert ((starts[found] <= rows) & (rows < starts[found + 1])).all()
    assert shards.blocks_of([]).shape == (0,)
    for wrong in (-1, ROWS):
        with pytest.raises(DataError, match=f"holds samples 0 to {ROWS - 1}; {wrong} was asked for"):
            shards.blocks_of([0, wrong])


def test_those_that_were_used_last_are_kept(large: Path) -> None:
    shards = Shards(large, keep=3)
    firsts = shards._tables.block_starts
    for block in (0, 1, 2, 0, 3):
        shards.columns([int(firsts[block])])
    assert list(shards._blocks._kept) == [2, 0, 3]
    shards.keep(1)
    assert list(shards._blocks._kept) == [3]


def mapped(folder: Path) -> int:
    """Returns what this process has in memory of the files in a folder, in bytes: its share, as the kernel counts."""
    found, of_it = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):  # the head of a map: its addresses, and at last the file
            of_it = str(folder) in line
        elif of_it and line.startswith("Pss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="only Linux says what memory a process has")
def test_what_is_let_go_leaves_the_memory(large: Path) -> None:
    def in_memory(keep: int) -> int:
        shards = Shards(large, keep=keep)
        total = 0
        for row in np.random.default_rng(0).permutation(ROWS).reshape(-1, 8):
            total += int(shards.columns(row, ["x"])["x"].sum())  # type: ignore[union-attr]
        assert total > 0
        return mapped(large / "shards")

    assert in_memory(ROWS) > 30 << 20, "this is how it would be seen"
    assert in_memory(2) < 3 << 20
    shards = Shards(large)
    shards.columns(np.arange(ROWS), ["x"])
    assert mapped(large / "shards") > 30 << 20
    shards.keep(1)
    assert mapped(large / "shards") < 3 << 20


def test_one_thread_checks_a_block_for_all(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    lock = threading.Lock()

    def counted(content: memoryview) -> int:
        with lock:
            hashed.append(len(content))
        return hash_of(content)

    hash_of = blocks.hash_of
    shards = Shards(large)
    monkeypatch.setattr(blocks, "hash_of", counted)
    gate = threading.Barrier(4)

    def read(seed: int) -> None:
        gate.wait(30.0)
        shards.columns(np.arange(ROWS), ["number"])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert len(hashed) == len(shards.block_rows)
    assert sum(hashed) == int(shards._tables.blocks["bytes"].sum())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_lock_that_is_held_during_a_fork_is_free_in_the_child(large: Path) -> None:
    shards = Shards(large)
    place = shards._blocks._place
    with shards._blocks._lock, shards._blocks._once._lock, place._lock:  # type: ignore[attr-defined]
        if not (child := os.fork()):
            code = 1
            try:
                code = 0 if shards.columns([5], ["number"])["number"].tolist() == [5] else 2  # type: ignore[union-attr]
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
