"""Metrics of a fast loop are held back for a moment, and of a slow one not; none is lost, doubled or changed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aetheria.control.line import NoLine
from aetheria.control.log_buffer import MOST, LogBuffer
from aetheria.control.weavelet import Weavelet
from aetheria.loom.messages import Point, decode_points
from aetheria.loom.processes import is_running
from aetheria.loom.reader import RunReader
from aetheria.protocol import command_of, encode


class Line(NoLine):
    """Keeps what is handed over, each time by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[list[int]] = []

    def hand_over(self, points: list[Point]) -> None:
        self.records.append([step for _, step, _ in points])
        points.clear()


def log(buffer: LogBuffer, times: list[float], first: int = 0) -> None:
    """Does what `Weavelet.log` does."""
    for step, now in enumerate(times, first):
        if now < buffer.due and len(buffer.points) < MOST:
            buffer.points.append((now, step, {"loss": 0.5}))
        else:
            buffer.add(now, step, {"loss": 0.5})


def every(seconds: float, count: int, start: float = 1000.0) -> list[float]:
    return [start + number * seconds for number in range(count)]


def test_a_slow_loop_is_written_at_once() -> None:
    line = Line()
    log(LogBuffer(line), every(0.021, 60))
    assert line.records == [[step] for step in range(60)]


def test_a_fast_loop_is_written_twenty_times_a_second() -> None:
    line = Line()
    buffer = LogBuffer(line)
    log(buffer, every(0.004, 200))
    sizes = [len(record) for record in line.records]
    assert sizes[:17] == [1] * 17  # until it has shown that it is fast
    assert set(sizes[17:]) == {13}
    buffer.flush()
    assert list(itertools.chain(*line.records)) == list(range(200))


def test_a_fast_loop_that_has_become_slow_is_written_at_once_again() -> None:
    line = Line()
    buffer = LogBuffer(line)
    log(buffer, every(0.004, 20))
    held = len(buffer.points)
    assert held
    log(buffer, every(1.0, 5, start=1010.0), first=20)
    assert line.records[-5:] == [[*range(20 - held, 20), 20], [21], [22], [23], [24]]


def test_a_loop_that_only_logs_does_not_make_a_record_that_takes_long() -> None:
    line = Line()
    log(LogBuffer(line), every(1e-5, 1000))
    assert max(map(len, line.records)) == MOST + 1
    assert len(line.records) < 30


def test_a_clock_that_is_set_back_holds_nothing_for_long() -> None:
    line = Line()
    buffer = LogBuffer(line)
    log(buffer, every(0.004, 30))
    log(buffer, every(0.004, 2 * MOST, start=10.0), first=30)
    assert sum(map(len, line.records)) > 30 + MOST
    buffer.flush()
    assert sorted(itertools.chain(*line.records)) == list(range(30 + 2 * MOST))


# --- in a Weavelet, with a real sidecar ------------------------------------------------------------------------------


@pytest.fixture
def weavelet(tmp_path: Path) -> Iterator[Weavelet]:
    weavelet = Weavelet(run="loop", hub="off", runs_dir=tmp_path / "runs").start()
    yield weavelet
    weavelet.stop()


def said(weavelet: Weavelet) -> list[Point]:
    """Returns the points that are in the shared memory."""
    records = weavelet._link._region.reader("metrics sent").read()
    return [point for record in records for point in decode_points(record.data)[0]]


def test_when_it_stops_nothing_is_held_back_any_more(weavelet: Weavelet) -> None:
    for number in range(1, 1001):
        weavelet.step({"loss": 1 / number, "count": number})
    assert len(said(weavelet)) < 1000
    weavelet.stop()
    assert weavelet._link.close() == 0
    reader = RunReader(weavelet.folder / "run.db")
    assert reader.metric("loss").steps.tolist() == list(range(1, 1001))
    assert reader.metric("count").values.tolist() == list(range(1, 1001))


def test_before_it_pauses_everything_is_written(weavelet: Weavelet) -> None:
    seen: list[int] = []

    def operator() -> None:
        while not (weavelet.paused and len(said(weavelet)) == 100):
            threading.Event().wait(0.005)
        seen.extend(step for _, step, _ in said(weavelet))
        assert weavelet._link._region.offer(encode(command_of("resume")))

    thread = threading.Thread(target=operator)
    thread.start()
    for number in range(1, 101):
        if number == 100:
            assert weavelet._link._region.offer(encode(command_of("pause")))
        weavelet.step({"loss": float(number)})
    thread.join(30)
    assert seen == list(range(1, 101))


