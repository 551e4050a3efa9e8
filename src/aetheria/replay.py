"""Training again from a run's configuration and its journal, to the very same weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aetheria.config import TrainingConfig
from aetheria.control.desk import Boundary
from aetheria.control.journal import effective, read_journal
from aetheria.core import Callback, RunResult
from aetheria.errors import AetheriaError, SnapshotError
from aetheria.orchestrator import Orchestrator
from aetheria.protocol import AnyCommand, Outcome, Set, Stop
from aetheria.runs import RunFolder, folder_name
from aetheria.snapshot import list_snapshots, weights_digest
from aetheria.snapshot.format import model_tensors

__all__ = ["Replay", "replay_run"]

REPLAYS = "replays"  # in the folder of all runs: so that nobody takes a replay for the newest run
_HOW_LONG = frozenset({"epochs", "max_steps", "max_time"})  # a replay goes as far as the run went
# What may differ between two lives of a run without a trace in its weights.
_HARMLESS = _HOW_LONG | {"live", "runs_dir", "run_name", "replica_id", "log_every", "snapshots", "loggers"}


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        result: of the replay, a run of its own.
        compared: the steps at which its weights were compared with those of the run.
        differs_at: the first of them at which they differ; None where they are equal everywhere.
        left_out: the commands that were left out because somebody wanted to know what if.
    """

    result: RunResult
    compared: list[int]
    differs_at: int | None
    left_out: list[str]

    @property
    def equal(self) -> bool:
        """Whether every comparison, of which there is at least one, found the same weights."""
        return bool(self.compared) and self.differs_at is None


def replay_run(
    path: Path, until: int | None = None, without: Collection[str] = (), callbacks: Sequence[Callback] = ()
) -> Replay:
    """Trains a run again, in a run folder of its own (in `replays/` beside it), and compares digests.

    Args:
        path: the run folder.
        until: the step to stop at; the run's last one by default.
        without: ids (or unambiguous beginnings of ids) of commands to leave out.
        callbacks: for the replay.

    Raises:
        AetheriaError: the run cannot be replayed, or has not come far enough; the message says why.
    """
    folder = RunFolder.open(path)
    content = folder.read()
    left_out = [_whole_id(folder.path, beginning) for beginning in without]
    planned, outcomes = _plan(folder.path, left_out)
    expected = {snapshot.manifest.step: snapshot.manifest.digest for snapshot in list_snapshots(folder.snapshots)}
    last = max([int(content.get("global_step") or 0), *expected])
    if until is None:
        until = last
    if not 0 < until <= last:
        raise AetheriaError(f"{folder.run_id} can be replayed until step {last:,}; asked for was {until:,}.")
    config = _config(content, folder, until)
    probe = _Probe({step: digest for step, digest in expected.items() if step <= until})
    orchestrator = Orchestrator.from_config(config, [*callbacks, probe], planned)
    lineage = content.get("lineage") or {}
    begin = lineage.get("snapshot")
    if begin is not None and not Path(begin).is_dir():
        raise SnapshotError(f"{folder.run_id} began from the snapshot {begin}, which is not there any more.")
    result = orchestrator.run(begin, new_run=True)
    own = RunFolder.open(result.folder)
    own.update(lineage={**lineage, "kind": "replay", "run_id": folder.run_id, "step": until, "without": left_out})
    if result.global_step < until:
        raise AetheriaError(f"the replay ended at step {result.global_step:,}, before {until:,}: {result.reason}.")
    compared = dict(probe.found)
    for entry in read_journal(result.folder / "journal.jsonl"):
        there, here = outcomes.get(entry.outcome.command), entry.outcome
        if there is not None and here.state == "applied" and there.digest and here.step <= until:
            compared[here.step] = compared.get(here.step, True) and here.digest == there.digest
    differences = [step for step, equal in sorted(compared.items()) if not equal]
    return Replay(result, sorted(compared), differences[0] if differences else None, left_out)


def _plan(path: Path, left_out: Collection[str]) -> tuple[list[tuple[Boundary, AnyCommand]], dict[str, Outcome]]:
    """Returns what is to be done again, with its boundaries, and how everything ended in the run."""
    entries = read_journal(path / "journal.jsonl")
    outcomes = {entry.outcome.command: entry.outcome for entry in entries}
    planned: list[tuple[Boundary, AnyCommand]] = []
    for entry in effective(entries):
        command = entry.command
        assert command is not None
        done = outcomes[command.id].state == "applied" and command.changes_training
        if not done or isinstance(command, Stop) or command.id in left_out:
            continue
        again: Any = msgspec.structs.replace(command, run="", expect_revision=None, not_after_step=None)
        if isinstance(command, Set):
            values = {key: value for key, value in command.args.values.items() if key not in _HOW_LONG}
            if not values:
                continue
            again = msgspec.structs.replace(again, args=msgspec.structs.replace(command.args, values=values))
        planned.append((Boundary(entry.outcome.step, entry.outcome.epoch, entry.outcome.window), again))
    return planned, outcomes


def _whole_id(path: Path, beginning: str) -> str:
    ids = {entry.outcome.command for entry in read_journal(path / "journal.jsonl")}
    found = [one for one in ids if one.startswith(beginning)]
    if len(found) != 1:
        raise AetheriaError(
            f"{len(found)} commands of {path.name} have an id that begins with '{beginning}'. "
            f"`aetheria journal {path.name}` lists them."
        )
    return found[0]


def _config(content: dict[str, Any], folder: RunFolder, until: int) -> TrainingConfig:
    """Returns the configuration that the run began with, made to end at a step."""
    values = dict(content["config"])
    for life in reversed(content.get("lives", [])):
        for key, (before, _after) in life.get("changed", {}).items():
            if key not in _HARMLESS:
                raise AetheriaError(
                    f"{folder.run_id} was continued with another {key} at step {life.get('step')}. Such a change is "
                    "not in the journal, so the run cannot be replayed; a `set` would have been."
                )
            values[key] = before
    values |= {
        "runs_dir": str(folder.path.parent / REPLAYS),
        "run_name": folder_name(f"replay-of-{folder.run_id}")[:100],
        "replica_id": None,
        "epochs": None,
        "max_steps": until,
        "max_time": None,
        "snapshots": {**values["snapshots"], "every_steps": None, "every_epochs": None, "every_seconds": None},
        "live": "off",
    }
    return TrainingConfig.from_resolved(values, folder.config_source())


class _Probe(Callback):
    """Compares the weights with those that the run's snapshots had."""

    critical = True

    def __init__(self, expected: dict[int, str]) -> None:
        self.expected = expected
        self.found: dict[int, bool] = {}

    def on_batch_end(self, batch_idx: int, metrics: Any) -> None:
        """Looks, where there is something to compare with."""
        digest = self.expected.get(self.context.global_step)
        if digest is not None:
            with self.context.accelerator.shared_weights(self.context.model):
                found = weights_digest(model_tensors(self.context.model)[0])
            self.found[self.context.global_step] = found == digest
