"""Reading snapshots. Nothing is believed before its hash has been checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from aetheria.errors import SnapshotDamagedError
from aetheria.snapshot.format import MANIFEST, MODEL, STATE, Manifest, rank_file, weights_digest

__all__ = ["Snapshot", "list_snapshots", "newest_good"]


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

    def weights(self) -> dict[str, Tensor]:
        """Returns the model's tensors by clean names, tied ones included, in host memory."""
        tensors = safetensors.torch.load_file(self.path / MODEL)
        return tensors | {alias: tensors[owner] for alias, owner in self.manifest.tied.items()}

    def state(self) -> dict[str, Any]:
        """Returns optimiser, schedulers, scaler, callbacks, cursor and loop."""
        return self._load(STATE)

    def rank_state(self, rank: int = 0) -> dict[str, Any]:
        """Returns a rank's generators and loader state."""
        return self._load(rank_file(rank))

    def digest(self) -> str:
        """Returns the digest of the weights as they are on disk now."""
        return weights_digest(self.weights())

    def _load(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        return content


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Returns the snapshots of a folder, the oldest first, unchecked. A folder without a manifest is not one."""
    if not folder.is_dir():
        return []
    return [
        Snapshot(path)
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path / MANIFEST).is_file()
    ]


def newest_good(folder: Path, report: Callable[[str], None]) -> Snapshot | None:
    """Returns the newest snapshot whose files are all as they were written.

    Args:
        folder: a run's `snapshots/`.
        report: told, in a sentence that names the file, about every damaged one that is passed over.

    Raises:
        SnapshotVersionError: the newest is in a newer format: older ones are not taken in its stead.
    """
    for snapshot in reversed(list_snapshots(folder)):
        try:
            snapshot.verify()
        except SnapshotDamagedError as error:
            report(f"{error} The snapshot before it is used.")
        else:
            return snapshot
    return None
