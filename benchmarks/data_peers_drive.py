"""Starting contestants in fresh processes, and looking at their memory while they read."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.data_peers_process import Task
from benchmarks.data_peers_tree import memory

__all__ = ["Found", "run"]

PATIENCE = 300.0  # seconds that a process may take, beyond what it is to read
_LOOK_EVERY = 0.25
_LEAVE = 20.0  # seconds to end in


@dataclass
class Found:
    """What one process has measured.

    Attributes:
        values: what it has printed.
        total: the most memory that it and its processes had, in MB, as proportional set size.
        own: the most of it that was not pages of mapped files.
        failure: the end of what it has said, if it did not come so far.
    """

    values: dict[str, Any] = field(default_factory=dict)
    total: float = 0.0
    own: float = 0.0
    failure: str = ""


class _Process:
    def __init__(self, task: Task, errors: Any, temporary: str) -> None:
        self.task = task
        self.found = Found()
        self._errors = errors
        # Some leave files for temporary ones behind, and are slowed down by those of the time before.
        usual = {"TMPDIR": temporary, "LITDATA_DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        if task.ranks > 1:
            usual |= {"RANK": str(task.rank), "LOCAL_RANK": str(task.rank), "WORLD_SIZE": str(task.ranks)}
            usual |= {"LOCAL_WORLD_SIZE": str(task.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task.meeting)}
        command = [sys.executable, "-m", "benchmarks.data_peers_process", task.text()]
        self._process = subprocess.Popen(
            command, env=os.environ | usual, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        self._deadline = time.monotonic() + PATIENCE + task.seconds

    def line(self, look: bool = False) -> str:
        """Returns the next line that it prints; looks at its memory until then."""
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], _LOOK_EVERY)[0]:
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"nothing came within {PATIENCE:g} s")
            if look:
                self.look()
        if not (line := self._process.stdout.readline()):
            raise EOFError("it ended")
        return line.decode()

    def look(self) -> None:
        """Remembers the most memory that it has had."""
        total, own = memory(self._process.pid)
        self.found.total, self.found.own = max(self.found.total, total), max(self.found.own, own)

    def go(self) -> None:
        """Lets it open the data."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Lets it end, and ends whatever of it remains after that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self.found.failure:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def fail(self, error: Exception) -> None:
        """Notes what went wrong, with the last thing that it has said."""
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.found.failure = f"{error}: {said[-1] if said else 'it said nothing'}"
        print("\n".join(said[-25:]), file=sys.stderr)


def run(tasks: Sequence[Task]) -> list[Found]:
    """Runs processes side by side, and returns what each of them has found; usually there is one.

    They open the data when all of them have imported.
    """
    started: list[_Process] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, task in enumerate(tasks):
                errors = (Path(folder) / str(number)).open("w+b")
                started.append(_Process(task, errors, folder))
            waiting = list(started)
            try:
                for process in waiting:
                    process.line()
                for process in waiting:
                    process.go()
                for process in waiting:
                    process.found.values = json.loads(process.line(look=True))
                    process.look()
            except (TimeoutError, EOFError, ValueError, BrokenPipeError) as error:
                for process in waiting:
                    process.fail(error)
        finally:
            for process in started:
                process.end()
    return [process.found for process in started]
