"""A hub and its runs, for scripts and notebooks: the asynchronous client on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, Unpack

from aetheria.client.aio import AsyncHub, AsyncRun
from aetheria.client.blocking import Commands
from aetheria.client.group import AsyncGroup
from aetheria.client.models import CommandOptions, Event, KnobValues, ReplicaOutcome, RunStatus
from aetheria.control.journal import Entry
from aetheria.protocol import AnyCommand, Outcome

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Group", "Hub", "Run", "connect"]

Result = TypeVar("Result")


def connect(url: str | None = None, token: str | None = None) -> Hub:
    """Connects to a hub.

        hub = aetheria.connect()
        run = hub.run("@last")
        run.set(learning_rate=1e-4, reason="plateau")

    Args:
        url: of the hub; AETHERIA_HUB_URL, or the hub of this machine, by default.
        token: of an operator or a viewer; AETHERIA_HUB_TOKEN, or the operator's of the hub of this machine, by default.

    Raises:
        HubError: no hub is running, or the token is wrong.
    """
    return Hub(url, token)


class _Loop:
    """An event loop on a daemon thread. In a notebook the main thread has one of its own, which must not be blocked."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aetheria-client", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Begins something and does not wait for it."""
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("this connection to the hub has been closed. Open another one: aetheria.connect()")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for something; Ctrl-C gives it up."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Ends the thread. Doing so again changes nothing."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(RuntimeError):  # it has just ended
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive() and not self._loop.is_closed():
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())  # a `watch` that was left in the middle
            self._loop.run_until_complete(asyncio.sleep(0))  # closed transports say goodbye in the next round
            self._loop.close()


class Hub:
    """A hub; `aetheria.connect` makes one. A context manager, for those who want to give its connection back early.

    Raises:
        HubError: no hub is running, or the token is wrong.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        self.aio = AsyncHub(url, token)
        self._loop = _Loop()
        self._end = weakref.finalize(self, _Loop.stop, self._loop)
        try:
            self._loop.run(self.aio.about())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<hub at {self.aio.url}>"

    def close(self) -> None:
        """Gives the connection back."""
        if self._end.alive:
            self._loop.run(self.aio.close())
            self._end()

    @property
    def url(self) -> str:
        """Its address."""
        return self.aio.url

    def about(self) -> dict[str, Any]:
        """Returns the hub's version, its address, and what the token may do: "role"."""
        return self._loop.run(self.aio.about())

    def browser_url(self, role: str = "operator") -> str:
        """Returns an address that opens in a browser, once, within ten minutes."""
        return self._loop.run(self.aio.browser_url(role))

    def runs(self) -> list[RunStatus]:
        """Returns all runs, the newest first."""
        return self._loop.run(self.aio.runs())

    def replicas(self) -> list[dict[str, Any]]:
        """Returns the processes that train: "run", "id" of the replica, "name", "host", "devices", "connected", ..."""
        return self._loop.run(self.aio.replicas())

    def run(self, name: str) -> Run | Group:
        """Returns a run.

        Args:
            name: any unambiguous part of its name, or "@last" for the newest. The name that several replicas have in
                common is that of all of them; `<run>@<replica_id>` is one.

        Raises:
            RunFolderError: none fits, or more than one; the message lists them.
        """
        found = self._loop.run(self.aio.run(name))
        return Group(self, found) if isinstance(found, AsyncGroup) else Run(self, found)

    def watch(self, run: str | None = None, since: int | None = None) -> Iterator[Event]:
        """Yields what happens, as it happens; see `AsyncHub.watch`."""
        source = self.aio.watch(run, since)

        async def following() -> Event | None:
            return await anext(source, None)

        try:
            while (event := self._loop.run(following())) is not None:
                yield event
        finally:
            if self._end.alive:
                self._loop.run(_finish(source))


async def _cancel_all() -> None:
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _finish(source: Any) -> None:
    # A `following` that Ctrl-C gave up is being cancelled at this moment; a generator that runs cannot be closed.
    for _ in range(100):
        try:
            await source.aclose()
            return
        except RuntimeError:
            await asyncio.sleep(0.01)


