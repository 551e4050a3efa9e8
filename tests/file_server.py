"""A real server of files over HTTP that answers wrongly when it is told to, and remembers what it was asked for."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["FileServer", "Request"]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        path: of the file, from the folder.
        range: first and last byte; None for all of it.
        number: how often the same was asked for before.
    """

    path: str
    range: tuple[int, int] | None
    number: int


@dataclass
class FileServer:
    """Serves a folder; use it as a context manager.

    `fault` is asked before each answer. It returns None, or what is to go wrong: the status of an error; "short", half
    of the bytes as if they were all; "cut", a connection that is reset in the middle; "hang", no answer; "flipped", one
    byte changed; "whole", the file without regard to the range; "halfway", which sends one half, and the other one when
    `go_on` is set.
    """

    folder: Path
    fault: Callable[[Request], int | str | None] = lambda _: None
    requests: list[Request] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FileServer:
        server = self
        counted = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Says nothing."""

            def do_HEAD(self) -> None:
                path = server.folder / self.path.lstrip("/")
                self.send_response(200 if path.is_file() else 404)
                self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
                self.end_headers()

            def do_GET(self) -> None:
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                limits = (int(asked[1]), int(asked[2])) if asked else None
                with counted:
                    path = self.path.lstrip("/")
                    number = sum((old.path, old.range) == (path, limits) for old in server.requests)
                    server.requests.append(request := Request(path, limits, number))
                server._answer(self, request)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Says nothing: that who asked was killed, or did not wait, is part of the tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def blocks(self) -> list[Request]:
        """Returns what was asked for of shards."""
        return [request for request in self.requests if request.path.startswith("shards/")]

    def _answer(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        fault = self.fault(request)
        path = self.folder / request.path
        if isinstance(fault, int) or not path.is_file():
            return _send(handler, fault if isinstance(fault, int) else 404, b"")
        if fault == "hang":
            self.go_on.wait()
            handler.close_connection = True
            return None
        content, status = path.read_bytes(), 200
        if request.range is not None and fault != "whole":
            if request.range[0] >= len(content):
                return _send(handler, 416, b"")
            content, status = content[request.range[0] : request.range[1] + 1], 206
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 4])
        return _send(handler, status, content, self, str(fault))


def _send(
    handler: BaseHTTPRequestHandler, status: int, content: bytes, server: FileServer | None = None, fault: str = ""
) -> None:
    try:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if fault not in ("cut", "halfway"):
            handler.wfile.write(content)
            return
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        if fault == "halfway":
            assert server is not None
            server.go_on.wait()
            handler.wfile.write(content[len(content) // 2 :])
            return
        handler.close_connection = True
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        handler.connection.close()
    except ConnectionError:
        handler.close_connection = True  # whoever asked has gone
