"""Commands to several replicas of a run at once: one request, a command for each of them, and what each says."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from aetheria.client.models import ENDED, ReplicaOutcome
from aetheria.errors import CommandError, HubError
from aetheria.protocol import AnyCommand, Outcome, decode_command
from aetheria.weaver.hub import CommandConflictError, Hub, RunEndedError, has_ended
from aetheria.weaver.registry import UnknownRunError
from aetheria.weaver.store import Part, Request

if TYPE_CHECKING:
    from aetheria.weaver.known_run import KnownRun

__all__ = ["Groups", "command_id"]

_REMOVED = "removed"
_LEFT = frozenset({"completed", "stopped", _REMOVED})  # a replica that ended so has left the others


def command_id(request_id: str, run: str) -> str:
    """Returns the id of the command that a replica gets.

    It follows from that of the request, so that the same request has one effect on each replica, whoever sends it
    again. It begins like it, so that people find in each journal what belongs together.
    """
    digest = hashlib.sha256(f"{request_id}@{run}".encode()).hexdigest()
    return f"{request_id[:31]}-{digest[:32]}"  # 64 characters are allowed


class Groups:
    """Passes on what is asked of several replicas. Between them nothing is atomic; each of them does it, or not.

    Args:
        hub: which knows the replicas and reaches them.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def submit(
        self, group: str, data: bytes, wanted: Sequence[str] = (), wait: float = 0.0
    ) -> tuple[AnyCommand, list[ReplicaOutcome]]:
        """Accepts a command for several replicas: kept for all of them at once, then published to each.

        The same request twice is the same request, for the same replicas: one that has come since does not get it.

        Args:
            group: the run whose replicas they are.
            data: the command, as JSON.
            wanted: the ids of the replicas; none for all that have not left: one that was completed or stopped has,
                and one whose folder has been removed.
            wait: up to how many seconds to wait for their final outcomes.

        Returns:
            The command, and for each replica how far it got. One that has ended otherwise refuses it: what trains no
            more is told as such, and the others are not held up.

        Raises:
            CommandError: it is none, or for another run.
            CommandConflictError: another command has that id.
            UnknownRunError: there is no such replica.
            RunEndedError: all replicas have left.
        """
        command = decode_command(data)
        if command.run not in ("", group):
            raise CommandError(f"the command is for {command.run}, but it was sent to {group}.")
        command = msgspec.structs.replace(command, run=group)
        wanted = sorted(set(wanted))
        request = self._known(command, wanted) or await self._accept(command, wanted)
        # All are begun before anybody is waited for: in the order in which they were kept.
        publishing = [self._published(part) for part in request.parts]
        answers = [self._answer(part, task, wait) for part, task in zip(request.parts, publishing, strict=True)]
        return request.command, list(await asyncio.gather(*answers))

    async def outcomes(self, group: str, request_id: str, wait: float = 0.0) -> tuple[AnyCommand, list[ReplicaOutcome]]:
        """Returns a request, and how far it got with each replica.

        Args:
            group: the run whose replicas they are.
            request_id: the id of the command that was sent.
            wait: up to how many seconds to wait for their final outcomes.

        Raises:
            UnknownRunError: there is no such request.
        """
        request = self._hub.store.request(request_id)
        if request is None or request.command.run != group:
            raise UnknownRunError(f"no command of the id {request_id} has been sent to {group} through this hub.")
        return request.command, list(await asyncio.gather(*(self._look(part, wait) for part in request.parts)))

    def _known(self, command: AnyCommand, wanted: list[str]) -> Request | None:
        store = self._hub.store
        known = store.request(command.id)
        same = None if known is None else msgspec.structs.replace(command, created=known.command.created)
        if store.command(command.id) is not None or (
            known is not None and (known.command, list(known.wanted)) != (same, wanted)
        ):
            raise _taken(command.id)
        return known

    async def _accept(self, command: AnyCommand, wanted: list[str]) -> Request:
        group = command.run
        members = self._chosen(group, wanted)
        found = await asyncio.to_thread(lambda: [_status_of(known) for known in members.values()])
        statuses = dict(zip(members, found, strict=True))
        if not wanted:
            members = {replica: known for replica, known in members.items() if statuses[replica] not in _LEFT}
        if not members:
            ends = ", ".join(f"{replica} is {status}" for replica, status in statuses.items())
            raise RunEndedError(f"no replica of {group} trains any more: {ends}.")
        if (request := self._known(command, wanted)) is not None:
            return request  # it came twice at the same time
        parts, commands, refused = [], [], []
        for replica, known in members.items():
            run = known.stored.id
            part = Part(replica, run, command_id(command.id, run))
            if self._hub.store.command(part.command) is not None:
                raise _taken(part.command)
            parts.append(part)
            if statuses[replica] in ENDED:
                told = has_ended(run, statuses[replica])
                outcome = Outcome(command=part.command, run=run, state="rejected", step=known.stored.step, message=told)
                refused.append(outcome)
            else:
                commands.append(msgspec.structs.replace(command, run=run, id=part.command))
        request = Request(command, wanted, parts)
        for message in self._hub.store.accept_all(request, commands, refused, time.time()):
            self._hub.feed.publish(message)
        return request

    def _chosen(self, group: str, wanted: list[str]) -> dict[str, KnownRun]:
        members = self._hub.registry.members(group)
        if unknown := [repr(replica) for replica in wanted if replica not in members]:
            raise UnknownRunError(f"{group} has no replica {', '.join(unknown)}. It has: {', '.join(members)}.")
        return {replica: members[replica] for replica in wanted} if wanted else members

    def _published(self, part: Part) -> asyncio.Task[None] | None:
        """Returns the publication of a replica's command; None where that is not needed."""
        command = self._hub.store.command(part.command)
        if command is None or self._hub.is_answered(command) or self._hub.store.delivery(command.id) == "published":
            return None
        return self._hub.on_the_way(command.id) or self._hub.publish(command)

    async def _answer(self, part: Part, publishing: asyncio.Task[None] | None, wait: float) -> ReplicaOutcome:
        command = self._hub.store.command(part.command)
        if publishing is None or command is None:
            return await self._look(part, wait)
        try:
            outcome = await self._hub.answer(command, publishing, wait)
        except HubError as error:
            return ReplicaOutcome(**part._asdict(), problem=str(error))
        return ReplicaOutcome(**part._asdict(), outcome=outcome)

    async def _look(self, part: Part, wait: float) -> ReplicaOutcome:
        try:
            outcome = await self._hub.outcome(part.run, part.command, wait)
        except HubError as error:  # of this replica; the others' answers are not held back for it
            return ReplicaOutcome(**part._asdict(), problem=str(error))
        return ReplicaOutcome(**part._asdict(), outcome=outcome)


def _status_of(known: KnownRun) -> str:
    return _REMOVED if known.removed else known.status()


def _taken(command_id: str) -> CommandConflictError:
    return CommandConflictError(f"the id {command_id} belongs to another command. Give each command its own id.")
