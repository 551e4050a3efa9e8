"""What the hub keeps of folders that it cannot look into: idempotent, bounded, and no trouble to anybody else."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aetheria.errors import HubError
from aetheria.loom.parts import (
    PART_BYTES,
    Copied,
    EventsPart,
    Have,
    JournalPart,
    LivesPart,
    Parcel,
    Part,
    PointsPart,
    RunFilePart,
    checksum,
    decode_have,
    encode_parcel,
)
from aetheria.loom.reader import RunReader
from aetheria.weaver.folder import HubFolder
from aetheria.weaver.mirror import Mirrors, folder_of

RUN = "digits-20260101-120000-ab12"
LIVES = LivesPart([(1, 1e9, 0, "elsewhere", 7)])


class Kept:
    """The copies of a hub, for tests that are not async."""

    def __init__(self, folder: Path, limit: int = 1_000_000) -> None:
        self.path = folder / "mirrors" / RUN
        self.said: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._mirrors = Mirrors(folder / "mirrors", limit)

    def take(self, *parts: Part, run: str = RUN) -> bool:
        taken, said = self._loop.run_until_complete(
            self._mirrors.take(run, encode_parcel(Parcel("session", 1, list(parts))))
        )
        self.said += said
        return taken

    def have(self, run: str = RUN) -> Have:
        answer, said = self._loop.run_until_complete(self._mirrors.have(run))
        self.said += said
        return decode_have(answer)

    def close(self) -> None:
        self._loop.run_until_complete(self._mirrors.close())
        self._loop.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    """Returns what opens the copies, as a hub does that was started."""
    every: list[Kept] = []

    def open_again(folder: Path = tmp_path, **options: Any) -> Kept:
        if every:
            every.pop().close()
        every.append(Kept(folder, **options))
        return every[0]

    yield open_again
    every[0].close()


def points(offset: int, count: int, name: str = "loss") -> PointsPart:
    steps = np.arange(offset, offset + count, dtype="<i8")
    return PointsPart(1, name, offset, steps.tobytes(), steps.astype("<f8").tobytes(), steps.astype("<f8").tobytes())


def test_the_journal_is_the_same_whatever_comes_twice_or_too_early(opened: Callable[..., Kept]) -> None:
    kept, lines = opened(), b"".join(b'{"seq":%d}\n' % number for number in range(20))
    assert kept.take(JournalPart(0, lines[:30]))
    assert not kept.take(JournalPart(31, lines[31:50])), "too early"
    for offset, end in ((0, 30), (0, 10), (10, 30), (20, 60), (30, 60), (0, 60), (5, 8), (60, 60)):
        assert kept.take(JournalPart(offset, lines[offset:end]))
    assert not kept.take(JournalPart(-1, b"x"))
    assert (kept.path / "journal.jsonl").read_bytes() == lines[:60]
    have = kept.have()
    assert (have.journal, have.journal_checksum) == (60, checksum(lines[:60]))
    kept = opened()
    assert (kept.have().journal, kept.have().journal_checksum) == (60, checksum(lines[:60]))
    kept.take(JournalPart(60, lines[60:]))
    assert kept.have().journal_checksum == checksum(lines)
    assert kept.said == []


def test_what_the_run_sends_is_right_where_the_copy_differs(opened: Callable[..., Kept]) -> None:
    kept = opened()
    kept.take(JournalPart(0, b"one\ntwo\nthree\n"))
    assert kept.take(JournalPart(0, b"one\ntwelve\n"))
    assert (kept.path / "journal.jsonl").read_bytes() == b"one\ntwelve\n"
    assert kept.have().journal_checksum == checksum(b"one\ntwelve\n")
    assert "differs from what the run sends, from byte 6 on" in kept.said[0]


def test_what_is_kept_is_for_its_owner_alone(opened: Callable[..., Kept]) -> None:
    kept = opened()
    kept.take(RunFilePart(b'{"status": "running"}'), JournalPart(0, b"one\n"))
    for file in ("run.json", "journal.jsonl"):
        assert stat.S_IMODE((kept.path / file).stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"[1]",
        b'{"status": 1}',
        b'{"global_step": "many"}',
        b'{"pid": [1]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"config": "' + b"x" * PART_BYTES + b'"}',
    ],
)
def test_a_run_file_that_is_none_is_not_kept(opened: Callable[..., Kept], content: bytes) -> None:
    kept = opened()
    good = b'{"status": "running", "config": {"threshold": NaN}, "global_step": null}'
    kept.take(RunFilePart(good))
    assert kept.take(RunFilePart(content)), "it would be none the next time, too"
    kept.take(RunFilePart(content))
    assert (kept.path / "run.json").read_bytes() == good
    assert kept.have().run == checksum(good)
    assert len(kept.said) == 1
    assert "run.json" in kept.said[0]


@pytest.mark.parametrize("run", ["..", ".", ".hidden", "a/b", "../../etc", "a\0b", "ä", "a b", "-x", "CON.", "x" * 200])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, run: str) -> None:
    path = folder_of(tmp_path, run)
    assert path.parent == tmp_path
    assert path.name.strip(".-")
    assert len(path.name) <= 200
    assert folder_of(tmp_path, "v1.5 x") != folder_of(tmp_path, "v1=2E5=20x".replace("=", ""))


@pytest.mark.parametrize("run", ["", "x" * 201])
def test_a_name_that_is_none_is_refused(opened: Callable[..., Kept], run: str) -> None:
    with pytest.raises(HubError):
        opened().take(JournalPart(0, b"x\n"), run=run)


def test_a_damaged_database_is_named_and_set_aside(opened: Callable[..., Kept]) -> None:
    kept = opened()
    kept.take(LIVES, points(0, 3000), points(0, 3000, "other"))
    kept = opened()
    content = bytearray((kept.path / "run.db").read_bytes())
    content[2 * 4096 : 5 * 4096] = b"\xff" * (3 * 4096)
    (kept.path / "run.db").write_bytes(content)
    assert kept.have().database.points == {}, "all of it is asked for"
    assert "run.db was damaged" in kept.said[0]
    assert (kept.path / "run.db.damaged").read_bytes()[100:] == content[100:]
    kept.take(LIVES, points(0, 3000))
    assert RunReader(kept.path / "run.db").metric("loss").steps.tolist() == list(range(3000))
    assert len(kept.said) == 1


@pytest.mark.parametrize("content", [b"this is no database, but long enough to be one" * 100, b""])
def test_a_file_that_is_no_database_is_no_obstacle(opened: Callable[..., Kept], content: bytes) -> None:
    kept = opened()
    kept.path.mkdir(parents=True)
    (kept.path / "run.db").write_bytes(content)
    assert kept.take(LIVES, points(0, 10))
    assert kept.have().database == Copied([(1, 1e9, 0, "elsewhere", 7)], {1: {"loss": 10}}, {}, {})
    assert len(kept.said) == bool(content)


def test_a_copy_that_somebody_removed_is_made_again(opened: Callable[..., Kept]) -> None:
    kept = opened()
    kept.take(LIVES, points(0, 10), JournalPart(0, b"one\n"))
    for file in kept.path.iterdir():
        file.unlink()
    kept.path.rmdir()
    assert not kept.take(points(10, 10), JournalPart(4, b"two\n"))
    assert kept.have().database.points == {}
    assert kept.have().journal == 0
    kept.take(LIVES, points(0, 20), JournalPart(0, b"one\ntwo\n"))
    assert kept.have().database.points == {1: {"loss": 20}}
    assert "cannot be written" in kept.said[0]


def test_a_copy_has_a_limit_and_says_so_once(opened: Callable[..., Kept]) -> None:
    kept = opened(limit=200_000)
    assert kept.take(LIVES, points(0, 1000), JournalPart(0, b"one\n"))
    for start in range(1000, 20_000, 1000):
        assert kept.take(points(start, 1000)), "it would not fit the next time, either"
    have = kept.have()
    assert (have.wanted, have.room) == (True, False)
    assert kept.take(JournalPart(4, b"two\n" * 100_000))
    assert kept.take(RunFilePart(b'{"status": "completed"}'))
    assert json.loads((kept.path / "run.json").read_bytes())["status"] == "completed"
    assert sum(file.stat().st_size for file in kept.path.iterdir() if file.suffix != ".db-wal") < 240_000
    assert len(kept.said) == 1
    assert "would exceed the 200,000 that are allowed" in kept.said[0]
    assert RunReader(kept.path / "run.db").metric("loss").steps[-1] == have.database.points[1]["loss"] - 1


def test_nonsense_is_said_once_and_counted(opened: Callable[..., Kept]) -> None:
    kept = opened()
    kept.take(LIVES)
    for _ in range(3):
        assert kept.take(EventsPart(1, 0, [(0, 1e9, "kind", "message", "no JSON")]))
    assert len(kept.said) == 1
    assert kept.have().database.events == {}


def test_more_runs_than_databases_stay_open(opened: Callable[..., Kept]) -> None:
    kept = opened()
    for round_ in range(2):
        for number in range(40):
            assert kept.take(LIVES, points(5 * round_, 5), run=f"run-{number}")
    assert all(kept.have(f"run-{number}").database.points == {1: {"loss": 10}} for number in range(40))
    if not Path("/proc/self/fd").exists():
        return
    opened_files = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert 0 < len({path for path in opened_files if path.name == "run.db"}) <= 32


def test_the_limit_is_a_setting_of_the_hub(tmp_path: Path) -> None:
    def settings(content: dict[str, Any]) -> None:
        tmp_path.joinpath("settings.json").write_text(json.dumps(content))

    held = HubFolder(tmp_path)
    assert (held.mirrors, held.mirror_bytes) == (tmp_path / "mirrors", 1_000_000_000)
    held.close()
    settings({"mirror_bytes": 5_000_000})
    held = HubFolder(tmp_path)
    assert held.mirror_bytes == 5_000_000
    held.close()
    settings({"mirror_bytes": "much"})
    with pytest.raises(HubError, match="not what the hub writes there"):
        HubFolder(tmp_path)


@pytest.mark.parametrize("small_disk", ["1m"], indirect=True)
def test_a_full_disk_is_said_once_and_what_is_missing_comes_later(
    opened: Callable[..., Kept], small_disk: Path
) -> None:
    kept = opened(small_disk)
    kept.take(LIVES, points(0, 100), JournalPart(0, b"one\n"))
    (small_disk / "filler").write_bytes(b"")
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
    assert not kept.take(points(100, 5000))
    assert not kept.take(JournalPart(4, b"two\n" * 5000), points(100, 5000))
    assert not kept.take(RunFilePart(b'{"status": "running"}' + b" " * 10_000))
    assert len(kept.said) == 1
    assert "cannot be written" in kept.said[0]
    (small_disk / "filler").unlink()
    have = kept.have()
    assert (have.wanted, have.journal, have.database.points) == (True, 4, {1: {"loss": 100}})
    assert kept.take(points(100, 5000), JournalPart(4, b"two\n" * 5000))
    assert (kept.path / "journal.jsonl").read_bytes() == b"one\n" + b"two\n" * 5000
    assert RunReader(kept.path / "run.db").metric("loss").steps.tolist() == list(range(5100))
    assert "can be written again. That failed 3 times" in kept.said[1]
