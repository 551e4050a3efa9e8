"""The hub as a process: `python -m aetheria.weaver`, which `aetheria up` starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from loguru import logger

from aetheria.errors import HubError
from aetheria.loom.broker import Broker
from aetheria.loom.transport import HubEnd
from aetheria.weaver.admissions import Admissions
from aetheria.weaver.api import make_app
from aetheria.weaver.folder import HubFolder
from aetheria.weaver.gate import Gate, Role, Tickets
from aetheria.weaver.hub import Hub
from aetheria.weaver.mirror import Mirrors
from aetheria.weaver.store import Store

__all__ = ["serve"]

_BROKER_INTERVAL = 1.0  # seconds between two looks at the message server
_MOST_REPLICAS = 5  # of JetStream
_BROKER_PATIENCE = 3  # looks at which it did not answer, until it is started anew


class _Server(uvicorn.Server):
    """A server that leaves signals to its owner, who has more than it to bring to an end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    folder: Path,
    *,
    port: int | None = None,
    nats: str | None = None,
    credentials: Path | None = None,
    replicas: int = 1,
    ready: Callable[[str], object] = lambda address: None,
) -> None:
    """Runs a hub until SIGTERM or SIGINT.

    Args:
        folder: of the hub.
        port: to listen on, on 127.0.0.1; the one it had last, by default.
        nats: the URL of a NATS server with JetStream that is there already; without it, one is started.
        credentials: the file to log in there with: a seed, or NATS credentials.
        replicas: on how many servers of that cluster everything is kept, so that it outlives the loss of one.
        ready: is told an address that opens in a browser, once, when everything is there.

    Raises:
        HubError: another hub runs in the folder, a port is taken, the message server cannot be started or reached;
            several replicas are wanted of the one server that a hub starts by itself.
    """
    if not 1 <= replicas <= _MOST_REPLICAS:
        raise HubError(f"{replicas} replicas are not possible: JetStream keeps 1 to {_MOST_REPLICAS}; 3 is usual.")
    if nats is None and replicas > 1:
        raise HubError(
            f"the message server that a hub starts by itself is one server, and cannot keep {replicas} replicas. Name "
            "a cluster of your own, with --nats URL and --creds FILE; or leave --replicas away."
        )
    # Whatever is made from now on is the owner's alone, also what libraries such as SQLite make.
    os.umask(0o077)
    held = HubFolder(folder)
    try:
        with contextlib.closing(held.bind(port)) as listener:
            asyncio.run(_serve(held, listener, nats, credentials, replicas, ready))
    finally:
        held.close()


async def _serve(
    held: HubFolder,
    listener: socket.socket,
    nats: str | None,
    credentials: Path | None,
    replicas: int,
    ready: Callable[[str], object],
) -> None:
    async with contextlib.AsyncExitStack() as at_end:
        store = Store(held.path / "hub.db")
        at_end.callback(store.close)
        broker: Broker | None = None
        admissions: Admissions | None = None
        if nats is None:
            broker = Broker(held.path / "nats")
            await asyncio.to_thread(broker.start)
            at_end.push_async_callback(asyncio.to_thread, broker.stop)
            admissions = Admissions(broker)
            at_end.push_async_callback(admissions.close)
            end = HubEnd(broker.url, broker.hub_seed)
        else:
            end = HubEnd(nats, "", credentials=_readable(credentials), replicas=replicas)
        await end.start()
        at_end.push_async_callback(end.close)

        async def admit(run: str) -> dict[str, str]:
            if broker is not None and admissions is not None:
                return {"nats_url": broker.url, "seed": await admissions.admit(run)}
            return {"nats_url": nats or "", "seed": "", "credentials": str(credentials)}

        mirrors = Mirrors(held.mirrors, held.mirror_bytes)
        at_end.push_async_callback(mirrors.close)
        hub = Hub(store, end, mirrors)
        at_end.callback(hub.close)
        tickets = Tickets()
        app = make_app(hub, admit, tickets.issue, held.url)
        tokens: dict[Role, str] = {"operator": held.operator_token, "viewer": held.viewer_token}
        gate = Gate(app, held.port, tokens, tickets, store)
        listening = end.listen(hub.handle, at_once=hub.handle, copies=hub)
        work = [asyncio.create_task(hub.tend()), asyncio.create_task(listening)]
        if broker is not None:
            work.append(asyncio.create_task(_keep_alive(broker)))
        at_end.push_async_callback(_cancel, work)
        held.announce()
        ready(f"{held.url}/?token={tickets.issue('operator')}")
        await _listen(gate, listener, held, hub)


async def _listen(gate: Gate, listener: socket.socket, held: HubFolder, hub: Hub) -> None:
    settings: dict[str, Any] = {"access_log": False, "log_level": "warning", "log_config": None, "lifespan": "off"}
    settings |= {"server_header": False, "proxy_headers": False, "ws": "websockets-sansio", "ws_max_size": 4096}
    server = _Server(uvicorn.Config(gate, timeout_graceful_shutdown=3, **settings))

    def stop() -> None:
        hub.close()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    logger.info("The hub listens on {}.", held.url)
    await server.serve(sockets=[listener])


async def _keep_alive(broker: Broker) -> None:
    """Starts the message server anew where it has died, or does not answer, until this is cancelled."""
    silent = 0
    while True:
        await asyncio.sleep(_BROKER_INTERVAL)
        silent = 0 if await asyncio.to_thread(broker.answers) else silent + 1
        if broker.alive and silent < _BROKER_PATIENCE:
            continue
        logger.warning("The message server {}; it is started again.", "does not answer" if broker.alive else "has died")
        try:
            await asyncio.to_thread(broker.restart)
            silent = 0
        except HubError as error:
            logger.error("The message server could not be started again: {} This is tried on.", error)
            await asyncio.sleep(2.0)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _readable(credentials: Path | None) -> Path:
    if credentials is None:
        raise HubError("a NATS server of your own needs credentials. Give them: --creds FILE")
    if not os.access(credentials, os.R_OK) or credentials.is_dir():
        raise HubError(
            f"the credentials {credentials} cannot be read. A file that `nats auth` or `nsc` made is expected."
        )
    return credentials.absolute()
