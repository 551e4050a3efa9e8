"""The processes that train together: who they are, and how they talk to one another about anything but gradients."""

from __future__ import annotations

import atexit
import ctypes
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from aetheria.errors import ConfigError, RankError

__all__ = ["Placement", "Ranks", "Team", "launched_ranks"]

_FAILURE, _HEARD = "failure", "heard"  # under these names the first rank that fails says so, and the others answer
_MOMENT = 1.0  # seconds that they have for it
_DONE = "done"
_LOOK = 0.05  # seconds between two looks into the store
_TIMEOUT = 1800.0  # seconds that a rank waits for the others in a collective
_RENDEZVOUS = 300.0  # seconds that the ranks have to find one another


def launched_ranks() -> int:
    """Returns how many ranks torchrun, or whoever sets its variables, has launched; 1 where nobody has."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        raise ConfigError(f"WORLD_SIZE: found {os.environ['WORLD_SIZE']!r}, expected a number of ranks.") from error


@dataclass(frozen=True)
class Placement:
    """Where this process stands among all.

    Attributes:
        rank: among all, from 0.
        local_rank: on its node.
        node_rank: its node's.
        world_size: how many there are.
    """

    rank: int
    local_rank: int
    node_rank: int
    world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Placement:
        """Reads what torchrun sets.

        Raises:
            ConfigError: something is missing or is not a number.
        """
        found: dict[str, int] = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
            text = environment.get(name, {"LOCAL_RANK": environment.get("RANK"), "GROUP_RANK": "0"}.get(name))
            if text is None or not text.isdecimal():
                raise ConfigError(
                    f"{name}: found {text!r} in the environment, expected a number. Several ranks are launched with "
                    "`aetheria launch --nproc N CONFIG`, or with torchrun, which set it."
                )
            found[name] = int(text)
        if found["RANK"] >= found["WORLD_SIZE"]:
            raise ConfigError(f"RANK is {found['RANK']}, but there are only {found['WORLD_SIZE']} (WORLD_SIZE).")
        return cls(found["RANK"], found["LOCAL_RANK"], found["GROUP_RANK"], found["WORLD_SIZE"])


class Team:
    """The same ranks over a process group of their own, for a thread beside the training's.

    Attributes:
        rank: of this one.
        group: the process group.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.where.rank
        self.group = ranks.new_group()
        self._ranks = ranks

    def gather(self, data: bytes) -> list[bytes]:
        """Returns what every rank gives, by rank."""
        return self._ranks.gather(data, self.group)


