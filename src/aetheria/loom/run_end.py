"""A run's end of what is said through the message server, for asyncio; the hub's is in `transport`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nats.aio.msg import Msg

from aetheria.errors import HubError
from aetheria.loom.connection import FAILURES, Connection, Publication, Puller, reason
from aetheria.loom.subjects import COMMANDS, COMMANDS_ON_THE_WAY, consumer_of, inbox_of, subject, token_of

__all__ = ["ID", "KIND", "PREVIOUS", "Arrival", "Overheard", "RunEnd"]

ID = "Nats-Msg-Id"  # the server stores a message with an id that it has seen lately only once
KIND = "Aetheria-Kind"  # says what an event is, where it is not just an event
PREVIOUS = "Aetheria-Previous"  # of a command: the id of the one that was sent to the same run before it


@dataclass
class Arrival:
    """A command that has arrived at a run.

    Attributes:
        id: as the hub gave it.
        data: the command.
        previous: the id of the command that the hub sent to this run before it; "" where the hub does not know.
        order: its place among all that the server has stored.
    """

    id: str
    data: bytes
    _message: Msg
    previous: str = ""
    order: int = 0

    async def done(self) -> None:
        """It need not be delivered again. Says so only as long as its connection lives; otherwise it comes again."""
        with suppress(*FAILURES):
            await self._message.ack()

    async def working(self) -> None:
        """It is being dealt with: the time until it is delivered again begins anew."""
        with suppress(*FAILURES):
            await self._message.in_progress()


@dataclass
class Overheard:
    """A command that is heard while the server is still storing it. It arrives as well, if it is stored.

    Attributes:
        id: as the hub gave it.
        previous: the id of the command that the hub sent to this run before it; "" where the hub does not know.
        data: the command.
    """

    id: str
    previous: str
    data: bytes


class RunEnd:
    """A run's end, for one connection: gets its commands, reports. A new one is made when `closed` is set."""

    def __init__(self, url: str, seed: str, run: str, *, credentials: Path | None = None) -> None:
        """Connects later.

        Args:
            url: of the message server.
            seed: as the hub gave it to this run.
            run: its name.
            credentials: a file instead of the seed, for a cluster.
        """
        self.run = run
        self._url = url
        self._seed = seed
        self._credentials = credentials
        self._connection: Connection | None = None
        self._puller: Puller | None = None

    async def connect(self, timeout: float = 5.0) -> None:
        """Connects.

        Raises:
            HubError: nobody answers, or we are not let in.
        """
        self._connection = await Connection.open(
            self._url,
            self._seed,
            f"aetheria run {token_of(self.run)}",
            # With a key of its own a run may listen at its own inbox only; a cluster's users, at the usual one.
            inbox="_INBOX" if self._credentials else inbox_of(self.run),
            credentials=self._credentials,
            timeout=timeout,
        )
        self._puller = Puller(self._connection, COMMANDS, consumer_of(self.run), COMMANDS_ON_THE_WAY)

    @property
    def closed(self) -> asyncio.Event:
        """Set when the connection has ended, in whatever way."""
        return self._open().closed

    async def close(self) -> None:
        """Hangs up."""
        if self._connection is not None:
            await self._connection.close()

    def _open(self) -> Connection:
        if self._connection is None:
            raise HubError("this end was never connected.")
        return self._connection

    async def unanswered(self) -> int | None:
        """Returns how many commands were delivered and not acknowledged; None while there is no consumer.

        Raises:
            HubError: the server does not answer.
        """
        answer = await self._open().request(f"$JS.API.CONSUMER.INFO.{COMMANDS}.{consumer_of(self.run)}")
        return None if "error" in answer else int(answer.get("num_ack_pending", 0))

    async def next_command(self) -> Arrival:
        """Waits for the next command.

        Raises:
            HubError: the connection is gone, or the hub has not made the consumer yet (it does at the first heartbeat).
        """
        self._open()
        assert self._puller is not None
        message = await self._puller.next()
        headers = message.headers or {}
        order = message.metadata.sequence.stream
        return Arrival(headers.get(ID, ""), message.data, message, headers.get(PREVIOUS, ""), order)

    async def overhear(self, heard: Callable[[Overheard], None]) -> None:
        """Hands over commands as they are said, from now on: earlier than they arrive, and perhaps not all of them.

        Args:
            heard: given each of them, in the order in which they are said.

        Raises:
            HubError: the connection is gone.
        """

        async def hear(message: Msg) -> None:
            headers = message.headers or {}
            heard(Overheard(headers.get(ID, ""), headers.get(PREVIOUS, ""), message.data))

        try:
            await self._open().client.subscribe(subject(self.run, "cmd"), cb=hear)
        except FAILURES as error:
            raise HubError(f"commands cannot be overheard: {reason(error)}") from error

    async def report(self, reports: Sequence[tuple[str, bytes, str]], timeout: float = 5.0) -> None:
        """Has reports stored, in this order. Returns when all of them are.

        Args:
            reports: for each its kind ("ack", "event", "status", "metric", "mirror"), the data, and an id of its own:
                sent again with the same one, it is stored once.
            timeout: seconds.

        Raises:
            HubError: not all of them are.
        """
        publications: list[Publication] = []
        for kind, data, identity in reports:
            headers = {ID: identity} if identity else {}
            if kind == "status":
                headers[KIND] = kind
            publications.append((subject(self.run, "event" if kind == "status" else kind), data, headers))
        await self._open().store(publications, timeout)

    async def ask(self, timeout: float = 2.0) -> bytes | None:
        """Asks the hub what it has of this run's folder; returns its answer, or None where nobody answers."""
        try:
            answer = await self._open().client.request(subject(self.run, "ask"), timeout=timeout)
        except FAILURES:
            return None  # there is no hub just now, or the connection ends, which is noticed elsewhere
        return answer.data

    async def beat(self, data: bytes) -> None:
        """Gives a sign of life.

        Raises:
            HubError: the connection is gone.
        """
        await self._open().publish(subject(self.run, "hb"), data)
