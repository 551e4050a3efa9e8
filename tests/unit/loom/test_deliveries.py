"""Commands that are heard before they arrive: nothing is overtaken, lost, or acknowledged too early."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.loom.deliveries import Deliveries
from aetheria.loom.region import Region
from aetheria.loom.run_end import Arrival, Overheard
from aetheria.loom.subjects import COMMANDS_ON_THE_WAY
from aetheria.protocol import Outcome, Ping, encode


class _Message:
    """What the message server's library hands over, as far as an arrival needs it."""

    def __init__(self, name: str, acknowledged: list[str]) -> None:
        self._name = name
        self._acknowledged = acknowledged

    async def ack(self) -> None:
        self._acknowledged.append(self._name)

    async def in_progress(self) -> None:
        pass


class _Way:
    """The way from the hub to the training: commands "command-0", "command-1", ... were sent, in this order."""

    def __init__(self) -> None:
        self.region = Region.create()
        self.deliveries = Deliveries(self.region)
        self.acknowledged: list[str] = []
        self.trained: list[str] = []  # in the order in which the training got them, each once
        self.answered: list[str] = []
        self.open: list[str] = []

    def hear(self, number: int, *, previous: int | None = None) -> None:
        known = number - 1 if previous is None else previous
        self.deliveries.heard(Overheard(name(number), name(known) if known >= 0 else "", data(number)))

    async def arrive(self, number: int, *, previous: bool = False) -> None:
        message: Any = _Message(name(number), self.acknowledged)
        before = name(number - 1) if previous and number else ""
        await self.deliveries.arrived(Arrival(name(number), data(number), message, before))

    def train(self) -> None:
        for taken in self.region.take():
            command = msgspec.json.decode(taken, type=Ping).id
            self.open.append(command)
            if command not in self.trained:
                self.trained.append(command)

    async def answer(self) -> None:
        for command in self.open:
            self.answered.append(command)
            await self.deliveries.answered(encode(Outcome(command=command, run="run", state="applied")))
        self.open.clear()
        self.deliveries.fill()
        assert set(self.acknowledged) <= set(self.answered)

    def close(self) -> None:
        self.region.close()


def name(number: int) -> str:
    return f"command-{number}"


def data(number: int) -> bytes:
    return encode(Ping(run="run", id=name(number)))


def names(*numbers: int) -> list[str]:
    return [name(number) for number in numbers]


def test_what_is_heard_behind_what_was_taken_last_is_taken_at_once() -> None:
    async def body() -> None:
        way = _Way()
        await way.arrive(0)
        way.hear(1)
        way.hear(2)
        way.train()
        assert way.trained == names(0, 1, 2)
        await way.answer()
        assert way.acknowledged == names(0)
        await way.arrive(1)  # answered before it was stored
        await way.arrive(2)
        way.train()
        assert way.acknowledged == names(0, 1, 2)
        assert not way.open
        way.close()

    asyncio.run(body())


def test_what_may_have_been_overtaken_is_waited_for() -> None:
    async def body() -> None:
        way = _Way()
        way.hear(0)  # nobody knows what was sent before it
        way.hear(1)
        way.train()
        assert way.trained == []
        await way.arrive(0)
        way.hear(2)  # 1 was sent, and has not arrived
        way.train()
        assert way.trained == names(0)
        await way.arrive(1)
        await way.arrive(2)
        way.hear(3)
        way.deliveries.heard(Overheard(name(5), "", data(5)))  # of another hub
        way.hear(6, previous=3)
        way.train()
        assert way.trained == names(0, 1, 2, 3)
        way.close()

    asyncio.run(body())


def test_a_lost_connection_is_begun_anew() -> None:
    async def body() -> None:
        way = _Way()
        await way.arrive(0)
        way.hear(1)
        way.deliveries.disconnected()
        way.hear(2)  # through the next one; what is between is not known
        way.train()
        assert way.trained == names(0, 1)
        await way.answer()
        assert way.acknowledged == []
        await way.arrive(0)  # they come again, and the run answers again
        await way.arrive(1)
        await way.arrive(2)
        way.train()
        await way.answer()
        assert way.trained == way.acknowledged == names(0, 1, 2)
        way.close()

    asyncio.run(body())


def test_no_more_is_taken_early_than_may_be_on_the_way() -> None:
    async def body() -> None:
        way = _Way()
        await way.arrive(0)
        for number in range(1, 100):
            way.hear(number)
        assert len(way.deliveries) == COMMANDS_ON_THE_WAY
        for number in range(1, 100):
            await way.arrive(number)
            way.train()
            await way.answer()
        assert way.trained == names(*range(100))
        way.close()

    asyncio.run(body())


