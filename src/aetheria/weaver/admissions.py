"""Letting runs in at the message server: those that come while it is busy doing so are let in together."""

from __future__ import annotations

import asyncio

from aetheria.loom.broker import Broker
from aetheria.loom.subjects import token_of

__all__ = ["Admissions"]


class Admissions:
    """The queue in front of the message server. For one event loop.

    The server learns of a new key by reading its configuration again, which takes the longer the more runs it knows;
    for a hundred new keys it takes as long as for one.
    """

    def __init__(self, broker: Broker) -> None:
        """Lets nobody in yet.

        Args:
            broker: the message server.
        """
        self._broker = broker
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._work: asyncio.Task[None] | None = None

    async def admit(self, run: str) -> str:
        """Lets a run in; returns the seed to log in with: a secret.

        Raises:
            HubError: it cannot be called like that; or the server does not run, or did not take the key in time.
        """
        token_of(run)  # a name that is none must not keep out those who came with it
        seed = self._waiting.get(run)
        if seed is None:
            seed = self._waiting[run] = asyncio.get_running_loop().create_future()
        if self._work is None:
            self._work = asyncio.create_task(self._let_in())
        return await asyncio.shield(seed)

    async def close(self) -> None:
        """Turns away who is still waiting."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _let_in(self) -> None:
        group: dict[str, asyncio.Future[str]] = {}
        try:
            while self._waiting:
                group, self._waiting = self._waiting, {}
                try:
                    seeds = await asyncio.to_thread(self._broker.admit_all, list(group))
                except Exception as error:  # noqa: BLE001 - whatever it is, each of them is told
                    for waiting in group.values():
                        waiting.set_exception(error)
                        waiting.exception()  # one that has gone meanwhile does not ask for it
                else:
                    for run, waiting in group.items():
                        waiting.set_result(seeds[run])
        finally:
            self._work = None
            for waiting in (*group.values(), *self._waiting.values()):
                waiting.cancel()
            self._waiting.clear()
