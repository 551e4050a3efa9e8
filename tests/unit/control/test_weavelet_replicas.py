"""A Weavelet that is a replica comes back to its folder, and to what it has been told there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aetheria.control.journal import Journal, read_journal
from aetheria.control.weavelet import Weavelet
from aetheria.errors import ConfigError, RunFolderError
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, Outcome, command_of
from scripted import ScriptedLine, journalled, set_, status_of


def begin(folder: Path, *commands: AnyCommand, replica: str = "a") -> tuple[Weavelet, ScriptedLine]:
    """Returns a Weavelet that has been told commands at its first step, and its line."""
    line = ScriptedLine({1: commands})
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    weavelet = Weavelet(replica, "pretrain", optimizer=optimizer, runs_dir=folder / "runs", line=line)
    line.weavelet = weavelet
    weavelet.start()
    weavelet.step()
    return weavelet, line


def test_it_comes_back_to_its_folder_and_its_journal(tmp_path: Path) -> None:
    told = set_(learning_rate=0.25)
    first, _ = begin(tmp_path, told)
    assert (first.run_id, first.replica_id) == ("pretrain@a", "a")
    first.stop("failed")
    again = set_(learning_rate=0.125)
    second, line = begin(tmp_path, told, again)
    assert second.folder == first.folder
    assert status_of(second) == "running"
    # What it was told in the life before is answered with the outcome that it had, and has no second effect.
    assert [outcome["result"].get("after") for outcome in line.outcomes(told)] == [{"learning_rate": 0.25}]
    assert line.outcome(again)["result"] == {"before": {"learning_rate": 0.5}, "after": {"learning_rate": 0.125}}
    assert line.outcome(again)["revision"] == 2
    second.stop()
    assert len([entry for entry in read_journal(second.folder / "journal.jsonl") if entry.command is not None]) == 2


def test_what_was_accepted_and_not_done_has_failed(tmp_path: Path) -> None:
    first, _ = begin(tmp_path)
    first.stop()
    left, done = command_of("pause"), command_of("note", {"text": "done"})
    journal = Journal(first.folder / "journal.jsonl")
    journal.append(Outcome(command=left.id, run=first.run_id, state="accepted", step=7), left)  # and here it was killed
    journal.append(Outcome(command=done.id, run=first.run_id, state="accepted", step=8), done)
    journal.append(Outcome(command=done.id, run=first.run_id, state="applied", step=8))
    journal.close()
    second, line = begin(tmp_path, left)
    outcomes = line.outcomes(left)  # told when it begins, and to whoever sends the command again
    assert [(outcome["state"], outcome["step"]) for outcome in outcomes] == [("failed", 7)] * 2
    assert "given again" in outcomes[0]["message"]
    assert not second.paused
    assert line.outcomes(done) == []
    second.stop()
    third, line = begin(tmp_path)
    assert line.outcomes(left) == []  # it has been told, and stands in the journal
    assert journalled(third)[left.id].state == "failed"
    third.stop()


def test_each_life_has_its_own_curve(tmp_path: Path) -> None:
    for rounds in (4, 2):
        weavelet = Weavelet("a", "pretrain", hub="off", runs_dir=tmp_path / "runs").start()
        for step in range(rounds):
            weavelet.step({"loss": float(step)})
        weavelet.stop()
    assert RunReader(weavelet.folder / "run.db").metric("loss").steps.tolist() == [1, 2]
    assert len(RunReader(weavelet.folder / "run.db").lives()) == 2


def test_two_of_one_id_and_two_of_two(tmp_path: Path) -> None:
    first, _ = begin(tmp_path)
    other, _ = begin(tmp_path, replica="b")
    with pytest.raises(RunFolderError, match="in use by this very process"):
        begin(tmp_path)
    assert other.run_id == "pretrain@b"
    for weavelet in (first, other):
        weavelet.stop()


def test_an_id_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="replica_id: found 'a/b', expected a text"):
        Weavelet("a/b")


def test_where_its_parameters_are_is_where_it_trains() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1, device="meta"))])
    weavelet = Weavelet(optimizer=optimizer).register_device("cpu", "fpga:0")
    assert weavelet._devices == ["cpu", "fpga:0"]