_STEPS = ["hear", "hear", "hear first of a new hub", "miss", "arrive", "arrive", "train", "answer"]


@given(st.lists(st.sampled_from(_STEPS)))
@settings(max_examples=100, deadline=None)
def test_whatever_is_heard_the_training_gets_all_in_their_order(steps: list[str]) -> None:
    async def body() -> None:
        way = _Way()
        heard = arrived = 0  # as many as were sent are heard, or missed; each arrives afterwards
        for step in steps:
            match step:
                case "miss":
                    heard += 1
                case "arrive" if arrived < heard:
                    await way.arrive(arrived)
                    arrived += 1
                case "train":
                    way.train()
                case "answer":
                    await way.answer()
                case "hear" | "hear first of a new hub":
                    way.hear(heard, previous=None if step == "hear" else -1)
                    heard += 1
        for number in range(arrived, heard):
            await way.arrive(number)
        for _ in range(1 + heard // COMMANDS_ON_THE_WAY):
            way.train()
            await way.answer()
        assert way.trained == names(*range(heard))
        assert sorted(way.acknowledged) == sorted(way.trained)
        way.close()

    asyncio.run(body())


def test_a_message_that_was_lost_is_not_overtaken_by_newer_ones() -> None:
    async def body() -> None:
        way = _Way()
        for number in (0, 3, 4, 5):  # 1 and 2 come again when their time is out
            await way.arrive(number, previous=True)
        way.train()
        assert way.trained == [name(0)]
        for number in (1, 2):
            await way.arrive(number, previous=True)
        way.train()
        assert way.trained == [name(number) for number in range(6)]

    asyncio.run(body())


@pytest.mark.parametrize(("asked", "later"), [(2, 5), (3, 25)], ids=["the server waits for no more", "too long"])
def test_what_was_never_stored_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, asked: int, later: float
) -> None:
    async def body() -> None:
        way = _Way()
        unanswered = 3  # of the server: 0, 2, and one that has not come

        async def ask() -> int:
            return unanswered

        await way.arrive(0, previous=True)
        await way.arrive(2, previous=True)
        await way.deliveries.keep(ask)
        way.train()
        assert way.trained == [name(0)]
        now = time.monotonic()
        monkeypatch.setattr("aetheria.loom.deliveries.time.monotonic", lambda: now + 5)
        await way.deliveries.keep(ask)
        way.train()
        assert way.trained == [name(0)]  # it is on its way
        unanswered = asked
        monkeypatch.setattr("aetheria.loom.deliveries.time.monotonic", lambda: now + later)
        await way.deliveries.keep(ask)
        way.train()
        assert way.trained == [name(0), name(2)]

    asyncio.run(body())


def test_what_comes_while_the_server_is_asked_is_not_taken_for_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        way = _Way()

        async def ask() -> int:
            await way.arrive(3, previous=True)
            return 3  # 0, 2, and 1, which is still to come

        await way.arrive(0, previous=True)
        await way.arrive(2, previous=True)
        now = time.monotonic()
        monkeypatch.setattr("aetheria.loom.deliveries.time.monotonic", lambda: now + 5)
        await way.deliveries.keep(ask)
        way.train()
        assert way.trained == names(0)
        await way.arrive(1, previous=True)
        way.train()
        assert way.trained == names(0, 1, 2, 3)
        way.close()

    asyncio.run(body())


def test_a_new_sidecar_asks_what_the_one_before_it_has_taken_along() -> None:
    async def body() -> None:
        way = _Way()
        for number in (5, 1, 2, 3, 4):  # 1 to 4 were with the one that was killed

            async def ask() -> int:
                return 5

            message: Any = _Message(name(number), way.acknowledged)
            arrival = Arrival(name(number), data(number), message, name(number - 1), order=number)
            await way.deliveries.arrived(arrival, ask)
        way.train()
        assert way.trained == names(1, 2, 3, 4, 5)
        way.close()

    asyncio.run(body())


def test_a_new_sidecar_lets_a_command_through_at_once_where_nothing_is_missing() -> None:
    async def body() -> None:
        way = _Way()

        async def ask() -> int:
            return 1

        message: Any = _Message(name(5), way.acknowledged)
        await way.deliveries.arrived(Arrival(name(5), data(5), message, name(4), order=5), ask)
        way.train()
        assert way.trained == names(5)
        way.close()

    asyncio.run(body())
