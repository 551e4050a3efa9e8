"""Where the bytes of blocks come from: files that are mapped where they lie, or a cache of what is dear to get."""

from __future__ import annotations

import mmap
import resource
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aetheria.data.blocks import Message, Tables, damaged, map_file
from aetheria.data.cache import HOLDS_DESCRIPTORS, SEAL, Cache
from aetheria.data.hints import Hints
from aetheria.data.manifest import hash_of, shard_name
from aetheria.data.once import Once, begins_anew_in_child
from aetheria.errors import DataDamagedError, DataError

__all__ = ["CachedPlace", "LocalPlace", "Place", "Source"]

_MAPS = 256  # shards that are mapped at a time; each holds a file descriptor
_KEPT = 4096  # blocks that are kept, where nobody has said how many
_THREADS, _HINTED = 8, 256  # that prefetch; blocks that they have before them at most
_AROUND = 1 << 16  # the kernel maps as much around a page that is touched
# What a system lacks of these is left out: they are advice.
_WILL_NEED: int | None = getattr(mmap, "MADV_WILLNEED", None)
_DO_NOT_NEED: int | None = getattr(mmap, "MADV_DONTNEED", None)


class Place(ABC):
    """Where the bytes of the blocks of some data come from. May be used by several threads.

    Attributes:
        name: what it is called in an error.
        lasting: whether a block that was checked once need not be checked when it is asked for again.
        slow: whether several blocks that are needed at once had better be fetched at the same time.
    """

    name: str
    lasting: ClassVar[bool] = True
    slow: bool = False

    @abstractmethod
    def message(self, block: int) -> Message:
        """Returns the bytes of a block.

        Raises:
            DataError: they cannot be had.
        """

    @abstractmethod
    def prefetch(self, blocks: Iterable[int]) -> None:
        """Begins to fetch blocks, the first one first; never blocks, never raises."""

    def let_go(self, block: int) -> None:  # noqa: B027 - there may be nothing to do
        """Is told that nobody uses a block any more. Takes no lock: it may be called in the middle of anything."""

    def discard(self, block: int) -> bool:
        """Is told that a block is damaged; returns whether asking for it again may give another one."""
        return False

    def at_most(self, blocks: int | None) -> int:
        """Returns how many blocks are kept where somebody wants to keep some number of them, or has not said.

        Raises:
            DataError: there is not enough room for them.
        """
        return _KEPT if blocks is None else blocks


class LocalPlace(Place):
    """A folder on this machine. Its shards are mapped.

    Args:
        folder: of the data.
        tables: where the blocks lie.
    """

    def __init__(self, folder: Path, tables: Tables) -> None:
        self.name = str(folder)
        self.patience = 60.0
        self._folder = folder
        self._tables = tables
        self._maps: OrderedDict[int, memoryview] = OrderedDict()
        self.begin_anew()
        begins_anew_in_child(self)

    def begin_anew(self) -> None:
        """Makes the lock anew, in a process that was forked."""
        self._lock = threading.Lock()

    def message(self, block: int) -> Message:
        table = self._tables.blocks
        offset, size = int(table["offset"][block]), int(table["bytes"][block])
        content = self._map(int(table["shard"][block]))[offset : offset + size]
        return Message(content, int(table["hash"][block]), mapped=True)

    def prefetch(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            try:
                mapped = self._map(int(self._tables.blocks["shard"][block]))
            except (DataError, OSError):
                continue  # who reads the block is told
            self._advise(mapped, block, _WILL_NEED, 0)

    def let_go(self, block: int) -> None:
        """Takes the pages of a block out of this process's memory. They stay in the page cache.

        Whoever still looks at them gets them from there: the map is of a file, and only read.
        """
        mapped = self._maps.get(int(self._tables.blocks["shard"][block]))
        if mapped is not None:
            self._advise(mapped, block, _DO_NOT_NEED, _AROUND)

    def _advise(self, mapped: memoryview, block: int, advice: int | None, around: int) -> None:
        table = self._tables.blocks
        offset, size = int(table["offset"][block]), int(table["bytes"][block])
        unit = max(mmap.PAGESIZE, around)
        begin, end = offset // unit * unit, min(-(-(offset + size) // unit) * unit, len(mapped))
        if advice is not None and isinstance(mapped.obj, mmap.mmap):
            mapped.obj.madvise(advice, begin, end - begin)

    def _map(self, shard: int) -> memoryview:
        with self._lock:
            if shard not in self._maps:
                size = int(self._tables.shards["bytes"][shard])
                self._maps[shard] = map_file(self._folder / shard_name(shard), size)
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)  # what is still in use of it keeps it mapped
            self._maps.move_to_end(shard)
            return self._maps[shard]

    def read(self, block: int) -> Any:
        """Returns the bytes of a block as they lie there."""
        return self.message(block).content


