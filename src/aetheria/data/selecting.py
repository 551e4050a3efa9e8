"""Selections: named sets of samples, such as those on which training is to go on.

    selections/hard.bits    a line of JSON that says what it is, sealed with its own sha256;
                            behind it a bit for each sample, the first one lowest, up to the last that is selected

What a name means never changes, because the journals of runs speak of it.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from aetheria.data.blocks import map_file
from aetheria.data.manifest import Manifest
from aetheria.data.remote import is_url
from aetheria.data.sealing import seal, unseal
from aetheria.data.shards import Shards
from aetheria.errors import DataDamagedError, DataError, did_you_mean
from aetheria.runs import fsync_directory, write_atomically

__all__ = ["Selection", "read_selection", "selections", "write_selection"]

FORMAT = 1
_FOLDER, _ENDING = "selections", ".bits"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_NOTE = 10_000  # characters
_LONGEST = 1 << 20  # bytes that the line in front of the bits never has
_PIECE = 1 << 20  # bits that are packed or unpacked at once


@dataclass(frozen=True, eq=False)
class Selection:
    """A named set of samples of one data set. Samples that were added to the data later are not in it.

    Attributes:
        name: what it is called.
        uid: of the data.
        version: of the data of which it was chosen.
        manifest: digest of that version's manifest.
        bits: a bit for each sample by its row, uint8 of shape [bytes], up to the last one that is selected.
        count: samples that are selected.
        note: for people: why these.
        created: time in UTC, ISO 8601.
    """

    name: str
    uid: int
    version: int
    manifest: str
    bits: NDArray[np.uint8]
    count: int
    note: str = ""
    created: str = ""

    @classmethod
    def of(
        cls,
        shards: Shards,
        name: str,
        ids: Sequence[int] | NDArray[np.integer[Any]] | NDArray[np.bool_] | None = None,
        *,
        rows: Sequence[int] | NDArray[np.int64] | None = None,
        note: str = "",
    ) -> Selection:
        """Returns a selection of some samples; it is not written anywhere.

        Args:
            shards: the data.
            name: letters, digits, ".", "_" and "-".
            ids: of the samples, in any order; or a boolean for each sample of the data.
            rows: numbers of the samples, in place of ids.
            note: for people.

        Raises:
            DataError: a name that cannot be that of a file, no samples, or samples that the data do not have.
        """
        _check_name(name)
        if len(note) > _NOTE:
            raise DataError(f"selection {name!r}: a note has {_NOTE:,} characters at most; found {len(note):,}.")
        if (ids is None) == (rows is None):
            raise DataError(f"selection {name!r}: a selection is made of ids or of rows. Give one of them.")
        found = _rows_of(shards, np.asarray(ids)) if ids is not None else np.asarray(rows)
        if found.size and found.dtype.kind not in "iu":
            raise DataError(f"selection {name!r}: rows are integers; found {found.dtype}.")
        found = np.sort(found.reshape(-1).astype(np.int64))  # of many, in a fiftieth of the time of np.unique
        found = found[np.diff(found, prepend=-2) != 0]
        if not len(found):
            raise DataError(f"selection {name!r} would hold no sample; there would be nothing to train on.")
        if found[0] < 0 or found[-1] >= len(shards):
            raise DataError(
                f"selection {name!r}: {shards.folder} holds samples 0 to {len(shards) - 1}; "
                f"found {found[0] if found[0] < 0 else found[-1]}."
            )
        manifest = shards.manifest
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        bits = _packed(found)
        return cls(name, manifest.uid, manifest.version, manifest.digest, bits, len(found), note, created)

    @property
    def digest(self) -> str:
        """What it means, as a hash of the data's uid and of the samples: xxh3, 128 bits, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(self.bits.data, seed=self.uid)

    def contains(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which of some samples are selected, booleans of the same shape. Row -1, what fills up, is not."""
        known = (rows >= 0) & (rows < 8 * len(self.bits))
        held = np.where(known, rows, 0)
        chosen: NDArray[np.bool_] = known & (self.bits[held >> 3] >> (held & 7).astype(np.uint8) & 1).astype(bool)
        return chosen

    def rows(self) -> NDArray[np.int64]:
        """Returns the numbers of the samples that are selected, in ascending order, int64 of shape [count]."""
        each = _PIECE // 8
        pieces = [
            np.flatnonzero(np.unpackbits(self.bits[first : first + each], bitorder="little")) + 8 * first
            for first in range(0, len(self.bits), each)
        ]
        return np.concatenate(pieces).astype(np.int64)

    def encode(self) -> bytes:
        """Returns the file's content."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "uid": self.uid,
            "version": self.version,
            "manifest": self.manifest,
            "count": self.count,
            "note": self.note,
            "created": self.created,
            "digest": self.digest,
        }
        return seal(content) + self.bits.tobytes()

    @classmethod
    def decode(cls, raw: memoryview | bytes, where: str) -> Selection:
        """Returns a selection from a file's content, where its bits stay.

        Args:
            raw: the content, or a map of it.
            where: it is from, for the error.

        Raises:
            DataError: it is of a newer format.
            DataDamagedError: a byte of it changed.
        """
        line = b"".join(bytes(raw[:_LONGEST]).partition(b"\n")[:2])
        content = unseal(line, "a selection", where, FORMAT)
        digest = content.pop("digest")
        del content["format"]
        found = cls(**content, bits=np.frombuffer(raw, dtype=np.uint8, offset=len(line)))
        if found.digest != digest:
            raise DataDamagedError(
                f"{where} is damaged: the hash of its bits is {found.digest}, {digest} was written. Put it back from a "
                "copy."
            )
        return found


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise DataError(
            "a selection is called by letters, digits, '.', '_' and '-' (no '.' or '-' in front, 128 characters at "
            f"most); found {name!r}."
        )


