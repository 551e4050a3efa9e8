"""Many runs at one hub: what gets lost, and what hub and message server need for it.

Each simulated Weavelet does what a sidecar does, with the sidecar's own connection: it registers, gives its signs
of life, waits for commands, and has one batch of metrics stored every second. Their machines are elsewhere, so the
hub reads no folders of theirs. They live in processes of their own, which count to neither side. The hub knows their
keys from before, as one that was started again; what a new run waits for is measured afterwards.

A batch has arrived when the message server has delivered it to the hub for the first time and the hub has said that it
took it. That the right thing arrived is looked up in the hub's view of the runs: each one's newest batch.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from aetheria.client import connect
from aetheria.errors import HubError
from aetheria.loom.broker import Broker
from aetheria.loom.connection import Connection
from aetheria.loom.hub_file import HubAddress, default_hub_file, read_hub_file, register
from aetheria.loom.keys import new_seed
from aetheria.loom.messages import BEATS, Heartbeat, MetricBatch, Point, encode_metrics
from aetheria.loom.private_files import private_folder, write_private
from aetheria.loom.run_end import RunEnd
from aetheria.loom.subjects import METRICS as STREAM
from benchmarks.common import Figure, summarise
from benchmarks.control_script import METRICS
from benchmarks.control_stage import Stage, cores, memory, stage, wait_for

__all__ = ["measure"]

RUNS, SECONDS = 1000, 60
RUNS_SHORT, SECONDS_SHORT = 100, 5
PROCESSES = 2
STEPS = 10  # in a batch
ATTEMPTS = 20  # to connect
NEW = 20  # runs that the hub has never heard of


def measure(short: bool) -> list[Figure]:
    """Returns the figures."""
    count, seconds = (RUNS_SHORT, SECONDS_SHORT) if short else (RUNS, SECONDS)
    share = count // PROCESSES
    with stage(lambda home: _hand_out_keys(home, count)) as hub, ExitStack() as swarms:
        started = [
            swarms.enter_context(
                hub.process("-m", "benchmarks.control_swarm", str(number * share), str(share), str(seconds))
            )
            for number in range(PROCESSES)
        ]
        for swarm in started:
            _line(swarm.stdout, "ready")
        results: list[dict[str, Any]] = []

        def send() -> None:
            for swarm in started:
                swarm.stdin.write("go\n")  # type: ignore[union-attr]
                swarm.stdin.flush()  # type: ignore[union-attr]
            results.extend(json.loads(_line(swarm.stdout, "{")) for swarm in started)

        used, taken = cores([hub.hub.pid, hub.messages], send)
        megabytes = [memory(process) for process in (hub.hub.pid, hub.messages)]
        arrived, again = asyncio.run(_arrived(hub))
        newest = wait_for(lambda: _newest(hub, count, seconds), "the hub does not show the newest batch of every run")
        admitting = [_admit(hub, f"new-{number}") for number in range(NEW)]
    sent, stored = (sum(result[key] for result in results) for key in ("sent", "stored"))
    told = f"{sent:,} sent in {taken:.0f} s, {stored:,} acknowledged, {arrived:,} taken by the hub, {again:,} of them "
    told += f"more than once; the newest of {newest:,} runs is in the hub's view"
    return [
        Figure(f"{count:,} runs: batches lost", "batches", float(sent - arrived), samples=sent, target=0.0, note=told),
        _single(f"{count:,} runs: hub and message server", "cores", sum(used), 1.0, _parts(used, "")),
        _single(f"{count:,} runs: their memory, at its most", "MB", sum(megabytes), 500.0, _parts(megabytes, "MB")),
        summarise(f"{count:,} runs: until a new one is let in", "ms", admitting),
    ]


def _hand_out_keys(home: Path, count: int) -> None:
    """Lets a hub that is still to start find the keys of all simulated runs."""
    keys = home / "hub" / "nats" / "keys"
    keys.mkdir(parents=True)
    for folder in (keys, *keys.parents[:2]):
        private_folder(folder)
    for number in range(count):
        write_private(keys / f"run-{_name(number)}.seed", f"{new_seed()}\n".encode())


def _admit(hub: Stage, run: str) -> float:
    """Returns how many milliseconds it takes to let a new run in."""
    begun = time.perf_counter()
    register(hub.address, run, {"host": "node-new"}, timeout=60.0)
    return 1e3 * (time.perf_counter() - begun)


def _name(number: int) -> str:
    return f"simulated-{number:04}"


def _single(name: str, unit: str, value: float, target: float | None, note: str) -> Figure:
    return Figure(name, unit, value, samples=1, target=target, note=note)


def _parts(values: list[float], unit: str) -> str:
    return f"hub {values[0]:.2f} {unit}".rstrip() + f", message server {values[1]:.2f} {unit}".rstrip()


def _line(stream: Any, beginning: str) -> str:
    for line in stream:
        if line.startswith(beginning):
            return str(line)
    raise RuntimeError(f"a swarm ended before it said '{beginning}': what it printed says why.")


async def _arrived(hub: Stage) -> tuple[int, int]:
    """Returns how many batches the hub took, and how many of them were delivered more than once."""
    broker = Broker(hub.home / "hub" / "nats")
    port = (hub.home / "hub" / "nats" / "port").read_text().strip()
    connection = await Connection.open(f"nats://127.0.0.1:{port}", broker.hub_seed, "benchmark")
    try:
        deadline = time.monotonic() + 10
        while True:
            state = await connection.request(f"$JS.API.CONSUMER.INFO.{STREAM}.hub")
            waiting = state["num_pending"] + state["num_ack_pending"]
            if not waiting or time.monotonic() > deadline:
                again = state["delivered"]["consumer_seq"] - state["ack_floor"]["consumer_seq"]
                return state["ack_floor"]["consumer_seq"] - state["num_redelivered"], state["num_redelivered"] + again
            await asyncio.sleep(0.1)
    finally:
        await connection.close()


def _newest(hub: Stage, count: int, seconds: int) -> int:
    """Returns how many runs there are, once the newest batch of each is in the hub's view; 0 until then."""
    with connect(hub.address.url, hub.address.operator_token) as client:
        last = [point for run in client.runs() if (point := run.metrics.get("batch")) is not None]
    return len(last) if [point.value for point in last].count(float(seconds - 1)) == count else 0


