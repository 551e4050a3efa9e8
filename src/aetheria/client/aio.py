"""A hub and its runs, for asynchronous programs. `aetheria.connect` gives the same to all others."""

from __future__ import annotations

import asyncio
import getpass
import socket
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack
from urllib.parse import quote

import msgspec

from aetheria.client.location import find_hub
from aetheria.client.models import (
    CommandOptions,
    CommandRefusedError,
    Event,
    KnobValues,
    NoAnswerError,
    RunStatus,
    settled,
)
from aetheria.client.wire import LostError, Wire
from aetheria.control.journal import Entry
from aetheria.errors import HubError, RunFolderError, did_you_mean
from aetheria.protocol import AnyCommand, Outcome, command_of, encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["AsyncHub", "AsyncRun"]

_POLL = 20.0  # seconds that one question about an outcome waits at most


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
        """Returns the processes that train, and their devices."""
        return await self.wire.get("/api/v1/replicas", list[dict[str, Any]])

    async def run(self, name: str) -> AsyncRun:
        """Returns a run.

        Args:
            name: any unambiguous part of its name, or "@last" for the newest.

        Raises:
            RunFolderError: none fits, or more than one; the message lists them.
        """
        names = [run.id for run in await self.runs()]
        if name == "@last":
            if not names:
                raise RunFolderError("this hub knows no runs yet. Start one: aetheria train CONFIG")
            return AsyncRun(self, names[0])
        fitting = [known for known in names if known == name] or [known for known in names if name and name in known]
        if len(fitting) == 1:
            return AsyncRun(self, fitting[0])
        if fitting:
            listed = ", ".join(fitting[:5]) + (", ..." if len(fitting) > 5 else "")
            raise RunFolderError(f"'{name}' fits {len(fitting)} runs: {listed}. Write more of the name, or @last.")
        raise RunFolderError(f"this hub knows no run called '{name}'. {did_you_mean(name, names)}")

    def watch(self, run: str | None = None, since: int | None = None) -> AsyncIterator[Event]:
        """Yields what happens, as it happens, and never ends by itself.

        Where the connection is lost it is made again, and nothing is left out; where the hub was away for so long that
        it no longer has everything, an event of the type "missed" says how much.

        Args:
            run: only this one.
            since: begin behind this number of an earlier event; now, by default.

        Raises:
            HubError: the hub cannot be reached, or does not come back within a minute.
        """
        return self.wire.watch(run, since)


class AsyncRun:
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

    # --- commands --------------------------------------------------------------------------------------------------
    async def set(
        self, values: Mapping[str, Any] | None = None, /, *, options: CommandOptions | None = None, **knobs: Any
    ) -> Outcome:
        """Gives knobs new values, all or none.

        Args:
            values: by knob; for those whose names Python does not take as keywords, such as "learning_rate.head".
            options: see `CommandOptions`; `reason=...` and the others may also be given as keywords.
            **knobs: values by knob.
        """
        given: dict[str, Any] = dict(options or {})
        given |= {name: knobs.pop(name) for name in list(knobs) if name in CommandOptions.__annotations__}
        return await self.command("set", {"values": {**(values or {}), **knobs}}, **given)

    async def pause(self, **options: Unpack[CommandOptions]) -> Outcome:
        """Lets the run wait at its next boundary."""
        return await self.command("pause", **options)

    async def resume(self, **options: Unpack[CommandOptions]) -> Outcome:
        """Lets a paused run go on."""
        return await self.command("resume", **options)

    async def stop(self, snapshot: bool = True, **options: Unpack[CommandOptions]) -> Outcome:
        """Ends the run, with a snapshot unless that is not wanted."""
        return await self.command("stop", {"snapshot": snapshot}, **options)

    async def run_for(
        self, *, steps: int | None = None, epochs: int | None = None, **options: Unpack[CommandOptions]
    ) -> Outcome:
        """Lets the run go on for so many steps or epochs, and pause then."""
        return await self.command("run_for", {"steps": steps, "epochs": epochs}, **options)

    async def snapshot(self, name: str = "", pinned: bool = False, **options: Unpack[CommandOptions]) -> Outcome:
        """Takes a snapshot; a pinned one is kept for ever."""
        return await self.command("snapshot", {"name": name, "pinned": pinned}, **options)

    async def rewind(self, step: int, **options: Unpack[CommandOptions]) -> Outcome:
        """Goes back to the snapshot of a step."""
        return await self.command("rewind", {"step": step}, **options)

    async def validate(self, **options: Unpack[CommandOptions]) -> Outcome:
        """Validates now; the outcome's `result` holds the metrics."""
        return await self.command("validate", **options)

    async def test(self, **options: Unpack[CommandOptions]) -> Outcome:
        """Evaluates on the test data now."""
        return await self.command("test", **options)

    async def note(self, text: str, **options: Unpack[CommandOptions]) -> Outcome:
        """Writes a note about this step."""
        return await self.command("note", {"text": text}, **options)

    async def health(self, check: str = "numerics", **options: Unpack[CommandOptions]) -> Outcome:
        """Looks into the run: "numerics", "activations", "throughput", "determinism" or "ranks"."""
        return await self.command("health", {"check": check}, **options)

    async def ping(self, **options: Unpack[CommandOptions]) -> Outcome:
        """Asks for a sign of life."""
        return await self.command("ping", **options)

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
    ) -> Outcome:
        """Sends any command and waits for its final outcome. See `AsyncRun`, and `aetheria.protocol`.

        Raises:
            CommandError, NoAnswerError, HubError: see `AsyncRun`.
        """
        command = command_of(
            op,
            args,
            run=self.id,
            id=id or uuid.uuid4().hex,
            author=author or f"{getpass.getuser()}@{socket.gethostname()}",
            reason=reason,
            expect_revision=expect_revision,
            not_after_step=not_after_step,
            dry_run=dry_run,
        )
        deadline = time.monotonic() + timeout
        outcome = await self._send(command, deadline)
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

    async def _send(self, command: AnyCommand, deadline: float) -> Outcome | None:
        """Returns how far the command got, if the run answered while the hub still held the request."""
        headers = {"Content-Type": "application/json"}
        path = f"{self._path}/commands"
        sent = False
        while True:
            wait = min(max(deadline - time.monotonic(), 0.0), _POLL)
            try:
                answer = await self.hub.wire.request(
                    "POST",
                    path,
                    content=encode(command),
                    headers=headers,
                    params={"wait": f"{wait:.3f}"},
                    timeout=wait + 15.0,
                )
            except HubError as error:
                # The hub may have taken it before it went away. The id makes sending it again harmless.
                if not (sent or isinstance(error, LostError)) or time.monotonic() >= deadline:
                    raise
                sent = True
                await asyncio.sleep(0.2)
            else:
                return msgspec.json.decode(answer.content, type=_Sent).outcome

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
            wait = min(left, _POLL)
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

        class Line(msgspec.Struct):
            command: AnyCommand
            outcome: Outcome | None

        lines = await self.hub.wire.get(f"{self._path}/commands", list[Line], params={"last": last})
        return [(line.command, line.outcome) for line in lines]

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
