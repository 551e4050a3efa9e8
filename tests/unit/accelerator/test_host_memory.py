"""Freed memory is kept, where the C library can be asked, and the user has not said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from aetheria.accelerator.host_memory import keep_freed_memory
kept = keep_freed_memory()
def step():
    activations = [torch.ones(1 << 18) for _ in range(8)]  # 1 MiB each
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del activations
    again = [torch.ones(1 << 18) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, min(step() for _ in range(5)))
"""


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    """Returns what the function says, and the page faults of a step that allocates what the last one freed."""
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, check=True, text=True
    )
    kept, faults = said.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_a_step_finds_the_memory_of_the_last_one() -> None:
    kept, faults = kept_and_faults()
    if not kept:
        pytest.skip("another C library, or the user's own settings")
    assert faults < 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_what_the_user_has_set_is_left_alone() -> None:
    kept, faults = kept_and_faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert faults > 1000  # of 2048 pages
