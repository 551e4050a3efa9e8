"""What is said to whoever sends a command: the run's word counts, whatever the message server says or does not say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aetheria.errors import HubError
from aetheria.protocol import Note, NoteArguments, Outcome, Set, SetArguments, encode
from aetheria.weaver.hub import Hub
from aetheria.weaver.mirror import Mirrors
from aetheria.weaver.store import Store

RUN = "run"


class Wire:
    """Carries nothing; confirms when it is told to."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.confirmed = asyncio.Event()
        self.failure: HubError | None = None

    async def publish_command(self, run: str, data: bytes, command_id: str, /) -> None:
        self.sent.append(command_id)
        await self.confirmed.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hub.db")
    yield store
    store.close()


def with_hub(store: Store, body: Callable[[Hub, Wire], Awaitable[None]]) -> None:
    async def work() -> None:
        wire = Wire()
        hub = Hub(store, wire, mirrors := Mirrors(store.path.parent / "mirrors"))
        hub.registry.register(RUN, "/elsewhere/run", "another-machine", 1)
        await body(hub, wire)
        hub.close()
        await mirrors.close()

    asyncio.run(asyncio.wait_for(work(), 20.0))


def note(text: str = "hello") -> Note:
    return Note(run=RUN, args=NoteArguments(text))


async def applied(hub: Hub, command: Any) -> None:
    for state in ("accepted", "applied"):
        await hub.handle(RUN, "ack", encode(Outcome(command=command.id, run=RUN, state=state)))


async def sent(wire: Wire, count: int) -> None:
    while len(wire.sent) < count:
        await asyncio.sleep(0)


def test_what_the_run_did_is_told_without_waiting_for_the_message_server(store: Store) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        command = note()
        asking = asyncio.create_task(hub.submit(RUN, encode(command), 10.0))
        await sent(wire, 1)
        assert store.command(command.id) is not None  # kept before it was sent
        await applied(hub, command)
        _, outcome = await asking
        assert outcome is not None
        assert outcome.state == "applied"
        assert store.delivery(command.id) == "unknown"
        wire.confirmed.set()
        while store.delivery(command.id) != "published":
            await asyncio.sleep(0)

    with_hub(store, body)


def test_who_does_not_wait_is_answered_when_the_message_server_has_it(store: Store) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        asking = asyncio.create_task(hub.submit(RUN, encode(note())))
        await sent(wire, 1)
        assert not asking.done()
        wire.confirmed.set()
        command, outcome = await asking
        assert outcome is None
        assert store.delivery(command.id) == "published"

    with_hub(store, body)


def test_a_command_that_was_carried_out_and_not_confirmed_is_no_failure(store: Store) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        command = Set(run=RUN, args=SetArguments({"value": 1.0}))
        wire.failure = HubError("it is full.")
        asking = asyncio.create_task(hub.submit(RUN, encode(command), 10.0))
        await sent(wire, 1)
        await applied(hub, command)
        wire.confirmed.set()
        _, outcome = await asking
        assert outcome is not None
        assert outcome.state == "applied"
        while store.delivery(command.id) != "unconfirmed":
            await asyncio.sleep(0)
        assert store.unanswered() == []

    with_hub(store, body)


@pytest.mark.parametrize("wait", [0.0, 10.0])
def test_a_command_of_which_nobody_knows_anything_is_said_so(store: Store, wait: float) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        wire.failure = HubError("it is full.")
        wire.confirmed.set()
        with pytest.raises(HubError, match=r"did not confirm the command: it is full\. It may still be carried out"):
            await hub.submit(RUN, encode(note()), wait)

    with_hub(store, body)


def test_commands_are_sent_in_the_order_in_which_they_were_kept(store: Store) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        wire.confirmed.set()
        commands = [note(str(number)) for number in range(50)]
        waits = [0.0 if number % 3 else 0.01 for number in range(50)]
        await asyncio.gather(
            *(hub.submit(RUN, encode(command), wait) for command, wait in zip(commands, waits, strict=True))
        )
        assert wire.sent == [known.id for known in store.commands(RUN, 50)]
        assert sorted(wire.sent) == sorted(command.id for command in commands)

    with_hub(store, body)


def test_a_command_goes_on_its_way_when_its_sender_has_gone(store: Store) -> None:
    async def body(hub: Hub, wire: Wire) -> None:
        command = note()
        for wait in (0.0, 10.0):
            asking = asyncio.create_task(hub.submit(RUN, encode(command), wait))
            await sent(wire, 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        wire.confirmed.set()
        while store.delivery(command.id) != "published":
            await asyncio.sleep(0)

    with_hub(store, body)


def test_what_was_set_is_known_before_the_run_tells_its_knobs_anew(store: Store) -> None:
    def told(rate: float, revision: int) -> bytes:
        values = {"learning_rate": rate, "momentum": 0.9}
        return encode({"kind": "knobs", "schema": {}, "values": values, "revision": revision})

    async def body(hub: Hub, wire: Wire) -> None:
        await hub.handle(RUN, "status", told(0.1, 3))
        done = Outcome(command="a" * 8, run=RUN, state="applied", revision=4, result={"after": {"learning_rate": 0.01}})
        await hub.handle(RUN, "ack", encode(done))
        known = store.knobs(RUN)
        assert known is not None
        assert known.observed == {"learning_rate": 0.01, "momentum": 0.9}
        await hub.handle(RUN, "status", told(0.1, 3))  # said before, and stored later
        assert store.knobs(RUN) == known
        await hub.handle(RUN, "status", told(0.02, 4))
        assert (store.knobs(RUN) or known).observed["learning_rate"] == 0.02

    with_hub(store, body)
