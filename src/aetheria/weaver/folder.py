"""The folder of a hub: who holds it, its port, its tokens. Nobody but its owner may look in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import Any

from aetheria.errors import HubError
from aetheria.loom.private_files import write_private
from aetheria.weaver.mirror import MIRROR_BYTES

__all__ = ["HubFolder"]


def _lock(descriptor: int) -> None:
    """Locks a file for this process alone.

    Who merely looks whether a hub runs shares the lock for an instant, and does not count.

    Raises:
        BlockingIOError: another hub has it.
    """
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        else:
            return


class HubFolder:
    """The folder of one hub, held by this process until `close`, or until the process ends in whatever way.

    Attributes:
        path: the folder.
        operator_token: whoever has it may do everything.
        viewer_token: whoever has it may look.
        port: the port of the hub, kept over restarts; 0 before the first start.
        mirror_bytes: how large the copy of one run's folder may be.

    Raises:
        HubError: another hub holds the folder, or it cannot be written or belongs to somebody else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.path.stat().st_uid != os.geteuid():
                raise HubError(f"{self.path} belongs to another user. Set AETHERIA_HOME to a folder of your own.")
            self.path.chmod(0o700)
            self._lock = self._take()
        except OSError as error:
            if isinstance(error, HubError):
                raise
            raise HubError(
                f"cannot make the hub's folder {self.path}: {error.strerror or error}. Set AETHERIA_HOME to a folder "
                "you may write to."
            ) from error
        for file in self.path.iterdir():  # of an earlier hub, a copy, a restored backup
            if stat.S_ISREG(file.lstat().st_mode):
                file.chmod(0o600)
        self._settings = self._read_settings()
        self.operator_token: str = self._settings.setdefault("operator_token", secrets.token_urlsafe(32))
        self.viewer_token: str = self._settings.setdefault("viewer_token", secrets.token_urlsafe(32))
        self.port: int = self._settings.setdefault("port", 0)
        self.mirror_bytes: int = self._settings.setdefault("mirror_bytes", MIRROR_BYTES)
        with contextlib.suppress(FileNotFoundError):
            (self.path / "hub.json").unlink()  # of a hub that was killed

    def _take(self) -> int:
        descriptor = os.open(self.path / "hub.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise HubError(
                f"A hub is running already on {self.path}: process {holder}. Use it, or end it with: aetheria down"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def _read_settings(self) -> dict[str, Any]:
        file = self.path / "settings.json"
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise HubError(f"cannot read {file}: {error}. Remove it; the hub then gets new tokens.") from error
        if (
            not isinstance(settings, dict)
            or not all(isinstance(settings.get(name, 0), int) for name in ("port", "mirror_bytes"))
            or not all(isinstance(settings.get(name, ""), str) for name in ("operator_token", "viewer_token"))
        ):
            raise HubError(f"{file} is not what the hub writes there. Remove it; the hub then gets new tokens.")
        return settings

    def bind(self, port: int | None = None) -> socket.socket:
        """Returns a socket that listens on loopback.

        Args:
            port: which; the one the hub had last, by default, or a free one the first time.

        Raises:
            HubError: the port is taken.
        """
        wanted = self.port if port is None else port
        # The protocol is named: asyncio asks for it, and sends small answers at once only where it is TCP.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
            listener.listen(1024)
        except (OSError, OverflowError) as error:
            listener.close()
            told = getattr(error, "strerror", None) or error
            raise HubError(
                f"the hub cannot use port {wanted}: {told}. Another program may have it. End that one, or choose "
                "another port with: aetheria up --port PORT"
            ) from error
        self.port = self._settings["port"] = listener.getsockname()[1]
        write_private(self.path / "settings.json", json.dumps(self._settings, indent=2).encode())
        return listener

    @property
    def mirrors(self) -> Path:
        """Where the folders of runs are copied to that are not on this machine."""
        return self.path / "mirrors"

    @property
    def url(self) -> str:
        """The address of the hub."""
        return f"http://127.0.0.1:{self.port}"

    def announce(self) -> None:
        """Writes `hub.json`: from now on the hub can be found."""
        known = {
            "url": self.url,
            "operator_token": self.operator_token,
            "viewer_token": self.viewer_token,
            "pid": os.getpid(),
        }
        write_private(self.path / "hub.json", json.dumps(known, indent=2).encode())

    def close(self) -> None:
        """Takes `hub.json` away and gives the folder back."""
        (self.path / "hub.json").unlink(missing_ok=True)
        os.close(self._lock)
