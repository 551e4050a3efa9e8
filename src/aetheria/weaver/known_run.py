"""One run as a hub knows it: what is kept of it, what was heard of it last, and what its folder says."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from aetheria.errors import RunFolderError
from aetheria.loom.filesystem import filesystem_of
from aetheria.loom.hub_file import host_name
from aetheria.runs import RunFolder
from aetheria.weaver.store import StoredRun

__all__ = ["HOST", "SILENT_SECONDS", "KnownRun"]

SILENT_SECONDS = 15.0
HOST = host_name()


@dataclass
class KnownRun:
    """What the hub knows of a run that has registered, in memory.

    Attributes:
        stored: what is kept over a restart.
        mirror: where the hub copies its folder to, if that is out of sight.
        heard: when something came from it, on the clock that never jumps; None since the hub was started.
        metrics: the newest values: name to (step, value).
        dropped: records it lost on their way, by kind.
        told: the status that the live feed was told last.
        reported: what the run says it does, if anything else than training: "paused".
        near: whether its status is known without waiting for another machine; None until somebody has looked.
    """

    stored: StoredRun
    mirror: Path
    heard: float | None = None
    metrics: dict[str, tuple[int, float]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    told: str = ""
    reported: str = ""
    near: bool | None = None
    _read: tuple[tuple[int, ...], str] | None = None  # which `run.json` was read last, and the status in it

    @property
    def folder(self) -> RunFolder | None:
        """Its folder, where that lies on this machine."""
        if self.stored.host != HOST or not self.stored.folder:
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
    def removed(self) -> bool:
        """Whether its folder was on this machine, and has been taken away since it was last heard of."""
        return not self.fresh and self.stored.host == HOST and self.stored.folder != "" and self.folder is None

    @property
    def fresh(self) -> bool:
        """Whether it was heard of within the last seconds."""
        return self.heard is not None and time.monotonic() - self.heard < SILENT_SECONDS

    def status(self) -> str:
        """Returns "running", "paused" or "silent", or how it ended: what `run.json` says of it."""
        if self.near is None:
            here = self.stored.host == HOST and self.stored.folder != ""
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
