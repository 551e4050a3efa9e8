"""One connection to the message server, and what is read through it. A lost connection is not mended but replaced.

The library would mend it by itself, but in silence: wrong keys look like a slow network for two minutes, and what was
being said when it broke is gone. So whoever holds a connection here is told when it ends, and opens the next one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loguru import logger
from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js import errors as jetstream_errors

from aetheria.errors import HubError
from aetheria.loom.keys import public_key

__all__ = ["FAILURES", "Connection", "NotStoredError", "Publication", "Puller"]

# What the library raises when the other end is not there, or does not do what it was asked.
FAILURES = (nats_errors.Error, OSError, TimeoutError, asyncio.TimeoutError)

_LOOK = 1.0  # seconds between two looks whether a connection is still there
_PING = 2  # seconds; a server that leaves two of them unanswered is given up
_EXPIRES = 60.0  # seconds after which a request for messages is made again
_HEARTBEAT = 5.0  # seconds between two signs of life of such a request


class NotStoredError(HubError):
    """JetStream did not take something.

    Attributes:
        refused: because it will not, whoever asks again; otherwise because it is not ready.
    """

    def __init__(self, message: str, *, refused: bool) -> None:
        """Says why."""
        super().__init__(message)
        self.refused = refused


Publication = tuple[str, bytes, dict[str, str]]
"""Something to be stored by JetStream: subject, data, headers."""


class Connection:
    """A connection that has been opened, until `closed` is set."""

    def __init__(self, url: str, client: Client, closed: asyncio.Event) -> None:
        """Use `open`."""
        self.url = url
        self.client = client
        self.closed = closed
        self.jetstream: JetStreamContext = client.jetstream(timeout=5.0)
        self.pullers: list[Puller] = []  # woken up when this ends
        self._answers: dict[str, asyncio.Future[None]] = {}  # to publications on their way, by number
        self._publications = 0
        self._inbox = ""

    @classmethod
    async def open(
        cls,
        url: str,
        seed: str,
        name: str,
        *,
        inbox: str = "_INBOX",
        credentials: Path | None = None,
        timeout: float = 5.0,
    ) -> Connection:
        """Connects.

        Args:
            url: for instance "nats://127.0.0.1:24222".
            seed: whose key to log in with; "" for none.
            name: shown by the server's own tools.
            inbox: where answers are received.
            credentials: a file as operators of a cluster hand it out, instead of a seed.
            timeout: seconds.

        Raises:
            HubError: nobody answers in time, or the server does not let us in.
        """
        closed = asyncio.Event()
        client = Client()
        login: dict[str, Any] = {"user_credentials": str(credentials)} if credentials else {}
        if seed and not credentials:
            public_key(seed)  # says what is wrong with one that is none
            login = {"nkeys_seed_str": seed}

        connections: list[Connection] = []

        async def on_closed() -> None:
            closed.set()
            for connection in connections:
                connection.wake()

        try:
            await asyncio.wait_for(
                client.connect(
                    servers=[url],
                    name=name,
                    inbox_prefix=inbox,
                    error_cb=_report,
                    closed_cb=on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=max(1, int(timeout)),
                    ping_interval=_PING,
                    max_outstanding_pings=2,
                    **login,
                ),
                timeout,
            )
        except FAILURES as error:
            await cls._abandon(client)
            raise HubError(_why(url, error, client.last_error)) from error
        except Exception as error:  # a seed or a credentials file that cannot be read, as various types
            await cls._abandon(client)
            raise HubError(f"cannot log in at the message server {url}: {type(error).__name__}: {error}.") from error
        connection = cls(url, client, closed)
        connections.append(connection)
        return connection

    @staticmethod
    async def _abandon(client: Client) -> None:
        """Closes a connection, also one that is lost or never came about, which the library leaves open."""
        transport = getattr(client, "_transport", None)
        if transport is None:
            return
        for closing in (client.close, transport.wait_closed):
            try:
                await asyncio.wait_for(closing(), 2.0)
            except FAILURES as error:
                logger.debug("While hanging up: {!r}", error)
            transport.close()

    async def close(self) -> None:
        """Says what is still to be said, and hangs up."""
        await self._abandon(self.client)
        self.closed.set()
        self.wake()

    async def ended(self) -> None:
        """Waits until this has ended. The library does not always say so: it is looked at, too."""
        while not self.closed.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.closed.wait(), _LOOK)
            if self.client.is_closed and not self.closed.is_set():
                self.closed.set()
                self.wake()

    def wake(self) -> None:
        """Tells those who wait for something that it will not come."""
        for puller in self.pullers:
            puller.wake()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(nats_errors.ConnectionClosedError())

    async def publish(self, subject: str, data: bytes) -> None:
        """Says something, to whoever listens just now.

        Raises:
            HubError: the connection is gone.
        """
        try:
            await self.client.publish(subject, data)
        except FAILURES as error:
            raise HubError(f"the connection to {self.url} is gone: {error!r}.") from error

    async def store(self, publications: Sequence[Publication], timeout: float = 5.0) -> None:
        """Has things stored, in this order. Returns when JetStream has acknowledged all of them.

        Raises:
            NotStoredError: it refused one of them, or has no place for them.
            HubError: it did not answer. Some may be stored all the same; those with a `Nats-Msg-Id` may be sent again.
        """
        pending: dict[str, asyncio.Future[None]] = {}  # of this call: others may be under way
        try:
            if not self._inbox:  # the library's own way loses refusals (nats-py 2.16)
                self._inbox = self.client.new_inbox()
                await self.client.subscribe(f"{self._inbox}.*", cb=self._answered)
            for subject, data, headers in publications:
                self._publications += 1
                number = str(self._publications)
                answer = asyncio.get_running_loop().create_future()
                self._answers[number] = answer
                pending[number] = answer
                reply = f"{self._inbox}.{number}"
                await self.client.publish(subject, data, reply=reply, headers=dict(headers) or None)
            async with asyncio.timeout(timeout):
                for answer in pending.values():
                    await answer
        except NotStoredError:
            raise
        except FAILURES as error:
            raise HubError(f"the message server {self.url} did not store it: {reason(error)}") from error
        finally:
            for number, answer in pending.items():
                self._answers.pop(number, None)
                if answer.done() and not answer.cancelled():
                    answer.exception()  # looked at, so that nobody reports it as forgotten
                answer.cancel()

    async def _answered(self, message: Msg) -> None:
        """Notes what JetStream says to a publication."""
        answer = self._answers.get(message.subject.rpartition(".")[2])
        if answer is None or answer.done():
            return
        if (message.headers or {}).get("Status") == "503":
            answer.set_exception(NotStoredError("the message server has no store for this yet.", refused=False))
            return
        error = json.loads(message.data).get("error")
        if error:
            said = (
                f"the message server refuses to store it: {error.get('description')} (error {error.get('err_code')})."
            )
            answer.set_exception(NotStoredError(said, refused=True))
        else:
            answer.set_result(None)

    async def request(self, subject: str, content: dict[str, Any] | None = None, timeout: float = 3.0) -> Any:
        """Asks JetStream something; returns its answer.

        Raises:
            HubError: it does not answer.
        """
        try:
            answer = await self.client.request(subject, json.dumps(content or {}).encode(), timeout=timeout)
        except FAILURES as error:
            raise HubError(f"the message server {self.url} does not answer: {reason(error)}") from error
        return json.loads(answer.data)


class Puller:
    """Gets the messages of a consumer, one by one, with one request for many of them on its way."""

    def __init__(self, connection: Connection, stream: str, consumer: str, batch: int) -> None:
        """Nothing is asked for yet.

        Args:
            connection: an open one.
            stream: its name.
            consumer: its name.
            batch: how many messages to ask for at a time.
        """
        self._connection = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._batch = batch
        self._owed = 0  # of the request that is on its way
        self._inbox = ""
        self._subscription: Any = None
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()  # None: the connection has ended
        connection.pullers.append(self)

    @property
    def waiting(self) -> int:
        """How many messages have arrived and were not taken."""
        return self._arrived.qsize()

    def wake(self) -> None:
        """Makes `next` look whether the connection is still there."""
        self._arrived.put_nowait(None)

    async def next(self) -> Msg:
        """Waits for the next message.

        Raises:
            HubError: the connection is gone, or there is no such consumer.
        """
        while True:
            if self._connection.closed.is_set():
                raise HubError(f"the connection to {self._connection.url} is gone.")
            if self._owed <= 0:
                await self._ask()
            try:
                async with asyncio.timeout(3 * _HEARTBEAT):  # `wait_for` would make a task of it
                    message = await self._arrived.get()
            except TimeoutError:
                self._owed = 0  # not even a sign of life: the request was lost
                continue
            status = (message.headers or {}).get("Status", "") if message is not None else "gone"
            if message is not None and not status:
                self._owed -= 1
                return message
            if status != "100":  # whatever became of the request: it is over. 100 is a sign of life
                self._owed = 0
            if status == "503":
                raise HubError("the message server has no such consumer yet.")

    async def close(self) -> None:
        """Gives back what has arrived and was not taken; what the server still sends goes to the next who asks."""
        self._connection.pullers.remove(self)
        try:
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            while not self._arrived.empty():
                message = self._arrived.get_nowait()
                if message is not None and not (message.headers or {}).get("Status"):
                    await message.nak()
        except FAILURES as error:
            logger.debug("The connection is gone, and with it what had arrived: {!r}", error)

    async def _ask(self) -> None:
        nanoseconds = 1_000_000_000
        wish = {
            "batch": self._batch,
            "expires": int(_EXPIRES * nanoseconds),
            "idle_heartbeat": int(_HEARTBEAT * nanoseconds),
        }
        client = self._connection.client
        try:
            if not self._inbox:
                self._inbox = client.new_inbox()
                self._subscription = await client.subscribe(self._inbox, cb=self._arrived.put)
            await client.publish(self._subject, json.dumps(wish).encode(), reply=self._inbox)
        except FAILURES as error:
            raise HubError(f"the connection to {self._connection.url} is gone: {reason(error)}") from error
        self._owed = self._batch


def reason(error: BaseException) -> str:
    """Returns what the library's error says, as the end of a sentence."""
    if isinstance(error, jetstream_errors.APIError):
        return f"{error.description or 'no reason given'} (error {error.err_code})."
    if isinstance(error, (nats_errors.TimeoutError, TimeoutError)):
        return "no answer in time."
    return f"{str(error).removeprefix('nats: ') or type(error).__name__}."


def _why(url: str, error: BaseException, last: BaseException | None) -> str:
    said = f"{error} {last or ''}"
    if "authorization" in said.lower() or "authentication" in said.lower():
        return f"the message server {url} does not know this key. Ask the hub for a new one: register again."
    if isinstance(error, nats_errors.NoServersError):
        return f"no message server answers at {url}: {last or 'nobody there'}. Is the hub running?"
    return f"no message server answers at {url}: {reason(error)} Is the hub running?"


async def _report(error: Exception) -> None:
    if "permissions violation" in str(error).lower():
        logger.warning("The message server refuses: {}", error)
    else:
        logger.debug("Message server: {!r}", error)
