"""Which runs there are, what their folders say about them, and who has been heard of when."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aetheria.errors import HubError, RunFolderError
from aetheria.loom.filesystem import filesystem_of
from aetheria.loom.hub_file import host_name
from aetheria.loom.messages import Heartbeat, MetricBatch
from aetheria.loom.reader import RunReader
from aetheria.runs import RunFolder, find_runs
from aetheria.weaver.mirror import folder_of
from aetheria.weaver.store import Replica, Store, StoredRun

__all__ = ["SILENT_SECONDS", "KnownRun", "Registry", "UnknownRunError"]

SILENT_SECONDS = 15.0
_HOST = host_name()


class UnknownRunError(HubError):
    """A run that the hub has never heard of."""


@dataclass
class KnownRun:
    """What the hub knows of a run that has registered, in memory.

    Attributes:
        stored: what is kept over a restart.
        mirror: where the hub copies its folder to, if that is out of sight.
        heard: when something came from it, on the clock that never jumps; None since the hub was started.
        metrics: the newest values: name to (step, value).
        replicas: its processes, by their ids.
        dropped: records it lost on their way, by kind.
        told: the status that the live feed was told last.
        reported: what the run says it does, if anything else than training: "paused".
        near: whether its status is known without waiting for another machine; None until somebody has looked.
    """

    stored: StoredRun
    mirror: Path
    heard: float | None = None
    metrics: dict[str, tuple[int, float]] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    told: str = ""
    reported: str = ""
    near: bool | None = None
    _read: tuple[tuple[int, ...], str] | None = None  # which `run.json` was read last, and the status in it

    @property
    def folder(self) -> RunFolder | None:
        """Its folder, where that lies on this machine."""
        if self.stored.host != _HOST or not self.stored.folder:
            return None
        path = Path(self.stored.folder)
        return RunFolder(path) if path.is_dir() else None

    @property
    def history(self) -> RunFolder | None:
        """What can be read of it on this machine: its folder, or the hub's copy of that."""
        if (folder := self.folder) is not None:
            return folder
        return RunFolder(self.mirror) if self.mirror.is_dir() else None

    @property
    def fresh(self) -> bool:
        """Whether it was heard of within the last seconds."""
        return self.heard is not None and time.monotonic() - self.heard < SILENT_SECONDS

    def status(self) -> str:
        """Returns "running", "paused" or "silent", or how it ended: what `run.json` says of it."""
        if self.near is None:
            here = self.stored.host == _HOST and self.stored.folder != ""
            self.near = not (here and filesystem_of(self.stored.folder).network)
        living = (self.reported or "running") if self.fresh else "silent"
        if (folder := self.folder) is None:
            return self._copied_status(living)
        try:
            status = self._written_status(folder)
        except RunFolderError:
            return living  # a run of another framework has a folder, and no run.json
        if status not in ("created", "running"):
            return status
        # A script that does not lock its folder looks killed to those who ask for the lock.
        locks = not self.fresh or (folder.path / ".lock").exists()
        return "killed" if locks and not folder.in_use() else living

    def _copied_status(self, living: str) -> str:
        """Returns how it ended, if the copy of its `run.json` says that it did."""
        if not self.mirror.is_dir():
            return living  # there is none yet
        folder = RunFolder(self.mirror)
        try:
            status = self._written_status(folder)
            if status in ("created", "running", "unknown"):
                return living
            # One that has just been continued is ahead of the copy, which then tells of another process.
            return living if self.fresh and folder.read().get("pid") != self.stored.pid else status
        except RunFolderError:
            return living

    def _written_status(self, folder: RunFolder) -> str:
        """Returns what `run.json` says; read again only where it is another file, or a changed one."""
        try:
            found = (folder.path / "run.json").stat()
        except OSError:
            return str(folder.read().get("status", "unknown"))  # says what is wrong with it
        mark = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        known = self._read  # another thread may be here, too
        if known is None or known[0] != mark:
            known = self._read = mark, str(folder.read().get("status", "unknown"))
        return known[1]


