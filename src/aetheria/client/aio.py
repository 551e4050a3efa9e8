"""A hub and its runs, for asynchronous programs. `aetheria.connect` gives the same to all others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import msgspec

from aetheria.client.commands import POLL, AsyncCommands, made, send
from aetheria.client.group import AsyncGroup
from aetheria.client.location import find_hub
from aetheria.client.models import (
    CommandRefusedError,
    Event,
    KnobValues,
    NoAnswerError,
    RunStatus,
    settled,
)
from aetheria.client.wire import Wire
from aetheria.control.journal import Entry
from aetheria.errors import HubError, RunFolderError, did_you_mean
from aetheria.protocol import AnyCommand, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AsyncHub", "AsyncRun"]


class _Sent(msgspec.Struct):
    id: str
    command: AnyCommand | None = None
    outcome: Outcome | None = None


class AsyncHub:
    """A hub.

        async with AsyncHub() as hub:
            run = await hub.run("@last")
            await run.set(learning_rate=1e-4, reason="plateau")

    Args:
        url: of the hub; that of this machine, by default. See `aetheria.client.location.find_hub`.
        token: of an operator, or a viewer.

    Raises:
        HubError: there is none.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        self.wire = Wire(*find_hub(url, token))

    @property
    def url(self) -> str:
        """Its address."""
        return self.wire.url

    async def __aenter__(self) -> AsyncHub:
        """Checks that the hub answers, and takes the token.

        Raises:
            HubError: it does not.
        """
        try:
            await self.about()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Gives the connections back."""
        await self.wire.close()

    async def about(self) -> dict[str, Any]:
        """Returns the hub's version, its address, and what the token may do: "role"."""
        return await self.wire.get("/api/v1/hub", dict[str, Any])

    async def browser_url(self, role: str = "operator") -> str:
        """Returns an address that opens in a browser, once, within ten minutes."""
        answer = await self.wire.request("POST", "/api/v1/tickets", params={"role": role})
        return str(msgspec.json.decode(answer.content)["url"])

    async def runs(self) -> list[RunStatus]:
        """Returns all runs, the newest first."""
        return await self.wire.get("/api/v1/runs", list[RunStatus])

    async def replicas(self) -> list[dict[str, Any]]:
        """Returns the processes that train: "run", "id" of the replica, "name", "host", "devices", "connected", ..."""
        return await self.wire.get("/api/v1/replicas", list[dict[str, Any]])

    async def run(self, name: str) -> AsyncRun | AsyncGroup:
        """Returns a run.

        Args:
            name: any unambiguous part of its name, or "@last" for the newest. The name that several replicas have in
                common is that of all of them; `<run>@<replica_id>` is one.

        Raises:
            RunFolderError: none fits, or more than one; the message lists them.
        """
        runs = await self.runs()
        # What lies beside the others and has never been heard of can be looked at, and not be commanded.
        groups = {run.group for run in runs if run.group and run.last_heartbeat is not None}
        if name == "@last":
            if not runs:
                raise RunFolderError("this hub knows no runs yet. Start one: aetheria train CONFIG")
            name = runs[0].group if runs[0].group in groups else runs[0].id
        names = [run.id for run in runs]
        # A part of the name that replicas have in common means them all; any other part, one of them.
        parts = [
            run.group if run.group in groups and name in run.group else run.id
            for run in runs
            if name and name in run.id
        ]
        fitting = [known for known in (*groups, *names) if known == name] or list(dict.fromkeys(parts))
        if len(fitting) == 1:
            return AsyncGroup(self, fitting[0]) if fitting[0] in groups else self.run_called(fitting[0])
        if fitting:
            listed = ", ".join(fitting[:5]) + (", ..." if len(fitting) > 5 else "")
            raise RunFolderError(f"'{name}' fits {len(fitting)} runs: {listed}. Write more of the name, or @last.")
        raise RunFolderError(f"this hub knows no run called '{name}'. {did_you_mean(name, [*groups, *names])}")

    def run_called(self, run_id: str) -> AsyncRun:
        """Returns a run by its whole name; the hub is asked for it only when something is wanted of it."""
        return AsyncRun(self, run_id)

    async def commands_of(self, path: str, last: int) -> list[tuple[AnyCommand, Outcome | None]]:
        """Returns the newest commands that were sent to what lies at a path, oldest first, and how far they got."""

        class Line(msgspec.Struct):
            command: AnyCommand
            outcome: Outcome | None

        lines = await self.wire.get(f"{path}/commands", list[Line], params={"last": last})
        return [(line.command, line.outcome) for line in lines]

    def watch(self, run: str | None = None, since: int | None = None) -> AsyncIterator[Event]:
        """Yields what happens, as it happens, and never ends by itself.

        Where the connection is lost it is made again, and nothing is left out; where the hub was away for so long that
        it no longer has everything, an event of the type "missed" says how much.

        Args:
            run: only this one, or the replicas of this one.
            since: begin behind this number of an earlier event; now, by default.

        Raises:
            HubError: the hub cannot be reached, or does not come back within a minute.
        """
        return self.wire.watch(run, since)


