"""Run folders under fire: many who look, processes that fork and die, folders that move, files that make no sense."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aetheria.errors import RunFolderError
from aetheria.runs import RunFolder, describe_git, find_runs, resolve_run, write_atomically

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "run")


def in_another_process(question: str, path: Path) -> str:
    """Returns what an expression about `folder` is, in a process that has nothing to do with this one."""
    code = f"import sys\nfrom aetheria.runs import RunFolder\nfolder = RunFolder.open(sys.argv[1])\nprint({question})"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def forked(action: Any) -> int:
    """Runs something in a forked child and returns its exit code: 0 when it returned True."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 2
    try:
        code = 0 if action() is True else 1
    finally:
        os._exit(code)


# --- who looks is in nobody's way -------------------------------------------------------------------------------------
def look_for_ever(path: Path, ready: Any) -> None:
    folder = RunFolder.open(path)
    while True:
        folder.in_use()
        ready.set()


def test_who_looks_does_not_keep_anybody_from_training(folder: RunFolder) -> None:
    context = multiprocessing.get_context("fork")
    ready = [context.Event() for _ in range(2)]
    lookers = [context.Process(target=look_for_ever, args=(folder.path, event), daemon=True) for event in ready]
    folder.acquire()  # there is a lock to look at
    folder.release()
    for looker, event in zip(lookers, ready, strict=True):
        looker.start()
        assert event.wait(30)
    try:
        for _ in range(1500):
            folder.acquire()
            folder.release()
            assert folder.display_status() == "killed", "those who look do not take one another for a trainer"
    finally:
        for looker in lookers:
            looker.kill()
            looker.join()


def test_looking_does_not_let_go_of_the_lock(folder: RunFolder) -> None:
    folder.acquire()
    for same in (folder, RunFolder.open(folder.path), RunFolder.open(folder.path / ".." / folder.run_id)):
        assert same.in_use()
        assert same.display_status() == "created"
    assert in_another_process("folder.in_use()", folder.path) == "True"
    folder.release()
    assert in_another_process("folder.in_use()", folder.path) == "False"


def test_a_folder_that_is_moved_while_it_is_trained_in_stays_locked(folder: RunFolder, tmp_path: Path) -> None:
    folder.acquire()
    moved = tmp_path / "elsewhere"
    folder.path.rename(moved)
    assert RunFolder.open(moved).in_use()
    with pytest.raises(RunFolderError, match="in use by this very process"):
        RunFolder.open(moved).acquire()
    assert in_another_process("folder.in_use()", moved) == "True"
    folder.release()
    assert in_another_process("folder.in_use()", moved) == "False"


def test_a_copy_of_a_folder_in_use_is_not_in_use(folder: RunFolder, tmp_path: Path) -> None:
    folder.acquire()
    copy = RunFolder(shutil.copytree(folder.path, tmp_path / "copy"))
    assert not copy.in_use()
    assert folder.in_use()
    folder.release()


@pytest.mark.parametrize("lock", [True, False])
def test_a_folder_that_may_only_be_read(folder: RunFolder, lock: bool) -> None:
    if lock:
        folder.acquire()
        folder.release()
        (folder.path / ".lock").chmod(0o444)
    folder.path.chmod(0o555)
    try:
        assert not folder.in_use()
        assert folder.display_status() == "killed"
        if os.geteuid():
            with pytest.raises(RunFolderError, match="cannot write in"):
                folder.acquire()
    finally:
        folder.path.chmod(0o755)


# --- processes that fork ----------------------------------------------------------------------------------------------
def test_a_forked_child_holds_nothing_and_cannot_let_go(folder: RunFolder) -> None:
    folder.acquire()

    def child() -> bool:
        try:
            folder.acquire()
        except RunFolderError as error:
            refused = "trains in it" in str(error)
        folder.release()  # what it has inherited is not its own
        return refused and folder.in_use()

    assert forked(child) == 0
    assert in_another_process("folder.in_use()", folder.path) == "True"
    folder.release()
    assert forked(lambda: not folder.in_use()) == 0


def test_a_child_that_outlives_its_parent_may_take_over(folder: RunFolder) -> None:
    parent_gone, verdict = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        folder.acquire()
        if not os.fork():  # the grandchild
            os.close(parent_gone[1])
            os.read(parent_gone[0], 1)  # ends when nobody holds the other end
            ok = not folder.in_use()
            folder._lock = None
            folder.acquire()
            os.write(verdict[1], b"y" if ok else b"n")
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(parent_gone[1])
    os.close(verdict[1])
    assert os.read(verdict[0], 1) == b"y"


# --- files ------------------------------------------------------------------------------------------------------------
def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    chance = random.Random(2)
    file = tmp_path / "run.json"
    write_atomically(file, b'{"number": -1, "filler": ""}')
    for _ in range(30):
        if not (pid := os.fork()):
            for number in range(100_000):
                write_atomically(file, json.dumps({"number": number, "filler": "x" * (number % 50_000)}).encode())
        time.sleep(chance.uniform(0.0, 0.02))  # not to wait for anything: the instant of the kill
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        content = json.loads(file.read_bytes())
        assert content["filler"] == "x" * (max(content["number"], 0) % 50_000)