# --- in a process of its own -----------------------------------------------------------------------------------------


class Simulated:
    """A run that does not train."""

    def __init__(self, number: int, phase: float, address: HubAddress) -> None:
        self.name = _name(number)
        self.phase = phase
        self.sent = self.stored = 0
        said = {"host": f"node-{number:04}", "pid": number + 1, "replica": "", "devices": ["cuda:0"]}
        access = register(address, self.name, said, timeout=60.0)
        self.end = RunEnd(access.nats_url, access.seed, self.name)

    async def enter(self) -> None:
        """Connects, and lets the hub know. Tries again, as a sidecar does: there is a crowd at the door."""
        for attempt in range(ATTEMPTS):
            try:
                await self.end.connect()
                break
            except HubError:
                if attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.2)
        await self._beat(0)
        self.commands = asyncio.create_task(self._wait_for_commands())

    async def work(self, begin: float, seconds: int) -> None:
        """Sends a batch and a sign of life every second.

        Args:
            begin: when, by `time.monotonic`.
            seconds: for how long.
        """
        for second in range(seconds):
            await asyncio.sleep(max(0.0, begin + self.phase + second - time.monotonic()))
            data = self._batch(second)
            self.sent += 1
            with suppress(HubError):  # then it was sent, and not stored: that is what is counted
                await self.end.report([("metric", data, f"{self.name}-{second}")])
                self.stored += 1
            if second % BEATS == 0:
                await self._beat(STEPS * (second + 1))

    async def leave(self) -> None:
        """Hangs up."""
        self.commands.cancel()
        await asyncio.gather(self.commands, return_exceptions=True)
        await self.end.close()

    def _batch(self, second: int) -> bytes:
        now = time.time()
        values = {"batch": float(second)} | {f"metric {number}": now * number for number in range(1, METRICS)}
        points: list[Point] = [(now, second * STEPS + step, values) for step in range(STEPS)]
        return encode_metrics(MetricBatch(points=points))

    async def _beat(self, step: int) -> None:
        beat = Heartbeat(host=self.name, pid=1, sidecar=2, step=step, time=time.time())
        await self.end.beat(msgspec.json.encode(beat))

    async def _wait_for_commands(self) -> None:
        while not self.end.closed.is_set():
            try:
                await (await self.end.next_command()).done()
            except HubError:  # its consumer is being made
                await asyncio.sleep(0.5)


async def _swarm(first: int, count: int, seconds: int) -> None:
    address = read_hub_file(default_hub_file())
    if address is None:
        raise HubError("there is no hub.")
    runs = []
    for number in range(first, first + count):
        runs.append(await asyncio.to_thread(Simulated, number, (number - first) / count, address))
        await runs[-1].enter()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    begin = time.monotonic() + 0.1
    await asyncio.gather(*(run.work(begin, seconds) for run in runs))
    print(json.dumps({"sent": sum(run.sent for run in runs), "stored": sum(run.stored for run in runs)}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(run.leave() for run in runs))


if __name__ == "__main__":
    asyncio.run(_swarm(*map(int, sys.argv[1:4])))
