"""Where the hub of this machine is, and the keys to it: what `aetheria up` writes, and everybody else reads."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

from aetheria.errors import HubError

__all__ = ["HubAddress", "find_hub", "hub_folder", "hub_is_running"]

NOT_RUNNING = "No hub is running. Start one with: aetheria up"


class HubAddress(NamedTuple):
    """How to reach a hub.

    Attributes:
        url: for instance "http://127.0.0.1:40123".
        token: says who asks: an operator, or a viewer.
    """

    url: str
    token: str


def hub_folder() -> Path:
    """Returns the folder of this user's hub: `hub` in $AETHERIA_HOME, or in ~/.aetheria."""
    return Path(os.environ.get("AETHERIA_HOME") or "~/.aetheria").expanduser() / "hub"


def hub_is_running(folder: Path) -> bool:
    """Returns whether a process holds the lock of a hub folder. The kernel drops it the instant the process dies."""
    try:
        descriptor = os.open(folder / "hub.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def find_hub(url: str | None = None, token: str | None = None) -> HubAddress:
    """Returns where the hub is.

    What is not given is taken from AETHERIA_HUB_URL and AETHERIA_HUB_TOKEN, then from the folder of this user's hub.
    Nobody is handed a token whose hub does not run: another process may have taken its port.

    Args:
        url: of the hub.
        token: of an operator or a viewer.

    Raises:
        HubError: there is no hub, or no token for the one that was named.
    """
    url = url or os.environ.get("AETHERIA_HUB_URL")
    token = token or os.environ.get("AETHERIA_HUB_TOKEN")
    if url and token:
        return HubAddress(url.rstrip("/"), token)
    folder = hub_folder()
    if not hub_is_running(folder):
        if url:
            raise HubError(f"there is no token for {url}. Give one: connect(url, token), or AETHERIA_HUB_TOKEN.")
        raise HubError(NOT_RUNNING)
    file = folder / "hub.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        address = HubAddress(str(known["url"]), str(known["operator_token"]))
    except FileNotFoundError:
        raise HubError("The hub is just starting. Try again in a second.") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HubError(f"cannot read {file}: {error!r}. Start the hub anew: aetheria down, aetheria up") from error
    if url and url.rstrip("/") != address.url:  # a token is for the hub that made it, and for nobody else
        raise HubError(f"there is no token for {url}. Give one: connect(url, token), or AETHERIA_HUB_TOKEN.")
    return HubAddress(address.url, token or address.token)
