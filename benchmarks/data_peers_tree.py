"""What a process and all that it has started use, and what of some files is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

__all__ = ["STILL_CACHED", "drop", "fill", "memory", "processor_seconds", "share_cached"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
STILL_CACHED = 0.1  # of the pages, at most, when the cache is called cold
_HARDLY = 0.01  # of the pages
_SYSTEM = ctypes.CDLL(None, use_errno=True)
_DROPPING = 5.0  # seconds that it is tried for


def _tree(process: int) -> Iterable[int]:
    yield process
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return
    for child in children:
        yield from _tree(int(child))


def processor_seconds(process: int) -> float:
    """Returns for how long a process, those that it has started, and those of them that have ended, have computed."""
    ticks = 0
    for each in _tree(process):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(process: int) -> tuple[float, float]:
    """Returns the proportional set size of a process and all that it has started, in MB; and how much of it is theirs.

    The rest are pages of files that are mapped, which the system takes back when it needs room.
    """
    total = own = 0
    for each in _tree(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total += found["Pss"]
        own += found["Pss_Anon"] + found["Pss_Shmem"]
    return total * 1024 / 1e6, own * 1024 / 1e6


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop(folder: Path) -> float:
    """Drops the files of a folder from the page cache; returns how much of them is there still, see `share_cached`.

    What a process that is just ending has mapped goes a moment later.
    """
    deadline = time.monotonic() + _DROPPING
    while True:
        for path in _files(folder):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (left := share_cached(folder)) < _HARDLY or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def fill(folder: Path) -> None:
    """Reads the files of a folder into the page cache, if they are not there yet."""
    if share_cached(folder) == 1.0:
        return
    piece = bytearray(8 << 20)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def share_cached(folder: Path) -> float:
    """Returns how much of the files of a folder is in the page cache, by `mincore`, which brings nothing into it.

    Raises:
        OSError: the system does not say.
    """
    cached = pages = 0
    for path in _files(folder):
        with path.open("rb") as file:
            if not (size := os.fstat(file.fileno()).st_size):
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                content = np.frombuffer(mapped, np.uint8)
                found = np.zeros(-(-size // _PAGE), np.uint8)
                address = ctypes.c_void_p(content.ctypes.data)
                if _SYSTEM.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)):
                    raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
                del content, address  # the map cannot be closed while it is looked at
        cached += int((found & 1).sum())
        pages += len(found)
    return cached / max(1, pages)
