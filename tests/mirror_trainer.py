"""A training whose folder the hub cannot see: it says that it runs on another machine. A real sidecar is beside it.

    AETHERIA_HOST=elsewhere python mirror_trainer.py RUNS_DIR NAME     a new run
    AETHERIA_HOST=elsewhere python mirror_trainer.py FOLDER            continues the run, ten steps back

It prints the run's folder, answers commands between two steps, and ends when it is told to, or by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from aetheria.control.desk import Action, Boundary, Desk, Done
from aetheria.control.journal import Journal
from aetheria.control.knobs import Knob, Knobs
from aetheria.loom.link import Link
from aetheria.loom.recorder import Recorder
from aetheria.protocol import encode
from aetheria.runs import RunFolder


class Trainer:
    def __init__(self, folder: RunFolder) -> None:
        folder.acquire()
        folder.update(status="running", pid=os.getpid())
        self.folder = folder
        self.step = max(0, folder.read()["global_step"] - 10)
        self.stopped = False
        self.learning_rate = 0.1
        self.journal = Journal(folder.path / "journal.jsonl")
        self.recorder = Recorder(folder.path / "run.db", self.step)
        self.link = Link(folder.path, folder.run_id, start_step=self.step)
        knob = Knob("learning_rate", float, self.put, lambda: self.learning_rate, ge=0.0, le=1.0)
        actions = {
            "stop": Action(self.stop),
            "note": Action(lambda command: self.recorder.note(self.step, command.args.text, command.author)),
            "rewind": Action(self.rewind),
        }
        tell = lambda outcome: self.link.tell("ack", encode(outcome))  # noqa: E731
        self.desk = Desk(folder.run_id, self.journal, Knobs([knob]), actions, tell)
        signal.signal(signal.SIGTERM, self.stop)

    def put(self, value: float) -> None:
        self.learning_rate = value

    def stop(self, *_: Any) -> None:
        self.stopped = True

    def rewind(self, command: Any) -> Done:
        self.recorder.close()
        self.step = command.args.step
        self.recorder = Recorder(self.folder.path / "run.db", self.step)
        return Done(f"back at {self.step}", {}, 0, Boundary(self.step))

    def run(self) -> None:
        started = time.monotonic()
        while not self.stopped:
            time.sleep(0.002)
            self.step += 1
            loss = (time.monotonic() - started) / self.step
            self.recorder.metrics({"loss": loss, "learning_rate": self.learning_rate}, self.step)
            if self.step % 50 == 0:
                self.recorder.event("nonfinite", self.step, "a window was dropped", {"ids": [self.step], "norm": loss})
            for data in self.link.take():
                self.desk.receive(data, self.step)
            self.link.beat(self.step)
            self.link.tend()
        self.recorder.close()
        self.folder.update(status="completed", global_step=self.step)
        self.link.close(timeout=10.0)
        self.journal.close()
        self.folder.release()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    found = RunFolder.open(place) if len(sys.argv) == 2 else RunFolder.create(place, sys.argv[2], seed=0)
    trainer = Trainer(found)
    print(found.path, flush=True)
    trainer.run()
