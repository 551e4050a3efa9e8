"""A run, its sidecar, the message server and a hub, each of them real; and what happens when one is killed."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.freezing import freeze

from aetheria.errors import HubError
from aetheria.loom.broker import Broker
from aetheria.loom.hub_file import HubAddress, read_hub_file, register
from aetheria.loom.link import Link
from aetheria.loom.messages import decode_heartbeat, decode_metrics
from aetheria.loom.processes import is_running
from aetheria.loom.run_end import ID, PREVIOUS
from aetheria.loom.subjects import COMMANDS, subject
from aetheria.loom.transport import HubEnd
from aetheria.protocol import Outcome, Ping, encode

RUN = "digits v1.5"
TOKEN = "operator-token"


class Door:
    """What the hub's interface does for a run: takes the registration, and gives access to the message server."""

    def __init__(self, folder: Path, broker: Broker) -> None:
        self.broker = broker
        self.file = folder / "hub.json"
        self.registered: list[dict[str, Any]] = []
        self.status = 200
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = self.headers["Authorization"] == f"Bearer {TOKEN}"
                status = door.status if known else 401
                answer: dict[str, Any] = {"error": "no"}
                if status == 200:
                    assert self.path == "/api/v1/runs/digits%20v1.5/register"
                    door.registered.append(said)
                    answer = {"nats_url": door.broker.url, "seed": door.broker.admit(RUN)}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def open(self, token: str = TOKEN) -> None:
        content = {"url": self.url, "operator_token": token, "viewer_token": "v", "pid": os.getpid()}
        self.file.write_text(json.dumps(content))
        self.file.chmod(0o600)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Hub:
    """A hub's end in a thread of its own: sends, and remembers what it hears."""

    def __init__(self, broker: Broker) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._end = HubEnd(broker.url, broker.hub_seed)
        self._do(self._end.start())
        self._listening = asyncio.run_coroutine_threadsafe(self._end.listen(self._hear), self._loop)

    async def _hear(self, run: str, kind: str, data: bytes) -> None:
        assert run == RUN
        self.heard.append((kind, data))

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def send(self, command: Ping) -> None:
        self._do(self._end.publish_command(RUN, encode(command), command.id, timeout=60.0))

    def of(self, kind: str) -> list[bytes]:
        return [data for found, data in list(self.heard) if found == kind]

    def answered(self) -> list[str]:
        return [msgspec.json.decode(data, type=Outcome).command for data in self.of("ack")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, self.of("event")) if event["kind"] == kind]

    def steps(self) -> list[int]:
        return [step for data in self.of("metric") for _, step, _ in decode_metrics(data).points]

    def close(self) -> None:
        self._do(self._end.close())
        self._listening.cancel()
        self._do(asyncio.sleep(0.05))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Trainer:
    """What a training process does with its link: takes commands, answers each, knows those it had."""

    def __init__(self, folder: Path, hub: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.link = Link(folder, RUN, hub=hub, record=True, replica="replica 0", devices=["cpu"])
        self.taken: list[str] = []

    def attend(self) -> None:
        self.link.tend()
        for data in self.link.take():
            command = msgspec.json.decode(data, type=Ping)
            if command.id not in self.taken:
                self.taken.append(command.id)
            for state in ("accepted", "applied"):
                self.link.tell("ack", encode(Outcome(command=command.id, run=RUN, state=state)))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "nats")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def door(tmp_path: Path, broker: Broker) -> Iterator[Door]:
    door = Door(tmp_path, broker)
    door.open()
    yield door
    door.close()


@pytest.fixture
def hub(broker: Broker) -> Iterator[Hub]:
    hub = Hub(broker)
    yield hub
    hub.close()


@pytest.fixture
def trainer(tmp_path: Path, door: Door) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path / "run", door.file)
    yield trainer
    trainer.link.close()


