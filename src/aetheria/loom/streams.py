"""What JetStream keeps, for how long, and on how many servers: one stream for each way of keeping things."""

from __future__ import annotations

from typing import Any

from nats.js import api
from nats.js import errors as jetstream_errors

from aetheria.errors import HubError
from aetheria.loom.connection import FAILURES, Connection, reason
from aetheria.loom.subjects import COMMANDS, METRICS, MIRRORS, PREFIX, REPORTS
from aetheria.protocol import COMMAND_BYTES

__all__ = ["DAY", "add_consumer", "make_streams"]

DAY = 24 * 3600.0
_MEGABYTE = 1 << 20
_DUPLICATES = 120.0  # seconds during which the server drops a message whose id it has seen


async def make_streams(connection: Connection, replicas: int) -> None:
    """Makes the streams; those that are there, with other limits, are changed.

    Args:
        connection: with the right to do so.
        replicas: on how many servers of a cluster each is kept.

    Raises:
        HubError: there is no room, or the server does not answer.
    """
    for config in _streams(replicas):
        try:
            # Not the other way round: to make one that is there wants room for two of it, and there may be none.
            try:
                await connection.jetstream.update_stream(config)
            except jetstream_errors.NotFoundError:
                await connection.jetstream.add_stream(config)
        except FAILURES as error:
            raise HubError(f"cannot make the stream {config.name}: {reason(error)}") from error


async def add_consumer(connection: Connection, stream: str, config: api.ConsumerConfig) -> None:
    """Makes a durable consumer; one that is there, with other settings, is changed.

    Raises:
        HubError: it cannot be made, or the server does not answer.
    """
    try:
        await connection.jetstream.add_consumer(stream, config.evolve(name=config.durable_name))
    except FAILURES as error:
        raise HubError(f"cannot make the consumer {config.durable_name}: {reason(error)}") from error


def _streams(replicas: int) -> list[api.StreamConfig]:
    common: dict[str, Any] = {
        "retention": api.RetentionPolicy.LIMITS,
        "duplicate_window": _DUPLICATES,
        "num_replicas": replicas,
    }
    return [
        api.StreamConfig(
            name=COMMANDS,
            subjects=[f"{PREFIX}.*.cmd"],
            storage=api.StorageType.FILE,
            max_age=7 * DAY,
            max_bytes=768 * _MEGABYTE,
            max_msg_size=COMMAND_BYTES + 4096,  # headers count
            discard=api.DiscardPolicy.NEW,  # full: the next one is refused, and its sender told
            **common,
        ),
        api.StreamConfig(
            name=REPORTS,
            subjects=[f"{PREFIX}.*.ack", f"{PREFIX}.*.event"],
            storage=api.StorageType.FILE,
            max_age=7 * DAY,
            max_bytes=512 * _MEGABYTE,
            **common,
        ),
        api.StreamConfig(
            name=METRICS,
            subjects=[f"{PREFIX}.*.metric"],
            storage=api.StorageType.MEMORY,
            max_age=600.0,
            max_bytes=64 * _MEGABYTE,
            **common,
        ),
        api.StreamConfig(
            name=MIRRORS,
            subjects=[f"{PREFIX}.*.mirror"],
            storage=api.StorageType.FILE,
            max_age=7 * DAY,
            max_bytes=256 * _MEGABYTE,
            **common,
        ),
    ]