def test_who_takes_a_folder_tidies_up_after_who_was_killed(folder: RunFolder) -> None:
    (folder.path / ".run.json.4711.tmp").write_text("{half")
    folder.acquire()
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "run.json", "snapshots"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b'{"format": "x"}', b'{"format": null}', b"\xff", b"{}x"]
)
def test_a_damaged_run_json_is_an_error_with_its_name(folder: RunFolder, tmp_path: Path, content: bytes) -> None:
    (folder.path / "run.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"cannot read .*run\.json"):
        folder.read()
    sound = RunFolder.create(tmp_path / "runs", "sound")
    assert {run.run_id for run in find_runs(tmp_path / "runs")} == {folder.run_id, sound.run_id}


def test_what_has_no_place_is_no_run(tmp_path: Path) -> None:
    assert find_runs(tmp_path / "nowhere") == []
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == []
    assert find_runs(tmp_path / "file") == []


# --- making -----------------------------------------------------------------------------------------------------------
def test_two_runs_that_draw_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(10):  # the name also says the second, which may be over between the two
        drawn = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
        monkeypatch.setattr(secrets, "token_hex", lambda _, drawn=drawn: next(drawn))
        first, second = (RunFolder.create(tmp_path / str(attempt), "job").run_id for _ in range(2))
        if first[:-4] == second[:-4]:
            break
    assert (first[-4:], second[-4:]) == ("aaaa", "bbbb")


def test_runs_begun_in_the_same_second_are_in_order(tmp_path: Path) -> None:
    made = []
    for name in ("c", "a", "b", "a"):
        made.append(RunFolder.create(tmp_path, name).run_id)
        time.sleep(0.002)  # not to wait for anything: two runs are never begun in the same millisecond
    assert [run.run_id for run in find_runs(tmp_path)] == made[::-1]
    assert resolve_run("@last", tmp_path).run_id == made[-1]


@pytest.mark.parametrize("place", ["file", "dangling", "proc"])
def test_a_place_where_no_run_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "no" / "such" / "place")
    runs_dir = Path("/proc/none") if place == "proc" else tmp_path / place
    with pytest.raises(RunFolderError, match=r"cannot make a run folder in .*Choose a folder you may write to"):
        RunFolder.create(runs_dir, "run")


def test_what_could_not_be_made_whole_is_not_there(tmp_path: Path) -> None:
    """The folder can be made, but the files in it may not grow: as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(RunFolderError, match=r"cannot make a run folder in .*: File too large"):
            RunFolder.create(tmp_path, "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(RunFolderError, match="File name too long"):
        RunFolder.create(tmp_path, "x" * 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("a b/c", "a-b-c"),
        ("..", "run"),
        ("", "run"),
        ("Größe", "Gr-e"),
        ("-x-", "x"),
        ("../../etc", "etc"),
        ("v1.2_x", "v1.2_x"),
    ],
)
def test_names_become_names_of_folders(tmp_path: Path, name: str, prefix: str) -> None:
    folder = RunFolder.create(tmp_path, name)
    assert folder.path.parent == tmp_path
    assert folder.run_id.startswith(prefix + "-2")
    assert folder.read()["name"] == name


# --- finding ----------------------------------------------------------------------------------------------------------
def test_a_whole_name_wins_over_parts_of_others(tmp_path: Path) -> None:
    for name in ("digits", "digits-more", "more-digits"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"format": 1}')
    assert resolve_run("digits", tmp_path).run_id == "digits"
    assert resolve_run("more-", tmp_path).run_id == "more-digits"
    for text in ("", "-", "igit"):
        with pytest.raises(RunFolderError):
            resolve_run(text, tmp_path)


# --- the state of the code --------------------------------------------------------------------------------------------
def git(place: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=b", *arguments],
        check=True,
        capture_output=True,
    )


def test_describing_the_code_runs_nobodys_program(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    git(tmp_path, "config", "diff.external", f"touch {tmp_path / '.git' / 'was-run'}; true")
    (tmp_path / "code.py").write_text("2")
    found = describe_git(tmp_path)
    assert found is not None
    assert found["changes"] is not None
    assert not (tmp_path / ".git" / "was-run").exists()
    (tmp_path / "code.py").write_text("1")
    os.utime(tmp_path / "code.py", (1, 1))
    clean = describe_git(tmp_path)
    assert clean == {"commit": found["commit"], "changes": None}


def test_a_repository_without_a_commit_says_nothing(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert describe_git(tmp_path) is None


def test_no_git_at_all_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_git(tmp_path) is None
    assert RunFolder.create(tmp_path / "runs", "run").read()["git"] is None