def until(condition: Callable[[], object], trainer: Trainer | None = None, seconds: float = 60.0) -> None:
    """Waits for a condition; the trainer meanwhile does what it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        if trainer is not None:
            trainer.attend()
        time.sleep(0.002)


def commands(count: int) -> list[Ping]:
    return [Ping(run=RUN, id=f"command-{number:04d}") for number in range(count)]


# --- everything in order ---------------------------------------------------------------------------------------------


def test_commands_arrive_and_everything_said_comes_out(trainer: Trainer, hub: Hub, door: Door, tmp_path: Path) -> None:
    sent = commands(100)  # more than there are slots
    for command in sent:
        hub.send(command)
    until(lambda: len(hub.answered()) >= 200, trainer)
    ids = [command.id for command in sent]
    assert trainer.taken == ids  # in their order
    assert hub.answered() == [identity for identity in ids for _ in range(2)]  # each told once
    for step in range(1, 301):
        trainer.link.metrics(step, {"loss": 1.0 / step})
    trainer.link.beat(300)
    trainer.link.tell("event", json.dumps({"kind": "nonfinite", "step": 3, "message": "dropped"}).encode())
    trainer.link.tell("status", json.dumps({"kind": "status", "status": "running"}).encode())
    until(lambda: hub.events("nonfinite") and hub.of("status") and len(hub.steps()) == 300, trainer)
    assert hub.steps() == list(range(1, 301))
    until(lambda: decode_heartbeat(hub.of("hb")[-1]).step == 300, trainer)
    beat = decode_heartbeat(hub.of("hb")[-1])
    assert (beat.pid, beat.sidecar, beat.replica) == (os.getpid(), trainer.link.sidecar, "replica 0")
    assert list(beat.devices) == ["cpu"]
    assert beat.dropped == {"metric": 0, "event": 0}
    said = door.registered[0]
    assert said["folder"] == str(tmp_path / "run")
    assert (said["pid"], said["replica"], said["devices"]) == (os.getpid(), "replica 0", ["cpu"])
    assert trainer.link.close() == 0


def test_the_way_there_and_back_is_short(trainer: Trainer, hub: Hub) -> None:
    hub.send(Ping(run=RUN, id="warm-up-0"))
    until(lambda: len(hub.answered()) == 2, trainer)
    times = []
    for number in range(30):
        started = time.perf_counter()
        hub.send(Ping(run=RUN, id=f"command-{number}"))
        until(lambda number=number: len(hub.answered()) == 2 * number + 4, trainer)
        times.append(time.perf_counter() - started)
    assert sorted(times)[15] < 0.1  # a bound for a busy machine


def test_a_command_is_carried_out_before_it_is_stored(trainer: Trainer, hub: Hub) -> None:
    hub.send(first := Ping(run=RUN))
    until(lambda: hub.answered().count(first.id) == 2, trainer)
    connection = hub._end._connection
    assert connection is not None
    hub._do(connection.request(f"$JS.API.STREAM.DELETE.{COMMANDS}"))
    said = {second: Ping(run=RUN) for second in ("behind the first", "behind another")}
    # Nobody stores these: what the training gets of them it has been told directly.
    for command, previous in zip(said.values(), (first.id, "somebody-else"), strict=True):
        headers = {ID: command.id, PREVIOUS: previous}
        hub._do(connection.client.publish(subject(RUN, "cmd"), encode(command), headers=headers))
    until(lambda: hub.answered().count(said["behind the first"].id) == 2, trainer)
    assert trainer.taken == [first.id, said["behind the first"].id]
    for command in said.values():  # as a hub does that was not told that they are stored
        hub.send(command)
    until(lambda: hub.answered().count(said["behind another"].id) == 2, trainer)
    assert trainer.taken == [first.id, *(command.id for command in said.values())]


def test_the_last_words_of_a_short_run_are_delivered(tmp_path: Path, hub: Hub, door: Door) -> None:
    trainer = Trainer(tmp_path / "run", door.file)
    trainer.link.metrics(1, {"loss": 0.5})
    trainer.link.tell("event", b'{"kind": "bye"}')
    assert trainer.link.close() == 0
    until(lambda: hub.events("bye") and hub.steps() == [1])


def test_a_sidecar_with_a_hub_stays_small(trainer: Trainer, hub: Hub) -> None:
    hub.send(Ping(run=RUN, id="command-0"))
    until(hub.answered, trainer)
    status = Path(f"/proc/{trainer.link.sidecar}/status")
    if not status.exists():
        pytest.skip("this system does not say how much memory a process has")
    resident = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    assert resident < 90 * 1024
    assert "torch" not in Path(f"/proc/{trainer.link.sidecar}/maps").read_text()


# --- finding the hub -------------------------------------------------------------------------------------------------


def test_a_hub_that_comes_later_is_found_and_gets_what_was_said(tmp_path: Path, broker: Broker, hub: Hub) -> None:
    door = Door(tmp_path, broker)
    trainer = Trainer(tmp_path / "run", door.file)
    try:
        trainer.link.metrics(1, {"loss": 0.5})
        trainer.link.tell("event", b'{"kind": "early"}')
        until(lambda: trainer.link._region.sidecar_age < 5)
        door.open(token="of another hub")
        until(lambda: "does not know the token" in (tmp_path / "run" / "sidecar.log").read_text(), trainer)
        door.open()
        until(lambda: hub.events("early") and hub.steps() == [1], trainer)
        assert trainer.link.close() == 0
    finally:
        trainer.link.close()
        door.close()


def test_a_hub_that_is_started_again_hears_who_is_there(trainer: Trainer, hub: Hub, door: Door) -> None:
    trainer.link.tell("status", b'{"kind": "knobs", "revision": 1}')
    trainer.link.tell("status", b'{"kind": "knobs", "revision": 2}')
    trainer.link.tell("status", b'{"kind": "status", "status": "running"}')
    until(lambda: len(hub.of("status")) == 3, trainer)
    content = json.loads(door.file.read_text()) | {"pid": 1}
    door.file.write_text(json.dumps(content))
    until(lambda: len(hub.of("status")) == 5, trainer)
    assert len(door.registered) == 2
    assert [json.loads(data).get("revision") for data in hub.of("status")[3:]] == [2, None]


def test_what_is_wrong_with_a_hub_is_said(tmp_path: Path, door: Door) -> None:
    assert read_hub_file(tmp_path / "nothing") is None
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(HubError, match="not what a hub writes there"):
        read_hub_file(tmp_path / "broken.json")
    with pytest.raises(HubError, match="cannot read"):
        read_hub_file(tmp_path)
    address = read_hub_file(door.file)
    assert address == HubAddress(door.url, TOKEN, os.getpid())
    assert register(address, RUN, {}).nats_url == door.broker.url
    door.file.chmod(0o666)
    with pytest.raises(HubError, match="written by others"):
        read_hub_file(door.file)
    door.status = 500
    with pytest.raises(HubError, match="does not take this run in: 500"):
        register(address, RUN, {})
    with pytest.raises(HubError, match="token of its own file"):
        register(HubAddress(door.url, "wrong"), RUN, {})
    with pytest.raises(HubError, match="does not answer"):
        register(HubAddress("http://127.0.0.1:1", TOKEN), RUN, {})
    with pytest.raises(HubError, match="not the address"):
        register(HubAddress("file:///etc/passwd", TOKEN), RUN, {})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give a file away")
def test_a_hub_file_of_somebody_else_is_not_used(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(door.file, 1234, -1)
    with pytest.raises(HubError, match="belongs to user 1234"):
        read_hub_file(door.file)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_killed_sidecar_loses_no_command(trainer: Trainer, hub: Hub) -> None:
    sent = commands(60)
    hub.send(sent[0])
    until(hub.answered, trainer)
    for number, command in enumerate(sent[1:], 1):
        hub.send(command)
        if number % 20 == 10:
            until(lambda: trainer.link.sidecar, trainer)
            assert trainer.link.sidecar is not None
            os.kill(trainer.link.sidecar, signal.SIGKILL)
    until(lambda: set(hub.answered()) == {command.id for command in sent}, trainer)
    assert trainer.taken == [command.id for command in sent]  # none overtook another
    assert trainer.link.close() == 0


def test_a_stopped_sidecar_goes_on_where_it_was(trainer: Trainer, hub: Hub) -> None:
    hub.send(Ping(run=RUN, id="command-0"))
    until(lambda: len(hub.answered()) == 2, trainer)
    freeze(trainer.link.sidecar)
    times = []
    for number in range(2000):
        started = time.perf_counter()
        trainer.link.metrics(number, {"loss": 1.0})
        trainer.link.tell("event", b'{"kind": "x"}')
        trainer.attend()
        times.append(time.perf_counter() - started)
    assert sorted(times)[1000] < 200e-6
    hub.send(Ping(run=RUN, id="command-1"))
    os.kill(trainer.link.sidecar, signal.SIGCONT)
    until(lambda: len(hub.answered()) == 4 and len(hub.events("x")) == 2000 and len(hub.steps()) == 2000, trainer)


@pytest.mark.parametrize("empty", [False, True], ids=["its store", "an empty store"])
def test_a_killed_message_server_loses_nothing_that_was_acknowledged(
    trainer: Trainer, hub: Hub, broker: Broker, empty: bool
) -> None:
    sent = commands(30)
    for command in sent[:10]:
        hub.send(command)
    until(lambda: len(set(hub.answered())) == 10, trainer)
    if not empty:
        for command in sent[10:20]:  # acknowledged by the server, perhaps not yet with the run
            hub.send(command)
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGKILL)
    for number in range(50):
        trainer.link.metrics(number, {"loss": 1.0})
    trainer.link.tell("event", b'{"kind": "meanwhile"}')
    if empty:
        shutil.rmtree(broker.folder / "store")
    broker.restart()
    for command in sent[20:]:
        hub.send(command)
    expected = {command.id for command in (sent[:10] + sent[20:] if empty else sent)}
    until(lambda: set(hub.answered()) == expected and hub.events("meanwhile"), trainer)
    assert set(trainer.taken) == expected
    until(lambda: set(hub.steps()) == set(range(50)), trainer)
    assert trainer.link.close() == 0


def test_what_was_dropped_while_the_server_was_away_is_said(trainer: Trainer, hub: Hub, broker: Broker) -> None:
    hub.send(Ping(run=RUN, id="command-0"))
    until(hub.answered, trainer)
    broker.stop()
    event = json.dumps({"kind": "flood", "message": "x" * 10_000}).encode()
    for number in range(200):  # twice what the ring holds
        trainer.link.tell("event", event)
        trainer.link.metrics(number, {"loss": 1.0})
    trainer.link.tell("event", b'{"kind": "newest"}')
    broker.start()
    until(lambda: hub.events("newest") and hub.events("lost"), trainer)
    lost = sum(event["data"]["records"] for event in hub.events("lost"))
    assert lost == 200 - len(hub.events("flood")) > 50
    until(lambda: decode_heartbeat(hub.of("hb")[-1]).dropped["event"] == lost, trainer)
    assert trainer.link.close() >= lost  # to the hub; the recorder may have missed as many


def test_a_message_that_nobody_can_read_is_answered_once(trainer: Trainer, hub: Hub, broker: Broker) -> None:
    """Not from our hub, which would not have sent it. The run rejects it without an id."""
    hub._do(hub._end.publish_command(RUN, b"\xff not a command", "id-of-nonsense"))
    taken: list[bytes] = []

    def take() -> bool:
        taken.extend(trainer.link.take())
        return bool(taken)

    until(take)
    trainer.link.tell("ack", encode(Outcome(command="", run=RUN, state="rejected", message="malformed")))
    until(lambda: hub.of("ack"))
    hub.send(Ping(run=RUN, id="command-0"))
    until(lambda: "command-0" in hub.answered(), trainer)
    assert taken == [b"\xff not a command"]
    assert trainer.taken == ["command-0"]


_PARENT = """
import sys, time
from pathlib import Path
from aetheria.loom.link import Link
link = Link(Path(sys.argv[1]), sys.argv[3], hub=Path(sys.argv[2]), record=True)
print(link.sidecar, flush=True)
for number in range(10_000_000):
    for data in link.take():
        print("taken", flush=True)  # and killed before it has answered
        time.sleep(60)
    time.sleep(0.002)
