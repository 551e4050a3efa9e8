"""Everything needed to continue from a boundary, as a folder that is either whole or not a snapshot."""

from aetheria.snapshot.format import Manifest, weights_digest
from aetheria.snapshot.reader import Snapshot, list_snapshots, newest_good
from aetheria.snapshot.retention import KeepBest, superfluous
from aetheria.snapshot.writer import SnapshotContent, SnapshotWriter

__all__ = [
    "KeepBest",
    "Manifest",
    "Snapshot",
    "SnapshotContent",
    "SnapshotWriter",
    "list_snapshots",
    "newest_good",
    "superfluous",
    "weights_digest",
]
