"""`aetheria up`, `set`, `watch` and the others, against a real hub and a run that answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import typer
from tests.freezing import frozen
from typer.testing import CliRunner, Result

import aetheria
from aetheria.cli import app
from aetheria.cli._steering import outcome_in_words, parse_values
from aetheria.cli.watch import sparkline
from aetheria.protocol import Outcome
from hub_cases import HubProcess, running_hub, running_trainer, wait_for


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def name(process: HubProcess) -> Iterator[str]:
    with running_trainer(process) as run_id:
        with aetheria.connect(process.url, process.operator) as hub:
            wait_for(lambda: run_id in [run.id for run in hub.runs()] and hub.run(run_id).knobs.schema, "the run")
        yield run_id


@pytest.fixture(autouse=True)
def _environment(process: HubProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(process.home))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# --- steering --------------------------------------------------------------------------------------------------------


def test_set_says_what_changed_in_one_sentence(name: str) -> None:
    assert call("set", "@last", "learning_rate=0.001").exit_code == 0
    result = call("set", "digits", "learning_rate=1e-4", "optimizer=adamw", "--reason", "plateau")
    assert result.exit_code == 0, result.output
    assert "learning_rate 0.001 -> 0.0001, optimizer sgd -> adamw at step" in result.stdout
    assert "(revision 2)" in result.stdout
    assert call("get", "@last", "learning_rate").stdout == "0.0001\n"
    assert json.loads(call("get", "@last", "--json").stdout)["optimizer"] == "adamw"
    assert "optimizer=adamw\n" in call("get", "@last").stdout


def test_a_refusal_is_a_sentence_and_exit_code_1(name: str) -> None:
    result = call("set", "@last", "learning_rate=7")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "learning_rate = 7 is refused" in result.stderr
    result = call("set", "@last", "learning_rate=0.5", "--expect-revision", "99", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["state"] == "rejected"
    assert call("rewind", "@last", "3").exit_code == 1
    assert call("run-for", "@last", "--steps", "3").exit_code == 1


def test_a_dry_run_says_what_would_be(name: str) -> None:
    result = call("set", "@last", "learning_rate=0.5", "--dry-run")
    assert result.exit_code == 0
    assert "learning_rate = 0.5 would be accepted at step" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pause", "@last"], "paused at step"),
        (["resume", "@last"], "resumed at step"),
        (["validate", "@last"], "val_loss 0.25"),
        (["note", "@last", "a thought"], "noted at step"),
        (["ping", "@last"], "alive at step"),
        (["snapshot", "take", "@last", "--name", "best", "--pinned"], "snapshot taken at step"),
    ],
)
def test_the_other_commands(name: str, arguments: list[str], said: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert result.stdout.count("\n") == 1
    assert json.loads(call(*arguments, "--json").stdout)["state"] == "applied"


def test_knobs_are_listed(name: str) -> None:
    assert "a number, >= 0, <= 1" in " ".join(call("knobs", "@last").stdout.split())
    assert call("knobs", "@last", "--markdown").stdout.startswith("| knob | value |")
    assert "learning_rate" in json.loads(call("knobs", "@last", "--json").stdout)["schema"]["properties"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["set", "@last", "learning_rate"],
        ["set", "@last", "=1"],
        ["set", "@last", "a=1", "a=2"],
        ["run-for", "@last"],
        ["run-for", "@last", "--steps", "1", "--epochs", "1"],
        ["set", "nobody", "a=1"],
        ["get", "@last", "nothing"],
        ["ping", "nobody"],
    ],
)
def test_wrong_usage_is_exit_code_2(name: str, arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_a_run_that_does_not_answer_is_exit_code_1(name: str) -> None:
    with aetheria.connect() as hub:
        pid = hub.run(name).status.pid
    with frozen(pid):
        result = call("ping", "@last", "--timeout", "0.2")
    assert result.exit_code == 1
    assert "has not said anything yet" in result.stderr


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_status_shows_the_hub_and_its_runs(process: HubProcess, name: str) -> None:
    result = call("status")
    assert result.exit_code == 0
    assert f"The hub is running: {process.url}" in result.stdout
    assert f"{process.url}/?token=" in result.stdout
    assert name in result.stdout
    known = json.loads(call("status", "--json").stdout)
    assert (known["running"], known["runs"][0]["id"]) == (True, name)
    assert process.operator not in call("status", "--json").stdout


def test_without_a_hub_every_command_is_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path))
    for arguments in (["status"], ["down"], ["ping", "x"], ["set", "x", "a=1"], ["watch", "x"], ["knobs", "x"]):
        result = call(*arguments)
        assert (result.exit_code, result.stdout) == (3, ""), arguments
        assert result.stderr == "No hub is running. Start one with: aetheria up\n"
    assert json.loads(call("status", "--json").stdout) == {"running": False}


def test_up_in_the_background_and_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path))
    try:
        result = call("up", "--detach")
        assert result.exit_code == 0, result.output
        assert "The hub is running: http://127.0.0.1:" in result.stdout
        again = call("up", "--detach")
        assert again.exit_code == 2
        assert "A hub is running already" in again.stderr
    finally:
        ended = call("down")
    assert (ended.exit_code, ended.stdout) == (0, "The hub has ended.\n")
    assert not (tmp_path / "hub" / "hub.json").exists()
    assert call("down").exit_code == 3


# --- watching --------------------------------------------------------------------------------------------------------


def test_watch_prints_lines_where_there_is_no_terminal_and_ends_at_ctrl_c(process: HubProcess, name: str) -> None:
    watcher = subprocess.Popen(
        [sys.executable, "-m", "aetheria", "watch", "@last"],
        env=process.environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    assert watcher.stdout.readline().startswith(f"{name}: ")
    line = watcher.stdout.readline()
    assert "loss" in line
    watcher.send_signal(signal.SIGINT)
    _, errors = watcher.communicate(timeout=20)
    assert (watcher.returncode, errors) == (0, "")


def test_watch_leaves_the_terminal_as_it_was(process: HubProcess, name: str) -> None:
    environment = process.environment | {"TERM": "xterm-256color"}
    terminal = pexpect.spawn(
        sys.executable, ["-m", "aetheria", "watch", "@last"], env=environment, encoding="utf-8", timeout=120
    )
    terminal.expect("loss")
    terminal.expect("knobs")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "Traceback" not in terminal.before
    assert terminal.before.count("\x1b[?25l") <= terminal.before.count("\x1b[?25h")  # the cursor is there again


def test_watch_once_shows_metrics_knobs_and_commands(name: str) -> None:
    call("note", "@last", "look here")
    shown = call("watch", "@last", "--once").stdout
    assert name in shown
    assert "loss" in shown
    assert "learning_rate" in shown
    assert "noted at step" in shown
    assert json.loads(call("watch", "@last", "--once", "--json").stdout)["id"] == name


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, float("nan"), 0.5]) in ("▁█ ▄", "▁█ ▅")
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("inf")]) == " "


# --- words -----------------------------------------------------------------------------------------------------------


def test_values_are_json_or_text() -> None:
    pairs = ["a=1e-4", "b=.5", "c=true", "d=adamw", 'e=["x", 1]', "f=NaN", "g=a=b", "h=", "i=1.", "j=null"]
    expected = {"a": 1e-4, "b": 0.5, "c": True, "d": "adamw", "e": ["x", 1], "f": "NaN", "g": "a=b", "h": "", "i": 1.0}
    assert parse_values(pairs) == expected | {"j": None}
    with pytest.raises(typer.BadParameter, match="expected KEY=VALUE"):
        parse_values(["a"])


def test_outcomes_in_words() -> None:
    def outcome(**fields: object) -> Outcome:
        return Outcome(command="0123456789", step=1240, revision=3, **fields)  # type: ignore[arg-type]

    result = {"before": {"learning_rate": 0.001}, "after": {"learning_rate": 0.0001}}
    told = outcome_in_words("set", outcome(state="applied", result=result, message="the schedule goes on from there"))
    assert told == "learning_rate 0.001 -> 0.0001 at step 1,240 (revision 3): the schedule goes on from there"
    assert (
        outcome_in_words("stop", outcome(state="rejected", message="no"))
        == "stop rejected at step 1,240 (revision 3): no"
    )