class Source(Protocol):
    """What gives the bytes of blocks, unchecked.

    Attributes:
        name: what it is called in an error.
        patience: seconds after which it is fetched by a second process, too.
    """

    name: str
    patience: float

    def read(self, block: int) -> Any:
        """Returns the bytes of a block; raises DataError."""


class CachedPlace(Place):
    """Blocks that are fetched, checked, unpacked if they are compressed, and kept in a cache as long as it has room.

    Args:
        source: which they are fetched from.
        tables: where the blocks lie.
        schema: of their columns.
        packed: which blocks are compressed, bool [blocks].
        cache: which keeps them.
        direct: where to read the blocks that are not compressed; None keeps them in the cache, too.

    Raises:
        DataError: the cache cannot hold the largest block.
    """

    lasting = False  # what another process has put into the cache is not what this one has checked
    slow = True

    def __init__(
        self,
        source: Source,
        tables: Tables,
        schema: pa.Schema,
        packed: NDArray[np.bool_],
        cache: Cache,
        direct: LocalPlace | None = None,
    ) -> None:
        self.name = source.name
        self._source = source
        self._tables = tables
        self._schema = schema
        self._packed = packed
        self._cache = cache
        self._direct = direct
        self._sizes = tables.blocks["bytes"][packed if direct is not None else slice(None)] + SEAL
        self._once: Once[Message] = Once()
        largest = int(self._sizes.max(initial=0))
        if largest > cache.limit:
            raise DataError(
                f"{self.name}: the largest block has {largest - SEAL:,} bytes, and {SEAL} that are kept with it; the "
                f"cache {cache.folder} may hold {cache.limit:,}. Give it more: cache_bytes."
            )
        # No more than fit in beside what is in use.
        self._hints = Hints(self.fetch, _THREADS, min(_HINTED, max(1, cache.limit // 2 // max(1, largest))))

    def message(self, block: int) -> Message:
        if not self._is_cached(block):
            return self._direct.message(block)  # type: ignore[union-attr]
        return self._once(block, lambda: self._obtained(block))

    def prefetch(self, blocks: Iterable[int]) -> None:
        chosen = list(blocks)
        if self._direct is not None:
            self._direct.prefetch([block for block in chosen if not self._is_cached(block)])
        self._hints.add(block for block in chosen if self._is_cached(block))

    def fetch(self, block: int) -> None:
        """Fetches a block into the cache, if it is not there."""
        if not self._cache.use(self._file(block)):
            self._once(block, lambda: self._obtained(block))

    def let_go(self, block: int) -> None:
        if not self._is_cached(block):
            self._direct.let_go(block)  # type: ignore[union-attr]

    def discard(self, block: int) -> bool:
        if not self._is_cached(block):
            return False
        self._cache.discard(self._file(block))
        return True

    def at_most(self, blocks: int | None) -> int:
        if blocks is None:
            wanted = min(_KEPT, max(1, self._cache.limit // 2 // max(1, int(self._sizes.max(initial=0)))))
        else:
            wanted = blocks
            in_use = int(np.sort(self._sizes)[-wanted:].sum())
            if in_use > self._cache.limit:
                raise DataError(
                    f"{self.name}: {wanted} blocks are in use at a time, of up to {in_use:,} bytes; the cache "
                    f"{self._cache.folder} may hold {self._cache.limit:,}. Give it more (cache_bytes), or let fewer be "
                    "in use: fewer lanes, a smaller window."
                )
        return min(wanted, _descriptors() // 4) if HOLDS_DESCRIPTORS else wanted

    def _is_cached(self, block: int) -> bool:
        return self._direct is None or bool(self._packed[block])

    def _file(self, block: int) -> str:
        table = self._tables.blocks
        form = ".unpacked" if self._packed[block] else ""
        return f"{int(table['hash'][block]):016x}-{int(table['bytes'][block])}{form}"

    def _obtained(self, block: int) -> Message:
        found = self._cache.obtain(self._file(block), lambda: self._fetched(block), self._source.patience)
        if found.hash is None or self._packed[block]:
            return found
        return Message(found.content, int(self._tables.blocks["hash"][block]), found.mapped)

    def _fetched(self, block: int) -> Any:
        for _ in range(2):  # what was damaged on its way is fetched again
            content = self._source.read(block)
            if hash_of(content) == int(self._tables.blocks["hash"][block]):
                break
        else:
            raise damaged(self.name, self._tables, block)
        if not self._packed[block]:
            return content
        try:
            return memoryview(pa.ipc.read_record_batch(pa.py_buffer(content), self._schema).serialize())
        except (pa.ArrowInvalid, OSError) as error:
            raise DataDamagedError(
                f"{self.name}: {self._tables.describe(block)} was written so that it cannot be read: {error}"
            ) from error


def _descriptors() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
