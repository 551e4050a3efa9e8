"""A run of several replicas: trainings that know nothing of one another, and are told things together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Unpack
from urllib.parse import quote

import msgspec

from aetheria.client.commands import POLL, AsyncCommands, made, send
from aetheria.client.models import CommandOptions, Event, ReplicaOutcome, ReplicasRefusedError, RunStatus
from aetheria.errors import HubError, RunFolderError
from aetheria.protocol import AnyCommand, Outcome
from aetheria.replicas import replica_run

if TYPE_CHECKING:
    from aetheria.client.aio import AsyncHub, AsyncRun

__all__ = ["AsyncGroup"]


class _Asked(msgspec.Struct):
    id: str
    outcomes: list[ReplicaOutcome]
    command: AnyCommand | None = None


class AsyncGroup(AsyncCommands[dict[str, Outcome]]):
    """A run of several replicas.

    A command goes to all of them that have not been completed or stopped, or to those that `replicas=[...]` names, and
    returns the outcome of each, by its id. Each of them carries it out at a step of its own, or refuses it; between
    them nothing is atomic. Commands raise

    - `ReplicasRefusedError`: not all have carried it out; `outcomes` says what came of each. Those that have, have;
    - `CommandError`: the hub refused it: nobody gets it;
    - `RunFolderError`: there is no such replica;
    - `HubError`: the hub cannot be reached.

    Attributes:
        hub: which one.
        id: the run's name, without that of a replica.
    """

    def __init__(self, hub: AsyncHub, name: str) -> None:
        self.hub = hub
        self.id = name
        self._path = f"/api/v1/runs/{quote(name, safe='')}"

    def __repr__(self) -> str:
        return f"<run {self.id} of several replicas at {self.hub.url}>"

    def replica(self, replica_id: str) -> AsyncRun:
        """Returns one replica, which is a run like any other; the hub is asked for it only when something is wanted."""
        return self.hub.run_called(replica_run(self.id, replica_id))

    # --- commands --------------------------------------------------------------------------------------------------
    async def command(
        self, op: str, args: dict[str, Any] | None = None, **options: Unpack[CommandOptions]
    ) -> dict[str, Outcome]:
        """Sends any command, and waits until all replicas have carried it out. See `AsyncGroup`.

        Raises:
            ReplicasRefusedError, CommandError, RunFolderError, HubError: see `AsyncGroup`.
        """
        request, answers = await self.ask(op, args, **options)
        dry_run = options.get("dry_run", False)
        failures = {answer.replica: answer.failure(op, dry_run) for answer in answers}
        done = {answer.replica: answer.outcome for answer in answers if answer.outcome and not failures[answer.replica]}
        if len(done) == len(answers):
            return done
        told = " ".join(f"{replica}: {failure}" for replica, failure in failures.items() if failure)
        others = ", ".join(f"{replica} at step {outcome.step}" for replica, outcome in done.items())
        raise ReplicasRefusedError(
            f"{len(answers) - len(done)} of {len(answers)} replicas of {self.id} have not done it. {told}"
            + (f" Done: {others}." if others else ""),
            request,
            answers,
        )

    async def ask(
        self, op: str, args: dict[str, Any] | None = None, **options: Unpack[CommandOptions]
    ) -> tuple[str, list[ReplicaOutcome]]:
        """Sends any command, and returns what came of it, whatever that is: its id, and what each replica says.

        Raises:
            CommandError, RunFolderError, HubError: see `AsyncGroup`.
        """
        fields: dict[str, Any] = dict(options)
        replicas: Sequence[str] = fields.pop("replicas", ())
        deadline = time.monotonic() + fields.pop("timeout", 30.0)
        command = made(self.id, op, args, **fields)
        asked = msgspec.json.decode(await send(self.hub.wire, self._path, command, deadline, replicas), type=_Asked)
        # One of which the hub knows no more is not asked for again; the others may still be on their way.
        known = {answer.replica: answer for answer in asked.outcomes}
        while not all(answer.settled(command.dry_run) for answer in known.values()) and time.monotonic() < deadline:
            for answer in await self.outcomes(command.id, max(deadline - time.monotonic(), 0.0)):
                if not known[answer.replica].problem:
                    known[answer.replica] = answer
        return command.id, list(known.values())

    async def outcomes(self, command_id: str, timeout: float = 0.0) -> list[ReplicaOutcome]:
        """Returns how far a command got with each replica, the final outcomes if they come in time.

        Args:
            command_id: the id of the command that was sent to them.
            timeout: seconds to wait for the final outcomes.
        """
        deadline = time.monotonic() + timeout
        path = f"{self._path}/commands/{quote(command_id, safe='')}"
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            wait = min(left, POLL)
            try:
                asked = await self.hub.wire.get(path, _Asked, params={"wait": f"{wait:.3f}"}, timeout=wait + 10.0)
            except HubError:
                if left <= 0.0:
                    raise
                await asyncio.sleep(0.2)  # it may be restarting
                continue
            dry_run = asked.command is not None and asked.command.dry_run
            if left <= 0.0 or all(answer.settled(dry_run) for answer in asked.outcomes):
                return asked.outcomes

    # --- looking ---------------------------------------------------------------------------------------------------
    async def status(self) -> RunStatus:
        """Returns the run as the hub sees it, with each of its `replicas`."""
        return await self.hub.wire.get(self._path, RunStatus)

    async def commands(self, last: int = 20) -> list[tuple[AnyCommand, Outcome | None]]:
        """Returns the newest commands of all replicas, oldest first, and how far they got; `run` says whose it is."""
        return await self.hub.commands_of(self._path, last)

    def watch(self, since: int | None = None) -> AsyncIterator[Event]:
        """Yields what happens in any of the replicas; `run` says in which. See `AsyncHub.watch`."""
        return self.hub.watch(self.id, since)

    async def knobs(self) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        await self._each_has_its_own("knobs")

    async def metrics(self, name: str, *, from_step: int | None = None, points: int | None = None) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        await self._each_has_its_own("curves")

    async def journal(self) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        await self._each_has_its_own("journal")

    async def events(self, last: int = 1000) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        await self._each_has_its_own("events")

    async def outcome(self, command_id: str, timeout: float = 0.0) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own; see `outcomes`."""
        await self._each_has_its_own("outcome")

    async def _each_has_its_own(self, what: str) -> NoReturn:
        names = ", ".join(replica.id for replica in (await self.status()).replicas)
        raise RunFolderError(f"each replica of {self.id} has its own {what}. Ask for one of them: {names}.")
