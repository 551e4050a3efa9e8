"""Requests to a hub and their answers, over connections that are kept: as much of HTTP/1.1 as that takes.

A general library spends two to three milliseconds on what is done here in half of one, and a command to a run that
trains is under way for less than ten altogether.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from aetheria.errors import HubError

__all__ = ["Answer", "Exchange", "LostError", "UnreachableError"]

_AT_ONCE = 100  # connections
_CONNECTING = 5.0  # seconds
_HEAD_BYTES = 64 * 1024
_BODY_BYTES = 1 << 30
_BREAKS = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)  # ValueError: what was said is no HTTP


class LostError(HubError):
    """A connection that broke: what was asked for may have happened."""


class UnreachableError(HubError):
    """Nobody is there: nothing was asked for."""


class Answer(NamedTuple):
    """What came back.

    Attributes:
        status: for instance 200.
        content: the body.
    """

    status: int
    content: bytes


class _Line:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @property
    def usable(self) -> bool:
        """Whether the other end has not hung up, as far as is known."""
        return not (self.reader.at_eof() or self.writer.transport.is_closing())

    def close(self) -> None:
        self.writer.close()

    async def ask(self, request: bytes, bodiless: bool) -> tuple[Answer, bool]:
        """Returns the answer, and whether the connection may be used again."""
        self.writer.write(request)
        await self.writer.drain()
        while True:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, _, rest = head[0].partition(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError(f"it says {head[0][:40]!r}")
            status = int(rest[:3])
            if status >= 200:  # before it, it may say that it will answer
                break
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        lasting = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if bodiless or status in (204, 304):
            return Answer(status, b""), lasting
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return Answer(status, await self._chunks()), lasting
        if "content-length" in headers:
            return Answer(status, await self.reader.readexactly(_size(headers["content-length"], 10))), lasting
        return Answer(status, await self.reader.read()), False

    async def _chunks(self) -> bytes:
        chunks: list[bytes] = []
        while size := _size((await self.reader.readuntil(b"\r\n")).partition(b";")[0].decode("latin-1"), 16):
            chunks.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        while (await self.reader.readuntil(b"\r\n")) != b"\r\n":  # headers behind the body
            pass
        return b"".join(chunks)


class Exchange:
    """Asks one server, over as many connections as it takes. For one event loop.

    No proxy is asked, whatever the environment says: none has any business between this machine and itself.

    Args:
        url: of the server, "http://..." or "https://...".
        headers: sent with every request.

    Raises:
        HubError: that is no such address.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = url
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise HubError(f"{url!r} is not the address of a hub: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HubError(f"{url!r} is not the address of a hub. One looks like this: http://127.0.0.1:40123")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        shown = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        known = {"Host": shown if port is None else f"{shown}:{port}", **headers}
        self._headers = _lines(known)
        self._idle: list[_Line] = []
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._closed = False

    async def close(self) -> None:
        """Hangs up."""
        self._closed = True
        for line in self._idle:
            line.close()
        for line in self._idle:
            with suppress(*_BREAKS):
                await line.writer.wait_closed()
        self._idle.clear()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Answer:
        """Returns what the server answers.

        Args:
            method: "GET", "POST", ...
            path: quoted, as it is to be sent.
            params: what stands behind the question mark.
            content: the body.
            headers: more of them.
            timeout: seconds.

        Raises:
            UnreachableError: nobody is there.
            LostError: the answer did not come, or not in time.
        """
        target = self._prefix + path + (f"?{urlencode(params)}" if params else "")
        length = f"Content-Length: {len(content)}\r\n" if content or method not in ("GET", "HEAD") else ""
        # In one piece: the other end then wakes up once.
        request = f"{method} {target} HTTP/1.1\r\n{self._headers}{_lines(headers or {})}{length}\r\n".encode() + content
        async with self._places:
            line = self._kept()
            if line is not None and method == "GET":
                try:
                    return await self._ask(line, method, request, timeout)
                except LostError as error:
                    if isinstance(error.__cause__, TimeoutError):
                        raise
                # The server gave it up in the very moment: it is asked again, which harms nobody.
                line = None
            return await self._ask(line or await self._connect(), method, request, timeout)

    async def _ask(self, line: _Line, method: str, request: bytes, timeout: float) -> Answer:
        lasting = False
        try:
            async with asyncio.timeout(timeout):
                answer, lasting = await line.ask(request, method == "HEAD")
        except TimeoutError as error:
            raise LostError(f"the hub at {self.url} does not answer within {timeout:g} s.") from error
        except _BREAKS as error:
            raise LostError(f"the hub at {self.url} does not answer: {error or type(error).__name__}.") from error
        finally:
            if lasting and not self._closed:
                self._idle.append(line)
            else:
                line.close()
        return answer

    def _kept(self) -> _Line | None:
        while self._idle:
            line = self._idle.pop()
            if line.usable:
                return line
            line.close()
        return None

    async def _connect(self) -> _Line:
        try:
            async with asyncio.timeout(_CONNECTING):
                streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_HEAD_BYTES)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise UnreachableError(f"nobody answers at {self.url}: {error or type(error).__name__}.") from error
        return _Line(*streams)


def _lines(headers: Mapping[str, str]) -> str:
    """Returns headers as they are sent.

    Raises:
        HubError: one would end early: what is behind its end would be taken for something else.
    """
    if any(character in value for value in headers.values() for character in "\r\n\0"):
        raise HubError("the token holds a line's end. Copy it again, without one.")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _size(said: str, base: int) -> int:
    size = int(said.strip(), base)
    if not 0 <= size <= _BODY_BYTES:
        raise ValueError(f"it announces {size:,} bytes")
    return size
