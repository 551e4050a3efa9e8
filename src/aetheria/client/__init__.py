"""What a notebook, a script or an agent holds: a hub, its runs, their knobs and commands. Without torch.

`aetheria.connect()` gives a `Hub`; asynchronous programs use `AsyncHub`.
"""

from __future__ import annotations

from aetheria.client.aio import AsyncHub, AsyncRun
from aetheria.client.location import find_hub, hub_folder
from aetheria.client.models import CommandOptions, CommandRefusedError, Event, KnobValues, NoAnswerError, RunStatus
from aetheria.client.sync import Hub, Run, connect

__all__ = [
    "AsyncHub",
    "AsyncRun",
    "CommandOptions",
    "CommandRefusedError",
    "Event",
    "Hub",
    "KnobValues",
    "NoAnswerError",
    "Run",
    "RunStatus",
    "connect",
    "find_hub",
    "hub_folder",
]
