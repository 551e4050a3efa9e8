"""Writes a few megabytes of shards:  python shard_writer.py FOLDER WORKERS KIND

A file of its own, because workers import what samples are made of.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aetheria.data import write_shards
from aetheria.data.manifest import Manifest

COUNT = 1200
PACE = 0.001  # seconds a sample takes, so that there is a middle to be killed in


class Rows:
    """Samples that are told by their number."""

    def __init__(self, pace: float = 0.0, broken: int | None = None) -> None:
        self.pace = pace
        self.broken = broken

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> dict[str, Any]:
        time.sleep(self.pace)
        if number == self.broken:
            raise ValueError("a sample that cannot be read")
        return {"number": number, "x": np.full(700 + number % 7, number, dtype=np.int32)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


def write(folder: Path, workers: int = 0, kind: str = "sequence", **options: Any) -> Manifest:
    """Writes them, as a sequence or as an iterator."""
    rows = Rows(options.pop("pace", 0.0), options.pop("broken", None))
    return write_shards(
        rows if kind == "sequence" else iter(rows), folder,
        workers=workers, shard_bytes=200_000, block_bytes=30_000, uid=9, **options,
    )  # fmt: skip


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pace=PACE)