class AsyncRun(AsyncCommands[Outcome]):
    """A run that is steered through a hub.

    Every command waits until the run says what came of it, and returns that: an `aetheria.protocol.Outcome`. The
    keywords that all of them take are those of `CommandOptions`. They raise

    - `CommandError`: the run refused it (`CommandRefusedError`, which holds the outcome), or the hub did;
    - `NoAnswerError`: the time was over. The command stands;
    - `HubError`: the hub cannot be reached.

    Attributes:
        hub: which one.
        id: the run's name.
    """

    def __init__(self, hub: AsyncHub, run_id: str) -> None:
        self.hub = hub
        self.id = run_id
        self._path = f"/api/v1/runs/{_quoted(run_id)}"

    def __repr__(self) -> str:
        return f"<run {self.id} at {self.hub.url}>"

    def replica(self, replica_id: str) -> NoReturn:
        """Raises `RunFolderError`: that is for a run of several replicas."""
        raise RunFolderError(f"{self.id} is not a run of several replicas: there is no {replica_id!r} to choose.")

    # --- commands --------------------------------------------------------------------------------------------------
    async def command(
        self,
        op: str,
        args: dict[str, Any] | None = None,
        *,
        reason: str = "",
        author: str | None = None,
        expect_revision: int | None = None,
        not_after_step: int | None = None,
        dry_run: bool = False,
        timeout: float = 30.0,
        id: str | None = None,  # noqa: A002
        replicas: Sequence[str] = (),
    ) -> Outcome:
        """Sends any command and waits for its final outcome. See `AsyncRun`, and `aetheria.protocol`.

        Raises:
            CommandError, NoAnswerError, HubError: see `AsyncRun`.
            RunFolderError: there is no such run; or replicas are named, of which it has none.
        """
        if replicas:
            self.replica(", ".join(replicas))
        fields = {"reason": reason, "expect_revision": expect_revision, "not_after_step": not_after_step}
        command = made(self.id, op, args, id=id, author=author, dry_run=dry_run, **fields)
        deadline = time.monotonic() + timeout
        outcome = msgspec.json.decode(await send(self.hub.wire, self._path, command, deadline), type=_Sent).outcome
        if outcome is None or not settled(outcome, dry_run):
            outcome = await self.outcome(command.id, timeout=max(deadline - time.monotonic(), 0.0))
        if outcome is None or not settled(outcome, dry_run):
            got = "has not said anything yet" if outcome is None else f"has {outcome.state} it, and is not done"
            raise NoAnswerError(
                f"{self.id} {got} after {timeout:g} s. The {op} stands, and takes effect at the run's next boundary; "
                f"ask for its outcome with the id {command.id}.",
                command.id,
                outcome,
            )
        if outcome.state in ("rejected", "failed"):
            raise CommandRefusedError(outcome.message or f"{op} was {outcome.state}.", outcome)
        return outcome

    async def outcome(
        self,
        command_id: str,
        timeout: float = 0.0,
    ) -> Outcome | None:
        """Returns how far a command got, the final outcome if it comes in time.

        Args:
            command_id: the command's.
            timeout: seconds to wait for the final outcome.
        """
        deadline = time.monotonic() + timeout
        path = f"{self._path}/commands/{_quoted(command_id)}"
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            wait = min(left, POLL)
            try:
                sent = await self.hub.wire.get(path, _Sent, params={"wait": f"{wait:.3f}"}, timeout=wait + 10.0)
            except HubError:
                if left <= 0.0:
                    raise
                await asyncio.sleep(0.2)  # it may be restarting
                continue
            outcome: Outcome | None = sent.outcome
            dry_run = sent.command is not None and sent.command.dry_run
            if left <= 0.0 or (outcome is not None and settled(outcome, dry_run)):
                return outcome

    # --- looking ---------------------------------------------------------------------------------------------------
    async def status(self) -> RunStatus:
        """Returns the run as the hub sees it."""
        return await self.hub.wire.get(self._path, RunStatus)

    async def knobs(self) -> KnobValues:
        """Returns what may be changed, and its values."""
        known = await self.hub.wire.get(f"{self._path}/knobs", dict[str, Any])
        return KnobValues(known["schema"], known["observed"], known["desired"], known["revision"])

    async def metrics(
        self, name: str, *, from_step: int | None = None, points: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns a curve: its steps, int64, and its values, float64, both of shape [points].

        Args:
            name: of the metric.
            from_step: leave out what lies before.
            points: at most about so many: the extremes of each stretch. All of them, by default.
        """
        import numpy as np  # noqa: PLC0415

        params = {"names": name, "from": from_step, "points": points}
        curves = await self.hub.wire.get(
            f"{self._path}/metrics",
            dict[str, dict[str, Any]],
            params={key: value for key, value in params.items() if value is not None},
        )
        curve = curves[name]
        return np.array(curve["steps"], dtype=np.int64), np.array(list(map(float, curve["values"])), dtype=np.float64)

    async def commands(self, last: int = 20) -> list[tuple[AnyCommand, Outcome | None]]:
        """Returns the newest commands that were sent through this hub, oldest first, and how far they got."""
        return await self.hub.commands_of(self._path, last)

    async def journal(self) -> list[Entry]:
        """Returns the run's journal: every command and what came of it."""
        return await self.hub.wire.get(f"{self._path}/journal", list[Entry])

    async def events(self, last: int = 1000) -> dict[str, Any]:
        """Returns what happened in the run: "told" to the hub, "recorded" in its folder, and the "notes"."""
        return await self.hub.wire.get(f"{self._path}/events", dict[str, Any], params={"last": last})

    def watch(self, since: int | None = None) -> AsyncIterator[Event]:
        """Yields what happens in this run; see `AsyncHub.watch`."""
        return self.hub.watch(self.id, since)


def _quoted(text: str) -> str:
    return quote(text, safe="")
