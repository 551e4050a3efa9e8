"""Which folder a run goes into, and which snapshot it begins from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aetheria.config import TrainingConfig
from aetheria.control.journal import read_journal
from aetheria.core import AetherModel
from aetheria.engine.state import describe_model
from aetheria.errors import ConfigError, RunFolderError, SnapshotError
from aetheria.replicas import Membership, claim_replica, replica_run
from aetheria.runs import RunFolder, describe_process, find_runs, folder_name, now
from aetheria.snapshot import Snapshot, list_snapshots, newest_good

__all__ = ["OpenedRun", "open_run"]

_LAUNCH = "AETHERIA_LAUNCH_ID"  # what processes have in common that are launched together, or again


@dataclass(frozen=True)
class OpenedRun:
    """A run folder that this process holds.

    Attributes:
        folder: the run folder, locked.
        snapshot: where to begin from, checked; None for the beginning.
        warnings: what was noticed on the way: damaged snapshots, by file.
        continues: whether the run goes on in its own folder, with its own journal.
        overridden: the keys of the configuration that are others than in the run's life before.
        stops_passed: lines of the journal behind which somebody has gone on: a stop among them is not done again.
    """

    folder: RunFolder
    snapshot: Snapshot | None = None
    warnings: list[str] = field(default_factory=list)
    continues: bool = False
    overridden: frozenset[str] = frozenset()
    stops_passed: int = 0

    @property
    def step(self) -> int:
        """The optimiser steps that lie behind the snapshot."""
        return 0 if self.snapshot is None else self.snapshot.manifest.step


def open_run(
    config: TrainingConfig, model: AetherModel, resume_from: str | Path | None, new_run: bool = False
) -> OpenedRun:
    """Makes a new run folder, or opens the one that is to be continued, and locks it.

    Args:
        config: of the run; written into `run.json` as resolved.
        model: for its name.
        resume_from: see `Orchestrator.run`.
        new_run: see there.

    Raises:
        RunFolderError: the folder cannot be made, found, or taken.
        SnapshotError: what should be resumed from is damaged, or is not there.
        ConfigError: the folder that should be resumed is not that of the replica that is configured.
    """
    if resume_from is None:
        return _new(config, model)
    if (member := _member(config)) is not None and str(resume_from) in ("auto", "latest"):
        return _begun_or_new(config, model, replica_run(*member), str(resume_from))
    if str(resume_from) == "auto":
        launch = os.environ.get(_LAUNCH)
        if not launch:
            raise RunFolderError(
                f"--resume auto goes on with the run that this launch has begun, but {_LAUNCH} does not say which "
                "launch this is; `aetheria launch` sets it. Otherwise: --resume latest, or a run folder."
            )
        begun = next((run for run in find_runs(config.runs_dir) if run.read().get("launch") == launch), None)
        return _new(config, model) if begun is None else _continue(begun, config)
    if str(resume_from) == "latest":
        runs = find_runs(config.runs_dir)
        if not runs:
            raise RunFolderError(f"there is no run to resume in {config.runs_dir.absolute()}. Train without --resume.")
        return _continue(runs[0], config)
    path = Path(resume_from)
    if (path / "run.json").is_file():
        return _continue(RunFolder.open(path), config)
    snapshot = Snapshot(path)
    if not path.is_dir():
        raise SnapshotError(f"there is no run and no snapshot at {path.absolute()}. `aetheria runs` lists the runs.")
    snapshot.verify()
    run = path.absolute().parent.parent
    if (run / "run.json").is_file() and not new_run:
        newest = newest_good(run / "snapshots", lambda _: None)
        if newest is not None and newest.path.samefile(path):
            return _continue(RunFolder.open(run), config)
    # An older snapshot: going on from it in its own run would mean writing over what came after.
    lineage = {"kind": "resume", "run_id": snapshot.manifest.run_id, "step": snapshot.manifest.step}
    return _new(config, model, snapshot, lineage | {"snapshot": str(path.absolute())})


def _member(config: TrainingConfig) -> Membership | None:
    """Returns which replica is configured; None where it is a run without others."""
    if config.replica_id is None or config.run_name is None:
        return None
    return Membership(folder_name(config.run_name), config.replica_id)


def _begun_or_new(config: TrainingConfig, model: AetherModel, run: str, resume_from: str) -> OpenedRun:
    """Goes on with a replica, which is found by its name; with "auto" it begins if there is none."""
    path = config.runs_dir / run
    if (path / "run.json").is_file():
        return _continue(RunFolder.open(path), config)
    if resume_from == "latest":
        raise RunFolderError(f"there is no {run} in {config.runs_dir.absolute()} to resume. Train without --resume.")
    return _new(config, model)


def _new(
    config: TrainingConfig, model: AetherModel, snapshot: Snapshot | None = None, lineage: dict[str, Any] | None = None
) -> OpenedRun:
    name = config.run_name or config.model_name or describe_model(model)["name"] or type(model).__name__
    fields: dict[str, Any] = {
        "seed": config.seed,
        "config": config.resolved(),
        "config_source": str(config.source) if config.source else None,
        "model": describe_model(model),
        "lineage": lineage,
        "launch": os.environ.get(_LAUNCH),
        "lives": [],
    }
    if config.replica_id is None:
        folder = RunFolder.create(config.runs_dir, name, **fields)
        folder.acquire()
    else:
        folder, is_new = claim_replica(config.runs_dir, name, config.replica_id, **fields)
        if not is_new:
            status = folder.read().get("status")
            folder.release()
            raise RunFolderError(
                f"{folder.path} is there already: replica '{config.replica_id}' of {config.run_name} has been trained, "
                f"and is {'killed' if status in ('created', 'running') else status}. Go on with it: --resume auto (or "
                f"aetheria continue {folder.run_id}). Otherwise choose another replica_id, or another run_name."
            )
    return _begin_life(folder, config, OpenedRun(folder, snapshot))


def _continue(folder: RunFolder, config: TrainingConfig) -> OpenedRun:
    _check_replica(folder, config)
    folder.acquire()
    try:
        warnings: list[str] = []
        snapshot = newest_good(folder.snapshots, warnings.append)
        if snapshot is None and list_snapshots(folder.snapshots):
            raise SnapshotError(f"every snapshot of {folder.path} is damaged:\n" + "\n".join(warnings))
        if snapshot is None:
            warnings.append(f"{folder.run_id} was ended before its first snapshot; it begins again")
        return _begin_life(folder, config, OpenedRun(folder, snapshot, warnings, continues=True))
    except BaseException:
        folder.release()
        raise


def _check_replica(folder: RunFolder, config: TrainingConfig) -> None:
    content = folder.read()
    found = content.get("group"), content.get("replica")
    if (member := _member(config)) is not None and found != member:
        found_in_words = f"replica '{found[1]}' of {found[0]}" if found[0] else "a run that is no replica"
        raise ConfigError(
            f"replica_id: found '{config.replica_id}' of {config.run_name}, but {folder.path} is that of "
            f"{found_in_words}. Leave replica_id away, or resume another folder."
        )


def _begin_life(folder: RunFolder, config: TrainingConfig, opened: OpenedRun) -> OpenedRun:
    content = folder.read()
    before, resolved = content.get("config", {}), config.resolved()
    changed = {key: [before.get(key), value] for key, value in resolved.items() if before.get(key) != value}
    life = {
        "started": now(),
        "step": opened.step,
        "snapshot": None if opened.snapshot is None else opened.snapshot.path.name,
        "changed": changed,
    }
    process = describe_process()
    folder.update(config=resolved, status_detail="", lives=[*content.get("lives", []), life | process], **process)
    if not opened.continues:
        return opened
    passed = content.get("stops_passed", 0)
    if content.get("status") == "stopped":  # and not killed meanwhile: then whoever stopped it still waits for that
        passed = len(read_journal(folder.path / "journal.jsonl"))
        folder.update(stops_passed=passed)
    return replace(opened, overridden=frozenset(changed), stops_passed=passed)
