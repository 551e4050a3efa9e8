"""The processes that read: when they may be interrupted, and what they see."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import get_worker_info

from aetheria.data.keyed import KeyedDataset

__all__ = ["WorkerStart", "begin"]

_STOPPING = (signal.SIGINT, signal.SIGTERM)


def begin(loader: Iterable[Any]) -> Iterator[Any]:
    """Returns `iter(loader)`; a signal to stop waits until its workers know what to do with one."""
    if not isinstance(getattr(loader, "worker_init_fn", None), WorkerStart):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # which the workers inherit
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerStart:
    """What a worker process does first: leaves Ctrl-C and the first SIGTERM to the training process.

    Both reach the whole process group. A worker that died of them would tear down the step that the training process
    wants to finish before it saves. A second SIGTERM, which is how a stuck worker is ended, works as ever; so does the
    first, once the training process is done with its workers: it then waits for them.

    `get_worker_info().dataset` is made to be what the user expects there: the user's own dataset.

    Args:
        users_function: the DataLoader's own `worker_init_fn`.
    """

    def __init__(self, users_function: Callable[[int], None] | None) -> None:
        self.users_function = users_function
        self._done_with, tell = multiprocessing.Pipe(duplex=False)
        # When this is no longer needed; at the latest when the process ends, just before its children are ended.
        Finalize(self, tell.send_bytes, (b"done",), exitpriority=0)

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, KeyedDataset):
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.users_function is not None:
            self.users_function(worker)

    def _on_sigterm(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._done_with.poll():
            os.kill(os.getpid(), signal.SIGTERM)
