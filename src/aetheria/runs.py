"""The run folder: where a run lives, what it says about itself, who may write in it. No torch in here.

`run.json` is small and always whole: it is replaced by renaming, never edited in place. One process at a time may
train in a folder; it holds a POSIX record lock, which the kernel drops at the very instant the process dies (and
which, unlike `flock`, forked data-loading workers do not inherit).
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aetheria.errors import RunFolderError, did_you_mean

__all__ = ["RunFolder", "find_runs", "folder_name", "fsync_directory", "resolve_run", "write_atomically"]

FORMAT = 1
# POSIX locks do not exclude the process that holds them, and closing any descriptor of the file gives them up; this
# set, of the devices and numbers of lock files, says which ones this process must leave alone.
_held: set[tuple[int, int]] = set()
os.register_at_fork(after_in_child=_held.clear)  # a child holds nothing


def fsync_directory(path: Path) -> None:
    """Makes the names in a folder durable. What this returns after survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either the old one or the new one, at any instant and after any crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def now() -> str:
    """Returns the time in UTC, ISO 8601, to the millisecond: runs are put in order by it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def folder_name(name: str) -> str:
    """Returns how a folder is called for a run that is called anything."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


class RunFolder:
    """One run on disk.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    @classmethod
    def create(cls, runs_dir: Path, name: str, **fields: Any) -> RunFolder:
        """Makes a new run folder, `<name>-<time>-<four hex digits>`, with its first `run.json`.

        Args:
            runs_dir: the folder of all runs; made if it is not there.
            name: how the run's id begins.
            **fields: further keys of `run.json` (JSON types only): config, seed, lineage.

        Raises:
            RunFolderError: the folder cannot be made or written.
        """
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        path: Path | None = None
        try:
            path = _make_folder(runs_dir.absolute(), f"{folder_name(name)}-{stamp}")
            folder = cls(path)
            folder.begin(name, **fields)
        except OSError as error:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise RunFolderError(
                f"cannot make a run folder in {runs_dir.absolute()}: {error.strerror or error}. "
                "Choose a folder you may write to: runs_dir in the config, or --set runs_dir=PATH."
            ) from error
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Opens a run folder that exists.

        Raises:
            RunFolderError: there is no readable `run.json` in it.
        """
        folder = cls(Path(path))
        folder.read()
        return folder

    @property
    def run_id(self) -> str:
        """The run's name: that of its folder, wherever the folder was moved."""
        return self.path.name

    @property
    def snapshots(self) -> Path:
        """The folder of this run's snapshots."""
        return self.path / "snapshots"

    def read(self) -> dict[str, Any]:
        """Returns the content of `run.json`.

        Raises:
            RunFolderError: it is missing, damaged, or in a newer format.
        """
        file = self.path / "run.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} is not a run folder: it has no run.json.") from None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {file}: {error}") from error
        if not isinstance(content, dict) or not isinstance(found := content.get("format", 0), int):
            raise RunFolderError(f"cannot read {file}: it is not what Aetheria writes there. Restore it from a copy.")
        if found > FORMAT:
            raise RunFolderError(
                f"{file} is in format {found}; this version of Aetheria reads format {FORMAT}. Open it with a newer "
                "version."
            )
        return content

    def config_source(self) -> Path | None:
        """Returns the file that configured the run, beside which `plugins/` lies; None where nobody vouches for it.

        A run folder may come from somebody else. It may point at code, but not bring it along: not by holding it, and
        not by a path such as /proc/self/cwd, which means a different folder for everybody who opens it.
        """
        source = Path(str(self.read().get("config_source") or ""))
        if not source.is_absolute() or source.parts[1:2] == ("proc",) or source.parts[1:3] == ("dev", "fd"):
            return None
        places = (source.resolve(), (source.parent / "plugins").resolve())
        return None if any(place.is_relative_to(self.path.resolve()) for place in places) else source

    def begin(self, name: str, **fields: Any) -> None:
        """Writes the first `run.json` of a folder that is new.

        Args:
            name: of the run, for people.
            **fields: further keys (JSON types only).
        """
        self.snapshots.mkdir(exist_ok=True)
        identity = {"format": FORMAT, "run_id": self.run_id, "name": name, "created": now()}
        state = {"status": "created", "status_detail": "", "global_step": 0}
        self._write(identity | fields | state | describe_process())

    def update(self, **fields: Any) -> None:
        """Replaces keys of `run.json`; the others stay."""
        self._write(self.read() | fields)

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        write_atomically(self.path / "run.json", text.encode() + b"\n")

    # --- who may train here ----------------------------------------------------------------------------------------
    def acquire(self) -> None:
        """Takes the folder for this process until `release`, or until the process ends in whatever way.

        Raises:
            RunFolderError: another process trains in it, or the folder cannot be written.
        """
        if self._lock_file() in _held:
            raise RunFolderError(f"{self.path} is in use by this very process. Wait for that run to end.")
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(f"cannot write in {self.path}: {error.strerror}. A run needs its folder.") from error
        try:
            taken = _take(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise RunFolderError(
                f"cannot lock {self.path}: {error.strerror}. Choose a runs_dir on a file system that has locks."
            ) from error
        if not taken:
            os.close(descriptor)
            process = self.read()
            raise RunFolderError(
                f"{self.path} is in use: process {process.get('pid')} on {process.get('host')} trains in it. "
                "Stop that one first, or start a new run."
            )
        self._lock = descriptor
        _held.add(_file_of(os.fstat(descriptor)))
        for leftover in self.path.glob(".run.json.*.tmp"):  # of a life that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def release(self) -> None:
        """Gives the folder back. Does nothing where it was not taken."""
        if self._lock is not None:
            _held.discard(_file_of(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = None

    def in_use(self) -> bool:
        """Returns whether a living process trains in this folder. Whoever asks is in nobody's way."""
        if self._lock_file() in _held:
            return True
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:  # a file we may not even read: the process is all there is to ask
            return self._process_lives()
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        finally:
            os.close(descriptor)
        return False

    def _lock_file(self) -> tuple[int, int] | None:
        try:
            return _file_of((self.path / ".lock").stat())
        except OSError:
            return None

    def _process_lives(self) -> bool:
        content = self.read()
        if content.get("host") != socket.gethostname():
            return True  # nobody here can tell; the file says running
        try:
            os.kill(int(content.get("pid", 0)), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def display_status(self) -> str:
        """Returns `run.json`'s status; "killed" where it says running and nobody is."""
        status = str(self.read().get("status", "unknown"))
        return "killed" if status in ("created", "running") and not self.in_use() else status


def _make_folder(runs_dir: Path, prefix: str) -> Path:
    """Makes a folder of a new name. Of many runs started in the same second, two may draw the same four digits."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    while True:
        path = runs_dir / f"{prefix}-{secrets.token_hex(2)}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _file_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _take(descriptor: int) -> bool:
    """Locks a file for this process alone; returns False if another one has done so.

    Who merely looks whether a run lives shares the lock for an instant, and does not count: where it can be shared,
    nobody trains, and it is asked for again.
    """
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
            fcntl.lockf(descriptor, fcntl.LOCK_UN)
        else:
            return True


def describe_process() -> dict[str, Any]:
    """Returns who writes: process, host, command line, versions, and the state of the code in git."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "versions": versions(),
        "git": describe_git(Path.cwd()),
    }


def versions() -> dict[str, str]:
    """Returns the versions that decide whether a run can be continued bit for bit."""
    found = {"python": platform.python_version()}
    for package in ("aetheria", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def describe_git(directory: Path) -> dict[str, str | None] | None:
    """Returns the commit, and the sha256 of what differs from it (None when nothing does); None outside git.

    Of files that git does not know, only the names count. No other program is run, whatever git is told to show
    differences with.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            check=True,
            timeout=10,
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD") + git(
            "ls-files", "--others", "--exclude-standard"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changes": hashlib.sha256(changes).hexdigest() if changes else None}


def find_runs(runs_dir: Path) -> list[RunFolder]:
    """Returns the runs of a folder, the newest first."""

    def found() -> Iterator[tuple[str, str, RunFolder]]:
        if not runs_dir.is_dir():
            return
        for path in runs_dir.iterdir():
            if (path / "run.json").is_file():
                folder = RunFolder(path)
                try:
                    created = str(folder.read().get("created", ""))
                except RunFolderError:
                    created = ""  # shown by whoever reads it, with the reason
                yield created, path.name, folder

    ordered = sorted(found(), key=lambda item: item[:2], reverse=True)
    return [folder for _, _, folder in ordered]


def resolve_run(text: str | Path, runs_dir: Path) -> RunFolder:
    """Finds a run by its path, by any unambiguous part of its name, or the newest by `@last`.

    Raises:
        RunFolderError: none fits, or more than one.
    """
    if (Path(text) / "run.json").is_file():
        return RunFolder.open(text)
    text = str(text)
    runs = find_runs(runs_dir)
    if text == "@last":
        if not runs:
            raise RunFolderError(f"there are no runs in {runs_dir.absolute()}. Start one: aetheria train CONFIG")
        return runs[0]
    names = [run.run_id for run in runs]
    fitting = [run for run in runs if run.run_id == text] or [run for run in runs if text and text in run.run_id]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(run.run_id for run in fitting[:5])
        if all(run.run_id.startswith(f"{text}@") for run in fitting):
            raise RunFolderError(f"'{text}' is a run of {len(fitting)} replicas: {listed}. Choose one of them.")
        raise RunFolderError(f"'{text}' fits {len(fitting)} runs: {listed}. Write more of the name, or @last.")
    raise RunFolderError(f"no run called '{text}' in {runs_dir.absolute()}. {did_you_mean(text, names)}")
