"""The hub, as a process: who is let in, what it serves, what survives when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from aetheria.loom.broker import find_binary
from aetheria.loom.keys import new_seed
from aetheria.protocol import command_of, encode
from hub_cases import HubProcess, running_hub, running_trainer, wait_for

READ = ["/", "/api/v1/hub", "/api/v1/runs", "/api/v1/replicas", "/api/v1/openapi.json", "/nothing"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub") / "home", umask=0) as running:
        yield running


@pytest.fixture(scope="module")
def run(hub: HubProcess) -> Iterator[str]:
    with running_trainer(hub) as name:
        with client(hub) as http:
            wait_for(lambda: http.get(f"/api/v1/runs/{name}/knobs").json().get("schema"), "the run's knobs")
        yield name


def client(hub: HubProcess, token: str | None = None, **headers: str) -> httpx.Client:
    token = hub.operator if token is None else token
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=hub.url, headers=authorization | headers, trust_env=False, timeout=30.0)


def command(op: str = "ping", args: dict[str, Any] | None = None, **fields: Any) -> bytes:
    return encode(command_of(op, args, **fields))


# --- who is let in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "wrong", "ä", "x" * 5000])
def test_nothing_is_served_without_a_token_but_a_sign_of_life(hub: HubProcess, token: str) -> None:
    with client(hub, "") as http:
        headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            for path in READ:
                assert http.request(method, path, headers=headers).status_code == 401, (method, path)
        answer = http.get("/healthz", headers=headers)
        assert (answer.status_code, answer.text) == (200, "ok")


@pytest.mark.parametrize("scheme", ["Basic {}", "{}", "Bearer", "Bearer {} more", "bearer{}"])
def test_a_token_is_taken_as_a_bearer_only(hub: HubProcess, scheme: str) -> None:
    with client(hub, "") as http:
        answer = http.get("/api/v1/hub", headers={"Authorization": scheme.format(hub.operator)})
        assert answer.status_code == 401


def test_a_viewer_looks_and_changes_nothing(hub: HubProcess, run: str) -> None:
    with client(hub, hub.viewer) as http:
        assert http.get("/api/v1/hub").json()["role"] == "viewer"
        assert http.get(f"/api/v1/runs/{run}").status_code == 200
        for path in (f"/api/v1/runs/{run}/commands", f"/api/v1/runs/{run}/register", "/api/v1/tickets", "/nothing"):
            answer = http.post(path, content=command())
            assert answer.status_code == 403
            assert "operator" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/runs", "/api/v1/hub"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Host": "evil.example:80@127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": ""},
    ],
)
def test_other_hosts_and_origins_are_refused(hub: HubProcess, path: str, method: str, headers: dict[str, str]) -> None:
    with client(hub) as http:
        assert http.request(method, path, headers=headers).status_code == 403


def test_its_own_origin_is_taken(hub: HubProcess) -> None:
    port = hub.url.rsplit(":", 1)[1]
    with client(hub) as http:
        for name in ("127.0.0.1", "localhost"):
            headers = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
            assert http.get("/api/v1/hub", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer {token}", "Origin": "http://evil.example"}, 403),
        ({"Authorization": "Bearer {token}", "Host": "evil.example"}, 403),
        ({"Authorization": "Bearer {token}"}, 101),
    ],
)
def test_the_web_socket_is_behind_the_same_gate(hub: HubProcess, headers: dict[str, str], status: int) -> None:
    port = int(hub.url.rsplit(":", 1)[1])
    lines = {"Host": f"127.0.0.1:{port}"} | {key: text.format(token=hub.viewer) for key, text in headers.items()}
    lines |= {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    lines |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    request = "GET /api/v1/live HTTP/1.1\r\n" + "".join(f"{key}: {text}\r\n" for key, text in lines.items()) + "\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request.encode())
        assert connection.recv(4096).split()[1] == str(status).encode()


def test_a_ticket_is_exchanged_for_a_cookie_once(hub: HubProcess, run: str) -> None:
    with client(hub) as http:
        address = http.post("/api/v1/tickets", params={"role": "viewer"}).json()["url"]
    with client(hub, "") as browser:
        answer = browser.get(address)
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 200
        assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
        assert hub.viewer not in cookie
        assert browser.get("/api/v1/hub").json()["role"] == "viewer"
        assert browser.post(f"/api/v1/runs/{run}/commands", content=command()).status_code == 403
        assert browser.get("/api/v1/hub", headers={"Origin": "http://localhost:1"}).status_code == 403
    with client(hub, "") as other:
        assert other.get(address).status_code == 401
        assert other.get("/?token=wrong").status_code == 401
        assert other.get("/api/v1/hub", headers={"Cookie": "aetheria_hub=x; other"}).status_code == 401
        assert other.get(f"/api/v1/hub?token={hub.operator}").status_code == 401


def test_headers_that_keep_pages_apart(hub: HubProcess) -> None:
    with client(hub) as http:
        for answer in (http.get("/"), http.get("/api/v1/hub"), http.get("/api/v1/hub", headers={"Origin": "null"})):
            assert "script-src 'self'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["cache-control"] == "no-store"
            assert "server" not in answer.headers
            assert "access-control-allow-origin" not in answer.headers


def test_it_listens_on_loopback_only(hub: HubProcess) -> None:
    port = int(hub.url.rsplit(":", 1)[1])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_whatever_the_umask_nobody_else_can_read_its_files(hub: HubProcess, run: str) -> None:
    for path in [hub.folder, *hub.folder.rglob("*")]:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            continue  # replaced meanwhile
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_secrets_stay_out_of_the_log(hub: HubProcess, run: str) -> None:
    log = hub.log.read_text()
    assert hub.operator not in log
    assert hub.viewer not in log
    assert not re.search(r"\bS[UA][A-Z2-7]{40,}", log)  # seeds of the message server


# --- what is asked for badly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not a command"),
        (b"\xff", "not a command"),
        (b"{}", "not a command"),
        (b'{"op": "dance"}', "dance"),
        (b'{"op": "ping", "more": 1}', "more"),
        (b'{"op": "ping", "id": "x"}', "id"),
        (b'{"op": "set", "args": {"values": {}}}', "at least one knob"),
        (b'{"op": "ping", "run": "another"}', "another"),
        (b'{"op": "note", "args": {"text": "' + b"x" * 70_000 + b'"}}', "at most 65,536"),
    ],
)
def test_what_is_no_command_is_refused_in_a_sentence(hub: HubProcess, run: str, body: bytes, told: str) -> None:
    with client(hub) as http:
        answer = http.post(f"/api/v1/runs/{run}/commands", content=body)
        assert answer.status_code == 422
        assert told in answer.json()["detail"]


def test_floods_of_bytes_are_refused_before_they_come(hub: HubProcess, run: str) -> None:
    port = int(hub.url.rsplit(":", 1)[1])
    head = f"POST /api/v1/runs/{run}/commands HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Authorization: Bearer {hub.operator}\r\n"
    for length, status in (("Content-Length: 99999999999", b"413"), ("Transfer-Encoding: chunked", b"411")):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n".encode())
            assert connection.recv(4096).split()[1] == status


@pytest.mark.parametrize("path", ["", "/knobs", "/journal", "/metrics", "/events", "/commands/0123456789"])
def test_an_unknown_run_is_not_found(hub: HubProcess, run: str, path: str) -> None:
    with client(hub) as http:
        answer = http.get(f"/api/v1/runs/nobody{path}")
        assert answer.status_code == 404
        assert "nobody" in answer.json()["detail"]
        assert http.post("/api/v1/runs/nobody/commands", content=command()).status_code == 404


@pytest.mark.parametrize(
    "query", ["metrics?points=3", "metrics?from=x", "commands/0123456789?wait=1e9", "events?last=0"]
)
def test_parameters_that_make_no_sense_are_told_in_a_sentence(hub: HubProcess, run: str, query: str) -> None:
    with client(hub) as http:
        answer = http.get(f"/api/v1/runs/{run}/{query}")
        assert answer.status_code == 422
        assert isinstance(answer.json()["detail"], str)


def test_a_folder_that_is_not_the_runs_is_not_looked_into(hub: HubProcess) -> None:
    with client(hub) as http:
        for folder in ("/etc", "relative/digits", "/runs/another"):
            answer = http.post("/api/v1/runs/digits/register", json={"folder": folder})
            assert answer.status_code == 422


def test_an_id_belongs_to_one_command(hub: HubProcess, run: str) -> None:
    path = f"/api/v1/runs/{run}/commands"
    first = command("note", {"text": "one"}, id="0123456789abcdef")
    with client(hub) as http:
        for _ in range(2):
            answer = http.post(path, content=first, params={"wait": 10})
            assert answer.status_code == 202
            assert answer.json()["outcome"]["state"] == "applied"
        assert http.post(path, content=command("note", {"text": "two"}, id="0123456789abcdef")).status_code == 409
        journal = http.get(f"/api/v1/runs/{run}/journal").json()
        assert len([line for line in journal if line["outcome"]["command"] == "0123456789abcdef"]) == 2


def test_a_finished_run_takes_no_commands(hub: HubProcess) -> None:
    with running_trainer(hub, "short") as name, client(hub) as http:
        path = f"/api/v1/runs/{name}"
        wait_for(lambda: http.get(f"{path}/knobs").json().get("schema"), "the run's knobs")
        stopped = http.post(f"{path}/commands", content=command("stop"), params={"wait": 10}).json()
        assert stopped["outcome"]["state"] == "applied"
        wait_for(lambda: http.get(path).json()["status"] == "completed", "the run to end")
        answer = http.post(f"{path}/commands", content=command())
        assert answer.status_code == 409
        assert f"aetheria continue {name}" in answer.json()["detail"]


# --- what it serves --------------------------------------------------------------------------------------------------


def test_runs_replicas_curves_and_the_journal(hub: HubProcess, run: str) -> None:
    with client(hub, hub.viewer) as http:
        wait_for(lambda: http.get(f"/api/v1/runs/{run}").json()["step"] > 100, "a hundred steps")
        line = next(line for line in http.get("/api/v1/runs").json() if line["id"] == run)
        assert (line["status"], line["connected"], line["metrics"]["loss"]["value"] > 0) == ("running", True, True)
        assert any(replica["run"] == run and replica["devices"] == ["cpu"] for replica in http.get(READ[3]).json())
        everything = wait_for(lambda: http.get(f"/api/v1/runs/{run}/metrics").json().get("loss"), "a curve")
        assert everything["steps"][:2] == [10, 20]
        curve = http.get(f"/api/v1/runs/{run}/metrics", params={"names": "loss", "from": 50, "points": 4}).json()[
            "loss"
        ]
        assert curve["steps"][0] == 50
        assert len(curve["steps"]) <= 4
        assert http.get(f"/api/v1/runs/{run}/metrics", params={"names": "nothing"}).json()["nothing"]["steps"] == []
        assert isinstance(http.get(f"/api/v1/runs/{run}/journal").json(), list)
        assert set(http.get(f"/api/v1/runs/{run}/events").json()) == {"told", "recorded", "notes"}
        paths = http.get("/api/v1/openapi.json").json()["paths"]
        assert "/api/v1/runs/{run}/commands/{command_id}" in paths


def test_an_outcome_is_waited_for(hub: HubProcess, run: str) -> None:
    sent = command("set", {"values": {"learning_rate": 0.25}}, reason="a test", author="ada")
    with client(hub) as http:
        answer = http.post(f"/api/v1/runs/{run}/commands", content=sent).json()
        path = f"/api/v1/runs/{run}/commands/{answer['id']}"
        told = http.get(path, params={"wait": 20, "until": "final"}).json()
        assert (told["outcome"]["state"], told["command"]["author"]) == ("applied", "ada")
        assert told["outcome"]["result"]["after"] == {"learning_rate": 0.25}
        newest = http.get(f"/api/v1/runs/{run}/commands", params={"last": 1}).json()
        assert newest[0]["command"]["id"] == answer["id"]
        known = wait_for(
            lambda: (
                (state := http.get(f"/api/v1/runs/{run}/knobs").json())["observed"]["learning_rate"] == 0.25 and state
            ),
            "the observed value",
        )
        assert known["desired"]["learning_rate"] == 0.25
        begun = time.monotonic()
        assert http.get(f"/api/v1/runs/{run}/commands/{uuid.uuid4().hex}", params={"wait": 0.3}).status_code == 404
        assert time.monotonic() - begun < 20.0


def test_the_live_feed_is_resumed_where_it_broke(hub: HubProcess, run: str) -> None:
    async def listen(since: int | None, until: str) -> list[dict[str, Any]]:
        query = f"?run={run}" + (f"&since={since}" if since is not None else "")
        address = hub.url.replace("http", "ws") + f"/api/v1/live{query}"
        headers = {"Authorization": f"Bearer {hub.viewer}"}
        found: list[dict[str, Any]] = []
        async with asyncio.timeout(20.0):
            async with websockets.connect(address, additional_headers=headers, proxy=None, close_timeout=0.2) as live:
                async for text in live:
                    found.append(json.loads(text))
                    if found[0]["type"] == "hello" and found[-1]["type"] == until:
                        return found
        raise AssertionError("the hub hung up")

    begun = asyncio.run(listen(None, "metrics"))
    assert {message["type"] for message in begun} >= {"hello", "metrics"}
    with client(hub) as http:
        sent = [
            http.post(f"/api/v1/runs/{run}/commands", content=command(), params={"wait": 10}).json()["id"]
            for _ in range(3)
        ]
    missed = asyncio.run(listen(begun[0]["seq"], "beat"))
    numbered = [message for message in missed[1:] if message["seq"]]
    assert [message["seq"] for message in numbered] == sorted({message["seq"] for message in numbered})
    applied = [m["data"]["command"] for m in numbered if m["type"] == "outcome" and m["data"]["state"] == "applied"]
    assert applied == sent


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_burst_of_ten_thousand_commands_meets_the_limit(hub: HubProcess, run: str) -> None:
    port = int(hub.url.rsplit(":", 1)[1])
    # All of one id, so that the run has little to do: what is counted is the asking.
    body = command(id="burst-0123456789")
    head = f"POST /api/v1/runs/{run}/commands HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Authorization: Bearer {hub.operator}\r\nContent-Length: {len(body)}\r\n\r\n"

    async def ask(times: int) -> list[tuple[int, bytes]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answers = []
        for _ in range(times):
            writer.write(head.encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", lines)
            assert length is not None
            answers.append((int(lines.split()[1]), lines + await reader.readexactly(int(length[1]))))
        writer.close()
        await writer.wait_closed()
        return answers

    async def burst() -> list[tuple[int, bytes]]:
        return [answer for answers in await asyncio.gather(*(ask(500) for _ in range(20))) for answer in answers]

    begun = time.monotonic()
    answers = asyncio.run(burst())
    taken = [text for status, text in answers if status == 202]
    refused = [text for status, text in answers if status == 429]
    assert [answer for answer in answers if answer[0] not in (202, 429)] == []
    assert len(answers) == 10_000
    assert 500 <= len(taken) <= 510 + 50 * (time.monotonic() - begun)
    assert b"Too many commands" in refused[0]
    assert b"retry-after: 1" in refused[0]
    with client(hub) as http:
        assert http.get("/api/v1/hub").status_code == 200  # looking is not limited
        wait_for(lambda: http.post(f"/api/v1/runs/{run}/commands", content=command()).status_code == 202, "room again")


def test_a_second_hub_and_a_taken_port_are_told(tmp_path: Path, hub: HubProcess) -> None:
    second = HubProcess(hub.home)
    assert second.process.wait(20) == 2
    assert f"process {hub.process.pid}" in hub.log.read_text()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = HubProcess(tmp_path / "home", "--port", str(other.getsockname()[1]))
        assert taken.process.wait(20) == 2
        assert f"cannot use port {other.getsockname()[1]}" in taken.log.read_text()
    assert hub.process.poll() is None
    assert json.loads((hub.folder / "hub.json").read_text())["pid"] == hub.process.pid


def test_credentials_that_are_missing_are_told(tmp_path: Path) -> None:
    for arguments in (["--nats", "nats://127.0.0.1:1"], ["--nats", "nats://127.0.0.1:1", "--creds", "/nowhere"]):
        other = HubProcess(tmp_path / "home", *arguments)
        assert other.process.wait(20) == 2
    assert "--creds FILE" in other.log.read_text()
    assert "/nowhere cannot be read" in other.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--replicas", "3"], "cannot keep 3 replicas. Name a cluster of your own, with --nats URL and --creds FILE"),
        (["--replicas", "0"], "0 replicas are not possible: JetStream keeps 1 to 5"),
    ],
)
def test_replicas_that_cannot_be_are_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    other = HubProcess(tmp_path / "home", *arguments)
    assert other.process.wait(20) == 2
    assert told in other.log.read_text()


def test_replicas_are_wanted_of_the_cluster(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [find_binary(), "--addr", "127.0.0.1", "--port", str(port), "--jetstream", "--store_dir", tmp_path]
    server = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    try:
        seed = tmp_path / "seed"
        seed.write_text(new_seed())

        def listens() -> bool:
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens, "the server")
        given = ["--nats", f"nats://127.0.0.1:{port}", "--creds", str(seed), "--replicas", "3"]
        other = HubProcess(tmp_path / "home", *given)
        assert other.process.wait(20) == 2
        assert "replicas > 1 not supported" in other.log.read_text()  # the server says so: it is no cluster
    finally:
        server.kill()
        server.wait()


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    home = tmp_path / "home"
    hub = HubProcess(home).wait()
    try:
        with running_trainer(hub) as name:
            acknowledged: list[str] = []
            path = f"/api/v1/runs/{name}"
            with client(hub) as http:
                wait_for(lambda: http.get(f"{path}/knobs").json().get("schema"), "the run's knobs")
                for index in range(20):
                    text = command("note", {"text": f"{index}"})
                    acknowledged.append(http.post(f"{path}/commands", content=text).json()["id"])
                seq = http.get("/api/v1/hub").json()["seq"]
            tokens, url = (hub.operator, hub.viewer), hub.url
            hub.kill()
            hub = HubProcess(home).wait()
            assert ((hub.operator, hub.viewer), hub.url) == (tokens, url)
            with client(hub) as http:
                assert http.get("/api/v1/hub").json()["seq"] >= seq
                for command_id in acknowledged:
                    told = http.get(f"{path}/commands/{command_id}", params={"wait": 20}).json()
                    assert told["outcome"]["state"] == "applied", told
                journal = http.get(f"{path}/journal").json()
                done = [line["outcome"]["command"] for line in journal if line["outcome"]["state"] == "applied"]
                assert done == acknowledged  # each once, in their order
    finally:
        hub.end()


def test_a_command_kept_and_not_published_is_published_at_the_next_start(tmp_path: Path) -> None:
    from aetheria.weaver.store import Store

    home = tmp_path / "home"
    hub = HubProcess(home).wait()
    try:
        with running_trainer(hub) as name:
            with client(hub) as http:
                wait_for(lambda: http.get(f"/api/v1/runs/{name}/knobs").json().get("schema"), "the run's knobs")
            hub.kill()
            store = Store(hub.folder / "hub.db")
            kept = command_of("set", {"values": {"learning_rate": 0.75}}, run=name)
            store.accept(kept, time.time())  # and here the hub was killed
            store.close()
            hub = HubProcess(home).wait()
            with client(hub) as http:
                told = http.get(f"/api/v1/runs/{name}/commands/{kept.id}", params={"wait": 20}).json()
                assert told["outcome"]["state"] == "applied"
    finally:
        hub.end()


def test_it_goes_on_when_the_message_server_was_killed(tmp_path: Path) -> None:
    with running_hub(tmp_path / "home") as hub, running_trainer(hub) as name, client(hub) as http:
        path = f"/api/v1/runs/{name}"
        wait_for(lambda: http.get(f"{path}/knobs").json().get("schema"), "the run's knobs")
        os.kill(int((hub.folder / "nats" / "nats.pid").read_text()), signal.SIGKILL)
        sent = command("note", {"text": "while it is away"})
        answer = wait_for(
            lambda: (
                (got := http.post(f"{path}/commands", content=sent, params={"wait": 20})).status_code == 202 and got
            ),
            "the command to be taken",
            40.0,
        )
        assert answer.json()["outcome"]["state"] == "applied"
