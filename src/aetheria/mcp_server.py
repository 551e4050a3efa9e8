"""A Model Context Protocol server: an agent looks at runs, and steers them where it may. The package `mcp` is needed.

What an agent may do is decided by whoever starts the server: without `allow_commands` it only looks; limits bound what
it may set, a budget how often it may act at all. Every command stands in the run's journal with the agent as author.
"""

from __future__ import annotations

import getpass
import math
import operator
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aetheria.client import AsyncGroup, AsyncHub, AsyncRun
from aetheria.errors import AetheriaError, CommandError, ConfigError, MissingDependencyError
from aetheria.protocol import Outcome

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

__all__ = ["Agent", "Limit", "make_server"]

_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_POINTS = 200  # of a curve, unless the agent asks for more: it has to read them


class Limit(NamedTuple):
    """What an agent may set a knob to, on top of what the run allows.

    Attributes:
        key: of the knob; holds for its parts, too: "learning_rate" for "learning_rate.head".
        sign: "<=", ">=", "<" or ">".
        bound: a number.
    """

    key: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Returns what "learning_rate<=1e-3" says.

        Raises:
            ConfigError: it is not of that form.
        """
        found = re.fullmatch(r"\s*([^<>=\s]+)\s*(<=|>=|<|>)\s*([-+.0-9eE]+)\s*", text)
        try:
            if found is None:
                raise ValueError(text)
            return cls(found[1], found[2], float(found[3]))
        except ValueError:
            raise ConfigError(
                f"found the limit {text!r}, expected KNOB<=NUMBER, for instance learning_rate<=1e-3."
            ) from None

    def check(self, values: Mapping[str, Any]) -> None:
        """Looks whether values are within this limit.

        Raises:
            CommandError: one is not.
        """
        for key, value in values.items():
            if key != self.key and not key.startswith(f"{self.key}."):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not _SIGNS[self.sign](value, self.bound):
                raise CommandError(
                    f"{key} = {value!r} is refused: this agent may set it to a number {self.sign} {self.bound:g} only."
                )


class Agent:
    """What an agent may do with the runs of a hub.

    Args:
        allow_commands: whether it may command at all.
        limits: what it may set knobs to.
        budget: how many commands it may send; any number, if None. Dry runs cost nothing.
        name: who it is, for the journal.
    """

    def __init__(
        self,
        *,
        allow_commands: bool = False,
        limits: Sequence[Limit] = (),
        budget: int | None = None,
        name: str = "agent",
    ) -> None:
        self.allow_commands = allow_commands
        self._limits = limits
        self._left = budget
        self._budget = budget
        self._author = f"{name} for {getpass.getuser()}@{socket.gethostname()}"
        self._hub: AsyncHub | None = None

    async def hub(self) -> AsyncHub:
        """Returns the hub of this machine."""
        if self._hub is None:
            hub = AsyncHub()
            await hub.about()
            self._hub = hub
        return self._hub

    async def run(self, name: str) -> AsyncRun | AsyncGroup:
        """Returns a run by any part of its name, or several replicas by the name that they have in common."""
        return await (await self.hub()).run(name)

    async def command(
        self, run: str, op: str, args: dict[str, Any] | None = None, *, reason: str = "", **options: Any
    ) -> Outcome | dict[str, Outcome]:
        """Sends a command, if it is within the limits and the budget; to several replicas it counts once.

        Returns:
            The outcome; of several replicas that of each, by its id.

        Raises:
            CommandError: it is not; or the run refused it.
        """
        if not self.allow_commands:
            raise CommandError("this server only looks. A person can start it with: aetheria mcp --allow-commands")
        if op == "set":
            for limit in self._limits:
                limit.check((args or {})["values"])
        steered = await self.run(run)
        if self._left is not None and not options.get("dry_run"):
            if self._left <= 0:
                raise CommandError(f"the budget of {self._budget} commands is used up. Ask the person who gave it.")
            self._left -= 1
        return await steered.command(op, args, reason=reason, author=self._author, **options)


def make_server(agent: Agent) -> MCPServer:
    """Returns the server; `run()` on it serves an agent through standard input and output.

    Raises:
        MissingDependencyError: the package `mcp` is not installed.
    """
    try:
        from mcp.server.mcpserver import MCPServer  # noqa: PLC0415 - optional
    except ImportError as error:
        raise MissingDependencyError.of("mcp", "mcp", "aetheria mcp") from error

    server = MCPServer(
        "aetheria",
        instructions="Training runs: look at their curves, knobs and journal"
        + ("; steer them, and say why." if agent.allow_commands else "."),
    )
    _add_looking(server, agent)
    if agent.allow_commands:
        _add_commands(server, agent)
    return server


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, str_keys=True)


def _told(error: AetheriaError) -> Exception:
    from mcp.server.mcpserver.exceptions import ToolError  # noqa: PLC0415 - optional

    return ToolError(str(error))


def _add_looking(server: MCPServer, agent: Agent) -> None:
    @server.tool()
    async def list_runs() -> list[dict[str, Any]]:
        """All runs, the newest first: status, step, newest metrics."""
        try:
            return [_plain(run) for run in await (await agent.hub()).runs()]
        except AetheriaError as error:
            raise _told(error) from error

    @server.tool()
    async def get_run(run: str) -> dict[str, Any]:
        """One run and its knobs: values, what is allowed, what they do. RUN: a part of its name, or @last.

        A run of several replicas has a status and knobs for each; one of them alone is called RUN@ID.
        """
        try:
            found = await agent.run(run)
            status = await found.status()
            if isinstance(found, AsyncGroup):
                members = [found.replica(replica.replica) for replica in status.replicas]
                return {"run": _plain(status), "knobs": {member.id: await _knobs(member) for member in members}}
            return {"run": _plain(status), "knobs": await _knobs(found)}
        except AetheriaError as error:
            raise _told(error) from error

    @server.tool()
    async def get_metric(run: str, name: str, from_step: int | None = None, points: int = _POINTS) -> dict[str, Any]:
        """A curve: steps and values, thinned out to about so many points with its extremes kept."""
        try:
            return await _curve(await agent.run(run), name, from_step, points)
        except AetheriaError as error:
            raise _told(error) from error

    @server.tool()
    async def get_journal(run: str, last: int = 50) -> list[dict[str, Any]]:
        """The newest lines of a run's journal: who commanded what and why, and what came of it."""
        try:
            return [_plain(line) for line in (await (await agent.run(run)).journal())[-last:]]
        except AetheriaError as error:
            raise _told(error) from error

    @server.resource("aetheria://runs", mime_type="application/json")
    async def runs_resource() -> str:
        """All runs."""
        return msgspec.json.encode(await (await agent.hub()).runs()).decode()

    @server.resource("aetheria://runs/{run}", mime_type="application/json")
    async def run_resource(run: str) -> str:
        """One run."""
        return msgspec.json.encode(await (await agent.run(run)).status()).decode()

    @server.resource("aetheria://runs/{run}/metrics/{name}", mime_type="application/json")
    async def curve_resource(run: str, name: str) -> str:
        """A curve of a run."""
        return msgspec.json.encode(await _curve(await agent.run(run), name, None, _POINTS)).decode()


