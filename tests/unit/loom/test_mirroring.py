"""What a sidecar sends of its run's folder: what a copy lacks, once, and nothing that is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aetheria.loom.database import Event, RunDatabase
from aetheria.loom.mirroring import FolderTail
from aetheria.loom.parts import PART_BYTES, Have, JournalPart, Parcel, Part, RunFilePart, checksum, encode_parcel


def all_parts(tail: FolderTail, have: Have) -> list[Part]:
    """Returns everything that is sent until nothing is left."""
    found: list[Part] = []
    while parts := tail.parts(have):
        assert len(encode_parcel(Parcel("session", 1, parts))) < 1_000_000, "more than a message server takes"
        have.add(parts)
        found += parts
    return found


def journal_of(parts: list[Part]) -> bytes:
    content = b""
    for part in parts:
        if isinstance(part, JournalPart):
            assert part.offset == len(content)
            content += part.content
    return content


def test_a_folder_is_sent_once_and_then_what_is_new_in_it(tmp_path: Path) -> None:
    tail, have = FolderTail(tmp_path), Have()
    assert all_parts(tail, have) == []
    (tmp_path / "run.json").write_text('{"status": "running"}')
    (tmp_path / "journal.jsonl").write_bytes(b"one\n")
    database = RunDatabase(tmp_path / "run.db")
    database.begin_life(0)
    database.write([(1.0, 1, ("loss",), (0.5,))])
    kinds = [type(part).__name__ for part in all_parts(tail, have)]
    assert kinds == ["RunFilePart", "JournalPart", "LivesPart", "PointsPart"]
    assert all_parts(tail, have) == []
    (tmp_path / "run.json").write_text('{"status": "completed"}')
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b"two\n")
    database.write([(2.0, 2, ("loss",), (0.25,))], [Event(2.0, 2, "kind", "message")])
    parts = all_parts(tail, have)
    assert parts[:2] == [RunFilePart(b'{"status": "completed"}'), JournalPart(4, b"two\n")]
    assert [type(part).__name__ for part in parts[2:]] == ["EventsPart", "PointsPart"]
    database.close()
    assert all_parts(tail, have) == [], "sealed, and the same points"


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    tail, have = FolderTail(tmp_path), Have()
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b"one\ntw")
    assert all_parts(tail, have) == [JournalPart(0, b"one\n")]
    file.write_bytes(b"one\n")  # torn, and repaired
    assert all_parts(tail, have) == []
    file.write_bytes(b"one\nthree\n")
    assert all_parts(tail, have) == [JournalPart(4, b"three\n")]


def test_a_long_journal_comes_in_pieces_that_a_server_takes(tmp_path: Path) -> None:
    content = b"".join(b'{"seq":%d}\n' % number for number in range(100_000)) + b"x" * PART_BYTES + b"\nlast\n"
    (tmp_path / "journal.jsonl").write_bytes(content + b"torn")
    assert journal_of(all_parts(FolderTail(tmp_path), Have())) == content


@pytest.mark.parametrize(
    ("copy", "offset"),
    [(b"one\n", 4), (b"one\ntwo\n", None), (b"", 0), (b"another\n", 0), (b"one\ntwo\nthree\n", 0)],
)
def test_a_copy_that_is_not_of_this_journal_is_sent_anew(tmp_path: Path, copy: bytes, offset: int | None) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"one\ntwo\n")
    tail, have = FolderTail(tmp_path), Have(journal=len(copy), journal_checksum=checksum(copy))
    tail.verify(have)
    assert [part.offset for part in all_parts(tail, have) if isinstance(part, JournalPart)] == (
        [] if offset is None else [offset]
    )


def test_a_journal_that_lost_its_end_is_sent_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"one\n")
    have = Have(journal=8)  # of a machine that went down before its disk had all of it
    assert all_parts(FolderTail(tmp_path), have) == [JournalPart(0, b"one\n")]


def test_a_run_file_that_is_too_long_is_not_sent(tmp_path: Path) -> None:
    tail, have = FolderTail(tmp_path), Have()
    (tmp_path / "run.json").write_text(json.dumps({"config": "x" * PART_BYTES}))
    (tmp_path / "journal.jsonl").write_bytes(b"one\n")
    assert all_parts(tail, have) == [JournalPart(0, b"one\n")]
    assert tail.too_long > PART_BYTES
    (tmp_path / "run.json").write_text("{}")
    assert all_parts(tail, have) == [RunFilePart(b"{}")]
    assert tail.too_long == 0


def test_where_there_is_no_room_only_the_run_file_is_sent(tmp_path: Path) -> None:
    tail, have = FolderTail(tmp_path), Have(room=False)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "journal.jsonl").write_bytes(b"one\n")
    assert all_parts(tail, have) == [RunFilePart(b"{}")]
    have.room = True
    assert all_parts(tail, have) == [JournalPart(0, b"one\n")]


def test_what_was_not_stored_is_read_again(tmp_path: Path) -> None:
    database = RunDatabase(tmp_path / "run.db")
    database.begin_life(0)
    database.write([(1.0, step, ("loss",), (0.5,)) for step in range(10)])
    tail = FolderTail(tmp_path)
    first = tail.parts(Have())
    assert first
    tail.reset()
    assert tail.parts(Have()) == first
    database.close()