class Run(Commands):
    """A run that is steered through a hub.

    Every command waits until the run says what came of it and returns that, an `aetheria.protocol.Outcome`; with
    `wait=False` it returns a `concurrent.futures.Future` of it at once. All of them take the keywords of
    `aetheria.client.CommandOptions` (reason, author, expect_revision, not_after_step, dry_run, timeout, id) and raise

    - `CommandError`: the run refused it (`CommandRefusedError`, which holds the outcome), or the hub did;
    - `NoAnswerError`: the time was over. The command stands;
    - `HubError`: the hub cannot be reached.
    """

    aio: AsyncRun

    def __init__(self, hub: Hub, aio: AsyncRun) -> None:
        self.hub = hub
        self.aio = aio

    def __repr__(self) -> str:
        return f"<run {self.id} at {self.hub.url}>"

    @property
    def id(self) -> str:
        """The run's name."""
        return self.aio.id

    def replica(self, replica_id: str) -> NoReturn:
        """Raises `RunFolderError`: that is for a run of several replicas."""
        self.aio.replica(replica_id)

    def _do(self, work: Coroutine[Any, Any, Any], wait: bool) -> Any:
        return self.hub._loop.run(work) if wait else self.hub._loop.start(work)

    # --- looking ---------------------------------------------------------------------------------------------------
    @property
    def status(self) -> RunStatus:
        """The run as the hub sees it now."""
        return self.hub._loop.run(self.aio.status())

    @property
    def knobs(self) -> KnobValues:
        """What may be changed, and its values now."""
        return self.hub._loop.run(self.aio.knobs())

    @property
    def journal(self) -> list[Entry]:
        """Every command and what came of it, from the run's own journal."""
        return self.hub._loop.run(self.aio.journal())

    def metrics(
        self, name: str, *, from_step: int | None = None, points: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns a curve: its steps, int64, and its values, float64, both of shape [points].

        Args:
            name: of the metric.
            from_step: leave out what lies before.
            points: at most about so many: the extremes of each stretch. All of them, by default.
        """
        return self.hub._loop.run(self.aio.metrics(name, from_step=from_step, points=points))

    def commands(self, last: int = 20) -> list[tuple[AnyCommand, Outcome | None]]:
        """Returns the newest commands that were sent through this hub, oldest first, and how far they got."""
        return self.hub._loop.run(self.aio.commands(last))

    def outcome(self, command_id: str, timeout: float = 0.0) -> Outcome | None:
        """Returns how far a command got; the final outcome, if it comes within `timeout` seconds."""
        return self.hub._loop.run(self.aio.outcome(command_id, timeout))

    def events(self, last: int = 1000) -> dict[str, Any]:
        """Returns what happened in the run: "told" to the hub, "recorded" in its folder, and the "notes"."""
        return self.hub._loop.run(self.aio.events(last))

    def watch(self, since: int | None = None) -> Iterator[Event]:
        """Yields what happens in this run, as it happens; see `AsyncHub.watch`."""
        return self.hub.watch(self.id, since)


class Group(Commands):
    """A run of several replicas: trainings that know nothing of one another, and are told things together.

    A command goes to all of them that have not been completed or stopped, or to those that `replicas=["a", "b"]` names,
    and returns a dictionary: the outcome of each, by its id. With `wait=False` it returns a future of that. Each
    carries it out at a step of its own, or refuses it; between them nothing is atomic. What is raised is that of
    `aetheria.client.AsyncGroup`, `ReplicasRefusedError` where not all have carried it out.
    """

    aio: AsyncGroup

    def __init__(self, hub: Hub, aio: AsyncGroup) -> None:
        self.hub = hub
        self.aio = aio

    def __repr__(self) -> str:
        return f"<run {self.id} of several replicas at {self.hub.url}>"

    @property
    def id(self) -> str:
        """The name that the replicas have in common."""
        return self.aio.id

    def replica(self, replica_id: str) -> Run:
        """Returns one replica, which is a run like any other."""
        return Run(self.hub, self.aio.replica(replica_id))

    @property
    def replicas(self) -> list[RunStatus]:
        """Each replica as the hub sees it now."""
        return self.status.replicas

    def ask(
        self, op: str, args: dict[str, Any] | None = None, **options: Unpack[CommandOptions]
    ) -> tuple[str, list[ReplicaOutcome]]:
        """Sends any command, and returns what came of it, whatever that is: its id, and what each replica says."""
        return self.hub._loop.run(self.aio.ask(op, args, **options))

    def _do(self, work: Coroutine[Any, Any, Any], wait: bool) -> Any:
        return self.hub._loop.run(work) if wait else self.hub._loop.start(work)

    # --- looking ---------------------------------------------------------------------------------------------------
    @property
    def status(self) -> RunStatus:
        """The run as the hub sees it now, with each of its `replicas`."""
        return self.hub._loop.run(self.aio.status())

    def commands(self, last: int = 20) -> list[tuple[AnyCommand, Outcome | None]]:
        """Returns the newest commands of all replicas, oldest first, and how far they got; `run` says whose it is."""
        return self.hub._loop.run(self.aio.commands(last))

    def outcomes(self, command_id: str, timeout: float = 0.0) -> list[ReplicaOutcome]:
        """Returns how far a command got with each replica; the final outcomes, if they come in `timeout` seconds."""
        return self.hub._loop.run(self.aio.outcomes(command_id, timeout))

    def watch(self, since: int | None = None) -> Iterator[Event]:
        """Yields what happens in any of the replicas, as it happens; see `AsyncHub.watch`."""
        return self.hub.watch(self.id, since)

    @property
    def knobs(self) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        self.hub._loop.run(self.aio.knobs())

    @property
    def journal(self) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        self.hub._loop.run(self.aio.journal())

    def metrics(self, name: str, *, from_step: int | None = None, points: int | None = None) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        self.hub._loop.run(self.aio.metrics(name))

    def outcome(self, command_id: str, timeout: float = 0.0) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own; see `outcomes`."""
        self.hub._loop.run(self.aio.outcome(command_id))

    def events(self, last: int = 1000) -> NoReturn:
        """Raises `RunFolderError`: each replica has its own."""
        self.hub._loop.run(self.aio.events(last))
