"""The hub's end of what is said through the message server, for asyncio; the other one is `RunEnd`.

JetStream is transport and cache; the journal is the truth. Whatever is sent again carries the same id, and has one
effect. Nothing is keyed on JetStream's own numbers: a server that lost its store counts from one again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from loguru import logger
from nats.aio.msg import Msg
from nats.js import api

from aetheria.errors import HubError
from aetheria.loom.connection import FAILURES, Connection, NotStoredError, Puller, reason
from aetheria.loom.copies import Copies, answer_questions, read_parts
from aetheria.loom.run_end import ID, KIND, PREVIOUS, Arrival, RunEnd
from aetheria.loom.streams import DAY, add_consumer, make_streams
from aetheria.loom.subjects import (
    ACK_WAIT,
    COMMANDS,
    COMMANDS_ON_THE_WAY,
    METRICS,
    PREFIX,
    REPORTS,
    consumer_of,
    subject,
    which,
)

__all__ = ["ACK_WAIT", "COMMANDS_ON_THE_WAY", "Arrival", "Handler", "HubEnd", "RunEnd"]

_REPORTS_AT_ONCE = 128
_ACKNOWLEDGING = 0.2  # seconds after which metrics that came one by one are acknowledged, all at once
_RETRIES = 5  # of a handler that raises
_ATTEMPT = 2.0  # seconds after which a command that was not acknowledged is sent again

Handler = Callable[[str, str, bytes], Awaitable[None]]
"""`async handler(run, kind, data)`, kind: "ack", "event", "status", "metric" or "hb"."""


class HubEnd:
    """The hub's end: sends commands, hears everything. Connects again by itself, and makes what a new server lacks."""

    def __init__(
        self, url: str, seed: str, *, credentials: Path | None = None, replicas: int = 1, name: str = "hub"
    ) -> None:
        """Connects later, in `start`.

        Args:
            url: of the message server.
            seed: of the hub's user; "" for none.
            credentials: a file instead of the seed, for a cluster.
            replicas: on how many servers of a cluster each stream is kept.
            name: what was heard is remembered under it; two hubs on one server need two.
        """
        self._url = url
        self._seed = seed
        self._credentials = credentials
        self._replicas = replicas
        self._name = name
        self._connection: Connection | None = None
        self._ready = asyncio.Event()
        self._admitted: set[str] = set()  # runs whose consumer is known to be there
        self._newest: dict[str, str] = {}  # by run, the id of the command that was sent to it last
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether the message server can be talked to now."""
        return self._ready.is_set() and not self._closed

    async def start(self, timeout: float = 5.0) -> None:
        """Connects, and makes the streams. From then on it stays connected, as long as there is a server.

        Raises:
            HubError: there is no server, or it does not let us in.
        """
        if self._keeper is None:
            await self._connect(timeout)
            self._keeper = asyncio.create_task(self._keep(), name="aetheria-hub-connection")

    async def close(self) -> None:
        """Hangs up. `listen` returns."""
        self._closed = True
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
        self._ready.set()  # those who wait find that there is no connection

    # --- commands --------------------------------------------------------------------------------------------------
    async def publish_command(self, run: str, data: bytes, id: str, timeout: float = 5.0) -> None:  # noqa: A002
        """Sends a command. Returns when it is on the server's disk.

        Args:
            run: for which run.
            data: the command, as `protocol.encode` writes it.
            id: the command's. Sent twice within two minutes it is stored once; later the run itself knows it.
            timeout: seconds.

        Raises:
            HubError: it is not, or nobody knows. Sending it again, with the same id, does no harm.
        """
        deadline = time.monotonic() + timeout
        target = subject(run, "cmd")
        headers = {ID: id}
        failure = ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                connection = await self._current(left)
                await self._ensure_consumer(connection, run)
                if PREVIOUS not in headers:  # what is sent again keeps its place: who gets the next one waits for it
                    headers[PREVIOUS] = self._newest.get(run, "")
                    self._newest[run] = id
                await connection.store([(target, data, headers)], timeout=min(left, _ATTEMPT))
                return
            except HubError as error:
                if isinstance(error, NotStoredError) and error.refused:
                    self._newest.pop(run, None)  # nobody is to wait for it
                    raise  # too large, or no room: so it will be the next time
                failure = str(error).removesuffix(".")
                await asyncio.sleep(0.05)
                if self._connection is not None and not self._connection.closed.is_set():
                    with suppress(HubError):
                        await self._prepare(self._connection)  # somebody may have deleted the streams
        self._newest.pop(run, None)
        raise HubError(
            f"the command was not acknowledged in {timeout:g} seconds: {failure}. Send it again with the same id: it "
            "will have one effect."
        )

    # --- reports ---------------------------------------------------------------------------------------------------
    async def listen(self, handler: Handler, *, at_once: Handler | None = None, copies: Copies | None = None) -> None:
        """Gives the handler everything that runs report, until this is cancelled or `close` is called.

        Outcomes, events and statuses come at least once, also those of a time when no hub was there; each run's come
        in their order. Metrics of the last ten minutes come too; heartbeats only now. One that the handler fails at is
        given to it again, a few times.

        Args:
            handler: given everything.
            at_once: given outcomes as they are said, before they are stored; they come to `handler` all the same.
            copies: given parts of run folders, on a way of their own, for to write them may take long.
        """
        await self.start()
        while not self._closed:
            await self._ready.wait()
            connection = self._connection
            if connection is None:
                return
            readers = [
                asyncio.create_task(read(connection, handler))
                for read in (self._read_reports, self._read_metrics, self._read_heartbeats)
            ]
            if at_once is not None:
                readers.append(asyncio.create_task(self._overhear_outcomes(connection, at_once)))
            if copies is not None:
                readers.append(asyncio.create_task(read_parts(connection, self._name, copies)))
                readers.append(asyncio.create_task(answer_questions(connection, copies)))
            try:
                done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
                for reader in done:
                    if not isinstance(error := reader.exception(), HubError | None):
                        raise error
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
            await asyncio.sleep(0.05)

    async def _read_reports(self, connection: Connection, handler: Handler) -> None:
        await add_consumer(
            connection,
            REPORTS,
            api.ConsumerConfig(durable_name=self._name, ack_wait=10.0, max_ack_pending=4 * _REPORTS_AT_ONCE),
        )
        puller = Puller(connection, REPORTS, self._name, _REPORTS_AT_ONCE)
        try:
            while True:
                message = await puller.next()
                if await self._hand_over(handler, message):
                    await message.ack()
                elif message.metadata.num_delivered < _RETRIES:
                    await message.nak(delay=1.0)
                else:
                    await message.term()
        except FAILURES as error:
            raise HubError(f"reports cannot be read: {reason(error)}") from error
        finally:
            await puller.close()

    async def _read_metrics(self, connection: Connection, handler: Handler) -> None:
        await add_consumer(
            connection, METRICS, api.ConsumerConfig(durable_name=self._name, ack_policy=api.AckPolicy.ALL)
        )
        puller = Puller(connection, METRICS, self._name, 2 * _REPORTS_AT_ONCE)
        newest: Msg | None = None  # taken, and not acknowledged

        async def acknowledge() -> None:
            nonlocal newest
            message, newest = newest, None
            if message is not None:
                await message.ack()  # and with it all before it

        async def acknowledge_later() -> None:
            with suppress(*FAILURES):  # the connection is gone, as the reader learns, too
                while True:
                    await asyncio.sleep(_ACKNOWLEDGING)
                    await acknowledge()

        since = 0
        acknowledging = asyncio.create_task(acknowledge_later())
        try:
            while True:
                message = await puller.next()
                await self._hand_over(handler, message)
                newest = message
                since += 1
                if since >= _REPORTS_AT_ONCE:
                    since = 0
                    await acknowledge()
        except FAILURES as error:
            raise HubError(f"metrics cannot be read: {reason(error)}") from error
        finally:
            acknowledging.cancel()
            await asyncio.gather(acknowledging, return_exceptions=True)
            with suppress(*FAILURES):
                await acknowledge()
            await puller.close()

    async def _read_heartbeats(self, connection: Connection, handler: Handler) -> None:
        async def heard(message: Msg) -> None:
            run, _ = which(message.subject)
            try:
                await self._ensure_consumer(connection, run)
            except HubError as error:
                logger.debug("The consumer of {} could not be made: {}", run, error)
            await self._hand_over(handler, message)

        try:
            subscription = await connection.client.subscribe(f"{PREFIX}.*.hb", cb=heard)
            try:
                await connection.closed.wait()
            finally:
                await subscription.unsubscribe()
        except FAILURES as error:
            raise HubError(f"heartbeats cannot be read: {reason(error)}") from error

    async def _overhear_outcomes(self, connection: Connection, handler: Handler) -> None:
        """Hands over outcomes while JetStream is still writing them: somebody waits for them, not for its disk.

        What an outcome says is in the run's journal before it is said. One that is lost here comes from the store.
        """

        async def heard(message: Msg) -> None:
            await self._hand_over(handler, message)

        try:
            subscription = await connection.client.subscribe(f"{PREFIX}.*.ack", cb=heard)
            try:
                await connection.closed.wait()
            finally:
                await subscription.unsubscribe()
        except FAILURES as error:
            raise HubError(f"outcomes cannot be overheard: {reason(error)}") from error

    @staticmethod
    async def _hand_over(handler: Handler, message: Msg) -> bool:
        """Returns whether the handler took it."""
        run, kind = which(message.subject)
        kind = (message.headers or {}).get(KIND, kind)
        try:
            await handler(run, kind, message.data)
        except Exception:  # noqa: BLE001 - whatever it is, the next report is not to blame
            logger.exception("Could not take in {} of {}.", kind, run)
            return False
        return True

    # --- the connection --------------------------------------------------------------------------------------------
    async def _keep(self) -> None:
        """Replaces a lost connection, for ever."""
        while True:
            if self._connection is not None:
                await self._connection.ended()
                self._ready.clear()
                await self._connection.close()
                logger.warning("The message server {} is gone; connecting again.", self._url)
            delay = 0.05
            while True:
                try:
                    await self._connect(5.0)
                    break
                except HubError as error:
                    logger.debug("{}", error)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 1.0)
            logger.info("Connected to the message server {} again.", self._url)

    async def _current(self, timeout: float) -> Connection:
        """Returns the connection, waiting for one if there is none."""
        try:
            if not self._ready.is_set():  # or nothing else runs in between: what is sent first is said first
                await asyncio.wait_for(self._ready.wait(), timeout)
        except TimeoutError:
            raise HubError(f"there is no message server at {self._url}.") from None
        if self._connection is None:
            raise HubError("this end has been closed.")
        return self._connection

    async def _connect(self, timeout: float) -> None:
        connection = await Connection.open(
            self._url, self._seed, f"aetheria {self._name}", credentials=self._credentials, timeout=timeout
        )
        try:
            await self._prepare(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self._ready.set()

    async def _prepare(self, connection: Connection) -> None:
        """Makes the streams; those that are there, with other limits, are changed."""
        self._admitted.clear()
        await make_streams(connection, self._replicas)

    async def _ensure_consumer(self, connection: Connection, run: str) -> None:
        """Makes the consumer through which a run gets its commands, if this connection has not seen to it yet."""
        if run in self._admitted:
            return
        config = api.ConsumerConfig(
            durable_name=consumer_of(run),
            filter_subject=subject(run, "cmd"),
            ack_wait=ACK_WAIT,
            max_ack_pending=COMMANDS_ON_THE_WAY,
            inactive_threshold=7 * DAY,
        )
        await add_consumer(connection, COMMANDS, config)
        self._admitted.add(run)
