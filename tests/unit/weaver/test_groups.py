"""Several replicas at one hub: who they are, what one request to them becomes, and what each of them says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aetheria.client.models import ReplicaOutcome
from aetheria.errors import CommandError, HubError
from aetheria.loom.hub_file import host_name
from aetheria.loom.messages import Heartbeat
from aetheria.protocol import AnyCommand, Outcome, command_of, decode_command, encode
from aetheria.weaver.groups import Groups, command_id
from aetheria.weaver.hub import CommandConflictError, Hub, RunEndedError
from aetheria.weaver.mirror import Mirrors
from aetheria.weaver.registry import TwinError, UnknownRunError
from aetheria.weaver.store import KnobState, Store

GROUP = "pretrain"


class Wire:
    """Carries commands as far as the test's hands."""

    def __init__(self) -> None:
        self.sent: list[AnyCommand] = []
        self.failure: HubError | None = None

    async def publish_command(self, run: str, data: bytes, command_id: str, /) -> None:
        self.sent.append(decode_command(data))
        assert (run, command_id) == (self.sent[-1].run, self.sent[-1].id)
        if self.failure is not None:
            raise self.failure


class Bench:
    """A hub with replicas on another machine, which say what the test lets them say."""

    def __init__(self, store: Store, wire: Wire, hub: Hub) -> None:
        self.store, self.wire, self.hub = store, wire, hub
        self.groups = Groups(hub)

    def register(self, *replicas: str, pid: int = 7) -> None:
        for replica in replicas:
            run = f"{GROUP}@{replica}"
            self.hub.registry.register(run, f"/there/{run}", f"node-{replica}", pid, replica, ["cuda:0"], GROUP)

    async def say(self, command: AnyCommand, state: Any = "applied", **fields: Any) -> None:
        outcome = Outcome(command=command.id, run=command.run, state=state, **fields)
        await self.hub.handle(command.run, "ack", encode(outcome))

    async def ask(self, command: AnyCommand, *wanted: str, wait: float = 0.0) -> list[ReplicaOutcome]:
        return (await self.groups.submit(GROUP, encode(command), wanted, wait))[1]

    def copy_says(self, replica: str, status: str) -> None:
        """Leaves what the hub has copied of a replica's `run.json`: that it has ended."""
        known = self.hub.registry.members(GROUP)[replica]
        known.mirror.mkdir(parents=True)
        said = {"format": 1, "status": status, "pid": known.stored.pid}
        (known.mirror / "run.json").write_bytes(msgspec.json.encode(said))


def bench(folder: Path, body: Callable[[Bench], Awaitable[None]]) -> None:
    async def work() -> None:
        store, wire, mirrors = Store(folder / "hub.db"), Wire(), Mirrors(folder / "mirrors")
        hub = Hub(store, wire, mirrors)
        try:
            await body(Bench(store, wire, hub))
        finally:
            hub.close()
            await mirrors.close()
            store.close()

    asyncio.run(asyncio.wait_for(work(), 60.0))


def note(text: str = "hello", **fields: Any) -> AnyCommand:
    return command_of("note", {"text": text}, **fields)


