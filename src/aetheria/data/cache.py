"""A folder that keeps blocks which are dear to get: of any data, for several processes, of limited size.

.lock      bytes that are taken; changed only under a lock of this file
blocks/    each by the hash of what was written; behind its content 8 bytes, the xxh3 of that
claims/    what a process is fetching at this moment, locked by it; what a killed one left is not
data/      manifests and tables, which do not count
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from loguru import logger

from aetheria.data.blocks import Message
from aetheria.data.manifest import hash_of
from aetheria.data.once import begins_anew_in_child
from aetheria.errors import DataError

__all__ = ["SEAL", "Cache", "default_cache"]

SEAL = 8  # bytes behind a block
Found = TypeVar("Found")
_SLACK = 16  # whoever makes room makes this part of the limit, so that not every block looks through the folder
HOLDS_DESCRIPTORS = sys.version_info < (3, 13)  # whether each file that is mapped keeps a descriptor open


def default_cache() -> Path:
    """Returns the folder that is used where none is given."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "aetheria" / "data"


class Cache:
    """Keeps blocks up to a limit; those that were not used for longest go first. Several processes may share it.

    Whoever has mapped a block that goes keeps it; the disk has its bytes again when the last one lets it go.

    Args:
        folder: made if it is not there.
        limit: bytes that all blocks in it may have; None takes three quarters of what is free and already kept there.

    Attributes:
        limit: in bytes.

    Raises:
        DataError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = folder
        self._blocks = folder / "blocks"
        self._claims = folder / "claims"
        try:
            self._blocks.mkdir(parents=True, exist_ok=True)
            self._claims.mkdir(exist_ok=True)
            with self._locked() as state:
                taken = self._tidied(state)
            free = os.statvfs(folder)
        except OSError as error:
            raise DataError(
                f"cannot use {folder} as a cache: {error}. Choose a folder that can be written: cache='...'."
            ) from error
        self.limit = (taken + free.f_bavail * free.f_frsize) * 3 // 4 if limit is None else limit
        self.begin_anew()
        begins_anew_in_child(self)

    def begin_anew(self) -> None:
        """Makes the lock anew, in a process that was forked."""
        self._saying = threading.Lock()
        self._said = getattr(self, "_said", False)

    def obtain(self, name: str, make: Callable[[], memoryview | bytes], patience: float) -> Message:
        """Returns a block that is kept, or makes it and keeps it, if it can be kept.

        Of several threads and processes that want the same one, one makes it.

        Args:
            name: of the block.
            make: returns its content, checked.
            patience: seconds after which it is made here, too, if another process has not finished it.
        """
        found, claim = None, None
        try:
            found, claim = self._claimed(name, lambda: self.find(name), patience)
        except OSError as error:
            self._say(error)
        if found is not None:
            return found
        if claim is None:
            return Message(make(), None, mapped=False)
        with claim:
            content = make()
            return self._kept(name, claim, content) or Message(content, None, mapped=False)

    def find(self, name: str) -> Message | None:
        """Returns a block as it lies in the cache, with the hash that it should have; None if it is not there."""
        path = self._blocks / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(descriptor).st_size
            if size > SEAL:
                _touch(descriptor)
                mapped = _mapped(descriptor, size)
                return Message(mapped[:-SEAL], int.from_bytes(mapped[-SEAL:], "little"), mapped=True)
        finally:
            os.close(descriptor)
        self.discard(name)  # cut off by a crash of the machine
        return None

    def use(self, name: str) -> bool:
        """Returns whether a block is there. It then counts as used, and is read from the disk ahead of its reader."""
        try:
            descriptor = os.open(self._blocks / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            _touch(descriptor)
            if sys.platform == "linux":
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        return True

    def discard(self, name: str) -> None:
        """Removes a block that is damaged."""
        try:
            with self._locked() as state:
                size = (self._blocks / name).stat().st_size
                (self._blocks / name).unlink()
                _note(state, self._taken(state) - size)
        except FileNotFoundError:
            return  # another process was quicker
        except OSError as error:
            self._say(error)

    def ensure(self, path: Path, is_whole: Callable[[Path], bool], make: Callable[[], bytes], patience: float) -> None:
        """Makes sure that a file which does not count lies in the cache.

        Args:
            path: of the file, in the folder of the cache.
            is_whole: whether the one that is there is right.
            make: returns its content, checked.
            patience: as in `obtain`.

        Raises:
            DataError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            name = path.relative_to(self.folder).as_posix().replace("/", "-")
            found, claim = self._claimed(name, lambda: (path.exists() and is_whole(path)) or None, patience)
            if found is not None:
                return
            if claim is None:
                raise TimeoutError(f"another process has been at it for {patience:.0f} s")
            with claim:
                claim.write(make())
                claim.path.replace(path)
        except OSError as error:
            raise DataError(
                f"cannot write {path}: {error}. Make room, or choose another folder: cache='...'."
            ) from error

    # --- claims: that somebody is at something is known to the others as long as it lives ----------------------------

    def _claimed(
        self, name: str, look: Callable[[], Found | None], patience: float
    ) -> tuple[Found | None, _Claim | None]:
        """Returns what is there, or a claim to making it; or neither, if somebody else does not get on with it."""
        deadline, pause = time.monotonic() + patience, 0.001
        while True:
            if (found := look()) is not None:
                return found, None
            if (claim := _Claim.on(self._claims / name)) is not None:
                try:
                    found = look()  # it may have been finished just now
                except BaseException:
                    claim.give_up()
                    raise
                if found is None:
                    return None, claim
                claim.give_up()
                return found, None
            if time.monotonic() > deadline:
                return None, None
            time.sleep(pause)  # a lock that is waited for in the kernel could not be waited for with a deadline
            pause = min(2 * pause, 0.02)

    def _kept(self, name: str, claim: _Claim, content: memoryview | bytes) -> Message | None:
        """Writes a block and returns it as it lies in the cache; None if it cannot be kept."""
        size, reserved = len(content) + SEAL, False
        try:
            with self._locked() as state:
                taken = self._taken(state)
                if taken + size > self.limit:
                    taken = self._make_room(size)
                    _note(state, taken)
                if taken + size > self.limit:
                    return None  # what others are writing takes all of it
                # First the count, then the size: whoever is killed in between leaves it too high, which is put right
                # when room is made the next time.
                _note(state, taken + size)
                reserved = True
                os.ftruncate(claim.descriptor, size)
            claim.write(content, hash_of(content).to_bytes(SEAL, "little"))
            with self._locked():  # whoever counts at this moment would meet it twice, or not at all
                claim.path.replace(self._blocks / name)
            return Message(_mapped(claim.descriptor, size)[:-SEAL], None, mapped=True)
        except OSError as error:
            self._say(error)
            if reserved:
                self._give_back(size)
            return None

    # --- what is taken; all of this under the lock --------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # Opened anew each time: a descriptor that threads or forked processes share would exclude none of them.
        state = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(state, fcntl.LOCK_EX)
            yield state
        finally:
            fcntl.flock(state, fcntl.LOCK_UN)  # a process that was forked just now may hold it open
            os.close(state)

    def _taken(self, state: int) -> int:
        noted = os.pread(state, 8, 0)
        return int.from_bytes(noted, "little", signed=True) if len(noted) == 8 else self._counted()

    def _counted(self) -> int:
        return sum(size for _, size, _ in (*_files(self._blocks), *_files(self._claims)))

    def _give_back(self, size: int) -> None:
        with suppress(OSError), self._locked() as state:  # otherwise it is counted anew when room is made
            _note(state, self._taken(state) - size)

    def _make_room(self, size: int) -> int:
        """Removes blocks that were not used for longest, until there is room; returns what is still taken."""
        files = sorted(_files(self._blocks))
        taken = sum(found for _, found, _ in files) + sum(found for _, found, _ in _files(self._claims))
        goal = self.limit - max(size, self.limit // _SLACK)
        for _, found, path in files:
            if taken <= goal:
                break
            Path(path).unlink(missing_ok=True)
            taken -= found
        return taken

    def _tidied(self, state: int) -> int:
        """Removes what killed processes have left; returns what is taken."""
        for _, size, path in list(_files(self._claims)):
            if (left := _Claim.on(Path(path))) is not None:
                left.give_up()
                if size:
                    os.ftruncate(state, 0)  # to be counted anew
        taken = self._taken(state)
        _note(state, taken)
        return taken

    def _say(self, error: OSError) -> None:
        with self._saying:
            said, self._said = self._said, True
        if not said:
            logger.warning(
                f"The cache {self.folder} cannot keep blocks: {error}. Reading goes on; what is not kept is fetched "
                "whenever it is needed. Make room there, or choose another folder."
            )


class _Claim:
    """A file that this process has locked, until it is given up or moved to its place.

    Attributes:
        path: of the file.
        descriptor: of it.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def on(cls, path: Path) -> _Claim | None:
        """Returns a claim; None if somebody else has it, or had it until just now."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        claim = cls(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if claim._is_there():
                os.ftruncate(descriptor, 0)  # what a killed process has written of it
                return claim
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return False

    def write(self, *parts: memoryview | bytes) -> None:
        """Writes the file, from its beginning."""
        place = 0
        for part in parts:
            rest = memoryview(part)
            while len(rest):
                written = os.pwrite(self.descriptor, rest, place)
                place, rest = place + written, rest[written:]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Leaves nothing, unless the file was moved to its place."""
        try:
            if self._is_there():
                self.path.unlink()
        finally:
            self._close()

    def _close(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a process that was forked in the meantime may hold it open
        os.close(self.descriptor)


def _touch(descriptor: int) -> None:
    with suppress(OSError):  # a cache that may only be read: what is in it seems older than it is
        os.utime(descriptor, ns=(time.time_ns(),) * 2)


def _note(state: int, taken: int) -> None:
    os.pwrite(state, taken.to_bytes(8, "little", signed=True), 0)


def _files(folder: Path) -> Iterator[tuple[int, int, str]]:
    """Yields when each file was used last, its size and its path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # finished or removed just now
                found = entry.stat()
                yield found.st_mtime_ns, found.st_size, entry.path


def _mapped(descriptor: int, size: int) -> memoryview:
    if sys.version_info >= (3, 13):
        return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, trackfd=False))
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
