"""Stopping a process for a while: `os.kill` only sends the signal, and on a busy machine threads go on for a moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["freeze", "frozen"]


def freeze(pid: int | None) -> None:
    """Stops a process with SIGSTOP, and returns when the last of its threads has stopped."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60.0
    while {_state(task) for task in Path(f"/proc/{pid}/task").iterdir()} != {"T"}:
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


@contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """Stops a process for the time of a `with` block."""
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid or 0, signal.SIGCONT)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(") ")[2][0]
