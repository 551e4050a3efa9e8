"""What a notebook, a script or an agent holds: a hub, its runs, their knobs and commands. Without torch.

`aetheria.connect()` gives a `Hub`; asynchronous programs use `AsyncHub`.
"""

from __future__ import annotations

from aetheria.client.aio import AsyncHub, AsyncRun
from aetheria.client.group import AsyncGroup
from aetheria.client.location import find_hub, hub_folder
from aetheria.client.models import (
    CommandOptions,
    CommandRefusedError,
    Event,
    KnobValues,
    NoAnswerError,
    ReplicaOutcome,
    ReplicasRefusedError,
    RunStatus,
)
from aetheria.client.sync import Group, Hub, Run, connect

__all__ = [
    "AsyncGroup",
    "AsyncHub",
    "AsyncRun",
    "CommandOptions",
    "CommandRefusedError",
    "Event",
    "Group",
    "Hub",
    "KnobValues",
    "NoAnswerError",
    "ReplicaOutcome",
    "ReplicasRefusedError",
    "Run",
    "RunStatus",
    "connect",
    "find_hub",
    "hub_folder",
]
