"""Ranks that somebody else has started: found through their own process group, and never waited for in vain.

Of `control/`, this file and `agreement.py` know torch; they are imported where there is more than one rank.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from aetheria.control.agreement import Agreement
from aetheria.control.meeting import Card, Place
from aetheria.errors import ConfigError, RankError

__all__ = ["JoinedAgreement", "JoinedRanks", "Meeting", "join"]

_MEETING = 300.0  # seconds that the ranks have to find one another
_TIMEOUT = 1800.0  # seconds that a rank waits for the others
_NAP, _LOOK = 0.0002, 0.05  # seconds between two looks at an exchange, and into the store
_SHORT = 248  # bytes that go over at once; what is longer needs a second exchange
_GRACE = 1.0  # seconds for what a rank has begun before it ended
_EXCHANGE = 60.0  # seconds for what all ranks but a straggler have begun long ago
_OVER = "over"  # under this name the first rank that takes part no more says why


class Meeting:
    """One time that all ranks meet, in the store of their process group: those that do not come are named.

    Every rank's first meeting is everybody's first, its second everybody's second.

    Args:
        place: this rank's.
    """

    _count: ClassVar[int] = 0

    def __init__(self, place: Place) -> None:
        Meeting._count += 1
        self._place = place
        self.store = PrefixStore(f"aetheria-weavelet-{self._count}", dist.distributed_c10d._get_default_store())

    def announce(self, card: Card) -> None:
        """Says who this rank is, or that it has failed; waits for nobody."""
        self.store.set(f"card-{self._place.rank}", msgspec.json.encode(card).decode())

    def cards(self) -> list[Card]:
        """Returns what all ranks have said, by rank.

        Raises:
            RankError: one of them has not come, or has failed.
            ConfigError: they have taken different numbers of steps, or commands by themselves.
        """
        patience = float(os.environ.get("AETHERIA_RENDEZVOUS_TIMEOUT", _MEETING))
        deadline = time.monotonic() + patience
        missing = names = [f"card-{rank}" for rank in range(self._place.size)]
        while missing := [name for name in missing if not self._has(name)]:
            if time.monotonic() > deadline:
                who = ", ".join(name.removeprefix("card-") for name in missing[:8])
                raise RankError(
                    f"rank {who} of {self._place.size} has no Weavelet that has come as far, after {patience:g} "
                    "seconds. Every rank makes one and starts it, at the same place of the script; what is written or "
                    'sent, the first rank writes and sends. Weavelet(ranks="alone") steers this process alone, where '
                    "the others do not train the same model."
                )
            time.sleep(_LOOK)
        cards = [msgspec.json.decode(data, type=Card) for data in self.store.multi_get(names)]
        for rank, card in enumerate(cards):
            if card.problem:
                raise RankError(f"rank {rank} failed: {card.problem}")
        if len({card.step for card in cards}) > 1:
            steps = ", ".join(f"{card.step:,} on rank {rank}" for rank, card in enumerate(cards[:8]))
            raise ConfigError(
                f"the ranks have taken different numbers of steps: {steps}. A command takes effect at the same step "
                "on all of them, so all must count alike: start the Weavelet at the same place on every rank."
            )
        if any(card.revision for card in cards):
            raise ConfigError(
                "this Weavelet has carried out commands by itself, before the other ranks were there: they would have "
                "other settings now. Start it when torch.distributed has been initialised, or with torchrun."
            )
        return cards

    def _has(self, name: str) -> bool:
        try:
            return bool(self.store.check([name]))
        except RuntimeError as error:
            raise RankError(_gone(error)) from error


class _Known(NamedTuple):
    """The group that was made for the last Weavelet: another one can use it."""

    world: Any
    group: Any


class JoinedRanks:
    """The ranks of a process group, which is not ours, and a group on the processors beside it, which is.

    Args:
        place: this rank's.
        meeting: at which all have met.
        cards: what they have said there.

    Attributes:
        where: this rank's place.
        store: what all can look into without waiting for one another.
        agreement: the group.
        exchange_patience: seconds that an exchange may be late.
    """

    _known: ClassVar[_Known | None] = None
    _calls: ClassVar[int] = 0  # exchanges begun in the group

    def __init__(self, place: Place, meeting: Meeting, cards: list[Card]) -> None:
        self.where = place
        self.store = meeting.store
        given = os.environ.get("AETHERIA_RANK_TIMEOUT")
        self._timeout = float(given or _TIMEOUT)
        self.exchange_patience = float(given or _EXCHANGE)
        world, known = dist.group.WORLD, JoinedRanks._known
        # Used again where all of them have begun the same exchanges in it: groups that are made again and again cost
        # connections and threads. Where one of them has begun one more, what comes next would meet that one.
        if known is not None and known.world is world and len({card.calls for card in cards}) == 1:
            self.agreement = known.group
            return
        self.agreement = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._timeout))
        JoinedRanks._known, JoinedRanks._calls = _Known(world, self.agreement), 0

    @classmethod
    def calls(cls) -> int:
        """Returns how many exchanges this rank has begun in the group that there is; -1 where there is none."""
        known = cls._known
        return -1 if known is None or known.world is not dist.group.WORLD else cls._calls

    # --- what is said ----------------------------------------------------------------------------------------------
    def all_reduce(self, vector: Tensor) -> Any:
        """Begins the maximum over all ranks, in place; returns what `finish` waits for."""
        return self._begun(lambda: dist.all_reduce(vector, dist.ReduceOp.MAX, group=self.agreement, async_op=True))

    def gather(self, data: bytes) -> list[bytes]:
        """Returns what every rank gives, by rank."""
        head = len(data).to_bytes(8, "little") + data[:_SHORT].ljust(_SHORT, b"\0")
        heads = self._gather(head)
        lengths = [int.from_bytes(each[:8], "little") for each in heads]
        whole = [each[8:] for each in heads]
        if (longest := max(lengths)) > _SHORT:
            whole = self._gather(data.ljust(longest, b"\0"))
        return [each[:length] for each, length in zip(whole, lengths, strict=True)]

    def _gather(self, data: bytes) -> list[bytes]:
        parts = [torch.empty(len(data), dtype=torch.uint8) for _ in range(self.where.size)]
        ours = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.finish(self._begun(lambda: dist.all_gather(parts, ours, group=self.agreement, async_op=True)))
        return [part.numpy().tobytes() for part in parts]

    def broadcast(self, data: bytes = b"", source: int = 0) -> bytes:
        """Returns what one rank gives; the others give nothing."""
        return self.gather(data if self.where.rank == source else b"")[source]

    # --- without waiting in vain -----------------------------------------------------------------------------------
    def _begun(self, begin: Callable[[], Any]) -> Any:
        try:
            work = begin()
        except (RuntimeError, ValueError) as error:  # the process group has been ended, or a connection is gone
            raise RankError(_gone(error)) from error
        JoinedRanks._calls += 1
        return work

    def finish(self, work: Any, patience: float | None = None) -> None:
        """Waits for an exchange, as long as somebody is there to finish it.

        Args:
            work: the exchange.
            patience: in seconds; `AETHERIA_RANK_TIMEOUT` by default.

        Raises:
            RankError: another rank has ended, or has died, or takes too long.
        """
        patience = self._timeout if patience is None else patience
        now = time.monotonic()
        deadline, look, over = now + patience, now + _LOOK, ""
        while not work.is_completed():
            now = time.monotonic()
            if now > look and not over:
                look = now + _LOOK
                if over := self.over():  # what it has begun before may still arrive
                    deadline = min(deadline, now + _GRACE)
            if now > deadline:
                raise RankError(
                    over
                    or f"the other ranks have not come as far after {patience:g} seconds (AETHERIA_RANK_TIMEOUT): not "
                    "all of them seem to take the same number of steps."
                )
            time.sleep(_NAP)
        try:
            work.wait()
        except RuntimeError as error:
            raise RankError(_gone(error)) from error

    def say_over(self, why: str) -> None:
        """Says that this rank takes part in nothing any more, to whoever waits for it; the first reason counts.

        Raises:
            RankError: the store is gone: there is nobody any more who could be told.
        """
        try:
            self.store.compare_set(_OVER, "", why)
        except RuntimeError as error:
            raise RankError(_gone(error)) from error

    def over(self) -> str:
        """Returns why one of the ranks takes part no more; empty where all do.

        Raises:
            RankError: the store is gone.
        """
        try:
            return str(self.store.get(_OVER).decode()) if self.store.check([_OVER]) else ""
        except RuntimeError as error:
            raise RankError(_gone(error)) from error

    def check_all_there(self) -> None:
        """Looks whether all ranks still take part.

        Raises:
            RankError: one of them does not; or the store is gone.
        """
        if over := self.over():
            raise RankError(over)


class JoinedAgreement(Agreement):
    """The exchanges of a training whose loop is somebody else's: whether all ranks count alike is not known there."""

    first_interval = 1  # a step may take a minute; a loop in which it takes a millisecond has soon been measured

    def __init__(self, ranks: JoinedRanks) -> None:
        super().__init__(ranks)
        self._ranks = ranks

    def _all_reduce(self, vector: Tensor) -> Any:
        return self._ranks.all_reduce(vector)

    def _finish(self, work: Any) -> None:
        # Where gradients are averaged in every step, all ranks have begun it before any of them can be here.
        self._ranks.finish(work, self._ranks.exchange_patience)

    def pass_on(self, commands: Sequence[bytes], signal: int = 0) -> None:
        """As of `Agreement`; raises `RankError` where the store is gone."""
        try:
            super().pass_on(commands, signal)
        except RuntimeError as error:
            raise RankError(_gone(error)) from error

    def await_word(self, ended: Callable[[], int]) -> tuple[int, list[bytes]]:
        """As of `Agreement`; raises `RankError` where the store is gone."""
        try:
            return super().await_word(ended)
        except RuntimeError as error:
            raise RankError(_gone(error)) from error


def join(place: Place, card: Card) -> tuple[Card, JoinedRanks, JoinedAgreement]:
    """Finds the other ranks; every rank calls it at the same step.

    Args:
        place: this rank's.
        card: what it says of itself.

    Returns:
        What the first rank says of itself, all ranks, and what they agree with.

    Raises:
        RankError: a rank has not come, or has failed.
        ConfigError: the ranks have taken different numbers of steps, or commands by themselves.
    """
    meeting = Meeting(place)
    meeting.announce(msgspec.structs.replace(card, calls=JoinedRanks.calls()))
    cards = meeting.cards()
    ranks = JoinedRanks(place, meeting, cards)
    return cards[0], ranks, JoinedAgreement(ranks)


def _gone(error: BaseException) -> str:
    return f"another rank is gone: {(str(error).splitlines() or [type(error).__name__])[0]}"
