"""The hub's end of what runs send of their folders: parts that come, and questions what there is already.

They have a way of their own, so that nothing else waits while they are written.
"""

from __future__ import annotations

from typing import Protocol

from loguru import logger
from nats.aio.msg import Msg
from nats.js import api

from aetheria.errors import HubError
from aetheria.loom.connection import FAILURES, Connection, Puller, reason
from aetheria.loom.streams import add_consumer
from aetheria.loom.subjects import MIRRORS, PREFIX, which

__all__ = ["Copies", "answer_questions", "read_parts"]

_AT_ONCE = 16
_ON_THE_WAY = 1024  # those included that wait for others
_ACK_WAIT = 5.0  # seconds after which what a hub that was killed had not acknowledged comes again
_LATER = 2.0  # seconds until one comes again that could not be taken
_RETRIES = 8


class Copies(Protocol):
    """What the hub keeps of the folders of runs that it cannot look into."""

    async def take_part(self, run: str, data: bytes, /) -> bool:
        """Takes what a run sent of its folder; returns False where that can only be done later."""
        ...

    async def say_what_there_is(self, run: str, /) -> bytes:
        """Returns what the hub has of a run's folder, as the run is told."""
        ...


async def read_parts(connection: Connection, name: str, copies: Copies) -> None:
    """Gives the copies everything that runs send of their folders, until the connection ends.

    Args:
        connection: the hub's.
        name: under which is remembered what was taken.
        copies: what is kept.

    Raises:
        HubError: the connection has ended.
    """
    config = api.ConsumerConfig(durable_name=name, ack_wait=_ACK_WAIT, max_ack_pending=_ON_THE_WAY)
    await add_consumer(connection, MIRRORS, config)
    puller = Puller(connection, MIRRORS, name, _AT_ONCE)
    try:
        while True:
            message = await puller.next()
            if await _take(copies, message) or message.metadata.num_delivered >= _RETRIES:
                await message.ack()  # one that was never taken is sent again by a run that lives
            else:
                await message.nak(delay=_LATER)
    except FAILURES as error:
        raise HubError(f"parts of run folders cannot be read: {reason(error)}") from error
    finally:
        await puller.close()


async def _take(copies: Copies, message: Msg) -> bool:
    """Returns whether the message is done with."""
    run, _ = which(message.subject)
    try:
        return await copies.take_part(run, message.data)
    except Exception:  # noqa: BLE001 - whatever it is, the next part is not to blame
        logger.exception("Could not take in a part of the folder of {}.", run)
        return True


async def answer_questions(connection: Connection, copies: Copies) -> None:
    """Tells runs what there is of their folders, until the connection ends.

    Raises:
        HubError: the connection has ended.
    """

    async def asked(message: Msg) -> None:
        run, _ = which(message.subject)
        try:
            await message.respond(await copies.say_what_there_is(run))
        except FAILURES as error:
            logger.debug("{} was not answered: {!r}", run, error)
        except Exception:  # noqa: BLE001 - whatever it is, the next question is not to blame
            logger.exception("{} could not be told what there is of its folder.", run)

    try:
        subscription = await connection.client.subscribe(f"{PREFIX}.*.ask", cb=asked)
        try:
            await connection.closed.wait()
        finally:
            await subscription.unsubscribe()
    except FAILURES as error:
        raise HubError(f"questions of runs cannot be heard: {reason(error)}") from error
