"""`aetheria journal` and `aetheria replay` on a run that was steered: what they print, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.warm import run_warm
from typer.testing import CliRunner

from aetheria.cli import app
from aetheria.config import TrainingConfig
from aetheria.control.line import NoLine
from aetheria.core import Callback
from aetheria.orchestrator import Orchestrator
from aetheria.protocol import AnyCommand, command_of, encode
from aetheria.registry import Registry

PLUGIN = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherDataModule, AetherModel, Registry


@Registry.register_model("Tiny")
class Tiny(AetherModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch):
        return {"loss": self.layers(batch[0]).square().mean()}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@Registry.register_data("Noise")
class Noise(AetherDataModule):
    def train_dataloader(self):
        samples = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(samples), batch_size=8, shuffle=True)
"""
CONFIG = """
model_name: Tiny
data_name: Noise
max_steps: 20
accelerator: cpu
live: "off"
snapshots: {every_steps: 8, keep_last: 5}
"""
FIRST, SECOND, REFUSED = "aaaa1111aaaa1111", "bbbb2222bbbb2222", "cccc3333cccc3333"


class Operator(Callback, NoLine):
    """Gives commands after given steps."""

    critical = True

    def __init__(self, commands: dict[int, list[AnyCommand]]) -> None:
        NoLine.__init__(self)
        self._memory = bytearray(8)
        self.word = memoryview(self._memory).cast("Q")
        self.commands = commands
        self.waiting: list[bytes] = []

    def on_batch_end(self, batch_idx: int, metrics: Any) -> None:
        given = self.commands.pop(self.context.global_step, [])
        self.waiting += map(encode, given)
        self.word[0] += len(given)

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken


def set_(identity: str, author: str = "ana", **values: Any) -> AnyCommand:
    return command_of("set", {"values": values}, id=identity, author=author, reason="plateau")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was steered; the project is the current directory."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "tiny.py").write_text(PLUGIN)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    operator = Operator(
        {
            5: [set_(FIRST, learning_rate=0.1)],
            9: [set_(SECOND, "ben", max_grad_norm=0.5), set_(REFUSED, learning_rate=-1)],
        }
    )
    with Registry.isolated():
        config = TrainingConfig.from_yaml("config.yaml")
        built = Orchestrator.from_config(config)
        return Orchestrator(built.model, built.data, config, callbacks=[operator], line=operator).run().folder


def inside(*arguments: str) -> tuple[int, str]:
    with Registry.isolated():
        result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_journal_is_a_table_and_json(run: Path) -> None:
    code, output = inside("journal", "@last")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].split() == ["id", "step", "rev", "what", "by", "why", "became"]
    together = " ".join(output.split())
    for piece in (FIRST[:8], "learning_rate 0.01", "ana", "ben", "applied", "rejected"):
        assert piece in together
    code, output = inside("journal", run.name, "--json")
    entries = json.loads(output)
    assert [(entry["seq"], entry["outcome"]["state"]) for entry in entries] == [
        (1, "accepted"),
        (2, "applied"),
        (3, "accepted"),
        (4, "applied"),
        (5, "rejected"),
    ]
    assert entries[0]["command"]["args"] == {"values": {"learning_rate": 0.1}}


def test_the_real_program_finds_the_same_weights(run: Path) -> None:
    done = run_warm(["-m", "aetheria", "replay", "@last", "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["equal"], found["differs_at"]) == (True, None)
    assert found["compared"] == [5, 8, 9, 16, 20]
    assert found["run"] == run.name
    replay = json.loads((Path(found["replay"]) / "run.json").read_text())
    assert replay["lineage"]["kind"] == "replay"
    assert replay["lineage"]["run_id"] == run.name
    again = inside("replay", "@last")
    assert again[0] == 0, "the newest run is still the run, not its replay"
    assert "EQUAL: the same weights at 5 steps, the last of them 20." in again[1]


def test_as_far_as_it_is_told_and_without_what_it_is_told(run: Path) -> None:
    code, output = inside("replay", "@last", "--until", "9", "--json")
    assert code == 0
    assert json.loads(output[output.index("{") :])["compared"] == [5, 8, 9]
    code, output = inside("replay", "@last", "--without", FIRST[:4], "--json")
    assert code == 0, "that it differs is what was asked for"
    found = json.loads(output[output.index("{") :])
    assert (found["equal"], found["without"]) == (False, [FIRST])
    assert found["differs_at"] == 8


def test_different_weights_are_said_with_the_step_and_the_exit_code(run: Path) -> None:
    journal = run / "journal.jsonl"
    lines = journal.read_text().splitlines()
    changed = json.loads(lines[3])
    changed["outcome"]["digest"] = "0" * 16
    lines[3] = json.dumps(changed)
    journal.write_text("\n".join(lines) + "\n")
    code, output = inside("replay", "@last")
    assert code == 1
    assert "DIFFERENT from step 9 on." in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "@last", "--until", "21"], "can be replayed until step 20; asked for was 21"),
        (["replay", "@last", "--until", "0"], "asked for was 0"),
        (["replay", "@last", "--without", "dddd"], "0 commands of"),
        (["replay", "nowhere"], "nowhere"),
        (["journal", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said(run: Path, arguments: list[str], words: str) -> None:
    code, output = inside(*arguments)
    assert code == 2
    assert words in " ".join(output.split())


def test_a_damaged_journal_is_named(run: Path) -> None:
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"\xff" + lines[1][1:], *lines[2:]]))
    for command in ("journal", "replay"):
        code, output = inside(command, "@last")
        assert code == 2
        assert "line 2 cannot be read" in " ".join(output.split())


def test_a_run_continued_with_another_configuration_cannot_be_replayed(run: Path) -> None:
    code, output = inside("continue", run.name, "--set", "max_steps=22", "--set", "nonfinite=raise")
    assert code == 0, output
    code, output = inside("replay", run.name)
    assert code == 2
    assert "was continued with another nonfinite at step 20" in " ".join(output.split())
