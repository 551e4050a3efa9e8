"""Who is who on the message server: nkeys (Ed25519). The server knows the public half, its owner the seed."""

from __future__ import annotations

import base64
import json
import os
import socket

import nkeys  # type: ignore[import-untyped]

from aetheria.errors import HubError

__all__ = ["is_admitted", "new_seed", "public_key"]


def new_seed() -> str:
    """Returns the seed of a new user: a secret."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def public_key(seed: str) -> str:
    """Returns what a server may know of a user.

    Raises:
        HubError: this is no seed.
    """
    key: bytes = _pair(seed).public_key
    return key.decode()


def is_admitted(port: int, seed: str, timeout: float = 2.0) -> bool:
    """Logs in at a message server on this machine, and leaves again.

    Returns:
        Whether the server let this user in.

    Raises:
        HubError: nobody answers there, or it is no message server.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection:
            connection.settimeout(timeout)
            lines = connection.makefile("rb")
            greeting = lines.readline(1 << 20)
            if not greeting.startswith(b"INFO "):
                raise HubError(f"what answers on port {port} is not a NATS server: it says {greeting[:40]!r}.")
            nonce = str(json.loads(greeting[5:]).get("nonce", ""))
            pair = _pair(seed)
            login = {
                "nkey": pair.public_key.decode(),
                "sig": base64.b64encode(pair.sign(nonce.encode())).decode(),
                "verbose": False,
                "pedantic": False,
                "lang": "python",
                "version": "1",
                "protocol": 1,
            }
            connection.sendall(f"CONNECT {json.dumps(login)}\r\nPING\r\n".encode())
            while answer := lines.readline(1 << 20):
                if answer.startswith(b"PONG"):
                    return True
                if answer.startswith(b"-ERR"):
                    return False
    except (OSError, ValueError) as error:
        raise HubError(f"no NATS server answers on 127.0.0.1:{port}: {error}.") from error
    raise HubError(f"the NATS server on 127.0.0.1:{port} hung up.")


def _pair(seed: str) -> nkeys.KeyPair:
    try:
        return nkeys.from_seed(bytearray(seed.strip().encode()))
    except (nkeys.NkeysError, ValueError) as error:
        raise HubError("this is not the seed of a NATS user: it begins with SU and has 58 characters.") from error
