"""How several ranks come to do the same thing at the same step: one small exchange now and then, and nothing between.

At some step every rank puts what it wishes into a vector, and an exchange (the maximum over all ranks) is begun. Some
steps later, at the same step everywhere, it has long arrived, and all ranks find the same in it. Nobody waits, and the
steps between cost one comparison of numbers.

Of this room only this file and `joined_ranks.py` know torch; they are imported where there is more than one rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from zlib import crc32

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from aetheria.control.decision import Decision, Wishes
from aetheria.errors import RankError

__all__ = ["Agreement"]

_INTERVAL = 0.5  # seconds between two exchanges: so long a command may wait, twice
_MOST = 100_000  # steps between two, at most
_SIGNAL, _STOP, _SAVE, _LENGTH, _STEPS, _SUM, _MINUS_SUM, _TIME = range(8)
_HEAD = 8
_PER_SECOND = 1000  # the vector holds whole numbers: milliseconds
_PAYLOAD = 448  # bytes that fit into the vector; what is longer is sent once it has been announced
_NOTHING = torch.iinfo(torch.int64).min
_PATIENCE = 10.0  # seconds that a parked rank which is to end waits for the first one
_LOOK = 0.05  # seconds between two looks of a parked rank


class Group(Protocol):
    """What the ranks have to talk with; `aetheria.accelerator.ranks.Ranks`."""

    where: Any
    store: Any
    agreement: Any  # a process group of its own: nothing else may come between an exchange's ends

    def gather(self, data: bytes) -> list[bytes]: ...
    def broadcast(self, data: bytes = b"", source: int = 0) -> bytes: ...


class Agreement:
    """The exchanges of a run. All methods must be called by every rank at the same step.

    Args:
        group: of all ranks.
    """

    first_interval = 4  # steps between the first two exchanges

    def __init__(self, group: Group) -> None:
        self._group = group
        self._rank = group.where.rank
        self._work: Any = None
        self._vector: Tensor = torch.empty(0)
        self._wishes = Wishes()
        self._steps = self._steps_agreed = self.first_interval
        self._launched = (0.0, 0)  # when, and at which step
        self._parked = 0
        self.due_at = 0
        self.is_first = self._rank == 0

    # --- the exchange ----------------------------------------------------------------------------------------------
    def launch(self, step: int, wishes: Wishes) -> None:
        """Begins an exchange, to be read at `due_at`."""
        now = time.monotonic()
        then, before = self._launched
        if step > before and then:
            self._steps = min(_MOST, max(1, round(_INTERVAL * (step - before) / (now - then))))
        self._launched = now, step
        self._begin(wishes)
        self.due_at = step + self._due_in
        self._wishes = wishes

    def _begin(self, wishes: Wishes) -> None:
        payload = msgspec.msgpack.encode(list(wishes.commands)) if wishes.commands else b""
        checksum = crc32(wishes.configuration.encode())
        head = [0] * _HEAD
        head[_SIGNAL], head[_STOP] = wishes.signal, self._rank + 1 if wishes.stop else 0
        head[_SAVE], head[_LENGTH] = wishes.save, len(payload)
        head[_STEPS] = self._steps if self._rank == 0 else 0
        head[_SUM], head[_MINUS_SUM] = checksum, -checksum
        head[_TIME] = int(wishes.seconds * _PER_SECOND)
        vector = torch.full((_HEAD + _PAYLOAD // 8,), _NOTHING, dtype=torch.int64)
        vector[:_HEAD] = torch.tensor(head)
        if payload and len(payload) <= _PAYLOAD:
            vector[_HEAD:] = torch.frombuffer(bytearray(payload.ljust(_PAYLOAD, b"\0")), dtype=torch.int64)
        self._payload = payload
        self._vector = vector
        self._work = self._all_reduce(vector)

    def _all_reduce(self, vector: Tensor) -> Any:
        return dist.all_reduce(vector, dist.ReduceOp.MAX, group=self._group.agreement, async_op=True)

    def _finish(self, work: Any) -> None:
        work.wait()

    @property
    def under_way(self) -> bool:
        """Whether an exchange has been begun and not read."""
        return self._work is not None

    def decide(self, step: int, at_once: bool, wishes: Callable[[], Wishes]) -> Decision:
        """Returns what takes effect at this step.

        Args:
            step: the steps taken.
            at_once: whether all ranks are here together anyway, and need not put off what they wish.
            wishes: returns this rank's.
        """
        decision = Decision()
        if self.under_way and (at_once or step >= self.due_at):
            decision = self.read()
        if at_once:
            decision = decision.and_then(self.now(wishes()))
        return decision

    def read(self) -> Decision:
        """Returns what has been agreed, waiting for it if need be; nothing where no exchange was begun.

        Raises:
            RankError: the ranks have drifted apart.
        """
        if self._work is None:
            return Decision()
        work, self._work = self._work, None
        self._finish(work)
        head = self._vector[:_HEAD].tolist()
        if head[_SUM] != -head[_MINUS_SUM]:
            raise RankError(self._who_differs())
        self._steps_agreed = head[_STEPS]
        length = head[_LENGTH]
        payload = self._vector[_HEAD:].numpy().tobytes()[:length]
        if length > _PAYLOAD:
            payload = self._group.broadcast(self._payload)
        stop = ""
        if head[_STOP]:
            stop = self._group.broadcast(self._wishes.stop.encode(), head[_STOP] - 1).decode()
        commands = tuple(msgspec.msgpack.decode(payload, type=list[bytes])) if length else ()
        return Decision(head[_SIGNAL], stop, head[_SAVE], commands, head[_TIME] / _PER_SECOND)

    def now(self, wishes: Wishes) -> Decision:
        """Returns what all agree on at this very moment; waits for the slowest."""
        self._begin(wishes)
        self._wishes = wishes
        return self.read()

    @property
    def _due_in(self) -> int:
        return max(1, self._steps_agreed)

    def _who_differs(self) -> str:
        said = [part.decode() for part in self._group.gather(self._wishes.configuration.encode())]
        ours = said[0]
        other = next((rank for rank, text in enumerate(said) if text != ours), 0)
        at = next((place for place, pair in enumerate(zip(ours, said[other], strict=False)) if pair[0] != pair[1]), 0)
        begin = max(0, at - 30)
        return (
            f"the ranks have drifted apart: rank {other} has ...{said[other][begin : at + 50]}... where rank 0 has "
            f"...{ours[begin : at + 50]}... Does the code ask for the rank where it should not?"
        )

    # --- a command's stages ----------------------------------------------------------------------------------------
    def vote(self, problem: str) -> str:
        """Returns the problem of the first rank that has one; empty where all can do it."""
        said = self._group.gather(problem.encode())
        for rank, text in enumerate(said):
            if text:
                return text.decode() if all(other == text for other in said) else f"rank {rank}: {text.decode()}"
        return ""

    # --- parked ----------------------------------------------------------------------------------------------------
    def pass_on(self, commands: Sequence[bytes], signal: int = 0) -> None:
        """From the first rank, to those that are parked: outside any collective, which could not wait so long."""
        self._group.store.set(f"parked-{self._parked}", msgspec.json.encode((signal, list(commands))).decode())

    def await_word(self, ended: Callable[[], int]) -> tuple[int, list[bytes]]:
        """Returns what the first rank passes on, to be called by every rank.

        Args:
            ended: returns the signal that this rank has got, or 0; the first rank passes it on.
        """
        store, key = self._group.store, f"parked-{self._parked}"
        patience = float("inf")
        while not store.check([key]):
            if (signal := ended()) and patience == float("inf"):
                patience = time.monotonic() + _PATIENCE
                store.set(f"parked-signal-{self._parked}", str(signal))
            if time.monotonic() > patience:
                raise RankError(f"rank 0 is gone: it has not answered signal {signal} in {_PATIENCE:g} seconds.")
            time.sleep(_LOOK)
        self._parked += 1
        signal, commands = msgspec.json.decode(store.get(key), type=tuple[int, list[bytes]])
        return signal, commands

    def signal_of_others(self) -> int:
        """Returns the signal that a parked rank has got, or 0; for the first rank."""
        key = f"parked-signal-{self._parked}"
        return int(self._group.store.get(key)) if self._group.store.check([key]) else 0