"""


def test_a_command_that_a_killed_run_did_not_answer_comes_to_its_next_life(
    tmp_path: Path, door: Door, hub: Hub
) -> None:
    (tmp_path / "run").mkdir()
    arguments = [sys.executable, "-c", _PARENT, str(tmp_path / "run"), str(door.file), RUN]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    sidecar = int(parent.stdout.readline())
    hub.send(Ping(run=RUN, id="command-0"))
    assert parent.stdout.readline() == "taken\n"
    parent.kill()
    parent.communicate()
    until(lambda: not is_running(sidecar))
    hub.send(Ping(run=RUN, id="command-1"))
    trainer = Trainer(tmp_path / "run", door.file)
    until(lambda: len(hub.answered()) >= 4, trainer)
    assert trainer.taken == ["command-0", "command-1"]
    assert trainer.link.close() == 0


def test_a_burst_larger_than_every_buffer(trainer: Trainer, hub: Hub) -> None:
    sent = commands(400)
    large = "x" * 60_000
    for number, command in enumerate(sent):
        hub.send(msgspec.structs.replace(command, reason=large if number % 4 == 0 else ""))
    until(lambda: len(set(hub.answered())) == len(sent), trainer)
    assert trainer.taken == [command.id for command in sent]
    assert len(list(itertools.groupby(hub.answered()))) == len(sent)
