"""Files that nobody else may read: keys, tokens, configurations that hold them. Whatever the umask says."""

from __future__ import annotations

import os
from pathlib import Path

from aetheria.runs import fsync_directory

__all__ = ["private_folder", "write_private"]


def private_folder(path: Path) -> Path:
    """Makes a folder that only its owner may enter, and its parents; one that is there is closed to others."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def write_private(path: Path, content: bytes) -> None:
    """Writes a file of mode 0600 that is either the old one or the new one, at any instant and after any crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that had this number and was killed while it wrote
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
