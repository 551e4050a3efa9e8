"""The journal: torn, damaged, on a full disk; and what it says that must be done again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aetheria.control.journal import Journal, effective, read_journal
from aetheria.errors import RunFolderError
from aetheria.protocol import AnyCommand, Outcome, command_of


def set_(**values: Any) -> AnyCommand:
    return command_of("set", {"values": values}, run="a-run")


def accept(journal: Journal, command: AnyCommand, step: int = 1, **options: Any) -> AnyCommand:
    journal.append(Outcome(command=command.id, state="accepted", step=step), command, **options)
    return command


def end(journal: Journal, command: AnyCommand, state: Any = "applied", **options: Any) -> None:
    position = options.pop("position", None)
    journal.append(Outcome(command=command.id, state=state, **options), position=position)


def do(journal: Journal, command: AnyCommand, step: int = 1, position: int | None = None) -> AnyCommand:
    accept(journal, command, step)
    end(journal, command, step=step, revision=journal.revision + 1, position=position)
    return command


def ids(journal: Journal, position: int = 0) -> list[str]:
    return [command.id for _, command, _ in journal.behind(position)]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.jsonl")
    yield opened
    opened.close()


def reopened(journal: Journal) -> Journal:
    return Journal(journal.path)


def test_what_was_written_is_there_when_it_is_opened_again(journal: Journal) -> None:
    command = do(journal, set_(a=1), step=5)
    refused = set_(b=2)
    journal.append(Outcome(command=refused.id, state="rejected", message="no"), refused, durable=False)
    again = reopened(journal)
    assert again.entries == journal.entries == read_journal(journal.path)
    assert (again.position, again.revision, again.repaired) == (3, 1, "")
    assert again.command(command.id) == command
    outcome = again.outcome(refused.id)
    assert outcome is not None
    assert outcome.state == "rejected"
    assert again.outcome("12345678") is None
    assert again.command("12345678") is None
    again.close()


def test_there_need_be_none(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal.jsonl") == []
    (tmp_path / "journal.jsonl").touch()
    opened = Journal(tmp_path / "journal.jsonl")
    assert (opened.position, opened.revision, opened.repaired) == (0, 0, "")
    opened.close()


def test_nobody_else_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Journal(tmp_path / "journal.jsonl").close()
    finally:
        os.umask(before)
    assert (tmp_path / "journal.jsonl").stat().st_mode & 0o777 == 0o600


@given(lost=st.integers(1, 10_000), rubbish=st.binary(max_size=20).filter(lambda data: b"\n" not in data))
def test_torn_anywhere_in_its_last_line_the_others_stay(
    tmp_path_factory: pytest.TempPathFactory, lost: int, rubbish: bytes
) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal.jsonl"
    journal = Journal(path)
    first = do(journal, set_(a=1))
    whole = path.stat().st_size
    last = accept(journal, set_(b=2))
    journal.close()
    data = path.read_bytes()
    keep = max(len(data) - lost, whole)
    path.write_bytes(data[:keep] + rubbish)
    again = Journal(path)
    torn = len(data[:keep] + rubbish) - whole
    assert [entry.outcome.command for entry in again.entries] == [first.id, first.id]
    assert path.stat().st_size == whole
    assert again.repaired == (f"the last line of journal.jsonl was torn ({torn} bytes); it is cut off." if torn else "")
    again.append(Outcome(command=last.id, state="accepted"), last)
    again.close()
    assert [entry.seq for entry in read_journal(path)] == [1, 2, 3]


@pytest.mark.parametrize("rubbish", [b"\0" * 300 + b"\n", b'{"seq": 3\n', b"\xff\xfe\n", b"{}\n", b"\n"])
def test_a_last_line_of_rubbish_is_torn_too(journal: Journal, rubbish: bytes) -> None:
    do(journal, set_(a=1))
    with journal.path.open("ab") as file:
        file.write(rubbish)
    assert len(read_journal(journal.path)) == 2, "reading changes nothing, and goes as far as it can"
    again = reopened(journal)
    assert again.repaired
    assert again.position == 2
    again.close()


@pytest.mark.parametrize("damage", [b"\xff", b"\n", b"\0"])
def test_a_damaged_line_in_the_middle_is_told_with_its_number(journal: Journal, damage: bytes) -> None:
    for value in range(3):
        do(journal, set_(a=value))
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:40] + damage + lines[2][41:]
    journal.path.write_bytes(b"".join(lines))
    for opening in (reopened, lambda one: read_journal(one.path)):
        with pytest.raises(RunFolderError, match=r"line 3 cannot be read.*restore it from a copy"):
            opening(journal)


def test_a_line_that_is_missing_is_noticed(journal: Journal) -> None:
    for value in range(3):
        do(journal, set_(a=value))
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(RunFolderError, match="line 3 says that it is number 4: lines are missing"):
        reopened(journal)


def test_before_a_snapshot_remembers_its_length_every_line_is_on_the_disk(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), real(file)))
    accept(journal, set_(a=1))
    assert len(synced) == 1
    accept(journal, set_(a=1), durable=False)
    assert len(synced) == 1
    journal.sync()
    journal.sync()
    assert len(synced) == 2


@pytest.mark.parametrize("small_disk", ["16k"], indirect=True)
def test_on_a_full_disk_no_line_is_half_written(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal.jsonl")
    long = {"values": {"a": "x" * 1500}}

    def fill() -> None:
        while True:
            accept(journal, command_of("set", long))

    with pytest.raises(OSError, match="No space left"):
        fill()
    written = journal.position
    assert written > 5
    assert len(journal.path.read_bytes().splitlines()) == written
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    accept(journal, set_(a=1))
    journal.close()
    assert [entry.seq for entry in read_journal(journal.path)] == list(range(1, written + 2))


# --- what must be done again -----------------------------------------------------------------------------------------
def test_behind_a_snapshot_lies_what_changes_training_and_what_was_not_finished(journal: Journal) -> None:
    do(journal, set_(before=1))
    position = journal.position
    again = do(journal, set_(a=1), step=5)
    do(journal, command_of("note", {"text": "done, and needs no doing again"}))
    failed = accept(journal, set_(a=2))
    end(journal, failed, "failed")
    refused = set_(a=3)
    journal.append(Outcome(command=refused.id, state="rejected"), refused)
    unfinished = accept(journal, command_of("note", {"text": "not done"}), step=8)
    assert ids(journal, position) == [again.id, unfinished.id]
    (accepted, _, latest), (_, _, open_still) = journal.behind(position)
    assert (accepted.state, accepted.step, latest.state, open_still.state) == ("accepted", 5, "applied", "accepted")
    assert ids(journal, journal.position) == []


def test_a_command_accepted_before_a_snapshot_is_not_behind_it_though_its_outcome_is(journal: Journal) -> None:
    command = accept(journal, set_(a=1))
    position = journal.position
    end(journal, command, revision=1)
    assert ids(journal, position) == []
    assert ids(journal) == [command.id]


def rewind(step: int) -> AnyCommand:
    return command_of("rewind", {"step": step})


def test_what_a_rewind_undid_is_not_done_again(journal: Journal) -> None:
    kept = do(journal, set_(a=1), step=3)
    position = journal.position  # of a snapshot at step 5
    do(journal, set_(a=2), step=7)
    do(journal, rewind(5), step=9, position=position)
    after = do(journal, set_(a=3), step=6)
    assert ids(journal) == [kept.id, after.id]
    assert ids(journal, position) == [after.id]


def test_rewinds_within_rewinds(journal: Journal) -> None:
    first = do(journal, set_(a=1), step=3)
    at_5 = journal.position
    do(journal, set_(a=2), step=7)
    at_10 = journal.position
    do(journal, set_(a=3), step=12)
    do(journal, rewind(10), step=13, position=at_10)
    do(journal, set_(a=4), step=11)
    do(journal, rewind(5), step=14, position=at_5)  # undoes all of it, the first rewind as well
    second = do(journal, set_(a=5), step=8)
    at_10_again = journal.position
    do(journal, set_(a=6), step=12)
    do(journal, rewind(10), step=15, position=at_10_again)
    last = do(journal, set_(a=7), step=16)
    assert ids(journal) == [first.id, second.id, last.id]
    assert [entry.seq for entry in effective(journal.entries, at_10_again)] == [journal.position - 1]
    do(journal, rewind(0), step=20, position=0)
    assert ids(journal) == []


def test_a_rewind_that_was_not_finished_is_finished(journal: Journal) -> None:
    position = journal.position
    change = do(journal, set_(a=2), step=7)
    going_back = accept(journal, rewind(5), step=9)
    assert ids(journal, position) == [change.id, going_back.id]
    end(journal, going_back, position=position, step=5)
    assert ids(journal, position) == []


def test_a_rewind_that_failed_undid_nothing(journal: Journal) -> None:
    change = do(journal, set_(a=2), step=7)
    going_back = accept(journal, rewind(5), step=9)
    end(journal, going_back, "failed")
    assert ids(journal) == [change.id]
