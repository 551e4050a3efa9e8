"""Which folder a run goes into, and which snapshot it begins from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aetheria.config import TrainingConfig
from aetheria.core import AetherModel
from aetheria.engine.state import describe_model
from aetheria.errors import RunFolderError, SnapshotError
from aetheria.runs import RunFolder, describe_process, find_runs, now
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
    """

    folder: RunFolder
    snapshot: Snapshot | None = None
    warnings: list[str] = field(default_factory=list)
    continues: bool = False
    overridden: frozenset[str] = frozenset()

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
    """
    if resume_from is None:
        return _new(config, model)
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


def _new(
    config: TrainingConfig, model: AetherModel, snapshot: Snapshot | None = None, lineage: dict[str, Any] | None = None
) -> OpenedRun:
    name = config.run_name or config.model_name or describe_model(model)["name"] or type(model).__name__
    folder = RunFolder.create(
        config.runs_dir,
        name,
        seed=config.seed,
        config=config.resolved(),
        config_source=str(config.source) if config.source else None,
        model=describe_model(model),
        lineage=lineage,
        launch=os.environ.get(_LAUNCH),
        lives=[],
    )
    folder.acquire()
    return _begin_life(folder, config, OpenedRun(folder, snapshot))


def _continue(folder: RunFolder, config: TrainingConfig) -> OpenedRun:
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
    overridden = frozenset(changed) if opened.continues else frozenset()
    return replace(opened, overridden=overridden)
