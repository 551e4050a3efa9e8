"""What goes between a client and a hub: requests, and the live feed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec

from aetheria.client.exchange import Answer, Exchange, LostError, UnreachableError
from aetheria.client.location import NOT_RUNNING
from aetheria.client.models import Event
from aetheria.errors import CommandError, HubError, RunFolderError

__all__ = ["LostError", "Wire"]

Kind = TypeVar("Kind")

_PATIENCE = 60.0  # seconds for which a hub that was there is waited for


class Wire:
    """Talks to one hub. For one event loop.

    Args:
        url: of the hub.
        token: of an operator or a viewer.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._exchange = Exchange(url, self._headers)

    async def close(self) -> None:
        """Gives the connections back."""
        await self._exchange.close()

    async def get(self, path: str, kind: type[Kind], **options: Any) -> Kind:
        """Returns what the hub answers, as that type; raises as `request` does."""
        answer = await self.request("GET", path, **options)
        return msgspec.json.decode(answer.content, type=kind)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Returns the hub's answer.

        Args:
            method: "GET", "POST", ...
            path: quoted.
            **options: those of `Exchange.ask`.

        Raises:
            HubError: the hub does not run, or refuses to talk; `LostError` where the connection broke.
            RunFolderError: there is no such thing.
            CommandError: it refuses what was asked.
        """
        try:
            answer = await self._exchange.ask(method, path, **options)
        except UnreachableError as error:
            raise HubError(NOT_RUNNING) from error
        if answer.status < 300:
            return answer
        told = _detail(answer.content)
        if answer.status == 404:
            raise RunFolderError(told)
        if answer.status in (409, 413, 422, 429):
            raise CommandError(told)
        raise HubError(told if answer.status < 500 or "{" not in told else f"the hub failed: {told}")

    async def watch(self, run: str | None = None, since: int | None = None) -> AsyncIterator[Event]:
        """Yields what happens; see `AsyncHub.watch`."""
        import websockets  # noqa: PLC0415 - only who watches needs it

        address = self.url.replace("http", "ws", 1) + "/api/v1/live"
        lost: float | None = None  # when the connection was lost
        connected = False
        while True:
            query = urlencode({name: value for name, value in (("since", since), ("run", run)) if value is not None})
            try:
                async with websockets.connect(
                    f"{address}?{query}",
                    additional_headers=self._headers,
                    proxy=None,
                    max_size=None,
                    open_timeout=10,
                    close_timeout=0.2,  # behind messages that nobody reads any more, a polite goodbye does not arrive
                ) as live:
                    connected, lost = True, None
                    async for text in live:
                        event = msgspec.json.decode(text, type=Event)
                        since = event.seq or since
                        if event.type != "hello":
                            yield event
                        elif event.data["missed"]:
                            yield msgspec.structs.replace(event, type="missed")
            except websockets.InvalidStatus as error:
                if error.response.status_code < 500:
                    raise HubError(_detail(error.response.body)) from error
            except (OSError, websockets.WebSocketException, EOFError) as error:
                if not connected:
                    raise HubError(NOT_RUNNING) from error
            lost = lost or time.monotonic()
            if time.monotonic() - lost > _PATIENCE:
                raise HubError(f"the hub at {self.url} went away, and has not come back for {_PATIENCE:g} seconds.")
            await asyncio.sleep(0.2)


def _detail(content: bytes | bytearray | None) -> str:
    """Returns the sentence in an answer that is an error."""
    try:
        return str(msgspec.json.decode(content or b"")["detail"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return bytes(content or b"no reason was given")[:500].decode(errors="replace")
