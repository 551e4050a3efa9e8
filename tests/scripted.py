"""A Weavelet whose commands come from a script: at the step that the script says, and while it is paused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from aetheria.control.journal import read_journal
from aetheria.control.weavelet import Weavelet
from aetheria.protocol import AnyCommand, Outcome, command_of, encode


class ScriptedLine:
    """Takes the place of a `Link`: brings commands when their step has been taken, and keeps what it is told."""

    def __init__(self, script: Mapping[int, Sequence[AnyCommand]], when_paused: Sequence[AnyCommand] = ()) -> None:
        self.script = dict(script)
        self.when_paused = list(when_paused)
        self.weavelet: Weavelet | None = None
        self.word = self
        self.waiting: list[bytes] = []
        self.brought = 0
        self.told: list[dict[str, Any]] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def __getitem__(self, _index: int) -> int:
        """The command word, which the Weavelet looks at once a step, and while it waits."""
        assert self.weavelet is not None
        for step in [step for step in self.script if step <= self.weavelet.global_step]:
            self.put(self.script.pop(step))
        if self.weavelet.paused and self.when_paused:
            self.put(self.when_paused)
            self.when_paused = []
        return self.brought

    def put(self, commands: Sequence[AnyCommand]) -> None:
        self.waiting += map(encode, commands)
        self.brought += 1

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken

    def tell(self, kind: str, data: bytes) -> None:
        self.told.append({"as": kind} | json.loads(data))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.points.append((step, dict(metrics)))

    def hand_over(self, points: list[Any]) -> None:
        self.points += [(step, metrics) for _, step, metrics in points]
        points.clear()

    def beat(self, step: int) -> None:
        pass

    def tend(self) -> None:
        pass

    def close(self, timeout: float = 5.0) -> int:
        self.closed = True
        return 0

    # --- what tests ask --------------------------------------------------------------------------------------------
    def outcomes(self, command: AnyCommand) -> list[dict[str, Any]]:
        """Returns what was said of a command, in order."""
        return [said for said in self.told if said["as"] == "ack" and said["command"] == command.id]

    def outcome(self, command: AnyCommand) -> dict[str, Any]:
        """Returns the last word on a command."""
        return self.outcomes(command)[-1]

    @property
    def statuses(self) -> list[str]:
        return [said["status"] for said in self.told if said.get("kind") == "status"]

    def series(self, name: str) -> dict[int, float]:
        """Returns a metric by step."""
        return {step: metrics[name] for step, metrics in self.points if name in metrics}


def scripted(
    folder: Path, script: Mapping[int, Sequence[AnyCommand]], when_paused: Sequence[AnyCommand] = ()
) -> tuple[Weavelet, ScriptedLine]:
    """Returns a Weavelet that is not started, and its line."""
    line = ScriptedLine(script, when_paused)
    line.weavelet = Weavelet(run="scripted", runs_dir=folder / "runs", line=line)
    return line.weavelet, line


def set_(**values: Any) -> AnyCommand:
    return command_of("set", {"values": values}, author="ana")


def journalled(weavelet: Weavelet) -> dict[str, Outcome]:
    """Returns the last outcome in the journal of each command."""
    return {entry.outcome.command: entry.outcome for entry in read_journal(weavelet.folder / "journal.jsonl")}


def status_of(weavelet: Weavelet) -> str:
    return str(json.loads((weavelet.folder / "run.json").read_text())["status"])


def weights(model: torch.nn.Module) -> str:
    """Returns a digest of all weights and buffers."""
    content = sha256()
    for name, tensor in model.state_dict().items():
        content.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return content.hexdigest()
