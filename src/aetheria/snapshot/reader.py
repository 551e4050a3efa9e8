"""Reading snapshots. Nothing is believed before its hash has been checked."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from aetheria.errors import SnapshotDamagedError
from aetheria.snapshot.format import (
    MANIFEST,
    MODEL,
    REPLACED,
    STATE,
    WHOLE_FORMAT,
    Manifest,
    rank_file,
    weights_digest,
)

if TYPE_CHECKING:
    from aetheria.snapshot.sharded import Place

__all__ = ["Snapshot", "list_snapshots", "newest_good"]

_NAME = re.compile(rf"({re.escape(REPLACED)})?step-(?P<step>\d{{8,}})")


class Snapshot:
    """A snapshot on disk.

    Args:
        path: its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def manifest(self) -> Manifest:
        """What it says about itself.

        Raises:
            SnapshotDamagedError: the manifest is missing or damaged.
            SnapshotVersionError: it is in a newer format.
        """
        return Manifest.read(self.path)

    def verify(self) -> None:
        """Checks every file against its size and sha256.

        Raises:
            SnapshotDamagedError: naming every file that is missing or differs.
            SnapshotVersionError: it is in a newer format.
        """
        problems = []
        for name, expected in self.manifest.files.items():
            try:
                size = (self.path / name).stat().st_size
                if size != expected["bytes"]:
                    problems.append(f"{name} has {size} bytes instead of {expected['bytes']}")
                    continue
                with (self.path / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                        problems.append(f"the bytes of {name} do not match their sha256")
            except FileNotFoundError:
                problems.append(f"{name} is missing")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
        if problems:
            raise SnapshotDamagedError(f"{self.path} is damaged: {'; '.join(problems)}.")

    @property
    def sharded(self) -> bool:
        """Whether its tensors lie in the parts in which ranks held them."""
        return self.manifest.format > WHOLE_FORMAT

    def weights(self, place: Place | None = None) -> dict[str, Tensor]:
        """Returns the model's tensors by clean names, tied ones included, in host memory.

        Args:
            place: `place(name, shape, dtype)` returns what a tensor is read into, for instance this rank's part of it.
        """
        if place is None and MODEL in self.manifest.files:
            tensors = safetensors.torch.load_file(self.path / MODEL)
        else:
            from aetheria.snapshot.sharded import WEIGHTS, ShardFiles  # noqa: PLC0415 - a second of imports

            tensors = ShardFiles(self.path / WEIGHTS if self.sharded else self.path).read(place)
        return tensors | {alias: tensors[owner] for alias, owner in self.manifest.tied.items()}

    def write_weights(self, path: Path) -> None:
        """Writes the weights into one file of safetensors, a few tensors in memory at a time.

        Args:
            path: of the file; what is there is replaced when the new one is whole.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        partial = path.with_name(f".{path.name}.part")
        try:
            if MODEL in self.manifest.files:
                shutil.copyfile(self.path / MODEL, partial)
            else:
                from aetheria.snapshot.sharded import WEIGHTS, ShardFiles, write_whole  # noqa: PLC0415

                write_whole(partial, ShardFiles(self.path / WEIGHTS))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def state(self, place: Place | None = None) -> dict[str, Any]:
        """Returns optimiser, schedulers, scaler, callbacks, cursor and loop.

        Args:
            place: as for `weights`, for the tensors that were sharded; by the way to them, as "optimizer/state/0/step".
        """
        state = self._load(STATE)
        if self.sharded:
            from aetheria.snapshot.sharded import STATE_TENSORS, ShardFiles, put_back  # noqa: PLC0415

            if (folder := self.path / STATE_TENSORS).is_dir():
                state = put_back(state, ShardFiles(folder).read(place))
        return state

    def rank_state(self, rank: int = 0) -> dict[str, Any]:
        """Returns a rank's generators and loader state."""
        return self._load(rank_file(rank))

    def digest(self) -> str:
        """Returns the digest of the weights as they are on disk now."""
        return weights_digest(self.weights())

    def _load(self, name: str) -> dict[str, Any]:
        with torch.serialization.safe_globals([bytes]):  # what empty bytes are made with
            content: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        return content


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Returns the snapshots of a folder, by their steps, unchecked.

    They are the folders named after a step that have a manifest: neither something half-written nor a copy that
    somebody put aside under another name.
    """
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # one that is being replaced comes first, and counts while there is no other
        if (name := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file():
            found[int(name["step"])] = path
    return [Snapshot(found[step]) for step in sorted(found)]


def newest_good(folder: Path, report: Callable[[str], None]) -> Snapshot | None:
    """Returns the newest snapshot whose files are all as they were written.

    Args:
        folder: a run's `snapshots/`.
        report: told, in a sentence that names the file, about every damaged one that is passed over.

    Raises:
        SnapshotVersionError: the newest is in a newer format: older ones are not taken in its stead.
    """
    snapshots = list_snapshots(folder)
    while snapshots:
        snapshot = snapshots.pop()
        try:
            snapshot.verify()
        except SnapshotDamagedError as error:
            report(f"{error} The snapshot before it is used." if snapshots else str(error))
        else:
            return snapshot
    return None
