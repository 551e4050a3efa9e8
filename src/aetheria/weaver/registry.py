"""Which runs there are, what their folders say about them, and who has been heard of when."""

from __future__ import annotations

import datetime
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aetheria.client.models import ENDED
from aetheria.errors import HubError, RunFolderError
from aetheria.loom.messages import Heartbeat, MetricBatch
from aetheria.loom.reader import RunReader
from aetheria.replicas import membership
from aetheria.runs import RunFolder, find_runs
from aetheria.weaver.known_run import HOST, SILENT_SECONDS, KnownRun
from aetheria.weaver.mirror import folder_of
from aetheria.weaver.store import Store, StoredRun

__all__ = ["Registry", "TwinError", "UnknownRunError"]


class UnknownRunError(HubError):
    """A run that the hub has never heard of, or that is none but several."""


class TwinError(HubError):
    """A training that says it is a replica which another one is, and that one trains."""


class Registry:
    """All runs: those that registered, and those whose folders lie beside theirs."""

    def __init__(self, store: Store, mirrors: Path) -> None:
        self._store = store
        self._mirrors = mirrors
        self._known = {run.id: KnownRun(run, folder_of(mirrors, run.id)) for run in store.runs()}
        self._groups: defaultdict[str, dict[str, KnownRun]] = defaultdict(dict)
        for known in self._known.values():
            self._sort_in(known)
        self._changed: set[str] = set()

    def _sort_in(self, known: KnownRun) -> None:
        if known.stored.group:
            self._groups[known.stored.group][known.stored.replica] = known

    def register(
        self,
        run: str,
        folder: str,
        host: str,
        pid: int,
        replica: str = "",
        devices: Sequence[str] = (),
        group: str = "",
    ) -> KnownRun:
        """Remembers a run that has said who it is; see `StoredRun`."""
        now = time.time()
        mirror = folder_of(self._mirrors, run)
        before = self._known[run].stored if run in self._known else None
        # A replica that begins again may begin anew.
        another = group != "" and before is not None and (before.host, before.pid) != (host or HOST, pid)
        step = 0 if another or before is None else before.step
        stored = StoredRun(run, folder, host or HOST, pid, now, now, step, group, replica, list(devices))
        self._store.register(stored)
        known = self._known.setdefault(run, KnownRun(stored, mirror))
        known.stored = stored
        if another:
            known.metrics, known.reported = {}, ""
            self._store.forget_revision(run)
        known.near = known._read = None
        known.heard = time.monotonic()
        self._sort_in(known)
        self._changed.add(run)
        return known

    def beat(self, run: str, beat: Heartbeat) -> KnownRun | None:
        """Takes a sign of life; returns None where it is from nobody who has registered."""
        if (known := self._known.get(run)) is None:
            return None
        if known.stored.group and (beat.host, beat.pid) != (known.stored.host, known.stored.pid):
            return None  # of a process that was this replica before, or that was sent away
        now = time.time()
        known.heard = time.monotonic()
        known.stored = known.stored._replace(last_seen=now, step=beat.step)
        known.dropped = beat.dropped
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
            self._store.seen([known.stored for known in changed])

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
        if members := self.members(run):
            names = ", ".join(known.stored.id for known in members.values())
            raise UnknownRunError(
                f"{run} is a run of {len(members)} replicas, each with its own. Ask for one of them: {names}."
            )
        raise UnknownRunError(f"no run called '{run}' is known to this hub.")

    # --- replicas --------------------------------------------------------------------------------------------------
    def members(self, group: str) -> dict[str, KnownRun]:
        """Returns the replicas of a run, by their ids; none where it has none."""
        return dict(sorted(self._groups[group].items())) if group in self._groups else {}

    def group_of(self, run: str) -> str:
        """Returns which run a replica belongs to; "" for any other run."""
        known = self._known.get(run)
        return "" if known is None else known.stored.group

    def refuse_twin(self, run: str, folder: str, host: str, group: str) -> None:
        """Looks whether a training may be the replica that it says it is. Reads files, and takes its time.

        One that comes back may be in another folder, on another machine. But while the one that is known trains, there
        is no second one.

        Raises:
            TwinError: it may not; or its run is called like another one that has no replicas, or the other way round.
        """
        if group in self._known or run in self._groups:
            raise TwinError(
                f"there is a run called {group or run} with replicas, and another one without. Give one of them "
                "another name."
            )
        known = self._known.get(run)
        if known is None or not group or (known.stored.host, known.stored.folder) == (host or HOST, folder):
            return  # who is in the same folder has its lock
        if known.fresh and known.status() not in ENDED:
            raise TwinError(
                f"{run} trains already: process {known.stored.pid} on {known.stored.host}, in {known.stored.folder}. "
                "Give each replica an id of its own; one that has ended is free again after "
                f"{SILENT_SECONDS:g} seconds."
            )

    # --- what is said about runs: these read files, and take their time --------------------------------------------
    def lines(self) -> list[dict[str, Any]]:
        """Returns a line about each run, the newest first."""
        lines = {run.stored.id: self._line(run.stored.id, run.history, run) for run in list(self._known.values())}
        for folder in self._beside():
            if folder.run_id not in lines:
                lines[folder.run_id] = self._line(folder.run_id, folder, None)
        return sorted(lines.values(), key=lambda line: line["created"] or 0.0, reverse=True)

    def replicas(self) -> list[dict[str, Any]]:
        """Returns who trains: a line about each process that registered, with where it is and what it trains on.

        "id" is the replica's, "run" the run that it belongs to, "name" how it is addressed alone; a run without other
        replicas has one name for all.
        """
        return [self._replica(known) for known in list(self._known.values())]

    @staticmethod
    def _replica(known: KnownRun) -> dict[str, Any]:
        stored, status = known.stored, known.status()
        return {
            "id": stored.replica if stored.group else stored.id,
            "run": stored.group or stored.id,
            "name": stored.id,
            "host": stored.host,
            "pid": stored.pid,
            "devices": stored.devices,
            "status": status,
            "connected": known.fresh and status not in ENDED,
            "step": stored.step,
            "last_seen": stored.last_seen,
        }

    def line(self, run: str) -> dict[str, Any]:
        """Returns a line about one run; about one of several replicas, with a line for each of them.

        Raises:
            UnknownRunError: there is no such run.
        """
        if members := self.members(run):
            return group_line(run, [self._line(each.stored.id, each.history, each) for each in members.values()])
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
        line |= {"metrics": {}, "folder": None, "host": HOST, "pid": None, "last_heartbeat": None, "dropped": {}}
        line |= {"connected": False, "name": run, "group": "", "replica": "", "devices": []}
        metrics: Mapping[str, tuple[int, float]] = {}
        if known is not None:
            line |= {"host": known.stored.host, "pid": known.stored.pid, "folder": known.stored.folder}
            line |= {"created": known.stored.registered, "last_heartbeat": known.stored.last_seen}
            line |= {"step": known.stored.step, "dropped": known.dropped, "devices": known.stored.devices}
            line |= {"group": known.stored.group, "replica": known.stored.replica}
            metrics = dict(known.metrics)
        if folder is not None:
            if known is None or folder.path != known.mirror:
                line["folder"] = str(folder.path)
            try:
                content = folder.read()
                line |= {key: content[key] for key in ("status_detail", "name", "pid") if key in content}
                if known is None:
                    line |= membership(run, content)._asdict()
                line["step"] = max(line["step"], content.get("global_step") or 0)
                line["created"] = _seconds(content.get("created")) or line["created"]
                metrics = metrics or RunReader(folder.path / "run.db").last()
            except RunFolderError as error:
                line["status_detail"] = "" if known is not None else str(error)
        line["status"] = known.status() if known is not None else _status_of(folder)
        line["connected"] = known is not None and known.fresh and line["status"] not in ENDED
        line["metrics"] = {name: {"step": step, "value": value} for name, (step, value) in metrics.items()}
        if metrics:
            line["step"] = max(line["step"], *(step for step, _ in metrics.values()))
        return line


def group_line(group: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a line about a run of several replicas: what can be said of them together, and a line about each.

    Args:
        group: the run's name.
        lines: about its replicas, at least one.
    """
    line: dict[str, Any] = {"id": group, "name": group, "replicas": lines}
    line["status"] = min((each["status"] for each in lines), key=_liveliness)
    line["step"] = max(each["step"] for each in lines)
    line["connected"] = any(each["connected"] for each in lines)
    line["created"] = min((each["created"] for each in lines if each["created"] is not None), default=None)
    heard = [each["last_heartbeat"] for each in lines if each["last_heartbeat"] is not None]
    return line | {"last_heartbeat": max(heard, default=None)}


_LIVELY = ("running", "paused", "silent", "killed", "failed", "interrupted", "stopped", "completed")


def _liveliness(status: str) -> int:
    """Returns the place of a status among all: a run of several replicas runs as long as one of them does."""
    return _LIVELY.index(status) if status in _LIVELY else len(_LIVELY)


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
