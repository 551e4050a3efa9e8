"""Other processes: whether they are there, how they were started, when they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

__all__ = ["command_of_process", "ended", "is_running"]

_POLL = 0.25  # seconds between two looks, where the system has no better way


def is_running(pid: int) -> bool:
    """Returns whether a process is there. One that has ended and was not collected by its parent is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # no such file on this system
    return state not in "ZX"


def command_of_process(pid: int) -> str:
    """Returns a process's command line; "" where there is none to be had."""
    file = Path(f"/proc/{pid}/cmdline")
    try:
        return file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        pass
    try:
        listed = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return listed.stdout.decode(errors="replace")


async def ended(parent: int, *, by_polling: bool = False) -> None:
    """Returns when the parent of this process has ended.

    By a pidfd where there are some (Linux), at that instant; elsewhere by asking four times a second who the parent
    is: an orphan is given another one.

    Args:
        parent: its number.
        by_polling: do not use a pidfd.
    """
    if not by_polling and hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(parent)
        except ProcessLookupError:
            return
        except OSError:
            pass  # an old kernel, or one that refuses: ask it like everywhere else
        else:
            await _readable(descriptor, parent)
            return
    while os.getppid() == parent:
        await asyncio.sleep(_POLL)


async def _readable(descriptor: int, parent: int) -> None:
    """Waits until a pidfd says that its process has ended."""
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    loop.add_reader(descriptor, signalled.set)
    try:
        if os.getppid() == parent:  # otherwise it ended before, and the number means somebody else now
            await signalled.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
