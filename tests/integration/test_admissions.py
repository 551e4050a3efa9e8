"""Runs that want to be let in at the same time, at a real message server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from aetheria.errors import HubError
from aetheria.loom.broker import Broker
from aetheria.loom.run_end import RunEnd
from aetheria.weaver.admissions import Admissions


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "nats")
    broker.start()
    yield broker
    broker.stop()


def reloads(broker: Broker) -> int:
    return (broker.folder / "nats.log").read_text().count("Reloaded server configuration")


def test_a_crowd_is_let_in_together(broker: Broker) -> None:
    async def body() -> None:
        admissions = Admissions(broker)
        names = [f"run {number}" for number in range(60)]
        seeds = dict(zip(names, await asyncio.gather(*map(admissions.admit, names)), strict=True))
        assert len(set(seeds.values())) == 60
        assert reloads(broker) <= 3  # the first alone, and then all the others
        again = await asyncio.gather(*(admissions.admit("run 1") for _ in range(5)))
        assert set(again) == {seeds["run 1"]}
        assert reloads(broker) <= 3
        for name in ("run 0", "run 59"):
            end = RunEnd(broker.url, seeds[name], name)
            await end.connect()
            await end.close()
        await admissions.close()

    asyncio.run(body())


def test_who_cannot_be_let_in_keeps_nobody_out(broker: Broker) -> None:
    async def body() -> None:
        admissions = Admissions(broker)
        told = await asyncio.gather(*map(admissions.admit, ["good", "x" * 500, "better"]), return_exceptions=True)
        assert [isinstance(answer, HubError) for answer in told] == [False, True, False]
        broker.stop()
        told = await asyncio.gather(*map(admissions.admit, ["late", "later"]), return_exceptions=True)
        assert all("does not run" in str(answer) for answer in told)
        await asyncio.to_thread(broker.start)
        assert await admissions.admit("late")
        await admissions.close()

    asyncio.run(body())


def test_who_waits_at_the_end_is_turned_away(broker: Broker) -> None:
    async def body() -> None:
        admissions = Admissions(broker)
        waiting = [asyncio.create_task(admissions.admit(name)) for name in ("one", "two")]
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(admissions.admit("three")))
        await asyncio.sleep(0)
        await admissions.close()
        await asyncio.wait(waiting)
        assert all(task.cancelled() for task in waiting)

    asyncio.run(body())
