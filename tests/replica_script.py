"""A plain training loop that is one replica of a run, until it is stopped or killed.

python replica_script.py RUNS_DIR RUN REPLICA_ID
"""

from __future__ import annotations

import sys
import time

import torch

from aetheria import Weavelet


def main(runs_dir: str, run: str, replica_id: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    weavelet = Weavelet(run=run, replica_id=replica_id, optimizer=optimizer, runs_dir=runs_dir).start()
    while not weavelet.should_stop:
        optimizer.zero_grad()
        loss = (parameter - 3.0).square().sum()
        loss.backward()
        optimizer.step()
        weavelet.log({"loss": loss.detach()})
        time.sleep(0.02)
    weavelet.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