def test_one_request_is_a_command_for_each_with_an_outcome_of_its_own(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a", "b")
        request = note(author="ana", expect_revision=3)
        asking = asyncio.create_task(it.ask(request, wait=30.0))
        while len(it.wire.sent) < 2:
            await asyncio.sleep(0)
        first, second = it.wire.sent
        assert [sent.run for sent in (first, second)] == ["pretrain@a", "pretrain@b"]
        assert all(sent.id.startswith(request.id[:31]) and sent.id != request.id for sent in (first, second))
        assert all((sent.author, sent.expect_revision) == ("ana", 3) for sent in (first, second))
        await it.say(second, "rejected", message="the run is at revision 4")
        await it.say(first, step=12)
        outcomes = await asking
        assert [(each.replica, each.run, each.command) for each in outcomes] == [
            ("a", "pretrain@a", first.id),
            ("b", "pretrain@b", second.id),
        ]
        assert [each.outcome and (each.outcome.state, each.outcome.step) for each in outcomes] == [
            ("applied", 12),
            ("rejected", 0),
        ]

    bench(tmp_path, body)


def test_some_or_one_of_them(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a", "b", "c")
        await it.ask(note(), "c", "a", "c")
        assert [sent.run for sent in it.wire.sent] == ["pretrain@a", "pretrain@c"]
        await it.hub.submit("pretrain@b", encode(note()))
        assert it.wire.sent[-1].run == "pretrain@b"
        with pytest.raises(UnknownRunError, match=r"pretrain has no replica 'x', 'y'\. It has: a, b, c\."):
            await it.ask(note(), "x", "a", "y")
        with pytest.raises(UnknownRunError, match="no run called 'pretrain@x'"):
            await it.hub.submit("pretrain@x", encode(note()))
        assert len(it.wire.sent) == 3

    bench(tmp_path, body)


def test_the_same_request_twice_is_the_same_request(tmp_path: Path) -> None:
    request = note()

    async def body(it: Bench) -> None:
        it.register("a", "b")
        await asyncio.gather(it.ask(request), it.ask(request))  # at the same time
        assert len(it.wire.sent) == 2
        await it.say(it.wire.sent[0], step=5)
        it.register("c")  # one that has come since does not get it
        outcomes = await it.ask(msgspec.structs.replace(request, created=1.0))
        assert [(each.replica, each.outcome and each.outcome.step) for each in outcomes] == [("a", 5), ("b", None)]
        assert len(it.wire.sent) == 2
        for other in (note("another", id=request.id), msgspec.structs.replace(request, author="bob")):
            with pytest.raises(CommandConflictError, match="belongs to another command"):
                await it.ask(other)
        with pytest.raises(CommandConflictError):
            await it.ask(request, "a")
        with pytest.raises(CommandConflictError):
            await it.hub.submit("pretrain@a", encode(request))
        alone, later = note(), note()
        await it.hub.submit("pretrain@a", encode(alone))
        await it.hub.submit("pretrain@a", encode(note(id=command_id(later.id, "pretrain@a"))))
        for other in (alone, later):
            with pytest.raises(CommandConflictError):
                await it.ask(other)

    async def after_a_restart(it: Bench) -> None:
        outcomes = await it.ask(request)
        assert [(each.replica, each.outcome and each.outcome.step) for each in outcomes] == [("a", 5), ("b", None)]
        assert it.wire.sent == []
        command, again = await it.groups.outcomes(GROUP, request.id)
        assert (command.id, again) == (request.id, outcomes)
        with pytest.raises(UnknownRunError, match="no command of the id"):
            await it.groups.outcomes(GROUP, "0123456789abcdef")
        with pytest.raises(UnknownRunError, match="no command of the id"):
            await it.groups.outcomes("another", request.id)

    bench(tmp_path, body)
    bench(tmp_path, after_a_restart)


def test_a_hub_that_was_killed_in_between_sends_the_rest(tmp_path: Path) -> None:
    request = note()

    async def body(it: Bench) -> None:
        it.register("a", "b")
        it.wire.failure = HubError("it is full.")
        outcomes = await it.ask(request)
        assert all("it is full" in each.problem and each.outcome is None for each in outcomes)
        it.store.delivered(command_id(request.id, "pretrain@b"), "unknown")  # it was killed before it knew

    async def after_a_restart(it: Bench) -> None:
        assert await it.hub.sweep() == 1
        assert [sent.run for sent in it.wire.sent] == ["pretrain@b"]
        assert [each.problem for each in await it.ask(request)] == ["", ""]  # sent again: a's is published, too
        assert [sent.run for sent in it.wire.sent] == ["pretrain@b", "pretrain@a"]

    bench(tmp_path, body)
    bench(tmp_path, after_a_restart)


def test_who_has_ended_says_so_and_holds_nobody_up(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a", "b", "c")
        it.hub.registry.members(GROUP)["b"].heard = None
        it.copy_says("b", "failed")
        it.hub.registry.members(GROUP)["c"].heard = None
        it.copy_says("c", "completed")
        request = note()
        asking = asyncio.create_task(it.ask(request, wait=30.0))
        while not it.wire.sent:
            await asyncio.sleep(0)
        await it.say(it.wire.sent[0])
        first, second = await asking  # c has left the others
        assert first.outcome is not None
        assert first.outcome.state == "applied"
        assert second.outcome is not None
        assert (second.replica, second.outcome.state) == ("b", "rejected")
        assert "pretrain@b does not train any more: it is failed. Continue it first" in second.outcome.message
        newest = it.store.newest("pretrain@b", "outcome", 5)
        assert len(newest) == 1  # who watches is told
        [named] = await it.ask(note(), "c")
        assert named.outcome is not None
        assert "it is completed" in named.outcome.message
        it.register("b", pid=8)  # it comes back: what was refused stays refused
        assert (await it.ask(request))[1].outcome == second.outcome
        assert len(it.wire.sent) == 1

    bench(tmp_path, body)


def test_where_all_have_left_there_is_nobody_to_tell(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a", "b")
        for replica, status in (("a", "stopped"), ("b", "completed")):
            it.hub.registry.members(GROUP)[replica].heard = None
            it.copy_says(replica, status)
        with pytest.raises(RunEndedError, match=r"no replica of pretrain trains any more: a is stopped, b is comp"):
            await it.ask(note())
        with pytest.raises(CommandError, match="is for another"):
            await it.ask(note(run="another"))

    bench(tmp_path, body)


# --- who they are ----------------------------------------------------------------------------------------------------


def test_replicas_come_go_and_are_known_after_a_restart(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("b", "a")
        beat = Heartbeat(replica="a", host="node-a", pid=7, step=40)
        assert it.hub.registry.beat("pretrain@a", beat) is not None
        await it.hub.handle("pretrain@b", "status", b'{"kind": "status", "status": "paused", "step": 3}')
        line = it.hub.registry.line(GROUP)
        assert (line["id"], line["status"], line["step"], line["connected"]) == (GROUP, "running", 40, True)
        assert [(each["replica"], each["host"], each["devices"], each["status"]) for each in line["replicas"]] == [
            ("a", "node-a", ["cuda:0"], "running"),
            ("b", "node-b", ["cuda:0"], "paused"),
        ]
        it.store.set_knobs("pretrain@a", KnobState({}, {"x": 1}, 5, time.time()))
        it.register("a", pid=8)  # it was ended, and begins anew
        assert [each["pid"] for each in it.hub.registry.line(GROUP)["replicas"]] == [8, 7]
        assert it.hub.registry.beat("pretrain@a", beat) is None  # of the process that is no more
        told = b'{"kind": "knobs", "schema": {}, "values": {"x": 2}, "revision": 0}'
        await it.hub.handle("pretrain@a", "event", told)
        knobs = it.store.knobs("pretrain@a")
        assert knobs is not None
        assert knobs.observed == {"x": 2}

    async def after_a_kill(it: Bench) -> None:
        replicas = it.hub.registry.replicas()
        assert sorted((each["run"], each["id"], each["name"], each["pid"], each["host"]) for each in replicas) == [
            (GROUP, "a", "pretrain@a", 8, "node-a"),
            (GROUP, "b", "pretrain@b", 7, "node-b"),
        ]
        assert {(tuple(each["devices"]), each["connected"], each["status"]) for each in replicas} == {
            (("cuda:0",), False, "silent")
        }
        assert it.hub.registry.line(GROUP)["status"] == "silent"
        for ask in (it.hub.registry.folder, it.hub.registry.status):
            with pytest.raises(
                UnknownRunError, match=r"a run of 2 replicas, each with its own.*pretrain@a, pretrain@b"
            ):
                ask(GROUP)

    bench(tmp_path, body)
    bench(tmp_path, after_a_kill)


def test_there_are_no_two_of_one_replica(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a")
        registry = it.hub.registry
        registry.refuse_twin("pretrain@a", "/there/pretrain@a", "node-a", GROUP)  # it has the lock of its folder
        registry.refuse_twin("pretrain@b", "/there/pretrain@b", "node-a", GROUP)
        with pytest.raises(TwinError, match=r"pretrain@a trains already: process 7 on node-a, in /there/pretrain@a\."):
            registry.refuse_twin("pretrain@a", "/elsewhere/pretrain@a", "node-z", GROUP)
        with pytest.raises(TwinError, match="with replicas, and another one without"):
            registry.refuse_twin(GROUP, "/there/pretrain", "node-z", "")
        registry.register("alone", "/there/alone", "node-a", 1)
        with pytest.raises(TwinError, match="a run called alone with replicas, and another one without"):
            registry.refuse_twin("alone@a", "/there/alone@a", "node-a", "alone")
        registry.members(GROUP)["a"].heard = None  # nothing has been heard of it for long
        registry.refuse_twin("pretrain@a", "/elsewhere/pretrain@a", "node-z", GROUP)

    bench(tmp_path, body)


def test_a_replica_that_was_killed_here_may_come_back_in_another_folder(tmp_path: Path) -> None:
    from aetheria.replicas import claim_replica

    async def body(it: Bench) -> None:
        folder, _ = claim_replica(tmp_path / "runs", GROUP, "a")
        folder.update(status="running")
        who = ("pretrain@a", "/elsewhere/pretrain@a", host_name(), GROUP)
        it.hub.registry.register("pretrain@a", str(folder.path), host_name(), 7, "a", ["cpu"], GROUP)
        with pytest.raises(TwinError):
            it.hub.registry.refuse_twin(*who)
        folder.release()  # as the kernel does when a process dies
        it.hub.registry.refuse_twin(*who)

    bench(tmp_path, body)


def test_one_whose_folder_was_removed_has_left(tmp_path: Path) -> None:
    from aetheria.replicas import claim_replica

    async def body(it: Bench) -> None:
        for replica in "ab":
            folder, _ = claim_replica(tmp_path / "runs", GROUP, replica)
            it.hub.registry.register(folder.run_id, str(folder.path), host_name(), 7, replica, ["cpu"], GROUP)
            folder.release()
        it.hub.registry.members(GROUP)["b"].heard = None
        folder.path.rename(tmp_path / "away")
        assert [each.replica for each in await it.ask(note())] == ["a"]

    bench(tmp_path, body)


def test_who_watches_a_run_hears_of_all_its_replicas(tmp_path: Path) -> None:
    async def body(it: Bench) -> None:
        it.register("a", "b")
        for run in ("pretrain@a", "another", "pretrain@b"):
            it.hub.feed.say(run, "event", {})
        for run, expected in ((GROUP, ["pretrain@a", "pretrain@b"]), ("pretrain@b", ["pretrain@b"]), ("", [])):
            heard = []
            following = it.hub.feed.follow(0, run)
            async for messages in following:
                heard += messages
                if not expected or len(heard) > len(expected):
                    break
            await following.aclose()  # type: ignore[attr-defined]
            assert [message.run for message in heard[1:]] == expected

    bench(tmp_path, body)


def test_the_id_of_a_replicas_command_follows_from_that_of_the_request() -> None:
    ids = {command_id(request, run) for request in ("x" * 64, "y" * 8) for run in ("pretrain@a", "pretrain@b")}
    assert len(ids) == 4
    assert all(decode_command(encode(note(id=each))).id == each for each in ids)
    assert command_id("0123456789abcdef", "pretrain@a") == command_id("0123456789abcdef", "pretrain@a")
