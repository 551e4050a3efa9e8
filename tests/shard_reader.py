"""Reads shards again and again:  python shard_reader.py OPTIONS, as JSON: place, cache, cache_bytes, passes, seed

Prints "ready" when it has opened them, and "read" after each pass. A file of its own, for processes to be killed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from aetheria.data import Shards


def read(place: str, cache: str, cache_bytes: int | None, passes: int, seed: int, keep: int | None = None) -> None:
    """Reads all samples in some order, and looks whether they are right."""
    shards = Shards(place, cache=cache, cache_bytes=cache_bytes, keep=keep, retries=2, timeout=20.0)
    print("ready", flush=True)
    draw = np.random.default_rng(seed)
    for _ in range(passes):
        for block in draw.permutation(len(shards.block_rows)).tolist():
            rows = np.flatnonzero(shards.blocks_of(range(len(shards))) == block)
            columns: dict[str, Any] = shards.columns(rows)
            assert np.array_equal(columns["number"], rows)
            assert (columns["values"] == rows[:, None]).all()
        print("read", flush=True)


if __name__ == "__main__":
    read(**json.loads(sys.argv[1]))
