"""The hub over HTTP: `/api/v1`, and one WebSocket. Who may ask is the gate's business; what is true is the hub's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from aetheria import __version__
from aetheria.control.journal import read_journal
from aetheria.errors import AetheriaError, CommandError, HubError, RunFolderError
from aetheria.loom.reader import Curve, RunReader
from aetheria.replicas import is_replica_id, replica_run
from aetheria.weaver.feed import message_text
from aetheria.weaver.groups import Groups
from aetheria.weaver.hub import CommandConflictError, Hub, RunEndedError
from aetheria.weaver.registry import TwinError, UnknownRunError
from aetheria.weaver.series import as_json, thinned

__all__ = ["Admit", "make_app"]

Admit = Callable[[str], Awaitable[dict[str, str]]]
"""Lets a run in; returns what it logs in to the message server with: "nats_url" and "seed"."""

_STATUS: list[tuple[type[AetheriaError], int]] = [
    (UnknownRunError, 404),
    (CommandConflictError, 409),
    (RunEndedError, 409),
    (TwinError, 409),
    (CommandError, 422),
    (HubError, 503),
    (RunFolderError, 500),
]


class Registration(BaseModel):
    """What a run says of itself."""

    model_config = ConfigDict(extra="ignore")  # a newer run may know more than this hub

    folder: str = Field("", max_length=4096)
    host: str = Field("", max_length=256)
    pid: int = Field(0, ge=0)
    group: str = Field("", max_length=256)
    replica: str = Field("", max_length=256)
    devices: list[str] = Field(default_factory=list, max_length=1024)

    def check(self, run: str) -> None:
        """Looks whether what is said can be said of a run.

        Raises:
            CommandError: it cannot.
        """
        if self.folder and (not Path(self.folder).is_absolute() or Path(self.folder).name != run):
            raise CommandError(f"the folder {self.folder!r} is not that of {run}: an absolute path that ends so is.")
        if self.group and not (is_replica_id(self.replica) and run == replica_run(self.group, self.replica)):
            raise CommandError(
                f"{run} is not replica {self.replica!r} of {self.group}: that one is called "
                f"{replica_run(self.group, self.replica)}."
            )


def make_app(hub: Hub, admit: Admit, open_ticket: Callable[[Literal["viewer", "operator"]], str], url: str) -> FastAPI:
    """Returns the application behind the gate.

    Args:
        hub: what it serves.
        admit: lets a run in at the message server.
        open_ticket: makes a secret that opens a browser's door once.
        url: of the hub.
    """
    app = FastAPI(
        title="Aetheria",
        version=__version__,
        summary="Look at runs, and steer them while they train.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _answer_errors(app)
    _add_hub(app, hub, open_ticket, url)
    _add_runs(app, hub, admit)
    _add_commands(app, hub)
    _add_history(app, hub)
    _add_live(app, hub)
    return app


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(AetheriaError)
    async def told(request: Request, error: AetheriaError) -> Response:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        return _json({"detail": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _json({"detail": f"{place}: {first['msg']}."}, 422)


def _add_hub(app: FastAPI, hub: Hub, open_ticket: Callable[[Any], str], url: str) -> None:
    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return Response(
            "Aetheria's hub. Its interface is described in /api/v1/openapi.json.\n", media_type="text/plain"
        )

    @app.get("/api/v1/hub", summary="What this hub is, and what the token may do")
    async def about(request: Request) -> Response:
        known = {"version": __version__, "url": url, "role": request.scope["role"], "seq": hub.feed.last}
        return _json(known)

    @app.post("/api/v1/tickets", summary="An address that opens in a browser, once", status_code=201)
    async def ticket(role: Literal["viewer", "operator"] = "operator") -> Response:
        return _json({"url": f"{url}/?token={open_ticket(role)}"}, 201)

    @app.get("/api/v1/replicas", summary="Who trains, and on which devices")
    async def replicas() -> Response:
        return _json(await asyncio.to_thread(hub.registry.replicas))


def _add_runs(app: FastAPI, hub: Hub, admit: Admit) -> None:
    joining = asyncio.Lock()

    @app.get("/api/v1/runs", summary="All runs, the newest first")
    async def runs() -> Response:
        return _json(await asyncio.to_thread(hub.registry.lines))

    @app.get("/api/v1/runs/{run}", summary="One run, or the run that several replicas have in common")
    async def run_(run: str) -> Response:
        return _json(await asyncio.to_thread(hub.registry.line, run))

    @app.post("/api/v1/runs/{run}/register", summary="A run says who it is, and gets its key to the message server")
    async def register(run: str, said: Registration) -> Response:
        said.check(run)

        def register() -> None:
            hub.registry.register(run, said.folder, said.host, said.pid, said.replica, said.devices, said.group)

        def refuse_twin() -> None:
            hub.registry.refuse_twin(run, said.folder, said.host, said.group)

        if not said.group:
            refuse_twin()
            granted = await admit(run)
            register()
            return _json(granted)
        await asyncio.to_thread(refuse_twin)  # it gets no key
        granted = await admit(run)
        async with joining:  # of two that come at once, the second one meets the first
            await asyncio.to_thread(refuse_twin)
            register()
        return _json(granted)

    @app.get("/api/v1/runs/{run}/knobs", summary="What may be changed: JSON Schema, observed and desired values")
    async def knobs(run: str) -> Response:
        await asyncio.to_thread(hub.registry.status, run)  # 404 where there is no such run
        state = hub.store.knobs(run)
        known = {"schema": None, "observed": {}, "revision": None, "time": None} if state is None else state._asdict()
        return _json(known | {"desired": hub.store.desired(run)})


def _add_commands(app: FastAPI, hub: Hub) -> None:
    groups = Groups(hub)

    @app.post("/api/v1/runs/{run}/commands", summary="Send a command; waits for its end, if asked to", status_code=202)
    async def send(
        run: str,
        request: Request,
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        replica: Annotated[
            list[str] | None, Query(description="of a run of several replicas, which ones; all, if none")
        ] = None,
    ) -> Response:
        if hub.registry.members(run):
            asked, answers = await groups.submit(run, await request.body(), replica or (), wait)
            return _json({"id": asked.id, "run": run, "outcomes": answers}, 202)
        if replica:
            raise UnknownRunError(f"{run} is not a run of several replicas; there is none to choose.")
        command, outcome = await hub.submit(run, await request.body(), wait)
        return _json({"id": command.id, "run": run, "outcome": outcome}, 202)

    @app.get("/api/v1/runs/{run}/commands", summary="The newest commands, and how far they got")
    async def commands(run: str, last: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
        members = [known.stored.id for known in hub.registry.members(run).values()]
        found = hub.store.commands_of(members or [run], last)
        return _json([{"command": command, "outcome": hub.store.outcome(command.run, command.id)} for command in found])

    @app.get("/api/v1/runs/{run}/commands/{command_id}", summary="How far a command got; waits for it, if asked to")
    async def outcome(
        run: str,
        command_id: str,
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        until: Literal["any", "final"] = "final",
    ) -> Response:
        if hub.registry.members(run):
            asked, answers = await groups.outcomes(run, command_id, wait)
            return _json({"id": command_id, "run": run, "command": asked, "outcomes": answers})
        outcome = await hub.outcome(run, command_id, wait, until)
        command = hub.store.command(command_id)
        if outcome is None and (command is None or command.run != run):
            raise UnknownRunError(f"no command of the id {command_id} has been sent to {run} through this hub.")
        return _json({"id": command_id, "run": run, "command": command, "outcome": outcome})


def _add_history(app: FastAPI, hub: Hub) -> None:
    @app.get("/api/v1/runs/{run}/journal", summary="Every command and what came of it, from the run's own journal")
    async def journal(run: str) -> Response:
        folder = await asyncio.to_thread(hub.registry.folder, run)
        return _json(await asyncio.to_thread(read_journal, folder.path / "journal.jsonl"))

    @app.get(
        "/api/v1/runs/{run}/metrics", summary="Curves; the extremes of each stretch where there are too many points"
    )
    async def metrics(
        run: str,
        names: Annotated[list[str] | None, Query(description="all, if none")] = None,
        first: Annotated[int | None, Query(alias="from", description="the first step")] = None,
        points: Annotated[
            int | None, Query(ge=4, le=1_000_000, description="how many at most; all, if not said")
        ] = None,
    ) -> Response:
        folder = await asyncio.to_thread(hub.registry.folder, run)
        read = functools.partial(_curves, RunReader(folder.path / "run.db"), names, first, points)
        return _json(await asyncio.to_thread(read))

    @app.get("/api/v1/runs/{run}/events", summary="What happened, and the notes")
    async def events(run: str, last: Annotated[int, Query(ge=1, le=10_000)] = 1000) -> Response:
        kept = [
            {"seq": message.seq, "time": message.time, "data": msgspec.Raw(message.data.encode())}
            for message in hub.store.newest(run, "event", last)
        ]
        try:
            reader = RunReader((await asyncio.to_thread(hub.registry.folder, run)).path / "run.db")
            recorded, notes = await asyncio.to_thread(lambda: (reader.events(), reader.notes()))
        except UnknownRunError:
            if hub.registry.get(run) is None:
                raise
            recorded, notes = [], []  # nothing of its folder has arrived: what it told is all there is
        return _json(
            {
                "told": kept,
                "recorded": [event._asdict() | {"data": dict(event.data)} for event in recorded[-last:]],
                "notes": [note._asdict() for note in notes],
            }
        )


def _curves(reader: RunReader, names: list[str] | None, first: int | None, points: int | None) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for name in reader.series() if names is None else names:
        curve = reader.metric(name)
        if first is not None:
            wanted = curve.steps >= first
            curve = Curve(curve.steps[wanted], curve.values[wanted], curve.times[wanted])
        curves[name] = as_json(curve if points is None else thinned(curve, points), len(curve.steps))
    return curves


def _add_live(app: FastAPI, hub: Hub) -> None:
    @app.websocket("/api/v1/live")
    async def live(socket: WebSocket, since: int | None = None, run: str | None = None) -> None:
        await socket.accept()

        async def tell() -> None:
            async for messages in hub.feed.follow(since, run):
                for message in messages:
                    await socket.send_text(message_text(message))

        async def listen() -> None:
            while True:  # nothing is expected; but only who reads learns that the other side has gone
                await socket.receive_text()

        tasks = [asyncio.create_task(work) for work in (tell(), listen(), hub.closing.wait())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, WebSocketDisconnect | RuntimeError):
                raise error
        if hub.closing.is_set():
            await socket.close(1012, "the hub is being restarted, or ends")
