"""Opening data: where they lie on this machine, or elsewhere with a cache of them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from aetheria.data.blocks import Tables, map_file
from aetheria.data.cache import Cache, default_cache
from aetheria.data.manifest import MANIFEST, Manifest, shard_name
from aetheria.data.places import CachedPlace, LocalPlace, Place
from aetheria.data.remote import Remote, is_url
from aetheria.data.schema import Schema
from aetheria.errors import DataDamagedError, DataError

__all__ = ["Access", "Opened", "open_data"]


@dataclass(frozen=True)
class Access:
    """How to get at data.

    Attributes:
        cache: folder of the cache; None for the default one where data lie elsewhere, for none where they do not.
        cache_bytes: its limit; None for three quarters of what is free there.
        retries: see `Remote`.
        timeout: see `Remote`.
        storage_options: what fsspec takes for this kind of storage.
    """

    cache: Path | None
    cache_bytes: int | None
    retries: int
    timeout: float
    storage_options: Mapping[str, Any] | None


@dataclass(frozen=True)
class Opened:
    """Data that are open.

    Attributes:
        folder: of the data, or their URL without secrets.
        manifest: of them.
        tables: of them.
        place: where their blocks come from.
    """

    folder: Path | str
    manifest: Manifest
    tables: Tables
    place: Place


def open_data(place: Path | str, version: int | None, access: Access, digest: str | None = None) -> Opened:
    """Opens data.

    Args:
        place: a folder, or its URL.
        version: of the manifest; None for the newest.
        access: how to get at them.
        digest: of the manifest; if it lies in the cache, it is not fetched.

    Raises:
        DataError: there are none, or the cache is too small.
        DataDamagedError: manifest or tables are damaged.
    """
    if not is_url(place):
        return _open_here(Path(place).absolute(), version, access)
    remote = Remote(str(place), retries=access.retries, timeout=access.timeout, options=access.storage_options)
    cache = Cache((access.cache or default_cache()).absolute(), access.cache_bytes)
    manifest = (digest and _held(cache, digest)) or _fetched_manifest(remote, version)
    folder = _fetch_tables(remote, cache, manifest)
    tables = Tables(folder, manifest)
    source = RemoteSource(remote, tables)
    schema = Schema.from_state(manifest.schema).arrow()
    return Opened(remote.name, manifest, tables, CachedPlace(source, tables, schema, _packed(manifest), cache))


def _open_here(folder: Path, version: int | None, access: Access) -> Opened:
    manifest = Manifest.read(folder, version)
    tables = Tables(folder, manifest)
    local, packed = LocalPlace(folder, tables), _packed(manifest)
    if access.cache is None or not packed.any():
        return Opened(folder, manifest, tables, local)
    cache = Cache(access.cache.absolute(), access.cache_bytes)
    schema = Schema.from_state(manifest.schema).arrow()
    return Opened(folder, manifest, tables, CachedPlace(local, tables, schema, packed, cache, direct=local))


def _packed(manifest: Manifest) -> NDArray[np.bool_]:
    """Returns which blocks are compressed."""
    packed = np.array([part.compression is not None for part in manifest.parts], dtype=bool)
    return np.repeat(packed, np.array([part.blocks for part in manifest.parts], dtype=np.int64))


class RemoteSource:
    """The bytes of blocks elsewhere.

    Args:
        remote: the folder of the data.
        tables: where the blocks lie in it.
    """

    def __init__(self, remote: Remote, tables: Tables) -> None:
        self.name = remote.name
        largest = int(tables.blocks["bytes"].max(initial=0))
        self.patience = remote.timeout * max(1, -(-largest // (8 << 20)))
        self._remote = remote
        self._tables = tables

    def read(self, block: int) -> bytes:
        """Returns the bytes of a block, unchecked.

        Raises:
            DataDamagedError: there is no such shard, or it is cut off.
            DataError: they cannot be read.
        """
        table = self._tables.blocks
        shard, offset, size = int(table["shard"][block]), int(table["offset"][block]), int(table["bytes"][block])
        try:
            return self._remote.read(shard_name(shard), offset, size)
        except FileNotFoundError as error:
            raise _missing(self._remote, shard_name(shard)) from error
        except DataError as error:
            self._look_after(shard, error)
            raise DataError(f"{self._tables.describe(block)}: {error}") from error

    def _look_after(self, shard: int, error: DataError) -> None:
        """Raises DataDamagedError if a shard is cut off, where a part of it was too short, or behind its end."""
        if not (isinstance(error.__cause__, EOFError) or getattr(error.__cause__, "status", None) == 416):
            return
        whole, found = int(self._tables.shards["bytes"][shard]), self._remote.size(shard_name(shard))
        if found is not None and found != whole:
            raise DataDamagedError(
                f"{self.name}/{shard_name(shard)} is damaged: it has {found:,} bytes, {whole:,} were written. Put it "
                "back from a copy, or write the data anew."
            ) from error


def _missing(remote: Remote, path: str) -> DataDamagedError:
    return DataDamagedError(f"{remote.name}/{path} is missing. Put it back from a copy, or write the data anew.")


def _fetched_manifest(remote: Remote, version: int | None) -> Manifest:
    path = MANIFEST if version is None else f"versions/{version:08d}.json"
    try:
        return Manifest.decode(remote.read(path), f"{remote.name}/{path}")
    except FileNotFoundError:
        if version is None:
            raise DataError(f"{remote.name} holds no shards: there is no {path}. Check the address.") from None
    newest = _fetched_manifest(remote, None).version
    raise DataError(f"{remote.name} has no version {version}; there are 1 to {newest}.")


def _home(cache: Cache, digest: str) -> Path:
    return cache.folder / "data" / digest[:32]


def _held(cache: Cache, digest: str) -> Manifest | None:
    """Returns a manifest that lies in the cache, if it does and is whole."""
    try:
        manifest = Manifest.read(_home(cache, digest))
    except DataError:  # it is fetched, then
        return None
    return manifest if manifest.digest == digest else None


def _fetch_tables(remote: Remote, cache: Cache, manifest: Manifest) -> Path:
    """Returns a folder in which manifest and tables lie; what is missing there, or damaged, is fetched."""
    folder, patience = _home(cache, manifest.digest), 2 * remote.patience

    def is_manifest(path: Path) -> bool:
        return path.read_bytes() == manifest.encode()

    cache.ensure(folder / MANIFEST, is_manifest, manifest.encode, patience)
    for number, part in enumerate(manifest.parts):
        for kind, wanted in part.tables.items():
            path = part.table(number, kind)

            def is_table(found: Path, wanted: str = wanted) -> bool:
                return xxhash.xxh3_128_hexdigest(map_file(found)) == wanted

            def fetched(path: str = path, wanted: str = wanted, about: int = 64 * part.blocks) -> bytes:
                try:
                    for _ in range(2):  # what was damaged on its way is fetched again
                        content = remote.read(path, about=about)
                        if (found := xxhash.xxh3_128_hexdigest(content)) == wanted:
                            return content
                except FileNotFoundError as error:
                    raise _missing(remote, path) from error
                raise DataDamagedError(
                    f"{remote.name}/{path} is damaged: its hash is {found}, the manifest says {wanted}."
                )

            cache.ensure(folder / path, is_table, fetched, patience)
    return folder
