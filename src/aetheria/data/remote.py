"""Files elsewhere, read through fsspec: in parts, again and again while what is wrong may pass."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import time
from collections.abc import Mapping
from typing import Any

from aetheria.errors import DataError, MissingDependencyError

__all__ = ["Remote", "is_url"]

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs"}  # of the extra "remote"
_PASSING = {408, 425, 429}  # of HTTP, beside those from 500 on
_LASTING = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds
_PIECE = 8 << 20  # bytes for which a request has its time


def is_url(place: object) -> bool:
    """Returns whether something is the URL of a folder elsewhere, not a path on this machine."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://", place) is not None


class Remote:
    """A folder elsewhere. May be used by several threads, and in processes that were forked.

    Args:
        url: of the folder, as fsspec takes it.
        retries: how often a request is made again, when it fails with what may pass: an error of the server, too many
            requests, a time-out, a connection that is cut, a part that is too short.
        timeout: seconds for each request, for each 8 MB of it.
        options: what fsspec takes for this kind of storage.

    Attributes:
        name: the URL without what is secret in it.
        timeout: seconds for a request of up to 8 MB.
        patience: seconds that it may take, with everything.

    Raises:
        DataError: fsspec knows no such URL.
        MissingDependencyError: a package is missing for it.
    """

    def __init__(self, url: str, *, retries: int, timeout: float, options: Mapping[str, Any] | None = None) -> None:
        if retries < 0 or timeout <= 0:
            raise DataError(f"retries is from 0 on, timeout more than 0 seconds; found {retries} and {timeout}.")
        self.name = re.sub(r"//[^/@]*@", "//", url).rstrip("/")
        self.patience = (1 + retries) * timeout + sum(_pause(number) for number in range(retries))
        self._url = url.rstrip("/")
        self._retries = retries
        self.timeout = timeout
        self._options = dict(options or {})
        self._opened: tuple[int, Any, str] | None = None
        self._system()

    def _system(self) -> tuple[Any, str]:
        """Returns the file system, this process's own, and the folder's path there."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec  # noqa: PLC0415 - only where data lie elsewhere

            try:
                system, root = fsspec.core.url_to_fs(self._url, **self._options)
            except ImportError as error:
                package = _PACKAGES.get(self._url.partition("://")[0].rpartition(":")[2])
                if package is not None:
                    raise MissingDependencyError.of(package, "remote", f"Reading from {self.name}") from error
                raise DataError(f"cannot read from {self.name}: {error}.") from error
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"cannot read from {self.name}: {error}. Check the address, and the options."
                ) from error
            self._opened = (os.getpid(), system, root.rstrip("/"))
        return self._opened[1:]

    def read(self, path: str, start: int = 0, size: int | None = None, about: int = 0) -> bytes:
        """Returns a file, or a part of it.

        Args:
            path: from the folder.
            start: where the part begins.
            size: of the part, at least 1; None reads the file as a whole.
            about: bytes that a whole file may have, to give it time.

        Raises:
            FileNotFoundError: there is none, as the server says; at once.
            DataError: it cannot be read, however often that was tried.
        """
        patience = self.timeout * max(1, -(-(size or about) // _PIECE))
        what = f"{self.name}/{path}" + (f", bytes {start:,} to {start + size - 1:,}" if size is not None else "")
        began, tried = time.monotonic(), 0
        while True:
            try:
                tried += 1
                return self._request(path, start, size, patience)
            except (FileNotFoundError, DataError, MissingDependencyError):
                raise
            except Exception as error:  # each file system has its own; all of them are told with the address
                if not _may_pass(error):
                    raise DataError(
                        f"cannot read {what}: {_said(error)}. Check the address, and what allows to read there."
                    ) from error
                if tried > self._retries:
                    raise DataError(
                        f"cannot read {what}: {_said(error)}. Tried {tried} times in {time.monotonic() - began:.1f} s, "
                        f"each for up to {patience:g} s. Look after the server and the network; retries and timeout "
                        "say how long to try."
                    ) from error
            time.sleep(_pause(tried - 1) * random.uniform(0.5, 1.0))  # so that many do not come back at once

    def size(self, path: str) -> int | None:
        """Returns how many bytes a file has, as the server says; None if it does not say."""
        system, root = self._system()
        try:
            found = system.info(f"{root}/{path}", **({"timeout": self.timeout} if system.async_impl else {})).get(
                "size"
            )
        except Exception:  # noqa: BLE001 - asked only where something else has failed already, and that is told
            return None
        return found if isinstance(found, int) else None

    def _request(self, path: str, start: int, size: int | None, patience: float) -> bytes:
        system, root = self._system()
        limits: dict[str, Any] = {} if size is None else {"start": start, "end": start + size}
        if system.async_impl:  # the others know no time-out
            limits["timeout"] = patience
        found: bytes = system.cat_file(f"{root}/{path}", **limits)
        if size is not None and len(found) > size:
            raise DataError(
                f"{self.name} sends whole files where parts of them are asked for: it does not know HTTP's Range. "
                "Read from a server that does."
            )
        if size is not None and len(found) < size:
            raise EOFError(f"found {len(found):,} bytes instead of {size:,}: the file is cut off, or its transfer was")
        return found


def _pause(number: int) -> float:
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**number)


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status >= 400:
        return status in _PASSING or status >= 500
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if kinds & {"aiohttp.InvalidURL"}:
        return False
    return isinstance(error, EOFError | asyncio.TimeoutError) or bool(
        kinds & {"aiohttp.ClientError", "botocore.HTTPClientError", "botocore.ConnectionError"}
    )


def _said(error: Exception) -> str:
    status, message = getattr(error, "status", None), str(error)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
