"""Naming what is damaged in a folder of shards, and going on without it: in quarantine until it is whole again."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aetheria.data.blocks import Tables
from aetheria.data.manifest import MANIFEST, Manifest, hash_of, shard_name
from aetheria.data.writer import explain_writing, folder_lock
from aetheria.errors import DataDamagedError, DataError
from aetheria.runs import write_atomically

__all__ = ["Damage", "Repair", "quarantined_blocks", "repair", "verify"]

Progress = Callable[[int, int], object]  # bytes that were read, out of how many


@dataclasses.dataclass(frozen=True)
class Damage:
    """Something in a folder of shards that is not as it was written.

    Attributes:
        file: its path, from the folder.
        what: in words.
        shard: number of the shard; None if it is another file.
        block: number of the block, among all; None if it is the file as a whole, or what stands around the blocks.
        first_row: number of its first sample.
        rows: how many samples cannot be read.
    """

    file: str
    what: str
    shard: int | None = None
    block: int | None = None
    first_row: int = 0
    rows: int = 0

    def __str__(self) -> str:
        lost = f" (samples {self.first_row} to {self.first_row + self.rows - 1})" if self.rows else ""
        return f"{self.file}: {self.what}{lost}"


@dataclasses.dataclass(frozen=True)
class Repair:
    """What `repair` has done.

    Attributes:
        manifest: the newest version; a new one, if anything has changed.
        damages: all that is damaged.
        quarantined: what went into quarantine now, by block.
        released: numbers of the blocks that are whole again, and were taken out of quarantine.
        restored: files that were written anew from their copies.
    """

    manifest: Manifest
    damages: tuple[Damage, ...]
    quarantined: tuple[Damage, ...]
    released: tuple[int, ...]
    restored: tuple[str, ...]

    @property
    def lost(self) -> int:
        """Samples that are in quarantine now."""
        return sum(entry["rows"] for entry in self.manifest.quarantined)


def verify(folder: Path | str, version: int | None = None, progress: Progress | None = None) -> list[Damage]:
    """Reads every byte of a folder of shards, and names all that is damaged: an empty list says that nothing is.

    What is in quarantine is not named: it is known, and not read.

    Args:
        folder: of the data.
        version: of the manifest; None for the newest.
        progress: called after each shard.

    Raises:
        DataError: there are no shards here.
        DataDamagedError: the manifest or a table is damaged, so that nothing more can be said.
    """
    folder = Path(folder).absolute()
    manifest = Manifest.read(folder, version)
    tables = Tables(folder, manifest)
    known = set(quarantined_blocks(manifest))
    found = _damaged_versions(folder, manifest)
    for shard, damages, _ in _inspected(folder, tables, progress):
        whole = set(range(*_blocks_of(tables, shard))) <= known
        found += [damage for damage in damages if not (whole or damage.block in known)]
    return found


def repair(folder: Path | str, progress: Progress | None = None) -> Repair:
    """Puts every block that cannot be read into quarantine, and takes out those that can be read again.

    That makes a new version, whose readers leave these blocks out; older versions stay as they are. A shard that is
    missing, or has another length than it was written with, goes into quarantine as a whole. If it is put back from a
    copy, the next repair takes it out. The manifest, and its newest copy in versions/, are restored from each other.

    Args:
        folder: of the data.
        progress: called after each shard.

    Raises:
        DataError: there are no shards here, another process is writing into the folder, or it cannot be written.
        DataDamagedError: a table, or the manifest and its copy, are damaged: only a copy of the folder helps.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        Manifest.read(folder)  # says so
    try:
        with folder_lock(folder):
            restored = _restore_manifest(folder)
            held = Manifest.read(folder)
            tables = Tables(folder, held)
            damages, unreadable = _damaged_versions(folder, held), dict[int, Damage]()
            for _, found, blocks in _inspected(folder, tables, progress):
                damages += found
                unreadable |= blocks
            before = dict(zip(quarantined_blocks(held), held.quarantined))
            manifest = held
            if unreadable.keys() != before.keys():
                manifest = dataclasses.replace(
                    held,
                    version=held.version + 1,
                    created=_now(),
                    quarantined=tuple(
                        before.get(block) or _entry(held, tables, damage)
                        for block, damage in sorted(unreadable.items())
                    ),
                )
                manifest.write(folder)
    except OSError as error:
        raise DataError(explain_writing(folder, error)) from error
    return Repair(
        manifest,
        tuple(damages),
        tuple(damage for block, damage in sorted(unreadable.items()) if block not in before),
        tuple(sorted(before.keys() - unreadable.keys())),
        tuple(restored),
    )


def quarantined_blocks(manifest: Manifest) -> list[int]:
    """Returns the numbers, among all blocks, of those in quarantine, in the order in which the manifest has them."""
    firsts = np.cumsum([0, *(part.blocks for part in manifest.parts)])
    return [int(firsts[entry["part"]]) + entry["block"] for entry in manifest.quarantined]


