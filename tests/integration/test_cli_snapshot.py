"""`aetheria snapshot`: what it lists, and what it says about a flipped byte; and what `aetheria continue` does then."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aetheria.cli import app
from aetheria.config import TrainingConfig
from aetheria.loom.reader import RunReader
from aetheria.orchestrator import Orchestrator
from aetheria.snapshot import Snapshot, list_snapshots

FILES = ("model.safetensors", "state.pt", "rank-0000.pt", "manifest.json")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the snapshots of steps 8 and 12, the second of which has the smaller loss."""
    config = TrainingConfig(
        max_steps=12,
        accelerator="cpu",
        model_name="SimpleMLP",
        data_name="RandomData",
        data_params={"samples": 96, "batch_size": 8},
        val_interval=None,
        val_every_steps=4,
        snapshots={"every_steps": 4, "every_epochs": None, "keep_best": {"metric": "val_loss"}},
        loggers=[{"name": "ConsoleLogger", "params": {"metrics": False}}],
        runs_dir=str(tmp_path_factory.mktemp("runs")),
    )
    return Orchestrator.from_config(config).run().folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def newest(run):
    return sorted((run / "snapshots").iterdir())[-1]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- ls --------------------------------------------------------------------------------------------------------------


def test_ls_describes_every_snapshot(run):
    lines = json.loads(command("snapshot", "ls", run, "--json").stdout)
    assert [line["step"] for line in lines] == [8, 12]
    assert [line["best"] for line in lines] == [False, True]
    assert [line["pinned"] for line in lines] == [False, False]
    for line, snapshot in zip(lines, list_snapshots(run / "snapshots"), strict=True):
        sizes = [path.stat().st_size for path in snapshot.path.iterdir() if path.name != "manifest.json"]
        assert line["bytes"] == sum(sizes)
        assert line["metrics"] == snapshot.manifest.metrics
        assert line["reason"] == snapshot.manifest.reason


def test_ls_prints_a_table(run):
    output = command("snapshot", "ls", run.name, "--runs-dir", run.parent).stdout
    heading, *lines = output.splitlines()
    assert heading.split()[:3] == ["step", "epoch", "created"]
    for line, snapshot, marks in zip(lines, list_snapshots(run / "snapshots"), (0, 1), strict=True):
        manifest = snapshot.manifest
        assert line.split()[:2] == [str(manifest.step), str(manifest.epoch)]
        assert manifest.reason in line
        assert f"val_loss {manifest.metrics['val_loss']:.4g}" in line
        assert line.count("best") == manifest.reason.count("best") + marks


def test_ls_names_a_snapshot_whose_manifest_cannot_be_read(run):
    (newest(run) / "manifest.json").write_text("{")
    assert "step-00000012 its manifest does not read" in " ".join(command("snapshot", "ls", run).stdout.split())


def test_ls_of_a_run_without_snapshots(run):
    shutil.rmtree(run / "snapshots")
    assert command("snapshot", "ls", run).stdout == f"{run.name} has no snapshots yet.\n"


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_says_that_all_is_whole(run):
    result = command("snapshot", "verify", run)
    assert result.exit_code == 0
    assert result.stdout == "".join(f"whole    {path}\n" for path in sorted((run / "snapshots").iterdir()))


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_file_with_the_flipped_byte(run, name):
    flip(newest(run) / name)
    result = command("snapshot", "verify", run)
    whole, damaged = result.stdout.splitlines()
    assert result.exit_code == 1
    assert whole.startswith("whole ")
    assert damaged.startswith(f"damaged  {newest(run)}: ")
    assert name in damaged


@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_file_that_is_missing(run, name):
    (newest(run) / name).unlink()
    result = command("snapshot", "verify", newest(run))
    assert result.exit_code == 1
    assert name in result.stdout


def test_verify_checks_all_that_it_is_given(run):
    first, second = sorted((run / "snapshots").iterdir())
    flip(first / "state.pt")
    result = command("snapshot", "verify", first, second)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["damaged", "whole"]
    assert result.exit_code == 1


# --- digest ----------------------------------------------------------------------------------------------------------


def test_digest_is_that_of_the_weights(run):
    first, second = sorted((run / "snapshots").iterdir())
    result = command("snapshot", "digest", run, first)
    assert (
        result.stdout == f"{Snapshot(second).manifest.digest}  {second}\n{Snapshot(first).manifest.digest}  {first}\n"
    )


def test_digest_of_damaged_weights_is_refused(run):
    flip(newest(run) / "model.safetensors")
    result = command("snapshot", "digest", run)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "model.safetensors" in result.stderr


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_written_into_one_file_which_is_not_replaced_unasked(run, tmp_path):
    there = tmp_path / "weights.safetensors"
    result = command("snapshot", "weights", run, "-o", there)
    assert result.exit_code == 0, result.stderr
    assert there.read_bytes() == (newest(run) / "model.safetensors").read_bytes()
    there.write_text("precious")
    again = command("snapshot", "weights", run, "-o", there)
    assert (again.exit_code, there.read_text()) == (2, "precious")
    assert "--force" in again.stderr
    assert command("snapshot", "weights", run, "-o", there, "--force").exit_code == 0
    assert there.stat().st_size > 100


def test_weights_that_are_damaged_or_have_no_place_leave_nothing_behind(run, tmp_path):
    nowhere = command("snapshot", "weights", run, "-o", tmp_path / "missing" / "file")
    assert nowhere.exit_code == 2
    assert "cannot write" in nowhere.stderr
    flip(newest(run) / "model.safetensors")
    damaged = command("snapshot", "weights", run, "-o", tmp_path / "file")
    assert damaged.exit_code == 2
    assert "sha256" in damaged.stderr
    assert not list(tmp_path.glob("*file*"))


# --- wrong names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["ls", "verify", "digest"])
def test_an_unknown_run_is_told_with_its_nearest_name(run, action):
    result = command("snapshot", action, run.name[:-1] + "_", "--runs-dir", run.parent)
    assert result.exit_code == 2
    assert f"Did you mean '{run.name}'?" in result.stderr


# --- continue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_continue_names_the_damaged_file_and_uses_the_snapshot_before(trained, run, name):
    flip(newest(run) / name)
    result = command("continue", run, "-q", "--set", "max_steps=16")
    assert result.exit_code == 0, result.output
    [warning] = [event.message for event in RunReader(run / "run.db").events("warning")]
    assert name in warning
    assert "The snapshot before it is used." in warning
    assert json.loads((run / "run.json").read_text())["lives"][-1]["snapshot"] == "step-00000008"
    assert command("snapshot", "verify", run).exit_code == 0  # the damaged one was written anew, or has gone


def test_continue_refuses_when_every_snapshot_is_damaged(run):
    for snapshot in (run / "snapshots").iterdir():
        flip(snapshot / "state.pt")
    result = command("continue", run, "-q")
    assert result.exit_code == 2
    assert "every snapshot of" in result.stderr
    assert result.stderr.count("state.pt") == 2