class Registry:
    """All runs: those that registered, and those whose folders lie beside theirs."""

    def __init__(self, store: Store, mirrors: Path) -> None:
        self._store = store
        self._mirrors = mirrors
        self._known = {run.id: KnownRun(run, folder_of(mirrors, run.id)) for run in store.runs()}
        for replica in store.replicas():
            if replica.run in self._known:
                self._known[replica.run].replicas[replica.id] = replica
        self._changed: set[str] = set()

    def register(
        self, run: str, folder: str, host: str, pid: int, replica: str = "", devices: Sequence[str] = ()
    ) -> KnownRun:
        """Remembers a run that has said who it is."""
        now = time.time()
        mirror = folder_of(self._mirrors, run)
        step = self._known[run].stored.step if run in self._known else 0
        stored = StoredRun(run, folder, host or _HOST, pid, now, now, step)
        self._store.register(stored)
        known = self._known.setdefault(run, KnownRun(stored, mirror))
        known.stored = stored
        known.near = known._read = None
        known.heard = time.monotonic()
        name = replica or run
        known.replicas = {name: Replica(name, run, stored.host, pid, list(devices), now)}
        self._changed.add(run)
        return known

    def beat(self, run: str, beat: Heartbeat) -> KnownRun | None:
        """Takes a sign of life; returns None where the run has never registered."""
        if (known := self._known.get(run)) is None:
            return None
        now = time.time()
        known.heard = time.monotonic()
        known.stored = known.stored._replace(last_seen=now, step=beat.step)
        known.dropped = beat.dropped
        name = beat.replica or run
        known.replicas[name] = Replica(name, run, beat.host, beat.pid, list(beat.devices), now)
        self._changed.add(run)
        return known

    def measured(self, run: str, batch: MetricBatch) -> KnownRun | None:
        """Takes metrics; returns None where the run has never registered."""
        if (known := self._known.get(run)) is None:
            return None
        known.heard = time.monotonic()
        newest: dict[str, tuple[int, float]] = {}
        for _, step, values in reversed(batch.points):
            if not values.keys() <= newest.keys():  # usually all points have the same names, and the last one is enough
                newest = {name: (step, value) for name, value in values.items()} | newest
        known.metrics |= newest
        return known

    def save(self) -> None:
        """Writes who was seen when. Called now and then: a heartbeat is worth no disk write."""
        changed = [self._known[run] for run in self._changed]
        self._changed.clear()
        if changed:
            self._store.seen(
                [known.stored for known in changed],
                [replica for known in changed for replica in known.replicas.values()],
            )

    def known(self) -> list[KnownRun]:
        """Returns the runs that registered."""
        return list(self._known.values())

    def get(self, run: str) -> KnownRun | None:
        """Returns a run that registered, or None."""
        return self._known.get(run)

    def folder(self, run: str) -> RunFolder:
        """Returns the folder of a run on this machine, or the copy of one that is elsewhere.

        Raises:
            UnknownRunError: there is no such run, or its folder is elsewhere and nothing of it has arrived.
        """
        if (known := self._known.get(run)) is not None:
            if (folder := known.history) is None:
                raise UnknownRunError(
                    f"the folder of {run} is not on this machine ({known.stored.folder} on {known.stored.host}), and "
                    "nothing of it has arrived here."
                )
            return folder
        for folder in self._beside():
            if folder.run_id == run:
                return folder
        raise UnknownRunError(f"no run called '{run}' is known to this hub.")

    def replicas(self) -> list[Replica]:
        """Returns all replicas."""
        return [replica for known in self._known.values() for replica in known.replicas.values()]

    # --- what is said about runs: these read files, and take their time --------------------------------------------
    def lines(self) -> list[dict[str, Any]]:
        """Returns a line about each run, the newest first."""
        lines = {run.stored.id: self._line(run.stored.id, run.history, run) for run in list(self._known.values())}
        for folder in self._beside():
            if folder.run_id not in lines:
                lines[folder.run_id] = self._line(folder.run_id, folder, None)
        return sorted(lines.values(), key=lambda line: line["created"] or 0.0, reverse=True)

    def line(self, run: str) -> dict[str, Any]:
        """Returns a line about one run.

        Raises:
            UnknownRunError: there is no such run.
        """
        known = self._known.get(run)
        return self._line(run, known.history if known is not None else self.folder(run), known)

    def status(self, run: str) -> str:
        """Returns the status of one run.

        Raises:
            UnknownRunError: there is no such run.
        """
        known = self._known.get(run)
        return known.status() if known is not None else _status_of(self.folder(run))

    def status_at_once(self, run: str) -> str | None:
        """Returns the status of a run where that takes no time worth a thread; None where `status` must be asked."""
        known = self._known.get(run)
        return known.status() if known is not None and known.near else None

    def _beside(self) -> list[RunFolder]:
        parents = {run.folder.path.parent for run in list(self._known.values()) if run.folder is not None}
        return [folder for parent in sorted(parents) for folder in find_runs(parent)]

    def _line(self, run: str, folder: RunFolder | None, known: KnownRun | None) -> dict[str, Any]:
        line: dict[str, Any] = {"id": run, "status": "", "status_detail": "", "step": 0, "created": None}
        line |= {"metrics": {}, "folder": None, "host": _HOST, "pid": None, "last_heartbeat": None, "dropped": {}}
        line |= {"connected": known is not None and known.fresh, "name": run}
        metrics: Mapping[str, tuple[int, float]] = {}
        if known is not None:
            line |= {"host": known.stored.host, "pid": known.stored.pid, "folder": known.stored.folder}
            line |= {"created": known.stored.registered, "last_heartbeat": known.stored.last_seen}
            line |= {"step": known.stored.step, "dropped": known.dropped}
            metrics = dict(known.metrics)
        if folder is not None:
            if known is None or folder.path != known.mirror:
                line["folder"] = str(folder.path)
            try:
                content = folder.read()
                line |= {key: content[key] for key in ("status_detail", "name", "pid") if key in content}
                line["step"] = max(line["step"], content.get("global_step") or 0)
                line["created"] = _seconds(content.get("created")) or line["created"]
                metrics = metrics or RunReader(folder.path / "run.db").last()
            except RunFolderError as error:
                line["status_detail"] = "" if known is not None else str(error)
        line["status"] = known.status() if known is not None else _status_of(folder)
        line["metrics"] = {name: {"step": step, "value": value} for name, (step, value) in metrics.items()}
        if metrics:
            line["step"] = max(line["step"], *(step for step, _ in metrics.values()))
        return line


def _status_of(folder: RunFolder | None) -> str:
    if folder is None:
        return "silent"
    try:
        return folder.display_status()
    except RunFolderError:
        return "damaged"


def _seconds(created: Any) -> float | None:
    """Returns a time of `run.json` in seconds since 1970."""
    try:
        seconds = datetime.datetime.fromisoformat(str(created)).timestamp()
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None
