"""Several ranks in a test: real processes, real gloo, forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

__all__ = ["Rank", "free_port", "launch", "run_ranks"]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.ranked_imports"])
_stores: deque[TCPStore] = deque(maxlen=8)
PATIENCE = 60.0  # seconds that a test waits for its ranks
_ENDING = 5.0  # and for a process that has answered: gloo's end hangs now and then, whoever uses it


class Rank:
    """One rank: a process, and what it returned or raised."""

    def __init__(self, process: Any, answer: Connection) -> None:
        self.process = process
        self._answer = answer
        self.pid: int = process.pid

    def result(self, patience: float = PATIENCE) -> Any:
        """Returns what the function returned; raises what it raised, as text."""
        if not self._answer.poll(patience):
            raise TimeoutError(f"rank {self.pid} did not answer in {patience:g} seconds")
        try:
            kind, value = self._answer.recv()
        except EOFError:
            self.process.join(patience)
            raise ChildProcessError(f"the rank ended with {self.process.exitcode}") from None
        self.process.join(_ENDING)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def launch(count: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[Rank]:
    """Starts as many ranks, each of which calls a function of the module's top level."""
    # As with torchrun, the store is not in a rank, and survives them all.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    ranks = []
    for rank in range(count):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        } | environment  # fmt: skip
        ours, theirs = _processes.Pipe(duplex=False)
        process = _processes.Process(target=_live, args=(theirs, variables, function, arguments), daemon=True)
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours))
    return ranks


def run_ranks(
    count: int, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE, **environment: str
) -> list[Any]:
    """Returns what each rank returned."""
    ranks = launch(count, function, *arguments, **environment)
    try:
        with ThreadPoolExecutor(count) as waiting:
            return list(waiting.map(lambda rank: rank.result(patience), ranks))
    finally:
        end(ranks)


def end(ranks: list[Rank]) -> None:
    """Kills what is left of them."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
        rank.process.join(10)
        rank.process.close()


def _live(
    answer: Connection, variables: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        answer.send(("result", function(*arguments)))
    except BaseException as error:  # noqa: BLE001 - told to the test
        traceback.print_exc(file=sys.stderr)
        answer.send(("error", f"{type(error).__name__}: {error}"))
        os._exit(1)


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)
    return found
