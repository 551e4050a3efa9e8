"""The run folder of a Weavelet: a new one each time, but for a replica, which comes back to its own."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from aetheria.control.journal import Journal
from aetheria.protocol import Outcome
from aetheria.replicas import Membership, claim_replica, membership
from aetheria.runs import RunFolder, describe_process

__all__ = ["open_folder", "settle"]


def open_folder(runs_dir: Path, name: str, replica_id: str) -> tuple[RunFolder, Membership]:
    """Makes or finds the run folder, and takes it for this process.

    Args:
        runs_dir: the folder of all runs.
        name: of the run.
        replica_id: which replica of it this is; "" where there are no others. A replica that has been here before goes
            on in its folder: with the journal, in which every command has one effect, and the name by which it is
            addressed.

    Raises:
        ConfigError: nothing can be called like that replica.
        RunFolderError: the folder cannot be made, or another process trains in it.
    """
    if replica_id:
        folder, is_new = claim_replica(runs_dir, name, replica_id, seed=None, config={})
        if not is_new:
            folder.update(status_detail="", global_step=0, **describe_process())
    else:
        folder = RunFolder.create(runs_dir, name, seed=None, config={})
        folder.acquire()
    folder.update(status="running")
    return folder, membership(folder.run_id, folder.read())


def settle(journal: Journal) -> list[Outcome]:
    """Writes down that what an earlier process had accepted, and not done when it ended, has failed; returns that.

    Aetheria's own runs do it again, from the snapshot they continue from. Where a script continues from is its own
    affair, and nothing can be said to have happened at a step that this process may never take.
    """
    failed = []
    for _, _, latest in journal.behind(0):
        if latest.state == "accepted":
            message = "the process ended before this took effect; it is to be given again, if it is still wanted."
            outcome = msgspec.structs.replace(latest, state="failed", message=message, time=time.time())
            journal.append(outcome)
            failed.append(outcome)
    return failed
