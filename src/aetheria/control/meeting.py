"""Whether this process is one of several ranks, and what they tell one another when they meet. No torch in here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

__all__ = ["Card", "Place", "launched_place", "place_in_group"]


class Place(NamedTuple):
    """Where a process stands among all.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int
    size: int


class Card(msgspec.Struct, frozen=True):
    """What a rank says of itself when the ranks meet.

    Attributes:
        step: the steps that it has taken.
        revision: how often its training has been changed already.
        run: of the first rank: the run's name.
        folder: of the first rank: the run folder.
        journal: of the first rank: what is in the journal.
        calls: the exchanges that it has begun in the group of an earlier Weavelet; -1 where there is none.
        problem: why it has failed; empty where it has not.
    """

    step: int = 0
    revision: int = 0
    run: str = ""
    folder: str = ""
    journal: str = ""
    calls: int = -1
    problem: str = ""


def place_in_group() -> Place | None:
    """Returns where this process stands in torch's process group; None where there is none, or only this process.

    A script that has not imported `torch.distributed` has no process group: nothing is imported to find that out.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    size = distributed.get_world_size()
    return None if size < 2 else Place(distributed.get_rank(), size)


def launched_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place that torchrun, or whoever sets its variables, has given this process; None where nobody has."""
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if not rank and environment.get("LOCAL_RANK", "0") != "0":
        rank = environment["LOCAL_RANK"]  # of a process that Lightning has started: not the first, that is all we ask
    if not size.isdecimal() or not rank.isdecimal() or int(size) < 2:
        return None
    return Place(int(rank), int(size))
