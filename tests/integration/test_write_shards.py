"""Writing shards with real processes, real signals and a real full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import shard_writer
from tests.shard_writer import COUNT, write
from tests.warm import WarmProcess

from aetheria.data import Shards, verify
from aetheria.errors import DataError

PATIENCE = 60.0  # seconds


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file but the manifests, which say when they were written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


def notes(folder: Path) -> int:
    return len(list((folder / ".writing").glob("shard-*.json")))


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process has started, and those that these have."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "data"
    assert write(folder).parts[0].shards > 12
    return content(folder)


@pytest.mark.parametrize(("kind", "kills"), [("sequence", (1, 4, 9)), ("iterator", (6,))])
def test_killed_again_and_again_it_ends_up_as_if_nothing_had_been(
    tmp_path: Path, whole: dict[str, bytes], kind: str, kills: tuple[int, ...]
) -> None:
    folder = tmp_path / "data"
    for finished in kills:
        program = WarmProcess([shard_writer.__file__, str(folder), "0", kind])
        wait_for(lambda finished=finished: notes(folder) >= finished, "no shard was finished")
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
        with pytest.raises(DataError, match="The writing of them was interrupted"):
            Shards(folder)
    write(folder, kind=kind)
    assert content(folder) == whole
    assert verify(folder) == []
    assert np.array_equal(Shards(folder).columns(np.arange(COUNT), ["number"])["number"], np.arange(COUNT))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "manifest.json", "shards", "tables", "versions"]


def test_workers_write_the_same_and_do_not_outlive_a_kill(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "data"
    program = WarmProcess([shard_writer.__file__, str(folder), "2", "sequence"])
    wait_for(lambda: notes(folder) >= 2, "no shard was finished")
    workers = descendants(program.pid)
    assert len(workers) >= 2
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    wait_for(lambda: not any(map(runs, workers)), f"workers are left: {workers}")
    write(folder, workers=2)
    assert content(folder) == whole
    assert verify(folder) == []


def test_what_goes_wrong_in_a_worker_is_told(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "data"
    with pytest.raises(DataError, match="sample 900 cannot be read: ValueError: a sample that cannot be read"):
        write(folder, workers=1, broken=900)
    assert notes(folder) > 5

    def kill(rows: int, _: int) -> None:
        if rows > 1000:
            for pid in descendants(os.getpid()):
                if b"spawn_main" in (command := Path(f"/proc/{pid}/cmdline").read_bytes()) or b"forkserver" in command:
                    killed.extend(worker for worker in descendants(pid) if runs(worker))
            for worker in killed:
                os.kill(worker, signal.SIGKILL)

    killed: list[int] = []
    with pytest.raises(DataError, match="a worker process has died"):
        write(folder, workers=1, kind="iterator", pace=0.002, progress=kill)
    assert killed
    write(folder)
    assert content(folder) == whole


def test_samples_that_cannot_be_sent_to_workers_are_refused(tmp_path: Path) -> None:
    class Here(shard_writer.Rows):
        pass

    from aetheria.data import write_shards

    with pytest.raises(DataError, match=r"cannot be sent to worker processes: .*Here.*workers=0"):
        write_shards(Here(), tmp_path / "data", workers=1)


def test_a_full_disk_is_told_and_nothing_is_lost(
    small_disk: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
) -> None:
    folder = small_disk / "data"
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    with pytest.raises(DataError, match=r"No space left.*0\.\d MB are free there.*make the same call again"):
        write(folder)
    finished = notes(folder)
    assert 4 < finished < 12
    with pytest.raises(DataError, match=r"No space left"):
        write(folder)
    assert notes(folder) == finished
    subprocess.run(["mount", "-o", "remount,size=14m", str(small_disk)], check=True)
    assert write(folder).rows == COUNT
    assert content(folder) == whole

    before = json.loads((folder / "manifest.json").read_bytes())
    subprocess.run(["mount", "-o", "remount,size=5m", str(small_disk)], check=True)
    with pytest.raises(DataError, match="No space left"):
        write(folder, append="more")
    assert json.loads((folder / "manifest.json").read_bytes()) == before
    assert verify(folder) == [], "what was there is whole, and is read"
    assert len(Shards(folder)) == COUNT
