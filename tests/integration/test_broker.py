"""The embedded message server and both ends of it: a real nats-server, real keys, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.freezing import freeze, frozen

from aetheria.errors import HubError
from aetheria.loom.broker import Broker, find_binary
from aetheria.loom.connection import Connection
from aetheria.loom.keys import new_seed
from aetheria.loom.run_end import Overheard
from aetheria.loom.subjects import COMMANDS, METRICS, REPORTS, consumer_of, subject, token_of, which
from aetheria.loom.transport import Arrival, HubEnd, RunEnd


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "nats")
    broker.start()
    yield broker
    broker.stop()


class Heard:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str, bytes]] = []

    async def __call__(self, run: str, kind: str, data: bytes) -> None:
        self.reports.append((run, kind, data))

    def of(self, kind: str) -> list[bytes]:
        return [data for _, found, data in self.reports if found == kind]


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def commands_of(end: RunEnd, count: int, *, acknowledge: bool = True) -> list[Arrival]:
    """Gets commands; the run says that it lives until the hub has made its consumer."""
    arrivals: list[Arrival] = []
    async with asyncio.timeout(40.0):
        while len(arrivals) < count:
            try:
                arrivals.append(await end.next_command())
            except HubError:
                await end.beat(b"{}")
                await asyncio.sleep(0.05)
                continue
            if acknowledge:
                await arrivals[-1].done()
    return arrivals


def run_async(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 120.0))  # type: ignore[arg-type]


# --- the server ------------------------------------------------------------------------------------------------------


def test_names_survive_the_way_into_a_subject_and_back() -> None:
    for run in ("digits-20260101-120000-ab12", "v1.5", "a b", "ä/ö", "x*>", "=41", "~", "%"):
        assert which(subject(run, "ack")) == (run, "ack")
        assert not set(token_of(run)) & set(". *>/\\")
    with pytest.raises(HubError, match="shorter name"):
        token_of("x" * 201)
    with pytest.raises(HubError, match="1 to 200"):
        token_of("")
    with pytest.raises(ValueError, match="not a subject"):
        which("weave.v9.run.ack")


def test_secrets_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        broker = Broker(tmp_path / "nats")
        broker.start()
        try:
            broker.admit("a run")
        finally:
            broker.stop()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "nats").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "nats" / "keys").stat().st_mode) == 0o700
    files = [*(tmp_path / "nats" / "keys").iterdir(), tmp_path / "nats" / "nats.conf"]
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_port_is_kept_and_a_taken_one_is_named(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "nats")
    broker.start()
    url = broker.url
    broker.stop()
    broker.start()
    assert broker.url == url
    broker.stop()
    broker.stop()  # again changes nothing
    assert not broker.alive
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        with pytest.raises(HubError, match=rf"port {url.rpartition(':')[2]} .* taken by another program.*delete"):
            broker.start()
        assert not broker.alive
    broker.start()
    broker.stop()


def test_a_port_that_is_taken_between_choosing_and_listening_is_left_to_the_quicker_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, taken = Broker._launch, []

    def somebody_is_quicker(broker: Broker) -> None:
        if not taken:
            taken.append(socket.create_server(("127.0.0.1", broker._port)))
        launch(broker)

    monkeypatch.setattr(Broker, "_launch", somebody_is_quicker)
    broker = Broker(tmp_path / "nats")
    broker.start()
    assert broker.answers()
    assert broker.url != f"nats://127.0.0.1:{taken[0].getsockname()[1]}"
    broker.stop()
    taken[0].close()


def test_a_folder_serves_one_hub_at_a_time(broker: Broker) -> None:
    with pytest.raises(HubError, match=f"another hub, process {os.getpid()},"):
        Broker(broker.folder).start()
    assert broker.answers()


def test_a_server_whose_hub_was_killed_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from aetheria.loom.broker import Broker\n"
        "broker = Broker(pathlib.Path(sys.argv[1])); broker.start(); broker.admit('run')\n"
        "print(broker.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    made = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "nats")], capture_output=True, check=False, timeout=30
    )
    pid = int(made.stdout)
    broker = Broker(tmp_path / "nats")
    broker.start()
    try:
        assert broker.pid == pid
        assert broker.alive
        assert broker.admit("another")
    finally:
        broker.stop()
    assert not broker.alive


def test_a_server_that_is_stuck_is_not_taken_over_but_replaced(broker: Broker) -> None:
    stuck = broker.pid
    freeze(stuck)
    assert broker.alive
    assert not broker.answers(timeout=0.2)
    broker.restart()
    assert broker.pid != stuck
    assert broker.answers()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="not a program that can be run"):
        Broker(tmp_path / "nats", binary=tmp_path).start()
    liar = tmp_path / "nats-server"
    liar.write_text("#!/bin/sh\nexit 3\n")
    liar.chmod(0o755)
    with pytest.raises(HubError, match="ended at once"):
        Broker(tmp_path / "nats", binary=liar).start()


def test_the_binary_is_found_in_path_and_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == program
    monkeypatch.setenv("PATH", "")
    assert find_binary().name == "nats-server"
    assert find_binary() != program
    assert find_binary(program) == program


def test_it_outlives_ctrl_c(broker: Broker) -> None:
    assert broker.pid is not None
    assert os.getsid(broker.pid) != os.getsid(0)


# --- both ends -------------------------------------------------------------------------------------------------------


def test_wrong_keys_are_said_at_once(broker: Broker) -> None:
    async def body() -> None:
        for end in (HubEnd(broker.url, new_seed()).start(), RunEnd(broker.url, new_seed(), "run").connect()):
            started = time.monotonic()
            with pytest.raises(HubError, match="does not know this key"):
                await end
            assert time.monotonic() - started < 10.0
        with pytest.raises(HubError, match="not the seed"):
            await HubEnd(broker.url, "nonsense").start()

    run_async(body)


def test_no_server_is_said_at_once() -> None:
    async def body() -> None:
        started = time.monotonic()
        with pytest.raises(HubError, match="no message server answers"):
            await HubEnd("nats://127.0.0.1:1", new_seed()).start()
        assert time.monotonic() - started < 10.0

    run_async(body)


def test_commands_go_to_their_run_and_reports_come_back(broker: Broker) -> None:
    async def body() -> None:
        hub, heard = HubEnd(broker.url, broker.hub_seed), Heard()
        await hub.start()
        ends = [RunEnd(broker.url, broker.admit(run), run) for run in ("a.run", "other")]
        listening = asyncio.create_task(hub.listen(heard))
        for end in ends:
            await end.connect()
        for number in range(40):
            await hub.publish_command("a.run", b"%d" % number, f"id-{number}")
        await hub.publish_command("a.run", b"39", "id-39")  # again: once
        await hub.publish_command("other", b"x", "id-x")
        arrivals = await commands_of(ends[0], 40)
        assert [(arrival.id, arrival.data) for arrival in arrivals] == [(f"id-{n}", b"%d" % n) for n in range(40)]
        assert [arrival.data for arrival in await commands_of(ends[1], 1)] == [b"x"]
        await ends[0].report([("ack", b"%d" % number, f"a-{number}") for number in range(200)])
        await ends[0].report(
            [("ack", b"199", "a-199"), ("status", b"s", ""), ("event", b"e", ""), ("metric", b"m", "")]
        )
        await ends[0].beat(b"alive")
        await until(lambda: {"event", "status", "metric", "hb"} <= {kind for _, kind, _ in heard.reports})
        assert heard.of("ack") == [b"%d" % number for number in range(200)]
        assert {run for run, _, _ in heard.reports} == {"a.run"} | {
            run for run, kind, _ in heard.reports if kind == "hb"
        }
        assert heard.of("status") == [b"s"]
        assert await ends[0].unanswered() == 0
        with pytest.raises(HubError, match=r"size|large"):
            await hub.publish_command("other", b"x" * 80_000, "id-large")
        listening.cancel()
        await hub.close()
        for end in ends:
            await end.close()

    run_async(body)


def test_a_server_that_is_there_already_needs_no_keys_of_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [find_binary(), "--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", tmp_path]
    server = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)

    async def body() -> None:
        hub, end = HubEnd(f"nats://127.0.0.1:{port}", ""), RunEnd(f"nats://127.0.0.1:{port}", "", "run")
        async with asyncio.timeout(40.0):
            while not hub.connected:
                try:
                    await hub.start()
                except HubError:
                    await asyncio.sleep(0.02)
        await end.connect()
        await hub.publish_command("run", b"x", "id-1")
        assert [arrival.data for arrival in await commands_of(end, 1)] == [b"x"]
        await end.close()
        await hub.close()

    try:
        run_async(body)
    finally:
        server.terminate()
        server.wait()


def test_a_run_may_do_nothing_but_its_own(broker: Broker) -> None:
    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        seed = broker.admit("mine")
        broker.admit("yours")
        await hub.publish_command("yours", b"secret", "id-secret")
        end = RunEnd(broker.url, seed, "mine")
        await end.connect()
        connection = await Connection.open(broker.url, seed, "test", inbox=f"_INBOX_{token_of('mine')}")
        refused = [
            subject("yours", "cmd"),
            subject("mine", "cmd"),
            subject("yours", "ack"),
            "$JS.API.STREAM.LIST",
            f"$JS.API.STREAM.PURGE.{COMMANDS}",
            f"$JS.API.CONSUMER.MSG.NEXT.{COMMANDS}.{consumer_of('yours')}",
            f"$JS.API.CONSUMER.CREATE.{COMMANDS}.{consumer_of('mine')}.{subject('mine', 'cmd')}",
        ]
        for target in refused:
            with pytest.raises(HubError):
                await connection.request(target, timeout=0.2)
        everything = await connection.client.subscribe(">")
        await hub.publish_command("mine", b"command", "id-mine")
        assert (await commands_of(end, 1, acknowledge=False))[0].data == b"command"
        assert everything.pending_msgs == 0
        await connection.close()
        await end.close()
        await hub.close()

    # The heartbeat that makes the hub admit the run is not needed: sending a command does so, too.
    run_async(body)


def test_a_hub_notices_the_end_of_a_connection_of_which_nobody_tells_it(broker: Broker) -> None:
    """Seen once in hours of killing message servers: the library had closed, and had not said so."""

    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        lost = hub._connection
        assert lost is not None
        lost.client._status = lost.client.CLOSED  # and none of its callbacks called
        await until(lambda: hub._connection is not lost)
        await hub.publish_command("mine", b"0", "id-0")
        await lost.close()
        await hub.close()

    run_async(body)


def test_a_command_that_is_sent_again_keeps_its_place(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        failed = 0
        store = Connection.store

        async def counted(*args: Any, **options: Any) -> None:
            nonlocal failed
            try:
                await store(*args, **options)
            except HubError:
                failed += 1
                raise

        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        end = RunEnd(broker.url, broker.admit("mine"), "mine")
        await end.connect()
        await hub.publish_command("mine", b"0", "id-0")
        monkeypatch.setattr("aetheria.loom.transport._ATTEMPT", 0.2)
        monkeypatch.setattr(Connection, "store", counted)
        with frozen(broker.pid):  # so long that the first attempt is given up
            sending = asyncio.create_task(hub.publish_command("mine", b"1", "id-1", timeout=20.0))
            await until(lambda: failed)
        await sending
        await hub.publish_command("mine", b"2", "id-2")
        arrivals = await commands_of(end, 3)
        assert [(arrival.previous, arrival.id) for arrival in arrivals] == [
            ("", "id-0"),
            ("id-0", "id-1"),
            ("id-1", "id-2"),
        ]
        await end.close()
        await hub.close()

    run_async(body)


def test_a_run_hears_its_own_commands_before_they_arrive_and_what_was_sent_before_them(broker: Broker) -> None:
    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        heard: dict[str, list[Overheard]] = {"mine": [], "yours": []}
        ends = [RunEnd(broker.url, broker.admit(run), run) for run in heard]
        for end in ends:
            await end.connect()
            await end.overhear(heard[end.run].append)
            await end.beat(b"{}")
            with suppress(HubError):
                await end.unanswered()  # answered behind the subscription: from now on nothing is missed
        for number in range(3):
            await hub.publish_command("mine", b"%d" % number, f"id-{number}")
        await hub.publish_command("yours", b"x", "id-x")
        await hub.publish_command("mine", b"3", "id-3")
        await until(lambda: len(heard["mine"]) == 4 and heard["yours"])
        told = [(command.previous, command.id, command.data) for command in heard["mine"]]
        assert told == [
            ("", "id-0", b"0"),
            ("id-0", "id-1", b"1"),
            ("id-1", "id-2", b"2"),
            ("id-2", "id-3", b"3"),
        ]
        assert [(command.previous, command.id) for command in heard["yours"]] == [("", "id-x")]
        assert [arrival.id for arrival in await commands_of(ends[0], 4)] == [f"id-{number}" for number in range(4)]
        for end in ends:
            await end.close()
        await hub.close()

    run_async(body)


def test_what_is_kept_is_kept_on_as_many_servers_as_wanted(tmp_path: Path) -> None:
    with ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(6)]
        ports = [found.getsockname()[1] for found in sockets]
    routes = [f"nats://127.0.0.1:{port}" for port in ports[3:]]
    servers = []
    for number in range(3):
        folder = tmp_path / f"server-{number}"
        arguments = ["--addr", "127.0.0.1", "--port", str(ports[number]), "--cluster", routes[number]]
        arguments += ["--server_name", f"server-{number}", "--cluster_name", "test", "--routes", ",".join(routes)]
        arguments += ["--jetstream", "--store_dir", str(folder)]
        servers.append(subprocess.Popen([find_binary(), *arguments], stderr=subprocess.DEVNULL))

    async def body() -> None:
        hub = HubEnd(f"nats://127.0.0.1:{ports[0]}", "", replicas=3)
        async with asyncio.timeout(30.0):
            while not hub.connected:  # they have to find each other, and to choose one of them first
                try:
                    await hub.start()
                except HubError:
                    await asyncio.sleep(0.05)
        connection = await Connection.open(f"nats://127.0.0.1:{ports[1]}", "", "test")
        for stream in (COMMANDS, REPORTS, METRICS):
            info = await connection.request(f"$JS.API.STREAM.INFO.{stream}")
            assert info["config"]["num_replicas"] == 3
            assert len(info["cluster"]["replicas"]) == 2  # beside the one that leads
        await connection.close()
        await hub.close()

    try:
        run_async(body)
    finally:
        for server in servers:
            server.kill()
        for server in servers:
            server.wait()


def test_many_are_let_in_together_and_a_deleted_key_is_made_anew(broker: Broker) -> None:
    written = broker._config_file.stat().st_ino
    seeds = broker.admit_all([f"run {number}" for number in range(50)])
    assert len(set(seeds.values())) == 50
    assert (now := broker._config_file.stat().st_ino) != written
    assert broker.admit_all(["run 3", "run 7"]) == {run: seeds[run] for run in ("run 3", "run 7")}
    assert broker._config_file.stat().st_ino == now  # the server was not disturbed
    broker._key_file(f"run-{token_of('run 3')}").unlink()
    seeds["run 3"] = broker.admit("run 3")

    async def body() -> None:
        for run in ("run 0", "run 3", "run 49"):
            end = RunEnd(broker.url, seeds[run], run)
            await end.connect()
            await end.close()

    run_async(body)


def test_letting_a_run_in_disconnects_nobody(broker: Broker) -> None:
    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        end = RunEnd(broker.url, broker.admit("first"), "first")
        await end.connect()
        for number in range(5):
            await asyncio.to_thread(broker.admit, f"further-{number}")
        await hub.publish_command("first", b"x", "id-1")
        assert (await commands_of(end, 1))[0].data == b"x"
        assert not end.closed.is_set()
        assert hub.connected
        await end.close()
        await hub.close()

    run_async(body)


def test_what_is_not_acknowledged_comes_again_to_the_next_one(broker: Broker) -> None:
    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        seed = broker.admit("run")
        for number in range(3):
            await hub.publish_command("run", b"%d" % number, f"id-{number}")
        end = RunEnd(broker.url, seed, "run")
        await end.connect()
        first, *_ = await commands_of(end, 3, acknowledge=False)
        await first.done()
        await end.close()
        end = RunEnd(broker.url, seed, "run")
        await end.connect()
        assert await end.unanswered() == 2
        assert [arrival.data for arrival in await commands_of(end, 2)] == [b"1", b"2"]
        await end.close()
        await hub.close()

    run_async(body)


@pytest.mark.parametrize("empty", [False, True], ids=["its store", "an empty store"])
def test_a_killed_server_is_found_again(broker: Broker, empty: bool) -> None:
    async def body() -> None:
        hub, heard = HubEnd(broker.url, broker.hub_seed), Heard()
        await hub.start()
        seed = broker.admit("run")
        listening = asyncio.create_task(hub.listen(heard))
        await hub.publish_command("run", b"before", "id-before")
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        with pytest.raises(HubError, match=r"not acknowledged in 0\.5 seconds.*same id"):
            await hub.publish_command("run", b"never", "id-never", timeout=0.5)
        if empty:
            subprocess.run(["rm", "-rf", str(broker.folder / "store")], check=True)
        sending = asyncio.create_task(hub.publish_command("run", b"after", "id-after", timeout=25.0))
        await asyncio.to_thread(broker.restart)
        await sending  # had to wait for the server, not to be repeated
        end = RunEnd(broker.url, seed, "run")
        await end.connect()
        expected = [b"after"] if empty else [b"before", b"after"]
        assert [arrival.data for arrival in await commands_of(end, len(expected))] == expected
        await end.report([("ack", b"heard", "")])
        await until(lambda: heard.of("ack") == [b"heard"])
        listening.cancel()
        await end.close()
        await hub.close()

    run_async(body)


def test_a_stopped_server_is_noticed(broker: Broker) -> None:
    async def body() -> None:
        end = RunEnd(broker.url, broker.admit("run"), "run")
        await end.connect()
        with frozen(broker.pid):
            await asyncio.wait_for(end.closed.wait(), 12.0)
        await end.close()

    run_async(body)


def test_reports_of_a_time_without_a_hub_come_later_and_again_if_the_handler_fails(broker: Broker) -> None:
    async def body() -> None:
        hub = HubEnd(broker.url, broker.hub_seed)
        await hub.start()
        await hub.close()
        end = RunEnd(broker.url, broker.admit("run"), "run")
        await end.connect()
        await end.report([("ack", b"first", ""), ("ack", b"second", "")])
        seen: list[bytes] = []

        async def handler(run: str, kind: str, data: bytes) -> None:
            seen.append(data)
            if seen.count(b"first") == 1 and data == b"first":
                raise RuntimeError("the first time it goes wrong")

        hub = HubEnd(broker.url, broker.hub_seed)
        listening = asyncio.create_task(hub.listen(handler))
        await until(lambda: len(seen) == 3)
        assert seen == [b"first", b"second", b"first"]
        await hub.close()
        await listening  # ends by itself
        with pytest.raises(HubError, match="closed"):
            await hub.publish_command("run", b"x", "id-1", timeout=0.2)
        await end.close()

    run_async(body)


def test_streams_that_somebody_deleted_are_made_again(broker: Broker) -> None:
    async def body() -> None:
        hub, heard = HubEnd(broker.url, broker.hub_seed), Heard()
        listening = asyncio.create_task(hub.listen(heard))
        await until(lambda: hub.connected)
        end = RunEnd(broker.url, broker.admit("run"), "run")
        await end.connect()
        connection = await Connection.open(broker.url, broker.hub_seed, "somebody")
        for stream in (COMMANDS, REPORTS):
            assert (await connection.request(f"$JS.API.STREAM.DELETE.{stream}"))["success"]
        await hub.publish_command("run", b"x", "id-1")
        assert [arrival.data for arrival in await commands_of(end, 1)] == [b"x"]
        await end.report([("ack", b"a", "")])
        await until(lambda: heard.of("ack") == [b"a"])
        await connection.close()
        await hub.close()
        await listening
        await end.close()

    run_async(body)
