"""Requests and answers, with a server that says exactly what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from aetheria.client.exchange import Answer, Exchange, LostError, UnreachableError
from aetheria.errors import HubError

Say = Callable[[bytes], bytes | None]
"""Given a request, returns what is answered; None to hang up."""


class Server:
    """Remembers the requests of every connection."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.connections: list[list[bytes]] = []
        self.url = ""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked: list[bytes] = []
        self.connections.append(asked)
        try:
            while request := await _request(reader):
                asked.append(request)
                if (answer := self._say(request)) is None:
                    return
                writer.write(answer)
        finally:
            writer.close()


async def _request(reader: asyncio.StreamReader) -> bytes:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
    return head + await reader.readexactly(length)


@asynccontextmanager
async def talking(say: Say) -> AsyncIterator[tuple[Server, Exchange]]:
    known = Server(say)
    server = await asyncio.start_server(known.talk, "127.0.0.1", 0)
    known.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    exchange = Exchange(known.url, {"Authorization": "Bearer secret"})
    try:
        yield known, exchange
    finally:
        await exchange.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)  # those who talked see that it is over


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20.0))  # type: ignore[arg-type]


def answer(body: bytes, head: str = "HTTP/1.1 200 OK") -> bytes:
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_what_is_asked_and_answered_arrives_and_the_connection_is_kept() -> None:
    async def body() -> None:
        async with talking(lambda request: answer(b"7" * 300_000, "HTTP/1.1 202 Accepted")) as (server, exchange):
            told = await exchange.ask("POST", "/a%20b", params={"wait": "1.5", "x": "ä&"}, content=b"body")
            assert told == Answer(202, b"7" * 300_000)
            await exchange.ask("GET", "/again", headers={"X-More": "yes"})
            host = server.url.removeprefix("http://").encode()
            assert server.connections == [
                [
                    b"POST /a%20b?wait=1.5&x=%C3%A4%26 HTTP/1.1\r\nHost: " + host + b"\r\nAuthorization: Bearer secret"
                    b"\r\nContent-Length: 4\r\n\r\nbody",
                    b"GET /again HTTP/1.1\r\nHost: "
                    + host
                    + b"\r\nAuthorization: Bearer secret\r\nX-More: yes\r\n\r\n",
                ]
            ]

    run(body)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nok", Answer(200, b"ok")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nT:\r\n\r\n",
            Answer(200, b"abc0123456789"),
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", Answer(204, b"")),
    ],
)
def test_ways_to_answer(said: bytes, told: Answer) -> None:
    async def body() -> None:
        async with talking(lambda request: said) as (server, exchange):
            assert [await exchange.ask("GET", "/") for _ in range(3)] == [told] * 3
            assert [len(asked) for asked in server.connections] == [3]

    run(body)


def test_who_says_goodbye_is_not_asked_again_over_the_same_connection() -> None:
    async def body() -> None:
        said = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
        async with talking(lambda request: said) as (server, exchange):
            assert [await exchange.ask("POST", "/") for _ in range(2)] == [Answer(200, b"ok")] * 2
            assert [len(asked) for asked in server.connections] == [1, 1]

    run(body)


def test_a_kept_connection_that_was_given_up_is_replaced_for_who_only_asks() -> None:
    asked: list[bytes] = []

    def say(request: bytes) -> bytes | None:
        asked.append(request[:4])
        return None if len(asked) in (2, 5) else answer(b"ok")

    async def body() -> None:
        async with talking(say) as (_, exchange):
            await exchange.ask("GET", "/")
            assert await exchange.ask("GET", "/") == Answer(200, b"ok")
            await exchange.ask("POST", "/")
            with pytest.raises(LostError, match="does not answer"):  # it may have happened: the caller decides
                await exchange.ask("POST", "/")
            assert asked == [b"GET ", b"GET ", b"GET ", b"POST", b"POST"]

    run(body)


def test_a_server_that_hung_up_meanwhile_is_called_again() -> None:
    async def body() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await _request(reader)
            writer.write(answer(b"ok"))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        exchange = Exchange(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
        await exchange.ask("POST", "/")
        while exchange._idle[0].usable:  # until the goodbye has arrived
            await asyncio.sleep(0.001)
        assert await exchange.ask("POST", "/") == Answer(200, b"ok")
        assert len(writers) == 2
        await exchange.close()
        server.close()
        await server.wait_closed()

    run(body)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        None,
    ],
)
def test_who_talks_something_else_is_lost(said: bytes | None) -> None:
    async def body() -> None:
        async with talking(lambda request: said) as (_, exchange):
            with pytest.raises(LostError, match="does not answer"):
                await exchange.ask("POST", "/")

    run(body)


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    async def body() -> None:
        async with talking(lambda request: b"") as (server, exchange):
            with pytest.raises(LostError, match=r"within 0.05 s"):
                await exchange.ask("GET", "/", timeout=0.05)
            assert [len(asked) for asked in server.connections] == [1]

    run(body)


def test_many_ask_at_once_and_each_gets_its_own_answer() -> None:
    async def body() -> None:
        async with talking(lambda request: answer(request.split(b" ")[1])) as (server, exchange):
            told = await asyncio.gather(*(exchange.ask("GET", f"/{number}") for number in range(250)))
            assert [found.content for found in told] == [f"/{number}".encode() for number in range(250)]
            assert len(server.connections) <= 100

    run(body)


def test_nobody_there() -> None:
    async def body() -> None:
        with pytest.raises(UnreachableError, match=r"nobody answers at http://127\.0\.0\.1:1"):
            await Exchange("http://127.0.0.1:1", {}).ask("GET", "/")

    run(body)


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://", "http://host:port", "http://[::1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(HubError, match="not the address of a hub"):
        Exchange(url, {})


def test_a_token_with_a_line_end_is_refused() -> None:
    with pytest.raises(HubError, match="line's end"):
        Exchange("http://127.0.0.1:1", {"Authorization": "Bearer a\r\nX-Evil: yes"})
