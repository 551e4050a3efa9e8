"""When a snapshot is due, and which ones stay."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aetheria.config import SnapshotsConfig
from aetheria.errors import (
    CommandError,
    ConfigError,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotVersionError,
    did_you_mean,
)
from aetheria.runs import fsync_directory
from aetheria.snapshot import (
    KeepBest,
    Manifest,
    Snapshot,
    SnapshotContent,
    SnapshotWriter,
    list_snapshots,
    superfluous,
)
from aetheria.snapshot.format import folder_name
from aetheria.snapshot.writer import remove_snapshot

if TYPE_CHECKING:
    from aetheria.snapshot.sharded import Team

__all__ = ["SnapshotKeeper"]


class SnapshotKeeper:
    """Decides when snapshots are taken, and lets the old ones go once newer ones are durable.

    Args:
        folder: the run's `snapshots/`.
        config: intervals and retention.
        synchronize: waits for the device's copies to host memory.
        before_commit: makes durable what must not be behind a snapshot.
        notify: called, on the writer's thread, when a snapshot has become durable or has failed.
        writes: whether this rank writes; the others take part in every snapshot, but leave no trace.
        alone: whether there are no other ranks. Where there are, only what they have agreed on is due, besides what
            follows from the number of steps.
        team: the ranks that write together, where each holds a part of the weights.
    """

    def __init__(
        self,
        folder: Path,
        config: SnapshotsConfig,
        synchronize: Callable[[], None],
        before_commit: Callable[[], object],
        notify: Callable[[], None],
        writes: bool = True,
        alone: bool = True,
        team: Team | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.rules: list[KeepBest] = []
        if config.keep_best is not None:
            self.rules.append(KeepBest(config.keep_best.metric, config.keep_best.mode, config.keep_best.k))
        self.reason = ""
        self.last_step = -1
        self._again = False
        self._reserved = False
        self.stalled_seconds = 0.0
        self._notify = notify
        self._last_time = time.monotonic()
        self._alone = alone
        self._leads = writes
        self._writer: SnapshotWriter | None = None
        if writes or team is not None:
            self._writer = SnapshotWriter(folder, synchronize, before_commit, self._committed, team)
        if self._leads and self._writer is not None:
            self._writer.clean()

    # --- when ------------------------------------------------------------------------------------------------------
    def deadline(self) -> float:
        """Returns when, on the monotonic clock, the next snapshot is due by time."""
        seconds = self.config.every_seconds
        return float("inf") if seconds is None else self._last_time + seconds

    def request(self, reason: str, again: bool = False) -> None:
        """Asks for a snapshot at the next boundary.

        Args:
            reason: why.
            again: even if one was taken at that very step, because more is known about it now.
        """
        self.reason = self.reason or reason
        self._again = self._again or again

    @property
    def wish(self) -> int:
        """What this rank would have, if it were asked: 0 nothing, 1 a snapshot, 2 one in the place of another, too."""
        if self._again:
            return 2
        return int(bool(self.reason) or (self._leads and time.monotonic() >= self.deadline()))

    def due(self, step: int, agreed: int = 0) -> str:
        """Returns why a snapshot is due at this boundary, or an empty string.

        Args:
            step: the steps taken.
            agreed: the largest of all ranks' wishes, where there are several.
        """
        wish = self.wish if self._alone else agreed
        if step == self.last_step and wish < 2:
            self.reason = ""
            return ""
        if wish and self.reason:
            return self.reason
        if self.config.every_steps is not None and step and step % self.config.every_steps == 0:
            return f"every {self.config.every_steps} steps"
        if wish:
            return f"every {self.config.every_seconds:g} seconds" if self.config.every_seconds else "asked for"
        return ""

    def end_epoch(self, epochs_done: int) -> None:
        """Asks for a snapshot if one is due after this many epochs."""
        every = self.config.every_epochs
        if every is not None and epochs_done % every == 0:
            self.request(f"every {every} epochs" if every > 1 else "end of epoch")

    def judge(self, metrics: Mapping[str, float]) -> None:
        """Asks for a snapshot if a metric is among the best that are to be kept."""
        if not self._leads:
            return  # who writes knows what there is
        for rule in self.rules:
            value = metrics.get(rule.metric)
            if value is not None and rule.admits(value, self._manifests()):
                self.request(f"best {rule.metric}", again=True)

    def check_rules(self, metrics: Mapping[str, float], validation: bool) -> None:
        """Raises if a metric that the best are kept by is not among those that there are.

        Args:
            metrics: of an epoch, or of a validation.
            validation: which of the two; the rules for the other kind are left alone.

        Raises:
            ConfigError: naming the metrics that there are.
        """
        for rule in self.rules:
            if rule.metric.startswith("val_") == validation and rule.metric not in metrics:
                raise ConfigError(
                    f"the best snapshots are to be kept by '{rule.metric}', which this run does not have. "
                    + (did_you_mean(rule.metric, metrics) if metrics else "It is never validated.")
                )

    # --- writing ---------------------------------------------------------------------------------------------------
    def reserve(self, content: Callable[[], SnapshotContent]) -> None:
        """Gets the memory that snapshots are copied into, once: when the optimiser has made its state.

        Args:
            content: returns what a snapshot would hold now.
        """
        if not self._reserved and self._writer is not None:
            self._reserved = True
            self._writer.reserve(content())

    def save(self, content: SnapshotContent, ending: bool = False) -> None:
        """Takes a snapshot; returns when its content has been copied to host memory.

        Args:
            content: of the snapshot.
            ending: whether it is the run's last one.
        """
        begun = time.monotonic()
        self._reserved = True
        if self._writer is not None:
            wanted = self.config.consolidate
            whole = wanted == "always" or (wanted == "end" and ending)
            self._writer.save(dataclasses.replace(content, consolidate=whole))
        self.last_step = content.manifest.step
        self.reason, self._again = "", False
        self._last_time = time.monotonic()
        self.stalled_seconds += self._last_time - begun

    def snapshot_at(self, step: int) -> Snapshot:
        """Returns the snapshot of a step, checked.

        Raises:
            CommandError: there is none, or it is damaged; it says which there are.
        """
        snapshots = {int(snapshot.path.name.rpartition("-")[2]): snapshot for snapshot in list_snapshots(self.folder)}
        if step not in snapshots:
            there = (
                f"There are: {', '.join(f'{number:,}' for number in snapshots)}." if snapshots else "There is none yet."
            )
            raise CommandError(f"there is no snapshot of step {step:,}. {there}")
        try:
            snapshots[step].verify()
        except SnapshotError as error:
            raise CommandError(f"the snapshot of step {step:,} cannot be used: {error}") from error
        return snapshots[step]

    def rewound_to(self, step: int, revision: int) -> None:
        """Puts the snapshots after a step aside, into a folder of their own: they belong to what has been undone."""
        aside = self.folder / f"undone-by-revision-{revision}"
        for snapshot in list_snapshots(self.folder) if self._leads else ():
            if int(snapshot.path.name.rpartition("-")[2]) > step:
                aside.mkdir(exist_ok=True)
                if (aside / snapshot.path.name).exists():  # this rewind was interrupted, and is done again
                    remove_snapshot(aside / snapshot.path.name)
                snapshot.path.rename(aside / snapshot.path.name)
        fsync_directory(self.folder)
        self.last_step = step
        self.reason, self._again = "", False

    def finished(self) -> Path | None:
        """Returns a snapshot that has become durable since the last call; raises if it could not be written."""
        return None if self._writer is None else self._writer.finished()

    def wait(self) -> Path | None:
        """Waits for the snapshot in progress, and returns it."""
        return None if self._writer is None else self._writer.wait()

    def close(self) -> None:
        """Ends the writing thread."""
        if self._writer is not None:
            self._writer.close()

    def _committed(self, path: Path) -> None:
        written = Snapshot(path).manifest.step
        for manifest in superfluous(self._manifests(), self.config.keep_last, self.rules, written):
            remove_snapshot(self.folder / folder_name(manifest.step))
        self._notify()

    def _manifests(self) -> list[Manifest]:
        manifests = []
        for snapshot in list_snapshots(self.folder):
            try:
                manifests.append(snapshot.manifest)
            except (SnapshotDamagedError, SnapshotVersionError):
                continue  # not ours to judge: it neither counts nor is it removed
        return manifests
