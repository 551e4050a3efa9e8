"""Replicas: what they may be called, and whose a folder is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aetheria.config import TrainingConfig
from aetheria.errors import ConfigError, RunFolderError
from aetheria.replicas import Membership, check_replica_id, claim_replica, membership, replica_run
from aetheria.runs import RunFolder, resolve_run

HOLDER = """
import sys, time
from pathlib import Path
from aetheria.replicas import claim_replica
claim_replica(Path(sys.argv[1]), "pretrain", "a")
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("text", ["a", "0", "node-7", "A_b.c", "x" * 64])
def test_what_a_replica_may_be_called(text: str) -> None:
    check_replica_id(text)
    assert TrainingConfig(epochs=1, run_name="pretrain", replica_id=text).replica_id == text


@pytest.mark.parametrize("text", ["", ".a", "-a", "a@b", "a/b", "a b", "ä", "x" * 65, "a\n"])
def test_what_it_may_not_be_called(text: str) -> None:
    with pytest.raises(ConfigError, match=r"replica_id: found .*, expected a text of letters, digits"):
        check_replica_id(text)
    with pytest.raises(ConfigError, match=r"replica_id: found .*, expected a text of letters, digits"):
        TrainingConfig(epochs=1, run_name="pretrain", replica_id=text)


def test_a_number_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found 0, expected a text"):
        check_replica_id(0)


def test_a_replica_says_whose_it_is() -> None:
    with pytest.raises(ConfigError, match=r"replica_id: found without run_name.*Add run_name"):
        TrainingConfig(epochs=1, replica_id="a")


def test_a_folder_is_found_again(tmp_path: Path) -> None:
    folder, is_new = claim_replica(tmp_path / "runs", "pre train", "a", seed=3)
    assert (folder.run_id, is_new) == ("pre-train@a", True)
    assert folder.path == tmp_path / "runs" / replica_run("pre-train", "a")
    content = folder.read()
    assert (content["group"], content["replica"], content["name"], content["seed"]) == (
        "pre-train",
        "a",
        "pre-train",
        3,
    )
    assert membership(folder.run_id, content) == ("pre-train", "a")
    folder.update(status="completed")
    folder.release()
    again, is_new = claim_replica(tmp_path / "runs", "pre train", "a", seed=4)
    assert (again.path, is_new) == (folder.path, False)
    assert (again.read()["seed"], again.read()["status"]) == (3, "completed")
    again.release()


def test_two_processes_are_not_one_replica(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=rf"in use: process {holder.pid} on") as refused:
            claim_replica(tmp_path, "pretrain", "a")
        assert "Each replica needs an id of its own" in refused.value.__notes__[0]
        other, _ = claim_replica(tmp_path, "pretrain", "b")
        other.release()
    finally:
        holder.kill()
        holder.communicate()
    folder, is_new = claim_replica(tmp_path, "pretrain", "a")  # the kernel has let go of it at once
    assert not is_new
    folder.release()


def test_one_that_was_killed_while_it_began_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "pretrain@a").mkdir()
    folder, is_new = claim_replica(tmp_path, "pretrain", "a")
    assert is_new
    assert membership(folder.run_id, folder.read()) == Membership("pretrain", "a")
    folder.release()


def test_a_copy_is_a_run_of_its_own(tmp_path: Path) -> None:
    folder, _ = claim_replica(tmp_path, "pretrain", "a")
    folder.release()
    copied = folder.path.rename(tmp_path / "pretrain@a-copy")
    assert membership(copied.name, RunFolder(copied).read()) == Membership()
    copied.rename(tmp_path / "pretrain@b")
    with pytest.raises(RunFolderError, match="is there already, and not that of replica 'b' of pretrain"):
        claim_replica(tmp_path, "pretrain", "b")
    assert membership("digits-1", {}) == Membership()


def test_a_folder_that_cannot_be_made_or_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot make the run folder .*Choose a folder you may write to"):
        claim_replica(tmp_path / "file", "pretrain", "a")
    (tmp_path / "pretrain@a").mkdir()
    (tmp_path / "pretrain@a" / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot read"):
        claim_replica(tmp_path, "pretrain", "a")
    (tmp_path / "pretrain@a" / "run.json").unlink()
    claim_replica(tmp_path, "pretrain", "a")[0].release()  # and it was not left locked


def test_the_name_of_a_run_with_replicas_lists_them(tmp_path: Path) -> None:
    for replica in "ab":
        claim_replica(tmp_path, "pretrain", replica)[0].release()
    with pytest.raises(RunFolderError, match=r"is a run of 2 replicas: pretrain@\w, pretrain@\w\. Choose one"):
        resolve_run("pretrain", tmp_path)
    assert resolve_run("pretrain@b", tmp_path).run_id == "pretrain@b"
    assert json.loads((resolve_run("@a", tmp_path).path / "run.json").read_text())["replica"] == "a"


def test_a_job_is_called_like_its_replica(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from aetheria.cli import app

    (tmp_path / "config.yaml").write_text("epochs: 1\nrun_name: pretrain\nreplica_id: node_7\n")
    result = CliRunner().invoke(app, ["launch", "--slurm", "--nodes", "1", str(tmp_path / "config.yaml")])
    assert result.exit_code == 0, result.output
    assert "--job-name=pretrain-node-7\n" in result.stdout  # or one job would take the other's place
