"""The gate in front of everything the hub serves. Nothing behind it is reached by somebody it does not know.

It refuses by default: a new route needs a token without a word being said about it, and an operator's token for
whatever is not read. Pages of other sites that a browser has open can neither read from the hub nor act on it: `Host`
defends against names that were pointed at this machine, `Origin` and the cookie's SameSite against requests from
elsewhere, on every verb and on the WebSocket.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Literal
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aetheria.weaver.store import Store

__all__ = ["Gate", "Role", "Tickets", "TokenBucket"]

Role = Literal["viewer", "operator"]

SESSION_SECONDS = 30 * 86400.0
TICKET_SECONDS = 600.0
BODY_BYTES = 128 * 1024
_READING = ("GET", "HEAD")
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
     b"form-action 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]  # fmt: skip


class TokenBucket:
    """Allows `rate` things a second in the long run, and `burst` at once."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = float(burst)
        self._at = clock()

    def take(self) -> float:
        """Takes one; returns 0, or the seconds until there will be one."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self._rate, self._burst)
        self._at = now
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0


class Tickets:
    """Secrets that open the door once, within ten minutes: what stands in the URL that a browser is sent to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Role, float]] = {}

    def issue(self, role: Role) -> str:
        """Returns a new one."""
        now = time.time()
        self._known = {hashed: known for hashed, known in self._known.items() if known[1] > now}
        secret = secrets.token_urlsafe(24)
        self._known[_hash(secret)] = (role, now + TICKET_SECONDS)
        return secret

    def redeem(self, secret: str) -> Role | None:
        """Returns what it opens; None where it was never issued, is too old, or was used."""
        role, expires = self._known.pop(_hash(secret), ("viewer", 0.0))  # by its hash, so that time tells nothing
        return role if expires > time.time() else None


