"""Worker processes outlive the signal that asks the training process to stop, but not the training process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

READER = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader
from aetheria.data import Cursor, prepare_loader

class Identities(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return torch.tensor([index, os.getpid(), os.getppid()])

def main():
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop"))
    signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
    options = {"persistent_workers": PERSISTENT, "multiprocessing_context": CONTEXT}
    loader = DataLoader(Identities(), 4, num_workers=2, **options)
    source = prepare_loader(loader, role="train", seed=1)
    batches = source.iterate(Cursor())
    first = [next(batches) for _ in range(BEFORE)]
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)  # as a terminal, a scheduler or a service manager does
    rest = list(batches) if READ_ALL else [next(batches)]
    workers = {int(batch.data[0, 1]) for batch in [*first, *rest]}
    print(sum(batch.size for batch in [*first, *rest]), len(workers))
    globals()["kept"] = source, batches  # still there when the interpreter ends

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("persistent", "read_all", "context"),
    [(True, True, "fork"), (True, False, "fork"), (False, False, "fork"), (True, True, "spawn")],
)
def test_workers_read_on_after_a_signal_and_end_with_their_process(
    persistent: bool, read_all: bool, context: str, tmp_path: Path
) -> None:
    before = 2 if context == "spawn" else 1  # a spawned worker is on its own while it imports, a forked one never
    constants = f"PERSISTENT, READ_ALL, CONTEXT, BEFORE = {persistent}, {read_all}, {context!r}, {before}"
    script = tmp_path / "reader.py"
    script.write_text(constants + READER)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )
    assert done.returncode == 0, done.stderr
    read = 40 if read_all else 4 * (before + 1)
    assert done.stdout.splitlines() == ["interrupted", "asked to stop", f"{read} 2"], done.stderr
