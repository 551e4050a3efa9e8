"""`aetheria runs`, `show`, `plot`, on run folders made by hand."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from aetheria.cli.runs import plot, runs, show
from aetheria.config import TrainingConfig
from aetheria.loom.database import Event, MetricRecord, Note, RunDatabase
from aetheria.loom.reader import RunReader

app = typer.Typer()
for command in (runs, show, plot):
    app.command()(command)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def records(steps: range) -> list[MetricRecord]:
    """Training metrics at every tenth step, validation metrics at every hundredth; the best is at step 200."""
    made: list[MetricRecord] = []
    for step in steps:
        if step % 10 == 0:
            metrics = {"loss": math.exp(-step / 60), "learning_rate": 1e-3}
            made.append((1e9 + step, step, tuple(metrics), tuple(metrics.values())))
        if step % 100 == 0:
            metrics = {"val_loss": 0.1 + abs(step - 200) / 1000, "val_accuracy": 0.9 - abs(step - 200) / 1000}
            made.append((1e9 + step, step, tuple(metrics), tuple(metrics.values())))
    return made


def make_run(runs_dir: Path, name: str, lives: tuple[tuple[int, int], ...] = ((0, 300),), **fields: Any) -> Path:
    folder = runs_dir / name
    folder.mkdir(parents=True)
    for start, end in lives:
        database = RunDatabase(folder / "run.db")
        database.begin_life(start, started=1e9 + start)
        event = Event(1e9 + end, end, "nonfinite", "a window was dropped", {"loss": math.nan})
        database.write(records(range(start + 1, end + 1)), [event], [Note(1e9, end, "ada", "a [note]")])
        database.close()
    content = {
        "format": 1,
        "run_id": name,
        "name": name,
        "created": "2026-01-02T03:04:05+00:00",
        "status": "completed",
        "status_detail": "all epochs are done",
        "global_step": 300,
        "config": TrainingConfig(epochs=3, model_name="SimpleMLP", model_params={"hidden_size": 7}).resolved(),
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "0123abc", "changes": "f00"},
        "command": ["aetheria", "train", "my config.yaml"],
        "directory": "/home/ada",
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    (folder / "run.json").write_text(json.dumps(content | fields), encoding="utf-8")
    return folder


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder, "digits-one-a1")
    make_run(folder, "digits-two-b2", lives=((0, 250), (150, 300)), created="2026-01-03T00:00:00+00:00")
    return folder


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_lists_the_newest_first(runs_dir: Path) -> None:
    result = call("runs", "--runs-dir", runs_dir)
    assert result.exit_code == 0
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == ["run", "status", "step", "metric", "last", "best", "age"]
    assert [line.split()[:6] for line in lines] == [
        ["digits-two-b2", "completed", "300", "val_loss", "0.2", "0.1"],
        ["digits-one-a1", "completed", "300", "val_loss", "0.2", "0.1"],
    ]


def test_runs_as_json(runs_dir: Path) -> None:
    two, one = json.loads(call("runs", "--json", "--runs-dir", runs_dir).stdout)
    assert (two["run_id"], one["run_id"]) == ("digits-two-b2", "digits-one-a1")
    assert one["status"] == "completed"
    assert one["global_step"] == 300
    assert one["last"]["val_loss"] == {"step": 300, "value": 0.2}
    assert one["best"] == {"metric": "val_loss", "mode": "min", "step": 200, "value": 0.1}
    assert one["age_seconds"] > two["age_seconds"] > 0
    assert one["error"] is None


def test_runs_judges_by_what_the_best_snapshots_are_kept_by(tmp_path: Path) -> None:
    keep_best = {"metric": "val_accuracy", "mode": "max", "k": 1}
    make_run(tmp_path, "a", config=TrainingConfig(epochs=1, snapshots={"keep_best": keep_best}).resolved())
    (line,) = json.loads(call("runs", "--json", "--runs-dir", tmp_path).stdout)
    assert line["best"] == {"metric": "val_accuracy", "mode": "max", "step": 200, "value": 0.9}


def test_runs_without_runs_says_how_to_start_one(tmp_path: Path) -> None:
    result = call("runs", "--runs-dir", tmp_path / "none")
    assert result.exit_code == 0
    assert "aetheria train CONFIG" in result.stdout
    assert json.loads(call("runs", "--json", "--runs-dir", tmp_path).stdout) == []


def test_a_damaged_run_does_not_hide_the_others(runs_dir: Path) -> None:
    (runs_dir / "digits-one-a1" / "run.json").write_text("{", encoding="utf-8")
    (runs_dir / "digits-two-b2" / "run.db").write_text("no database\n" * 100, encoding="utf-8")
    result = call("runs", "--runs-dir", runs_dir)
    assert result.exit_code == 0
    assert re.search(r"digits-one-a1 +damaged", result.stdout)
    assert re.search(r"digits-two-b2 +completed +300", result.stdout)
    assert "digits-one-a1: cannot read" in result.stderr
    assert "file is not a database" in result.stderr


def test_a_run_without_metrics_is_listed(tmp_path: Path) -> None:
    (make_run(tmp_path, "young", status="running", global_step=0) / "run.db").unlink()
    result = call("runs", "--runs-dir", tmp_path)
    assert re.search(r"young +killed +0 ", result.stdout)  # nobody holds its lock


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_tells_what_a_run_is(runs_dir: Path) -> None:
    snapshots = runs_dir / "digits-two-b2" / "snapshots"
    for step in (100, 200):
        (snapshots / f"step-{step:08d}").mkdir(parents=True)
        manifest = {"step": step, "epoch": 0, "created": "2026-01-03T00:00:00+00:00", "reason": "every epoch"}
        manifest |= {"metrics": {"val_loss": 0.25}, "pinned": False, "files": {"model.safetensors": {"bytes": 9}}}
        (snapshots / f"step-{step:08d}" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (snapshots / "step-00000200" / "manifest.json").write_text("{", encoding="utf-8")
    (snapshots / "step-00000300.tmp").mkdir()
    result = call("show", "@last", "--runs-dir", runs_dir)
    assert result.exit_code == 0
    for line in (
        "digits-two-b2",
        r"status +completed: all epochs are done",
        r"step +300",
        r"command +aetheria train 'my config.yaml' +in /home/ada",
        r"resumed +1 times, at step 150",
        r"code +git 0123abc with changes",
        r"epochs +3",
        r"model_params.hidden_size +7",
        r"val_accuracy +0.8 +300 +0.9 +200",
        r"learning_rate +0.001 +300 *$",
        r"step-00000100 .*val_loss 0.25",
        r"step-00000200 .*its manifest does not read",
        r"250 .*nonfinite +a window was dropped",
        r"ada +a \[note\]",
    ):
        assert re.search(line, result.stdout, re.MULTILINE), f"{line}\n{result.stdout}"
    assert "batch_size" not in result.stdout  # a default
    assert "step-00000300" not in result.stdout


def test_show_as_json_is_strict_json(runs_dir: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    content = json.loads(call("show", "one", "--json", "--runs-dir", runs_dir).stdout, parse_constant=refuse)
    assert content["run_id"] == "digits-one-a1"
    assert content["config_changes"] == {"epochs": 3, "model_name": "SimpleMLP", "model_params.hidden_size": 7}
    assert content["metrics"]["val_loss"] == {
        "last": {"step": 300, "value": 0.2},
        "best": {"step": 200, "value": 0.1},
    }
    assert content["events"][0]["data"] == {"loss": "NaN"}
    assert content["notes"][0]["text"] == "a [note]"
    assert content["lives"][0]["start_step"] == 0


def test_a_killed_run_says_how_to_continue(tmp_path: Path) -> None:
    make_run(tmp_path, "a1", status="running", status_detail="")
    result = call("show", "a1", "--runs-dir", tmp_path)
    assert re.search(r"status +killed *$", result.stdout, re.MULTILINE)
    assert "aetheria continue a1" in result.stdout


@pytest.mark.parametrize("command", ["show", "plot"])
def test_a_wrong_run_names_the_nearest(command: str, runs_dir: Path) -> None:
    result = call(command, "digits-one-a2", "--runs-dir", runs_dir)
    assert result.exit_code == 2
    assert "no run called 'digits-one-a2'" in result.stderr
    assert "'digits-one-a1'" in result.stderr
    assert call(command, "digits", "--runs-dir", runs_dir).exit_code == 2  # fits two


# --- plot ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "signature"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_draws_a_picture(runs_dir: Path, tmp_path: Path, suffix: str, signature: bytes) -> None:
    picture = tmp_path / f"curves.{suffix}"
    result = call("plot", "digits-two-b2", "-o", picture, "--runs-dir", runs_dir)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(picture)
    assert picture.read_bytes().startswith(signature)


def test_a_picture_says_whose_curves_these_are_and_what_happened(runs_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curves.svg"
    call("plot", "two", "-o", picture, "--runs-dir", runs_dir)
    text = picture.read_text(encoding="utf-8")
    for words in ("digits-two-b2", "loss", "accuracy", "learning rate", "training", "resumed: 1"):
        assert words in text
    assert "validation, best 0.9 at 200" in text
    assert "dropped, not finite: 2" in text
    call("plot", "two", "val_loss", "--compare", "one", "-o", picture, "--runs-dir", runs_dir)
    text = picture.read_text(encoding="utf-8")
    assert "digits-one-a1" in text
    assert "digits-two-b2" in text
    assert "accuracy" not in text


def test_plot_draws_in_the_terminal(runs_dir: Path) -> None:
    result = call("plot", "one", "loss", "learning_rate", "--runs-dir", runs_dir)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "loss"
    assert "learning rate" in lines
    assert max(len(line) for line in lines) <= 100
    result = call("plot", "one", "--compare", "two", "--runs-dir", runs_dir)
    assert "x digits-two-b2 training" in result.stdout


def test_a_family_is_drawn_by_its_name(runs_dir: Path) -> None:
    result = call("plot", "one", "accuracy", "--runs-dir", runs_dir)
    assert result.stdout.splitlines()[0] == "accuracy   ━━ validation, best 0.9 at 200"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_any_values_can_be_drawn(tmp_path: Path, value: float) -> None:
    folder = make_run(tmp_path, "odd")
    database = RunDatabase(folder / "run.db")
    database.begin_life(300)
    database.write([(0.0, 301, ("odd", "loss"), (value, value))])
    database.close()
    for options in ((), ("-o", tmp_path / "x.png")):
        result = call("plot", "odd", "odd", "loss", "--runs-dir", tmp_path, *options)
        assert result.exit_code == 0, result.output


def test_a_wrong_metric_names_the_nearest(runs_dir: Path) -> None:
    result = call("plot", "one", "los", "--runs-dir", runs_dir)
    assert result.exit_code == 2
    assert "digits-one-a1 has no metric called 'los'. Did you mean 'loss'" in result.stderr


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    (make_run(tmp_path, "young") / "run.db").unlink()
    result = call("plot", "young", "--runs-dir", tmp_path)
    assert result.exit_code == 2
    assert "young has no metrics yet" in result.stderr


def test_a_picture_that_cannot_be_made_is_refused(runs_dir: Path, tmp_path: Path) -> None:
    for name, words in (("x.gif", "png, svg, pdf"), ("x", "has no suffix"), ("no/such/x.png", "cannot write")):
        result = call("plot", "one", "-o", tmp_path / name, "--runs-dir", runs_dir)
        assert result.exit_code == 2
        assert words in result.stderr


# --- all -------------------------------------------------------------------------------------------------------------


def test_reading_changes_nothing(runs_dir: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in runs_dir.rglob("*") if path.is_file()}

    before = content()
    call("runs", "--runs-dir", runs_dir)
    call("show", "one", "--runs-dir", runs_dir)
    call("plot", "one", "--runs-dir", runs_dir)
    assert content() == before
    assert RunReader(runs_dir / "digits-one-a1" / "run.db").series()


def test_neither_torch_nor_matplotlib_is_imported(runs_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aetheria.cli.runs import runs, show, plot; "
        "folder = Path(sys.argv[1]); runs(folder); show('one', folder); "
        "assert not {'torch', 'matplotlib', 'plotext'} & set(sys.modules); "
        "plot('one', output=folder / 'x.png', runs_dir=folder); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(runs_dir)], check=True, capture_output=True)
