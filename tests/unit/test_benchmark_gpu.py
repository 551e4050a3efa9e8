"""What of `benchmarks/gpu.py` can be seen to work without a GPU: that it says so, and that it counts right."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from benchmarks.gpu import ABSENT, has_driver
from benchmarks.gpu_parts import SynchronisationCount

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(has_driver(), reason="this machine has the driver of a GPU")
def test_without_cuda_it_says_so_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from benchmarks import gpu; code = gpu.main(); "
        "print([name for name in ('torch', 'numpy', 'aetheria') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (ABSENT, "[]\n"), done.stderr
    assert "found no driver of a GPU" in done.stderr
    assert "--device cpu" in done.stderr


class _Event:
    def __init__(self, arrived: bool) -> None:
        self.arrived = arrived
        self.waited = 0

    def query(self) -> bool:
        return self.arrived


def test_synchronisations_are_counted_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(event: Any) -> None:
        event.waited += 1

    def train() -> None:
        for _ in range(3):  # at one and the same line, as in a loop
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", wait)
    waited_for, arrived = _Event(arrived=False), _Event(arrived=True)
    with SynchronisationCount() as counted:
        thread = Thread(target=train)
        thread.start()
        thread.join()
        for event in (waited_for, arrived):
            torch.cuda.Event.synchronize(event)  # type: ignore[arg-type]
    assert (counted.operations, counted.events) == (3, 1)
    assert (waited_for.waited, arrived.waited) == (1, 1)
    assert torch.cuda.Event.synchronize is wait  # as it was