class Ranks:
    """The process group of a run, and beside it a group on the processors, for what is said between ranks.

    Nothing that is said is a pickle: bytes go over as bytes.

    Args:
        backend: of the gradients: "gloo", or "cpu:gloo,cuda:nccl".
        timeout: seconds that a rank waits for the others in a collective; `AETHERIA_RANK_TIMEOUT` by default.

    Attributes:
        where: this process's place.
        store: what all ranks can look into without waiting for one another.
        group: of all ranks, on their processors.
        agreement: another one, for what is begun at one step and read at another.

    Raises:
        ConfigError: the ranks do not find one another.
    """

    _joined: ClassVar[dict[tuple[Any, ...], Ranks]] = {}

    @classmethod
    def join(cls, backend: str, timeout: float | None = None) -> Ranks:
        """Returns the process group; for a second run in a process it is the same again.

        Gloo does not survive that groups are made and ended again and again: connections are mixed up.
        """
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        key = backend, timeout, *(os.environ.get(name) for name in names)
        if key not in cls._joined:
            cls._joined.clear()
            _end_process_group()
            cls._joined[key] = cls(backend, timeout)
        ranks = cls._joined[key]
        ranks._runs += 1
        ranks.store = PrefixStore(f"run-{ranks._runs}", ranks._whole_store)
        return ranks

    def __init__(self, backend: str, timeout: float | None = None) -> None:
        self.where = Placement.from_environment()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _end_with_parent()
        seconds = float(os.environ.get("AETHERIA_RANK_TIMEOUT", _TIMEOUT)) if timeout is None else timeout
        self._timeout = datetime.timedelta(seconds=seconds)
        patience = float(os.environ.get("AETHERIA_RENDEZVOUS_TIMEOUT", _RENDEZVOUS))
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, rank, size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=patience)))
            # An agent's store outlives the ranks that it starts again, and holds the addresses of those before.
            store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            store.set_timeout(datetime.timedelta(seconds=patience))
            # Everybody says that they are here, so that a rank that is missing is missed by its number.
            here = PrefixStore("aetheria-here", store)
            here.set(str(rank), "here")
            self._await_all(here, size, patience)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=self._timeout)
        except (dist.DistError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"rank {self.where.rank} of {self.where.world_size} did not find the others at {master} (MASTER_ADDR, "
                f"MASTER_PORT) within {patience:g} seconds: {_first_line(error)} Is every rank started, with the same "
                "address, and can it be reached from here?"
            ) from error
        self._whole_store = PrefixStore("aetheria", store)
        self.store: Store = self._whole_store
        self.group = self.new_group()
        self.agreement = self.new_group()
        self._runs = self._calls = 0
        self._meshes: dict[tuple[str, int], tuple[Any, Any]] = {}
        atexit.register(_end_process_group)
        self._broken = self._failed = self._store_is_gone = False

    @staticmethod
    def _await_all(store: Store, size: int, patience: float) -> None:
        deadline = time.monotonic() + patience
        missing = list(range(size))
        while missing := [rank for rank in missing if not store.check([str(rank)])]:
            if time.monotonic() > deadline:
                named = ", ".join(map(str, missing[:8]))
                raise ValueError(f"rank {named} of {size} is missing.")
            time.sleep(_LOOK)

    def new_group(self) -> Any:
        """Makes one more group of all ranks on their processors: for what goes on beside the others' collectives."""
        return dist.new_group(backend="gloo", timeout=self._timeout)

    def meshes(self, device: str, together: int = 1) -> tuple[Any, Any]:
        """Returns the ranks as `torch.distributed.device_mesh` knows them; the same again each time.

        Args:
            device: its type, "cpu" or "cuda".
            together: how many ranks next to one another compute the same samples.

        Returns:
            Those that this rank shares the samples with, and those that it computes its share with: None if it does so
            alone.
        """
        if (device, together) not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - as late as may be

            size = self.where.world_size
            if together == 1:
                self._meshes[device, together] = init_device_mesh(device, (size,)), None
            else:
                mesh = init_device_mesh(device, (size // together, together), mesh_dim_names=("data", "tensor"))
                self._meshes[device, together] = mesh["data"], mesh["tensor"]
                for group in mesh.get_all_groups():  # made anew, with a patience of torch's own
                    _set_pg_timeout(self._timeout, group)
        return self._meshes[device, together]

    @cached_property
    def team(self) -> Team:
        """Them again, for what is written beside the training. Every rank asks for it at the same time."""
        return Team(self)

    # --- what is said ----------------------------------------------------------------------------------------------
    def gather(self, data: bytes, group: Any = None) -> list[bytes]:
        """Returns what every rank gives, by rank; through a group of their own, where somebody else may be talking."""
        size, group = self.where.world_size, group or self.group
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
        longest = max(int(length) for length in lengths)
        if not longest:
            return [b""] * size
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
        dist.all_gather(parts, _as_tensor(data, longest), group=group)
        return [bytes(part[: int(length)].numpy()) for part, length in zip(parts, lengths, strict=True)]

    def broadcast(self, data: bytes = b"", source: int = 0) -> bytes:
        """Returns what one rank gives; the others give nothing."""
        length = torch.tensor([len(data)])
        dist.broadcast(length, source, group=self.group)
        content = _as_tensor(data, int(length)) if self.where.rank == source else torch.empty(int(length)).byte()
        if len(content):
            dist.broadcast(content, source, group=self.group)
        return bytes(content.numpy())

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to add up a tensor in host memory, in place."""
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def arrived() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return arrived

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.all_reduce(torch.zeros(1), group=self.group)

    def main_says(self, function: Callable[[], bytes]) -> bytes:
        """See `Accelerator.main_says`."""
        if self.where.rank == 0:
            try:
                said = function()
            except BaseException as error:
                self.broadcast(b"\1" + _told(0, error).encode())
                raise
            self.broadcast(b"\0" + said)
            return said
        said = self.broadcast()
        if said[:1] == b"\1":
            raise RankError(said[1:].decode())
        return said[1:]

    def once_per_node(self, function: Callable[[], object]) -> None:
        """See `Accelerator.once_per_node`. Not a collective: a download may take longer than these may wait."""
        self._calls += 1
        key = f"node-{self.where.node_rank}-{self._calls}"
        if self.where.local_rank == 0:
            try:
                function()
            except BaseException as error:
                self.store.set(key, _told(self.where.rank, error))
                raise
            self.store.set(key, _DONE)
            return
        while not self.store.check([key]):
            if (failure := self.failure()) is not None:
                raise RankError(failure)
            time.sleep(_LOOK)
        if (said := self.store.get(key).decode()) != _DONE:
            raise RankError(said)

    # --- when one of them fails ------------------------------------------------------------------------------------
    def failure(self) -> str | None:
        """Returns what the first rank that failed has said; None where all is well, or nobody can be asked."""
        try:
            if not self.store.check([_FAILURE]):
                return None
            said: str = self.store.get(_FAILURE).decode()
            self.store.set(f"{_HEARD}-{self.where.rank}", _DONE)
        except RuntimeError:
            self._store_is_gone = True  # it was in a process that has died
            return None
        return said

    def explain(self, error: BaseException) -> BaseException:
        """See `Accelerator.explain`."""
        self._broken = True  # whoever waits for this rank learns it when the connection ends
        if isinstance(error, RankError):
            return error
        if isinstance(error, RuntimeError) and _is_of_collective(error):
            told = self._wait_for_failure()
            return RankError(told or f"another rank is gone, without a word: {_first_line(error)}")
        try:
            self.store.compare_set(_FAILURE, "", _told(self.where.rank, error))
            self._failed = True
        except RuntimeError as second:
            error.add_note(f"the other ranks could not be told: {_first_line(second)}")
        return error

    def _wait_for_failure(self) -> str | None:
        """Returns what another rank has said, which may take it a moment longer than its connections to break."""
        deadline = time.monotonic() + _MOMENT
        while (told := self.failure()) is None and not self._store_is_gone and time.monotonic() < deadline:
            time.sleep(_LOOK)
        return told

    def leave(self) -> None:
        """Ends a run; the process group only if a rank has failed. Then the one that has the store stays a moment."""
        if not self._broken:
            return
        self._joined.clear()
        self.__dict__.pop("team", None)
        self._meshes.clear()
        self.group = self.agreement = None  # connections end when nobody has them any more
        _end_process_group()
        has_store = self.where.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if self._failed and has_store:
            others = [f"{_HEARD}-{rank}" for rank in range(1, self.where.world_size)]
            deadline = time.monotonic() + 2 * _MOMENT
            while not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(_LOOK)


def _end_with_parent() -> None:
    """Has the system send SIGTERM when torchrun's agent dies: nobody would start, or stop, the ranks of a dead one.

    See prctl(2), PR_SET_PDEATHSIG. Elsewhere than on Linux, ranks that are left alone train on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _as_tensor(data: bytes, length: int) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(max(length, 1), b"\0")), dtype=torch.uint8)[:length]


def _told(rank: int, error: BaseException) -> str:
    return f"rank {rank} failed: {type(error).__name__}: {error}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_of_collective(error: BaseException) -> bool:
    """Returns whether it is the end of a connection to another rank. Not all that torch raises there has a type."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )
