"""What a run, or several replicas, can be told: a method for each operation, for asynchronous programs."""

from __future__ import annotations

import asyncio
import getpass
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, Unpack
from urllib.parse import urlencode

from aetheria.client.models import CommandOptions
from aetheria.client.wire import LostError, Wire
from aetheria.errors import HubError
from aetheria.protocol import AnyCommand, command_of, encode

__all__ = ["POLL", "AsyncCommands", "made", "send"]

POLL = 20.0  # seconds that one question about an outcome waits at most
Answer = TypeVar("Answer")


class AsyncCommands(ABC, Generic[Answer]):
    """Every operation, in terms of one method that sends any command and returns what came of it."""

    @abstractmethod
    async def command(self, op: str, args: dict[str, Any] | None = None, **options: Unpack[CommandOptions]) -> Answer:
        """Sends any command of `aetheria.protocol` and waits for what comes of it."""

    async def set(
        self, values: Mapping[str, Any] | None = None, /, *, options: CommandOptions | None = None, **knobs: Any
    ) -> Answer:
        """Gives knobs new values, all or none.

        Args:
            values: by knob; for those whose names Python does not take as keywords, such as "learning_rate.head".
            options: see `CommandOptions`; `reason=...` and the others may also be given as keywords.
            **knobs: values by knob.
        """
        given: dict[str, Any] = dict(options or {})
        given |= {name: knobs.pop(name) for name in list(knobs) if name in CommandOptions.__annotations__}
        return await self.command("set", {"values": {**(values or {}), **knobs}}, **given)

    async def pause(self, **options: Unpack[CommandOptions]) -> Answer:
        """Lets the run wait at its next boundary."""
        return await self.command("pause", **options)

    async def resume(self, **options: Unpack[CommandOptions]) -> Answer:
        """Lets a paused run go on."""
        return await self.command("resume", **options)

    async def stop(self, snapshot: bool = True, **options: Unpack[CommandOptions]) -> Answer:
        """Ends the run, with a snapshot unless that is not wanted."""
        return await self.command("stop", {"snapshot": snapshot}, **options)

    async def run_for(
        self, *, steps: int | None = None, epochs: int | None = None, **options: Unpack[CommandOptions]
    ) -> Answer:
        """Lets the run go on for so many steps or epochs, and pause then."""
        return await self.command("run_for", {"steps": steps, "epochs": epochs}, **options)

    async def snapshot(self, name: str = "", pinned: bool = False, **options: Unpack[CommandOptions]) -> Answer:
        """Takes a snapshot; a pinned one is kept for ever."""
        return await self.command("snapshot", {"name": name, "pinned": pinned}, **options)

    async def rewind(self, step: int, **options: Unpack[CommandOptions]) -> Answer:
        """Goes back to the snapshot of a step."""
        return await self.command("rewind", {"step": step}, **options)

    async def validate(self, **options: Unpack[CommandOptions]) -> Answer:
        """Validates now; the outcome's `result` holds the metrics."""
        return await self.command("validate", **options)

    async def test(self, **options: Unpack[CommandOptions]) -> Answer:
        """Evaluates on the test data now."""
        return await self.command("test", **options)

    async def note(self, text: str, **options: Unpack[CommandOptions]) -> Answer:
        """Writes a note about this step."""
        return await self.command("note", {"text": text}, **options)

    async def health(self, check: str = "numerics", **options: Unpack[CommandOptions]) -> Answer:
        """Looks into the run: "numerics", "activations", "throughput", "determinism" or "ranks"."""
        return await self.command("health", {"check": check}, **options)

    async def ping(self, **options: Unpack[CommandOptions]) -> Answer:
        """Asks for a sign of life."""
        return await self.command("ping", **options)


def made(
    run: str,
    op: str,
    args: dict[str, Any] | None,
    *,
    id: str | None = None,  # noqa: A002
    author: str | None = None,
    **fields: Any,
) -> AnyCommand:
    """Returns a command of whoever is logged in here, with a new id, unless another one is given.

    Raises:
        CommandError: unknown operation, unknown or missing arguments.
    """
    who = author or f"{getpass.getuser()}@{socket.gethostname()}"
    return command_of(op, args, run=run, id=id or uuid.uuid4().hex, author=who, **fields)


async def send(wire: Wire, path: str, command: AnyCommand, deadline: float, replicas: Sequence[str] = ()) -> bytes:
    """Sends a command, again where the connection is lost; returns how far it got while the hub held the request.

    Args:
        wire: to the hub.
        path: of the run.
        command: with its id, which makes sending it again harmless.
        deadline: until when to wait, by `time.monotonic`.
        replicas: of a run of several, which ones.

    Raises:
        CommandError, HubError, RunFolderError: see `Wire.request`.
    """
    headers = {"Content-Type": "application/json"}
    named = f"?{urlencode([('replica', replica) for replica in replicas])}" if replicas else ""
    sent = False
    while True:
        wait = min(max(deadline - time.monotonic(), 0.0), POLL)
        try:
            answer = await wire.request(
                "POST",
                f"{path}/commands{named}{'&' if named else '?'}wait={wait:.3f}",
                content=encode(command),
                headers=headers,
                timeout=wait + 15.0,
            )
        except HubError as error:
            # The hub may have taken it before it went away. The id makes sending it again harmless.
            if not (sent or isinstance(error, LostError)) or time.monotonic() >= deadline:
                raise
            sent = True
            await asyncio.sleep(0.2)
        else:
            return answer.content
