"""The run folder: one writer, always whole, and honest about who died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aetheria.errors import RunFolderError
from aetheria.runs import RunFolder, describe_git, find_runs, resolve_run, write_atomically

HOLDER = """
import sys, time
from aetheria.runs import RunFolder
folder = RunFolder.open(sys.argv[1])
folder.acquire()
folder.update(status="running")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "a name/with: signs")


def hold(folder: RunFolder) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_new_folder_says_what_it_is(folder: RunFolder) -> None:
    content = folder.read()
    assert folder.run_id.startswith("a-name-with-signs-")
    assert content["run_id"] == folder.run_id
    assert content["pid"] == os.getpid()
    assert set(content["versions"]) == {"python", "aetheria", "torch", "numpy"}
    assert folder.snapshots.is_dir()
    folder.update(extra=[1])
    assert folder.read() == content | {"extra": [1]}


def test_one_process_at_a_time(folder: RunFolder) -> None:
    holder = hold(folder)
    assert folder.in_use()
    assert folder.display_status() == "running"
    with pytest.raises(RunFolderError, match=r"in use: process \d+ on .* trains in it"):
        folder.acquire()
    end(holder)  # SIGKILL: the kernel lets go of the lock at once
    assert not folder.in_use()
    assert folder.display_status() == "killed"
    folder.acquire()
    with pytest.raises(RunFolderError, match="in use by this very process"):
        RunFolder.open(folder.path).acquire()
    folder.release()
    folder.acquire()
    folder.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_worker_does_not_keep_the_lock_of_a_dead_trainer(folder: RunFolder) -> None:
    code = HOLDER.replace("time.sleep(60)", "import os\nif os.fork() == 0: time.sleep(60)\nos.kill(os.getpid(), 9)")
    command = [sys.executable, "-c", code, str(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.wait(30) == -signal.SIGKILL
    try:
        assert not folder.in_use()
        folder.acquire()
        folder.release()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no run.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot read"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(RunFolderError, match="format 2; this version of Aetheria reads format 1"):
        RunFolder.open(tmp_path)


def test_runs_are_found_by_path_part_or_age(tmp_path: Path) -> None:
    for number, name in enumerate(("digits-a", "digits-b", "words")):
        (tmp_path / name).mkdir()
        content = {"format": 1, "run_id": name, "created": f"2026-01-0{number + 1}T00:00:00+00:00"}
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    (tmp_path / "not-a-run").mkdir()
    assert [run.run_id for run in find_runs(tmp_path)] == ["words", "digits-b", "digits-a"]
    assert resolve_run("@last", tmp_path).run_id == "words"
    assert resolve_run("-b", tmp_path).run_id == "digits-b"
    assert resolve_run(tmp_path / "digits-a", Path("nowhere")).run_id == "digits-a"
    with pytest.raises(RunFolderError, match="'digits' fits 2 runs: digits-b, digits-a"):
        resolve_run("digits", tmp_path)
    with pytest.raises(RunFolderError, match=r"no run called 'wrods' in .* Did you mean 'words'"):
        resolve_run("wrods", tmp_path)
    with pytest.raises(RunFolderError, match="there are no runs"):
        resolve_run("@last", tmp_path / "not-a-run")


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "not bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_code_is_pointed_at_but_not_brought_along(folder: RunFolder, tmp_path: Path) -> None:
    folder.update(config_source=str(tmp_path / "config.yaml"))
    assert folder.config_source() == tmp_path / "config.yaml"
    (folder.path / "plugins").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "plugins").symlink_to(folder.path / "plugins")
    for source in (folder.path / "config.yaml", tmp_path / "elsewhere" / "config.yaml", "config.yaml",
                   "/proc/self/cwd/config.yaml", None):  # fmt: skip
        folder.update(config_source=str(source) if source else None)
        assert folder.config_source() is None, source


def test_the_state_of_the_code(tmp_path: Path) -> None:
    assert describe_git(tmp_path) is None
    for command in ("init -q", "-c user.name=a -c user.email=b commit -q --allow-empty -m x"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    clean = describe_git(tmp_path)
    assert clean is not None
    assert clean["changes"] is None
    (tmp_path / "new.py").write_text("1")
    dirty = describe_git(tmp_path)
    assert dirty is not None
    assert dirty["commit"] == clean["commit"]
    assert dirty["changes"] is not None