async def _knobs(run: AsyncRun) -> dict[str, Any]:
    knobs = await run.knobs()
    return {"schema": knobs.schema, "values": knobs.observed, "revision": knobs.revision}


async def _curve(run: AsyncRun | AsyncGroup, name: str, from_step: int | None, points: int) -> dict[str, Any]:
    steps, values = await run.metrics(name, from_step=from_step, points=max(points, 4))
    numbers = [value if math.isfinite(value) else None for value in values.tolist()]
    return {"run": run.id, "name": name, "steps": steps.tolist(), "values": numbers}


def _add_commands(server: MCPServer, agent: Agent) -> None:
    async def send(run: str, op: str, args: dict[str, Any] | None, reason: str, **options: Any) -> dict[str, Any]:
        try:
            outcome: dict[str, Any] = _plain(await agent.command(run, op, args, reason=reason, **options))
        except AetheriaError as error:
            raise _told(error) from error
        return outcome

    @server.tool()
    async def set_knobs(
        run: str,
        values: dict[str, Any],
        reason: str,
        expect_revision: int | None = None,
        dry_run: bool = False,
        replicas: list[str] | None = None,
    ) -> dict[str, Any]:
        """Give knobs new values, all or none, between two steps. Say why; read get_run for what is allowed.

        Of a run of several replicas all are meant, or those that are named.
        """
        options = {"expect_revision": expect_revision, "dry_run": dry_run, "replicas": replicas or ()}
        return await send(run, "set", {"values": values}, reason, **options)

    @server.tool()
    async def pause(run: str, reason: str, replicas: list[str] | None = None) -> dict[str, Any]:
        """Let a run wait at its next boundary."""
        return await send(run, "pause", None, reason, replicas=replicas or ())

    @server.tool()
    async def resume(run: str, reason: str, replicas: list[str] | None = None) -> dict[str, Any]:
        """Let a paused run go on."""
        return await send(run, "resume", None, reason, replicas=replicas or ())

    @server.tool()
    async def stop(run: str, reason: str, snapshot: bool = True, replicas: list[str] | None = None) -> dict[str, Any]:
        """End a run, with a snapshot."""
        return await send(run, "stop", {"snapshot": snapshot}, reason, timeout=120.0, replicas=replicas or ())

    @server.tool()
    async def run_for(
        run: str,
        reason: str,
        steps: int | None = None,
        epochs: int | None = None,
        replicas: list[str] | None = None,
    ) -> dict[str, Any]:
        """Let a run go on for so many steps or epochs, and pause then."""
        return await send(run, "run_for", {"steps": steps, "epochs": epochs}, reason, replicas=replicas or ())

    @server.tool()
    async def snapshot(
        run: str, reason: str, name: str = "", pinned: bool = False, replicas: list[str] | None = None
    ) -> dict[str, Any]:
        """Take a snapshot."""
        args = {"name": name, "pinned": pinned}
        return await send(run, "snapshot", args, reason, timeout=120.0, replicas=replicas or ())

    @server.tool()
    async def rewind(run: str, step: int, reason: str, replicas: list[str] | None = None) -> dict[str, Any]:
        """Take a run back to the snapshot of a step."""
        return await send(run, "rewind", {"step": step}, reason, timeout=120.0, replicas=replicas or ())

    @server.tool()
    async def validate(run: str, reason: str, replicas: list[str] | None = None) -> dict[str, Any]:
        """Validate now; the result holds the metrics."""
        return await send(run, "validate", None, reason, timeout=600.0, replicas=replicas or ())

    @server.tool()
    async def health(run: str, check: str = "numerics", replicas: list[str] | None = None) -> dict[str, Any]:
        """Look into a run: numerics, activations, throughput, determinism or ranks."""
        return await send(run, "health", {"check": check}, "", timeout=120.0, replicas=replicas or ())

    @server.tool()
    async def note(run: str, text: str, replicas: list[str] | None = None) -> dict[str, Any]:
        """Write a note about this step, shown on the curves."""
        return await send(run, "note", {"text": text}, "", replicas=replicas or ())