def _entry(manifest: Manifest, tables: Tables, damage: Damage) -> dict[str, Any]:
    assert damage.block is not None
    firsts = np.cumsum([0, *(part.blocks for part in manifest.parts)])
    part = int(np.searchsorted(firsts, damage.block, side="right")) - 1
    return {
        "part": part,
        "block": damage.block - int(firsts[part]),
        "shard": damage.shard,
        "rows": damage.rows,
        "reason": damage.what,
        "time": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _restore_manifest(folder: Path) -> list[str]:
    """Makes the manifest and its newest copy one again; returns what was written."""
    copies = sorted((folder / "versions").glob("[0-9]*.json"))
    try:
        newest = Manifest.read(folder)
    except DataDamagedError as damaged:
        if not copies:
            raise
        try:
            newest = Manifest.decode(copies[-1].read_bytes(), str(copies[-1]))
        except DataDamagedError as error:
            damaged.add_note(f"Its copy is no better: {error}")
            raise damaged from error
        write_atomically(folder / MANIFEST, newest.encode())
        return [MANIFEST]
    copy = folder / "versions" / f"{newest.version:08d}.json"
    if copy.is_file() and copy.read_bytes() == newest.encode():
        return []
    copy.parent.mkdir(exist_ok=True)
    write_atomically(copy, newest.encode())
    return [f"versions/{copy.name}"]


def _damaged_versions(folder: Path, manifest: Manifest) -> list[Damage]:
    found = []
    for number in range(1, manifest.version + 1):
        try:
            Manifest.read(folder, number)
        except DataError as error:
            found.append(Damage(f"versions/{number:08d}.json", str(error)))
    return found


def _blocks_of(tables: Tables, shard: int) -> tuple[int, int]:
    begin, end = np.searchsorted(tables.blocks["shard"], [shard, shard + 1]).tolist()
    return begin, end


def _inspected(
    folder: Path, tables: Tables, progress: Progress | None
) -> Iterator[tuple[int, list[Damage], dict[int, Damage]]]:
    """Yields for each shard its number, what is damaged, and why each of its blocks that is not read is not read."""
    sizes = tables.shards["bytes"]
    total, done = int(sizes.sum()), 0
    for shard in range(len(sizes)):
        found, none_is_read = _damages(folder, tables, shard)
        lost = {damage.block: damage for damage in found if damage.block is not None}
        if none_is_read:
            what = found[-1].what
            lost = {block: _lost(tables, shard, block, what) for block in range(*_blocks_of(tables, shard))}
        yield shard, found, lost
        done += int(sizes[shard])
        if progress is not None:
            progress(done, total)


def _lost(tables: Tables, shard: int, block: int, what: str) -> Damage:
    return Damage(
        shard_name(shard), what, shard, block, int(tables.block_starts[block]), int(tables.blocks["rows"][block])
    )


def _damages(folder: Path, tables: Tables, shard: int) -> tuple[list[Damage], bool]:
    """Returns what is damaged in a shard, and whether nothing of it is read because of the last thing.

    It is read, not mapped: a disk that fails must not end the process.
    """
    name, first, rows = shard_name(shard), int(tables.shard_starts[shard]), int(tables.shards["rows"][shard])
    try:
        file = (folder / name).open("rb")
    except FileNotFoundError:
        return [Damage(name, "missing", shard, None, first, rows)], True
    except OSError as error:
        return [Damage(name, f"cannot be opened: {error.strerror}", shard, None, first, rows)], True
    with file:
        size, wanted = file.seek(0, 2), int(tables.shards["bytes"][shard])
        found, frame, place = [], [], 0
        begin, end = _blocks_of(tables, shard)
        for block in range(begin, end):
            offset, length = int(tables.blocks["offset"][block]), int(tables.blocks["bytes"][block])
            frame.append(_read(file, place, offset - place))
            place = offset + length
            content = _read(file, offset, length)
            if content is None or hash_of(content) != int(tables.blocks["hash"][block]):
                how = "cannot be read from the disk" if content is None else "damaged"
                what = f"block {block - begin} is {'cut off' if place > size else how}"
                found.append(_lost(tables, shard, block, what))
        frame.append(_read(file, place, max(size - place, 0)))
    if size != wanted:
        found.append(Damage(name, f"{size:,} bytes instead of {wanted:,}: none of it is read", shard))
    elif None in frame or hash_of(*frame) != int(tables.shards["frame"][shard]):
        found.append(Damage(name, "damaged before or behind its blocks, which are whole", shard))
    return found, size != wanted


def _read(file: BinaryIO, offset: int, length: int) -> bytes | None:
    """Returns some bytes of a file; None if the disk does not give them."""
    try:
        file.seek(offset)
        return file.read(length)
    except OSError:
        return None