def _rows_of(shards: Shards, ids: NDArray[Any]) -> NDArray[np.int64]:
    if ids.dtype.kind == "b":
        if ids.shape != (len(shards),):
            raise DataError(
                f"{shards.folder} holds {len(shards):,} samples; a selection by booleans has one for each, found shape "
                f"{ids.shape}."
            )
        return np.flatnonzero(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise DataError(f"a selection is made of integers, the ids of samples, or of booleans; found {ids.dtype}.")
    return shards.rows_of(ids)


def _packed(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns the bits of some rows that ascend; made piece by piece, so that a billion takes no gigabyte."""
    bits = np.zeros(int(rows[-1]) // 8 + 1, dtype=np.uint8)
    first = 0
    while first < len(rows):
        base = int(rows[first]) // _PIECE * _PIECE
        end = int(np.searchsorted(rows, base + _PIECE))
        piece = np.zeros(_PIECE, dtype=bool)
        piece[rows[first:end] - base] = True
        held = bits[base // 8 : (base + _PIECE) // 8]
        held[:] = np.packbits(piece, bitorder="little")[: len(held)]
        first = end
    bits.flags.writeable = False
    return bits


def write_selection(
    folder: Path | str,
    name: str,
    ids: Sequence[int] | NDArray[np.integer[Any]] | NDArray[np.bool_],
    note: str = "",
) -> Selection:
    """Keeps a selection beside the data under a name, for good.

    Writing the same samples under the same name again changes nothing.

    Args:
        folder: of the data.
        name: letters, digits, ".", "_" and "-".
        ids: of the samples, in any order; or a boolean for each sample.
        note: for people: why these.

    Returns:
        The selection as it is kept, durably.

    Raises:
        DataError: there are no such samples, or other ones have this name; the disk is full.
        DataDamagedError: the data, or what has this name, are damaged.
    """
    folder = _here(folder)
    chosen = Selection.of(Shards(folder), name, ids, note=note)
    try:
        with _alone(folder / _FOLDER) as home:
            if (home / (name + _ENDING)).exists():
                kept = read_selection(folder, name)
                if kept.digest != chosen.digest:
                    raise DataError(
                        f"{folder} has a selection {name!r} already, of {kept.count:,} other samples than these "
                        f"{chosen.count:,}; journals may speak of it. Choose another name."
                    )
                return kept
            write_atomically(home / (name + _ENDING), chosen.encode())
    except OSError as error:
        raise DataError(
            f"cannot write the selection {name!r} into {folder}: {error}. Nothing has changed; put that right "
            "and try again."
        ) from error
    return chosen


def _here(folder: Path | str) -> Path:
    if is_url(folder):
        raise DataError(
            "selections are kept beside data in a folder on this machine; these have a URL. Copy the data, to select "
            "of them."
        )
    return Path(folder).absolute()


@contextmanager
def _alone(home: Path) -> Iterator[Path]:
    """Makes the folder of the selections, and waits until nobody else writes there."""
    if not home.exists():
        home.mkdir(exist_ok=True)
        fsync_directory(home.parent)
    descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield home
    finally:
        os.close(descriptor)


def read_selection(folder: Path | str, name: str) -> Selection:
    """Returns a selection that is kept beside the data; its bits are mapped, not read into memory.

    Raises:
        DataError: there is none of this name; or it is of other data than these.
        DataDamagedError: a byte of it, or of the manifest, changed.
    """
    _check_name(name)
    folder = _here(folder)
    path = folder / _FOLDER / (name + _ENDING)
    if not path.exists():
        raise DataError(f"{folder} has no selection {name!r}. {did_you_mean(name, selections(folder))}")
    found = Selection.decode(map_file(path), str(path))
    if found.name != name:
        raise DataError(f"{path} is the selection {found.name!r}. Give the file its own name back.")
    newest = Manifest.read(folder)
    its_own = found.version <= newest.version and Manifest.read(folder, found.version).digest == found.manifest
    if found.uid != newest.uid or not its_own:
        raise DataError(
            f"{path} was made of other data: of uid {found.uid} and version {found.version}; {folder} has uid "
            f"{newest.uid} and versions up to {newest.version}. Make the selection anew, of the ids in these data."
        )
    return found


def selections(folder: Path | str) -> list[str]:
    """Returns the names of the selections that are kept beside the data, a folder on this machine."""
    found = (_here(folder) / _FOLDER).glob(f"[!.]*{_ENDING}")
    return sorted(path.name.removesuffix(_ENDING) for path in found)