def test_any_thread_may_log(weavelet: Weavelet) -> None:
    count, threads = 2000, 4

    def work(name: str) -> None:
        for number in range(count):
            weavelet.log({name: float(number)})

    names = [f"thread {number}" for number in range(threads)]
    workers = [threading.Thread(target=work, args=(name,)) for name in names]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        weavelet.step()
    weavelet._buffer.flush()  # type: ignore[union-attr]
    found: dict[str, list[float]] = {name: [] for name in names}
    for _, _, values in said(weavelet):
        ((name, value),) = values.items()
        found[name].append(value)
    assert found == {name: list(map(float, range(count))) for name in names}


class Elsewhere(torch.Tensor):
    """A tensor that claims to be on a device."""

    @property
    def device(self) -> Any:
        return "somewhere:0"


def elsewhere(*values: float) -> torch.Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], requires_grad=True).as_subclass(Elsewhere)


def test_what_a_device_computes_is_read_by_a_later_call_as_it_was(weavelet: Weavelet) -> None:
    value = elsewhere(3.0)
    weavelet.log({"host": 1.0, "device": value})
    assert [values for _, _, values in said(weavelet)] == [{"host": 1.0}]
    with torch.no_grad():
        value += 1.0  # as one does who adds up
    weavelet.global_step = 1
    weavelet.log({"host": 2.0, "device": value})
    assert [(step, values) for _, step, values in said(weavelet)] == [
        (0, {"host": 1.0}),
        (0, {"device": 3.0}),
        (1, {"host": 2.0}),
    ]
    with pytest.raises(RuntimeError, match="invalid for input of size 2"):
        weavelet.log({"device": elsewhere(1.0, 2.0)})
    weavelet.stop()
    assert RunReader(weavelet.folder / "run.db").metric("device").values.tolist() == [3.0, 4.0]


def test_what_a_device_computes_is_not_lost_in_a_fast_loop(weavelet: Weavelet) -> None:
    for number in range(1, 501):
        weavelet.step({"device": elsewhere(float(number)), "host": torch.tensor(float(number))})
    weavelet.stop()
    reader = RunReader(weavelet.folder / "run.db")
    for name in ("device", "host"):
        assert reader.metric(name).values.tolist() == list(range(1, 501))


def test_a_dictionary_that_is_used_again_is_kept_as_it_was(weavelet: Weavelet) -> None:
    metrics = {"loss": 0.0}
    for number in range(100):
        metrics["loss"] = float(number)
        weavelet.log(metrics)
        weavelet.log({})  # says nothing
    weavelet._buffer.flush()  # type: ignore[union-attr]
    assert [values["loss"] for _, _, values in said(weavelet)] == list(range(100))


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_no_number_is_refused_where_it_is_logged(weavelet: Weavelet, fast: bool) -> None:
    for number in range(40 * fast):
        weavelet.log({"loss": float(number)})
    with pytest.raises(ValueError, match="could not convert"):
        weavelet.log({"loss": "low"})
    with pytest.raises(TypeError):
        weavelet.log({"loss": None})
    weavelet._buffer.flush()  # type: ignore[union-attr]
    assert len(said(weavelet)) == 40 * fast


_LOGS = """
import sys, time
from aetheria.control.weavelet import Weavelet
weavelet = Weavelet(run="loop", hub="off", runs_dir=sys.argv[1]).start()
while weavelet._link._region.sidecar_age > 5:
    time.sleep(0.01)
print(weavelet.folder, weavelet._link.sidecar, flush=True)
while True:
    begun = time.monotonic()
    weavelet.step({"loss": begun})
    print(begun, time.monotonic(), flush=True)
    while time.monotonic() < begun + 0.002:
        pass
"""


def test_a_killed_fast_loop_loses_a_moment_at_most(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _LOGS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder, sidecar = process.stdout.readline().rsplit(" ", 1)
    lines = [process.stdout.readline() for _ in range(300)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.communicate()[0].splitlines()
    begun, ended = zip(*(map(float, line.split()) for line in lines), strict=True)
    for _ in range(2000):
        if not is_running(int(sidecar)):
            break
        threading.Event().wait(0.01)
    found = RunReader(Path(folder) / "run.db").metric("loss").values.tolist()
    count = len(found)
    assert found[: len(begun)] == list(begun[:count])  # nothing is missing in between
    assert begun[count:] == () or begun[-1] - ended[count] < 0.05
