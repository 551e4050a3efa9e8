"""How a run finds the hub: a file that the hub writes for this user alone, and one request that lets the run in."""

from __future__ import annotations

import http.client
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from aetheria.errors import HubError

__all__ = ["Access", "HubAddress", "default_hub_file", "host_name", "hub_file", "read_hub_file", "register"]


class HubAddress(msgspec.Struct, frozen=True):
    """What `hub.json` says.

    Attributes:
        url: of the hub's interface, for instance "http://127.0.0.1:8421".
        operator_token: the right to command. A secret.
        pid: the hub's process.
    """

    url: str
    operator_token: str
    pid: int = 0


class Access(msgspec.Struct, frozen=True):
    """What the hub gives a run that registers. A secret.

    Attributes:
        nats_url: where the message server is.
        seed: of the run's key there.
        credentials: a file to log in with instead, for a server that is not the hub's own.
    """

    nats_url: str
    seed: str = ""
    credentials: str = ""


def host_name() -> str:
    """Returns the name of this machine: `AETHERIA_HOST`, or the one that it gives itself.

    Runs and their hub on machines of the same name look into each other's folders. Where they cannot, as in containers
    that were all given the same name, the variable tells them apart.
    """
    return os.environ.get("AETHERIA_HOST") or socket.gethostname()


def default_hub_file() -> Path:
    """Returns where the hub of this user says how to find it: `$AETHERIA_HOME/hub/hub.json`, or in `~/.aetheria`."""
    return Path(os.environ.get("AETHERIA_HOME", "~/.aetheria")).expanduser() / "hub" / "hub.json"


def hub_file(hub: str) -> Path | None:
    """Returns the file to look into: None for "off"; for a folder the `hub.json` in it."""
    if hub == "off":
        return None
    if hub == "auto":
        return default_hub_file()
    path = Path(hub).expanduser()
    return path / "hub.json" if path.is_dir() else path


def read_hub_file(path: Path) -> HubAddress | None:
    """Returns what the hub's file says; None where there is none.

    Raises:
        HubError: it is somebody else's, who could give commands by it; it is damaged, or may not be read.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            content = file.read(1 << 20)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HubError(f"cannot read {path}: {error.strerror or error}.") from error
    if found.st_uid not in (os.geteuid(), 0):
        raise HubError(f"{path} belongs to user {found.st_uid}, and would let him command this run. It is not used.")
    if found.st_mode & 0o022:
        raise HubError(f"{path} may be written by others, who could command this run by it. Close it: chmod 600 {path}")
    try:
        return msgspec.json.decode(content, type=HubAddress)
    except msgspec.DecodeError as error:
        raise HubError(f"{path} is not what a hub writes there: {error}. Start the hub again.") from error


def register(address: HubAddress, run: str, said: dict[str, Any], timeout: float = 5.0) -> Access:
    """Tells the hub that this run is there; returns how to reach the message server.

    Args:
        address: of the hub.
        run: the run's name.
        said: about it: folder, group and replica, devices, pid, host.
        timeout: seconds.

    Raises:
        HubError: nobody answers, the token is refused, or the answer is none.
    """
    url = urlsplit(address.url)
    if url.scheme not in ("http", "https") or url.hostname is None:
        raise HubError(f"{address.url!r} is not the address of a hub.")
    # Not through urllib, which would look for proxies: what the hub's file names is meant as it is.
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=timeout)
    headers = {"Authorization": f"Bearer {address.operator_token}", "Content-Type": "application/json"}
    target = f"{url.path.rstrip('/')}/api/v1/runs/{quote(run, safe='')}/register"
    try:
        connection.request("POST", target, msgspec.json.encode(said), headers)
        answer = connection.getresponse()
        content = answer.read(1 << 20)
    except (OSError, http.client.HTTPException) as error:
        raise HubError(f"the hub at {address.url} does not answer: {error or type(error).__name__}.") from error
    finally:
        connection.close()
    if answer.status == 401:
        raise HubError(f"the hub at {address.url} does not know the token of its own file: another hub took its port.")
    if answer.status >= 300:
        said_back = content[:300].decode(errors="replace")
        raise HubError(f"the hub at {address.url} does not take this run in: {answer.status} {said_back}")
    try:
        return msgspec.json.decode(content, type=Access)
    except msgspec.DecodeError as error:
        raise HubError(f"the hub at {address.url} answers something else than expected: {error}.") from error
