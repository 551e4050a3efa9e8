"""`run.db` where things go wrong for real: a process killed while it writes, a full disk, media that are read-only."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from aetheria.loom.database import RunDatabase
from aetheria.loom.reader import RunReader
from aetheria.loom.recorder import Recorder

# Says on its standard output how far it has committed, until it is killed.
WRITER = """
import sys
from pathlib import Path
from aetheria.loom.database import RunDatabase

path, start = Path(sys.argv[1]), int(sys.argv[2])
database = RunDatabase(path)
database.begin_life(start, started=float(start))
step = start
while True:
    database.write([(0.0, step + offset, ("loss", "accuracy"), (float(step + offset), 0.5)) for offset in range(1, 51)])
    step += 50
    print(step, flush=True)
"""


def kill_while_writing(path: Path, start: int, after: int) -> int:
    """Starts a writer at a step, kills it once it has committed `after` steps more; returns the last step it said."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(start)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = start
    for line in process.stdout:
        said = int(line)
        if said >= start + after:
            break
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    whole = [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    return int(whole[-1]) if whole else said


def check_integrity(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A folder on which a test may mount something; unmounted afterwards."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs Linux and root")
    folder = tmp_path / "mount"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def run_mount(*arguments: str | Path) -> None:
    if subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode:
        pytest.skip("this process may not mount")


def test_a_killed_writer_leaves_everything_it_committed(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    start = 0
    for life, after in enumerate([50, 1000, 2300, 650, 3000], start=1):
        committed = kill_while_writing(path, start, after)
        reader = RunReader(path)
        for name in ("loss", "accuracy"):
            steps = reader.metric(name).steps.tolist()
            # At most the one commit whose news did not come through any more.
            assert steps in (list(range(1, committed + 1)), list(range(1, committed + 51)))
        assert len(reader.lives()) == life
        check_integrity(path)
        start = committed - 30  # resumed from a snapshot a little before


def test_a_full_disk_is_waited_out(mount: Path) -> None:
    run_mount("-t", "tmpfs", "-o", "size=1m", "none", mount)
    path, filler = mount / "run.db", mount / "filler"
    recorder = Recorder(path)
    recorder.metrics({"loss": 0.0}, 0)
    assert recorder.flush()
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1024 * 1024))
    step, full = 0, False
    while not full:
        for _ in range(100):
            step += 1
            recorder.metrics({"loss": float(step)}, step)
        full = not recorder.flush()
        assert step < 100_000, "the disk should have been full by now"
    assert not recorder.flush()
    filler.unlink()
    assert recorder.flush()
    recorder.metrics({"loss": -1.0}, step + 1)
    assert recorder.close()
    assert recorder.lost == 0
    assert RunReader(path).metric("loss").steps.tolist() == list(range(step + 2))
    check_integrity(path)


def test_a_disk_that_is_full_from_the_start(mount: Path) -> None:
    run_mount("-t", "tmpfs", "-o", "size=1m", "none", mount)
    (mount / "filler").write_bytes(bytes(1024 * 1024))
    recorder = Recorder(mount / "run.db")
    recorder.metrics({"loss": 1.0}, 1)
    assert not recorder.flush()
    (mount / "filler").unlink()
    assert recorder.flush()
    assert recorder.close()
    assert RunReader(mount / "run.db").last() == {"loss": (1, 1.0)}


@pytest.mark.parametrize("left", ["closed", "closed while somebody read", "killed", "killed, copied without memory"])
def test_read_only_media(tmp_path: Path, mount: Path, left: str) -> None:
    original = tmp_path / "run"
    original.mkdir()
    path = original / "run.db"
    if left.startswith("closed"):
        last = 50
        database = RunDatabase(path)
        database.begin_life(0)
        database.write([(0.0, step, ("loss",), (float(step),)) for step in range(1, last + 1)])
        with closing(sqlite3.connect(path)) as reading:
            if left != "closed":
                assert reading.execute("SELECT count(*) FROM chunks").fetchone() == (1,)
            database.close()
    else:
        last = kill_while_writing(path, 0, 2000)
        assert (original / "run.db-wal").stat().st_size > 0
        if left != "killed":
            (original / "run.db-shm").unlink()
    before = {file.name: file.read_bytes() for file in original.iterdir()}
    run_mount("--bind", original, mount)
    run_mount("-o", "remount,ro,bind", mount)
    assert RunReader(mount / "run.db").metric("loss").steps[:last].tolist() == list(range(1, last + 1))
    assert {file.name: file.read_bytes() for file in original.iterdir()} == before


def test_a_live_run_is_read_through_a_read_only_folder(tmp_path: Path, mount: Path) -> None:
    original = tmp_path / "run"
    original.mkdir()
    recorder = Recorder(original / "run.db")
    run_mount("--bind", original, mount)
    run_mount("-o", "remount,ro,bind", mount)
    for step in range(3):
        recorder.metrics({"loss": float(step)}, step)
        assert recorder.flush()
        assert RunReader(mount / "run.db").last() == {"loss": (step, float(step))}
    assert recorder.close()


def test_a_process_that_ends_without_closing_ends_quietly(tmp_path: Path) -> None:
    code = (
        "import sys; from aetheria.loom.recorder import Recorder; recorder = Recorder(sys.argv[1]); "
        "recorder.metrics({'loss': 1.0}, 1); recorder.flush(); recorder.metrics({'loss': 2.0}, 2)"
    )
    path = tmp_path / "run.db"
    result = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")
    assert RunReader(path).metric("loss").steps.tolist()[:1] == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_neither_records_nor_disturbs(tmp_path: Path) -> None:
    code = """
import os, sys
from aetheria.loom.recorder import Recorder
recorder = Recorder(sys.argv[1])
recorder.metrics({"loss": 1.0}, 1)
assert recorder.flush()
if os.fork() == 0:
    recorder.metrics({"loss": 9.0}, 9)
    assert not recorder.flush(timeout=60)
    recorder.close(timeout=60)
    sys.exit()
_, status = os.wait()
recorder.metrics({"loss": 2.0}, 2)
sys.exit(status or not recorder.close())
"""
    path = tmp_path / "run.db"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert RunReader(path).metric("loss").steps.tolist() == [1, 2]
    check_integrity(path)
