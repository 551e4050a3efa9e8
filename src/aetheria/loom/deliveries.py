"""The commands that a sidecar has got and the training has not answered: nothing lost, nothing overtaken.

A command is stored on a disk before it arrives, and heard before it is stored. It may be dealt with as soon as it is
heard, since it has one effect however often it comes; but only where nothing that was sent before it can still be on
its way. That is so where the command that was sent just before it is the one that was taken last.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from aetheria.errors import CommandError, HubError
from aetheria.loom.region import Region
from aetheria.loom.subjects import COMMANDS_ON_THE_WAY
from aetheria.protocol import COMMAND_BYTES, decode_command

if TYPE_CHECKING:  # what only a sidecar with a hub loads
    from aetheria.loom.run_end import Arrival, Overheard

__all__ = ["Deliveries"]

_ANSWERS = frozenset({"accepted", "rejected", "applied", "failed"})  # the run knows it: it need not come again
_BUSY = 5.0  # seconds during which an answer is expected soon
_STORING = 5.0  # seconds after which what was heard does not arrive any more: it was not stored, or had been before
_MISSED = 3.0  # seconds after which it is asked whether what a command has overtaken is still to come
_LONGEST = 20.0  # and after which it is not waited for any more, whatever the server says
_RECENT = 1000  # commands
_EAGER = 0.05  # and during which it is expected at once: so long most boundaries are away


Unanswered = Callable[[], Awaitable[int | None]]


class _Identified(msgspec.Struct):
    """Of a command, its id."""

    id: str = ""


class _Answer(msgspec.Struct):
    """Of an outcome, what matters here."""

    command: str = ""
    state: str = ""


@dataclass
class _Delivery:
    data: bytes
    arrival: Arrival | None  # None: it has only been heard, or its connection has ended; it will come again


class Deliveries:
    """Hands commands to the training process, and acknowledges them once their outcome has been reported."""

    def __init__(self, region: Region) -> None:
        """Begins with none; what an earlier sidecar left in the slots is announced.

        Args:
            region: the shared memory.
        """
        self._region = region
        self._open: dict[str, _Delivery] = {}
        self._waiting: deque[str] = deque()  # those for which there was no slot
        self._newest = ""  # the id of the command that was taken last: everything that was sent before it has been
        self._recent: dict[str, None] = {}  # the ids of commands that were taken, the newest last
        self._held: dict[str, tuple[float, Arrival]] = {}  # by the id of the command that each has overtaken
        self._early: dict[str, float] = {}  # taken when they were heard, and to arrive, at the latest then
        self._busy_until = self._eager_until = 0.0
        self._resting: asyncio.Future[None] | None = None
        region.announce()

    @property
    def busy(self) -> bool:
        """Whether an answer may come at any moment."""
        return time.monotonic() < self._busy_until

    @property
    def eager(self) -> bool:
        """Whether an answer is to be looked for all the time."""
        return bool(self._open) and time.monotonic() < self._eager_until

    def __len__(self) -> int:
        return len(self._open)

    async def rest(self, seconds: float) -> None:
        """Waits so long, or until a command arrives: from then on its answer is looked for."""
        loop = asyncio.get_running_loop()
        self._resting = loop.create_future()  # `wait_for` makes a task each time, many times a second
        timer = loop.call_later(seconds, self._stir)
        try:
            await self._resting
        finally:
            timer.cancel()

    def _stir(self) -> None:
        if self._resting is not None and not self._resting.done():
            self._resting.set_result(None)

    async def arrived(self, arrival: Arrival, unanswered: Unanswered | None = None) -> None:
        """Takes a command; one that is with the training already is not given to it again.

        Args:
            arrival: the command.
            unanswered: asks the server for how many answers it waits.
        """
        if len(arrival.data) > COMMAND_BYTES:
            logger.error("A command of {} bytes was thrown away: it fits no slot.", len(arrival.data))
            await arrival.done()
            return
        self._busy_until = time.monotonic() + _BUSY
        if self._overtakes(arrival):
            until, _ = self._held.get(arrival.previous, (time.monotonic() + _MISSED, None))  # it may come twice
            self._held[arrival.previous] = (until, arrival)
            if not self._recent and unanswered is not None:  # of a sidecar before this one nothing is known here: ask
                with suppress(HubError):  # then `keep` will
                    await self._let_go(list(self._held), unanswered)
            return
        await self._arrive(arrival)

    def _overtakes(self, arrival: Arrival) -> bool:
        """Returns whether the command before it has not come, and may be expected to.

        A message that a connection took with it when it ended comes again when its time is out, behind newer ones.
        """
        return bool(arrival.previous and arrival.previous not in self._recent)

    async def _arrive(self, arrival: Arrival) -> None:
        identity = _id_of(arrival.data) or arrival.id
        early = self._early.pop(identity, 0.0) > time.monotonic()
        known = self._open.get(identity)
        if known is not None:
            known.arrival = arrival
        elif early:
            await arrival.done()  # it was answered before it was stored
        else:
            self._newest = arrival.id
            self._take(identity, arrival.data, arrival)
        self._note(arrival.id)
        if (held := self._held.pop(arrival.id, None)) is not None:
            await self._arrive(held[1])

    def _note(self, sent: str) -> None:
        self._recent[sent] = None
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]

    def heard(self, command: Overheard) -> None:
        """Takes a command that has been overheard, unless another one could have been sent before it.

        Args:
            command: it arrives, too, if the server stores it.
        """
        now = time.monotonic()
        self._early = {identity: until for identity, until in self._early.items() if until > now}
        identity = _id_of(command.data) or command.id
        if identity in self._open or identity in self._early:
            return  # the hub repeats itself
        follows = bool(command.previous) and command.previous == self._newest
        if not follows or len(self._open) >= COMMANDS_ON_THE_WAY or len(command.data) > COMMAND_BYTES:
            self._newest = ""  # until it has arrived, what comes behind it is not taken early either
            return
        self._busy_until = now + _BUSY
        self._newest = command.id
        self._early[identity] = now + _STORING
        self._note(command.id)
        self._take(identity, command.data, None)

    def _take(self, identity: str, data: bytes, arrival: Arrival | None) -> None:
        self._open[identity] = _Delivery(data, arrival)
        self._waiting.append(identity)
        self._stir()
        self.fill()

    def fill(self) -> None:
        """Puts into the slots what waits for one."""
        while self._waiting:
            delivery = self._open.get(self._waiting[0])
            if delivery is not None and not self._region.offer(delivery.data):
                return
            self._eager_until = time.monotonic() + _EAGER
            self._waiting.popleft()

    async def answered(self, outcome: bytes) -> None:
        """Acknowledges the command to which this is an outcome, once the outcome has been stored."""
        try:
            answer = msgspec.json.decode(outcome, type=_Answer)
        except msgspec.DecodeError as error:
            logger.error("An outcome that is none was reported: {}", error)
            return
        self._busy_until = time.monotonic() + _BUSY
        if answer.state not in _ANSWERS:
            return
        delivery = self._open.pop(answer.command, None)
        if delivery is None and not answer.command and answer.state == "rejected":
            delivery = self._illegible()
        if delivery is not None and delivery.arrival is not None:
            await delivery.arrival.done()

    async def keep(self, unanswered: Unanswered) -> None:
        """Says that the commands are being dealt with, so that they are not delivered again.

        Args:
            unanswered: asks the server for how many answers it waits.

        Raises:
            HubError: it does not say.
        """
        for arrival in (*self._arrivals(), *(arrival for _, arrival in list(self._held.values()))):
            await arrival.working()
        now = time.monotonic()
        if late := [previous for previous, (until, _) in self._held.items() if now >= until]:
            await self._let_go(late, unanswered)

    def _arrivals(self) -> list[Arrival]:
        return [delivery.arrival for delivery in list(self._open.values()) if delivery.arrival is not None]

    def _here(self) -> set[str]:
        return {arrival.id for arrival in (*self._arrivals(), *(arrival for _, arrival in self._held.values()))}

    async def _let_go(self, held: list[str], unanswered: Unanswered) -> None:
        """Takes commands that wait for others, if these will not come: if the server waits for no more than are here.

        Args:
            held: by the ids of those that they have overtaken.
            unanswered: asks the server.
        """
        too_long = time.monotonic() - _LONGEST + _MISSED
        given_up = [previous for previous in held if previous in self._held and self._held[previous][0] < too_long]
        if not given_up:
            here = self._here()
            waits_for = await unanswered() or 0
            if waits_for > len(here & self._here()):  # what came or was answered meanwhile, the server may not count
                return
        for previous in sorted(held, key=lambda each: self._held[each][1].order if each in self._held else 0):
            if (found := self._held.pop(previous, None)) is not None:
                await self._arrive(found[1])

    def disconnected(self) -> None:
        """Forgets what belongs to a connection that has ended: commands without a slot come again, in their order.

        The others are with the training. They come again, too, and are recognised. Acknowledging them through the next
        connection would be wrong: a server that has lost its store would take that for another command.
        """
        for identity in self._waiting:
            delivery = self._open.pop(identity, None)
            arrived = None if delivery is None else delivery.arrival
            self._recent.pop(identity if arrived is None else arrived.id, None)
        self._waiting.clear()
        self._early.clear()
        self._held.clear()
        self._newest = ""
        for delivery in self._open.values():
            delivery.arrival = None

    def _illegible(self) -> _Delivery | None:
        """Returns the oldest command that nobody can read: the outcome of such a one names none."""
        for identity, delivery in self._open.items():
            try:
                decode_command(delivery.data)
            except CommandError:
                return self._open.pop(identity)
        return None


def _id_of(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Identified).id
    except msgspec.DecodeError:
        return ""