class Refusal(Exception):  # noqa: N818 - it never leaves this file
    """A request that is not let through."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


class Gate:
    """Lets requests through to an application, or answers them itself.

    Args:
        app: what is behind the gate; finds the role in `scope["role"]`.
        port: of the hub, which stands in `Host` and `Origin`.
        tokens: each role's.
        tickets: for browsers.
        store: remembers browsers over a restart.
        rate: commands a second, for each token, in the long run.
        burst: commands at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        port: int,
        tokens: Mapping[Role, str],
        tickets: Tickets,
        store: Store,
        rate: float = 50.0,
        burst: int = 500,
    ) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._origins = {f"http://{host}" for host in self._hosts}
        self._cookie = f"aetheria_hub_{port}"  # cookies do not know ports; two users' hubs must not mix theirs up
        self._tokens = {role: _hash(token) for role, token in tokens.items()}
        self._store = store
        self._sessions: dict[str, tuple[str, float]] = dict(store.sessions())
        self._tickets = tickets
        self._rate = rate, burst
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks a request; the ASGI interface."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._check_addresses(scope)
            if scope["type"] == "http" and scope["path"] == "/healthz" and scope["method"] in _READING:
                await _answer(send, 200, b"ok", [(b"content-type", b"text/plain; charset=utf-8")])
                return
            if await self._ticket_used(scope, send):
                return
            scope["role"] = self._role(scope)
        except Refusal as refusal:
            await _refuse(scope, receive, send, refusal)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
                if not any(name.lower() == b"cache-control" for name, _ in message["headers"]):
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        await self._app(scope, receive, send_with_headers)

    # --- who asks, and from where ----------------------------------------------------------------------------------
    def _check_addresses(self, scope: Scope) -> None:
        hosts = _headers(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise Refusal(403, "This hub answers under 127.0.0.1 and localhost only, with its port.")
        origins = _headers(scope, b"origin")
        if any(origin.lower() not in self._origins for origin in origins):
            raise Refusal(403, "Pages of other origins may not talk to this hub.")

    def _role(self, scope: Scope) -> Role:
        key, role = self._identity(scope)
        if scope["type"] == "http" and scope["method"] not in _READING:
            if role != "operator":
                raise Refusal(403, "This token may look, and change nothing. An operator's token is needed for that.")
            if scope["path"].endswith("/commands"):
                self._check_rate(key)
            _check_length(scope)
        return role

    def _identity(self, scope: Scope) -> tuple[str, Role]:
        """Returns what identifies the token, without being it, and the role."""
        for header in _headers(scope, b"authorization"):
            scheme, _, token = header.partition(" ")
            hashed = _hash(token.strip())
            # All of them are compared, in constant time: how long it takes says nothing.
            matching = [role for role, known in self._tokens.items() if hmac.compare_digest(hashed, known)]
            if scheme.lower() == "bearer" and matching:
                return hashed, matching[0]
            raise Refusal(401, "The token is wrong. The right ones are in hub.json in the hub's folder.", _CHALLENGE)
        for header in _headers(scope, b"cookie"):
            try:
                cookie = SimpleCookie(header).get(self._cookie)
            except CookieError:
                continue
            if cookie is not None:
                hashed = _hash(cookie.value)
                role, expires = self._sessions.get(hashed, ("", 0.0))
                if expires > time.time():
                    return hashed, "operator" if role == "operator" else "viewer"
        raise Refusal(
            401, "A token is needed. `aetheria status` prints an address that opens in a browser.", _CHALLENGE
        )

    def _check_rate(self, key: str) -> None:
        bucket = self._buckets.setdefault(key, TokenBucket(*self._rate))
        if wait := bucket.take():
            rate, burst = self._rate
            raise Refusal(
                429,
                f"Too many commands: {burst:,} at once and then {rate:g} a second are taken. This one was not; send it "
                f"again in {wait:.2f} s.",
                {"Retry-After": str(math.ceil(wait))},
            )

    async def _ticket_used(self, scope: Scope, send: Send) -> bool:
        """Exchanges a one-time token in the URL for a cookie; returns whether there was one."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
            return False
        given = parse_qs(scope["query_string"].decode("ascii", "replace")).get("token")
        if not given:
            return False
        if (role := self._tickets.redeem(given[0])) is None:
            raise Refusal(401, "This address has been used, or is too old. `aetheria status` prints a new one.")
        secret = secrets.token_urlsafe(32)
        end = time.time() + SESSION_SECONDS
        self._store.add_session(_hash(secret), role, end)
        self._sessions[_hash(secret)] = (role, end)
        cookie = f"{self._cookie}={secret}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SESSION_SECONDS:.0f}"
        # Not a redirection by status: a cookie of SameSite=Strict is not sent along one that began on another site.
        page = b'<!doctype html><meta http-equiv="refresh" content="0; url=/"><a href="/">Aetheria</a>'
        headers = [(b"set-cookie", cookie.encode()), (b"content-type", b"text/html; charset=utf-8")]
        await _answer(send, 200, page, headers)
        return True


_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _check_length(scope: Scope) -> None:
    # A body without a length would have to be counted while it arrives; nobody needs to send one.
    lengths = _headers(scope, b"content-length") or ["0"]
    if _headers(scope, b"transfer-encoding") or not lengths[0].isdecimal():
        raise Refusal(411, "The length of what is sent must be said first (Content-Length).", {"Connection": "close"})
    if len(lengths[0]) > 12 or int(lengths[0]) > BODY_BYTES:
        raise Refusal(413, f"Too much was sent: at most {BODY_BYTES:,} bytes are taken.", {"Connection": "close"})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]], kind: str = "http") -> None:
    length = (b"content-length", str(len(body)).encode())
    all_headers = [*headers, length, *_HEADERS, (b"cache-control", b"no-store")]
    await send({"type": f"{kind}.response.start", "status": status, "headers": all_headers})
    await send({"type": f"{kind}.response.body", "body": body})


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.detail}).encode()
    headers: list[Any] = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    if scope["type"] == "http":
        await _answer(send, refusal.status, body, headers)
        return
    await receive()  # the request to connect
    if "websocket.http.response" in scope.get("extensions", {}):
        await _answer(send, refusal.status, body, headers, kind="websocket.http")
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.detail})
