"""Replicas: trainings that belong together and know nothing of one another. What they are called, and their folders.

A replica is a run like any other, with a folder, a journal and a name of its own, `<run>@<replica_id>`; that of its
folder. What belongs together is known by the name before the `@`, which all of them are given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aetheria.errors import ConfigError, RunFolderError
from aetheria.runs import RunFolder, folder_name

__all__ = [
    "ID_IN_WORDS",
    "Membership",
    "check_replica_id",
    "claim_replica",
    "is_replica_id",
    "membership",
    "replica_run",
]

ID_IN_WORDS = "letters, digits, '.', '_' and '-' (no '.' or '-' in front, 64 characters at most)"


class Membership(NamedTuple):
    """Which replica of which run a training is.

    Attributes:
        group: the name that all replicas of the run have in common; "" where the training belongs to no others.
        replica: the replica's id; "" likewise.
    """

    group: str = ""
    replica: str = ""


def is_replica_id(text: object) -> bool:
    """Returns whether a replica can be called so."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", text) is not None


def check_replica_id(text: object) -> None:
    """Looks whether a replica can be called so.

    Raises:
        ConfigError: it cannot.
    """
    if not is_replica_id(text):
        raise ConfigError(f"replica_id: found {text!r}, expected a text of {ID_IN_WORDS}.")


def replica_run(group: str, replica: str) -> str:
    """Returns by which name a replica is addressed alone, which is that of its folder: `<run>@<replica_id>`."""
    return f"{group}@{replica}"


def membership(run_id: str, content: Mapping[str, Any]) -> Membership:
    """Returns which replica a run folder is that of.

    A folder that was copied or renamed is that of an ordinary run: there are no two of one replica.

    Args:
        run_id: the folder's name.
        content: of its `run.json`.
    """
    found = Membership(str(content.get("group") or ""), str(content.get("replica") or ""))
    return found if found.group and run_id == replica_run(*found) else Membership()


def claim_replica(runs_dir: Path, name: str, replica: str, **fields: Any) -> tuple[RunFolder, bool]:
    """Takes the folder of a replica for this process: a new one, or the one that there is.

    Args:
        runs_dir: the folder of all runs; made if it is not there.
        name: of the run that the replica belongs to.
        replica: its id.
        **fields: further keys of a new `run.json`.

    Returns:
        The folder, locked, and whether it is new.

    Raises:
        ConfigError: nothing can be called like that replica.
        RunFolderError: another process trains in the folder, it cannot be made or read, or it is something else.
    """
    check_replica_id(replica)
    member = Membership(folder_name(name), replica)
    folder = RunFolder(runs_dir / replica_run(*member))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _take(folder)
        try:
            # Whether it is new is asked under the lock: of two that begin at once, and of one that was killed in here.
            if (folder.path / "run.json").exists():
                _check_it_is(folder, member)
                return folder, False
            folder.begin(member.group, **member._asdict(), **fields)
        except BaseException:
            folder.release()
            raise
    except OSError as error:
        raise RunFolderError(
            f"cannot make the run folder {folder.path}: {error.strerror or error}. Choose a folder you may write to: "
            "runs_dir in the config, or --set runs_dir=PATH."
        ) from error
    return folder, True


def _take(folder: RunFolder) -> None:
    try:
        folder.acquire()
    except RunFolderError as error:
        if folder.in_use():
            error.add_note(
                "Each replica needs an id of its own (replica_id). Where several ranks train one replica, they have "
                "found one another before the folder is opened: torch.distributed is initialised by then, or they "
                "were launched by torchrun."
            )
        raise


def _check_it_is(folder: RunFolder, member: Membership) -> None:
    if membership(folder.run_id, folder.read()) != member:
        raise RunFolderError(
            f"{folder.path} is there already, and not that of replica '{member.replica}' of {member.group}. Move it "
            "away, or choose another replica_id."
        )
