"""Something that trains, as far as a hub can tell: a process with a run folder, knobs and a desk.

    python hub_trainer.py RUNS_DIR NAME

It finds the hub as a sidecar does, answers commands between two steps, and ends when it is told to, or by SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec

from aetheria.client.location import find_hub
from aetheria.control.desk import Action, Desk, Done
from aetheria.control.journal import Journal
from aetheria.control.knobs import Knob, Knobs
from aetheria.errors import CommandError, HubError
from aetheria.loom.messages import Heartbeat, MetricBatch, encode_metrics
from aetheria.loom.recorder import Recorder
from aetheria.loom.run_end import RunEnd
from aetheria.protocol import Outcome, encode
from aetheria.runs import RunFolder


class Trainer:
    def __init__(self, runs_dir: Path, name: str) -> None:
        self.folder = RunFolder.create(runs_dir, name, seed=0)
        self.folder.acquire()
        self.folder.update(status="running")
        self.recorder = Recorder(self.folder.path / "run.db")
        self.values: dict[str, Any] = {"learning_rate": 0.001, "learning_rate.head": 0.01, "optimizer": "sgd"}
        self.knobs = Knobs(
            [
                self.knob("learning_rate", float, ge=0.0, le=1.0, help="step size | of every group"),
                self.knob("learning_rate.head", float, ge=0.0, le=1.0),
                self.knob("optimizer", str, choices=["sgd", "adamw"]),
            ]
        )
        self.step, self.paused, self.stopped = 0, False, False
        self.reports: asyncio.Queue[tuple[str, bytes, str]] = asyncio.Queue()
        journal = Journal(self.folder.path / "journal.jsonl")
        self.desk = Desk(self.folder.run_id, journal, self.knobs, self.actions(), self.tell)

    def knob(self, key: str, kind: Any, **options: Any) -> Knob:
        def put(value: Any) -> None:
            self.values[key] = value

        return Knob(key, kind, put, lambda: self.values[key], **options)

    def actions(self) -> dict[str, Action]:
        def pause(command: Any) -> None:
            self.paused = True
            self.event("status", {"status": "paused"})

        def resume(command: Any) -> None:
            self.paused = False
            self.event("status", {"status": "running"})

        def stop(command: Any) -> None:
            self.stopped = True

        def fail(command: Any) -> None:
            raise RuntimeError("the test data are broken")

        def no_snapshot(command: Any) -> None:
            raise CommandError(f"there is no snapshot of step {command.args.step}.")

        return {
            "pause": Action(pause),
            "resume": Action(resume),
            "stop": Action(stop),
            "snapshot": Action(lambda command: Done(f"step-{self.step:08d}", {"name": command.args.name})),
            "validate": Action(lambda command: Done("", {"val_loss": 0.25})),
            "test": Action(fail),
            "rewind": Action(lambda command: None, no_snapshot),
            "note": Action(lambda command: None),
            "ping": Action(lambda command: None),
        }

    def tell(self, outcome: Outcome) -> None:
        self.reports.put_nowait(("ack", encode(outcome), ""))
        if outcome.state == "applied":
            self.tell_knobs()

    def tell_knobs(self) -> None:
        told = {"schema": self.knobs.schema(), "values": self.knobs.values(), "revision": self.desk.revision}
        self.event("event", {"kind": "knobs", **told})

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.reports.put_nowait((kind, json.dumps(data).encode(), ""))

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(self, "stopped", True))
        talking = asyncio.create_task(self.talk_always())
        self.tell_knobs()
        while not self.stopped:
            await asyncio.sleep(0.005)
            if not self.paused:
                self.step += 1
                if self.step % 10 == 0:
                    loss = 1 / self.step
                    self.recorder.metrics({"loss": loss}, self.step)
                    batch = MetricBatch(points=[(0.0, self.step, {"loss": loss})])
                    self.reports.put_nowait(("metric", encode_metrics(batch), ""))
        async with asyncio.timeout(30.0):
            while not self.reports.empty():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        talking.cancel()
        self.recorder.close()
        self.folder.update(status="completed", global_step=self.step)
        self.folder.release()

    async def talk_always(self) -> None:
        while True:
            try:
                await self.talk()
            except (HubError, httpx.HTTPError, OSError, ValueError):
                await asyncio.sleep(0.1)

    async def talk(self) -> None:
        hub = find_hub()
        said = {"folder": str(self.folder.path), "pid": os.getpid(), "host": os.uname().nodename, "devices": ["cpu"]}
        headers = {"Authorization": f"Bearer {hub.token}"}
        async with httpx.AsyncClient(base_url=hub.url, headers=headers, trust_env=False) as client:
            answer = await client.post(f"/api/v1/runs/{self.folder.run_id}/register", json=said)
        if not answer.is_success:
            raise HubError(answer.text)
        granted = answer.json()
        end = RunEnd(granted["nats_url"], granted["seed"], self.folder.run_id)
        await end.connect()
        work = [asyncio.create_task(task) for task in (self.beat(end), self.report(end), self.obey(end))]
        try:
            await asyncio.wait([*work, asyncio.create_task(end.closed.wait())], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await end.close()

    async def beat(self, end: RunEnd) -> None:
        while True:
            beat = Heartbeat(host=os.uname().nodename, pid=os.getpid(), devices=["cpu"], step=self.step)
            await end.beat(msgspec.json.encode(beat))
            await asyncio.sleep(0.2)

    async def report(self, end: RunEnd) -> None:
        while True:
            report = await self.reports.get()
            try:
                await end.report([report])
            except HubError:
                self.reports.put_nowait(report)
                raise

    async def obey(self, end: RunEnd) -> None:
        while True:
            try:
                arrival = await end.next_command()
            except HubError:
                if end.closed.is_set():
                    raise
                await asyncio.sleep(0.05)  # the hub has not made the consumer yet
                continue
            self.desk.receive(arrival.data, self.step)
            await arrival.done()


if __name__ == "__main__":
    trainer = Trainer(Path(sys.argv[1]), sys.argv[2])
    print(trainer.folder.run_id, flush=True)
    asyncio.run(trainer.run())
