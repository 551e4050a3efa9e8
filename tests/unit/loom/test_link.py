"""The training process's end: a real sidecar beside it, killed, stopped, missing; and nobody waits for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from loguru import logger
from tests.freezing import freeze, frozen

from aetheria.loom.link import Link
from aetheria.loom.messages import Point, decode_points
from aetheria.loom.processes import is_running
from aetheria.loom.reader import RunReader
from aetheria.protocol import Outcome, encode


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What loguru said, from WARNING on."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    link = Link(tmp_path, "run", hub="off", record=True)
    yield link
    link.close()


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def sidecar_works(link: Link) -> bool:
    return link._region.sidecar_age < 5


def event(kind: str, step: int, message: str = "", **data: object) -> bytes:
    return msgspec.json.encode({"kind": kind, "step": step, "message": message, "data": data})


def test_everything_said_is_recorded(link: Link, tmp_path: Path) -> None:
    for step in range(1, 501):
        link.metrics(step, {"loss": 1.0 / step, "accuracy": np.float32(0.5), "count": 3})
    link.tell("event", event("nonfinite", 7, "a window was dropped", ids=[1, 2]))
    link.tell("event", event("note", 8, "too warm", author="ada"))
    link.tell("ack", encode(Outcome(command="a" * 8, state="applied")))
    link.tell("status", event("status", 9))
    assert link.close() == 0
    reader = RunReader(tmp_path / "run.db")
    curve = reader.metric("loss")
    assert curve.steps.tolist() == list(range(1, 501))
    assert curve.values.tolist() == [1.0 / step for step in range(1, 501)]
    assert reader.last()["accuracy"] == (500, 0.5)
    assert reader.last()["count"] == (500, 3.0)
    assert [(found.kind, found.step, found.message, found.data) for found in reader.events()] == [
        ("nonfinite", 7, "a window was dropped", {"ids": [1, 2]})
    ]
    assert [(note.step, note.text, note.author) for note in reader.notes()] == [(8, "too warm", "ada")]
    assert [life.start_step for life in reader.lives()] == [0]
    assert not (tmp_path / "sidecar.log").exists()  # it had nothing to say


def test_closing_again_does_nothing(link: Link) -> None:
    assert link.close() == 0
    assert link.close() == 0
    assert link.sidecar is None
    assert link.word[0] == 0
    link.metrics(1, {"loss": 1.0})
    link.tend()
    assert link.take() == []
    assert link.sidecar is None


def test_without_a_hub_and_a_recorder_nothing_counts_as_undelivered(tmp_path: Path) -> None:
    link = Link(tmp_path, "run", hub=tmp_path / "hub.json")
    link.metrics(1, {"loss": 1.0})
    until(lambda: sidecar_works(link))
    started = time.monotonic()
    assert link.close(timeout=60.0) == 0
    assert time.monotonic() - started < 30.0  # it did not wait for anything to be delivered
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_nothing_to_do_there_is_no_sidecar(tmp_path: Path) -> None:
    link = Link(tmp_path, "run", hub="off")
    link.metrics(1, {"loss": 1.0})
    link.tell("event", event("x", 1))
    link.tend()
    assert link.sidecar is None
    assert link.close() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_sidecar_is_light_and_apart(link: Link) -> None:
    until(lambda: sidecar_works(link))
    assert link.sidecar is not None
    assert os.getsid(link.sidecar) != os.getsid(0)
    if Path("/proc").is_dir():
        mapped = Path(f"/proc/{link.sidecar}/maps").read_text()
        assert "torch" not in mapped
        assert "numpy" not in mapped
        status = Path(f"/proc/{link.sidecar}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        assert resident < 80 * 1024
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what a terminal and a batch system send to all
        os.kill(link.sidecar, number)
    link.metrics(1, {"loss": 1.0})
    assert link.close() == 0


def test_the_sidecar_never_imports_torch() -> None:
    program = "import sys, aetheria.loom.sidecar; print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert said.stdout.strip() == "set()"


def test_a_killed_sidecar_is_replaced_and_nothing_is_missing(link: Link, tmp_path: Path, warnings: list[str]) -> None:
    pids = set()
    for round_ in range(2):
        until(lambda: RunReader(tmp_path / "run.db").lives())
        for step in range(100 * round_, 100 * round_ + 50):
            link.metrics(step, {"loss": float(step)})
        if round_ == 0:
            until(lambda: RunReader(tmp_path / "run.db").last())
        assert link.sidecar is not None
        pids.add(link.sidecar)
        os.kill(link.sidecar, signal.SIGKILL)
        for step in range(100 * round_ + 50, 100 * round_ + 100):
            link.metrics(step, {"loss": float(step)})
        killed = link.sidecar

        def replaced(killed: int = killed) -> bool:
            started = time.perf_counter()
            link.tend()
            assert time.perf_counter() - started < 2.0  # it never waits; a busy machine may take long to start it
            return link.sidecar not in (None, killed)

        until(replaced)
    assert len(pids) == 2
    assert link.close() == 0
    curve = RunReader(tmp_path / "run.db").metric("loss")
    assert sorted(set(curve.steps.tolist())) == list(range(200))
    assert [message for message in warnings if "signal 9" in message]


def test_a_sidecar_that_dies_at_once_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    link = Link(tmp_path, "run", hub="off", record=True)
    monkeypatch.setattr("aetheria.loom.link._FIRST_DELAY", 0.05)
    link._delay = 0.05
    until(lambda: link.tend() or sum("exit status 1" in message for message in warnings) == 4)
    delays = [float(message.split(" again in ")[1].split()[0]) for message in warnings]
    assert delays == [0.05, 0.1, 0.2, 0.4]
    link.metrics(1, {"loss": 1.0})
    link.tell("event", event("x", 1))
    assert link.close(timeout=1.0) == 2


def test_without_a_program_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    link = Link(tmp_path / "no folder", "run", record=True)
    link.metrics(1, {"loss": 1.0})
    link.tend()
    assert any("cannot be started" in message for message in warnings)
    assert link.close(timeout=0.5) == 1


def test_a_stopped_sidecar_costs_the_training_nothing(link: Link) -> None:
    until(lambda: sidecar_works(link))
    assert link.sidecar is not None
    metrics = {f"metric {number}": float(number) for number in range(20)}
    said = encode(Outcome(command="a" * 8, state="applied", message="x" * 200))

    def costs(count: int) -> float:
        times = []
        for step in range(count):
            started = time.perf_counter()
            if link.word[0]:
                raise AssertionError
            link.metrics(step, metrics)
            link.tell("ack", said)
            link.beat(step)
            times.append(time.perf_counter() - started)
        return sorted(times)[count // 2]

    costs(100)
    with frozen(link.sidecar):
        stopped = costs(20_000)  # several times what the rings hold
    assert stopped < 200e-6  # a bound for a busy machine; a step that waited would take far longer
    left = link.close(timeout=10.0)
    assert left > 10_000  # they were dropped, and this is said


def test_a_sidecar_that_does_not_end_is_killed(link: Link, warnings: list[str]) -> None:
    until(lambda: sidecar_works(link))
    pid = link.sidecar
    assert pid is not None
    link.metrics(1, {"loss": 1.0})
    freeze(pid)
    started = time.monotonic()
    link.metrics(2, {"loss": 1.0})
    assert 1 <= link.close(timeout=0.5) <= 2
    assert time.monotonic() - started < 30.0
    assert not is_running(pid)
    assert any("is killed" in message for message in warnings)


def test_what_was_dropped_is_said_in_the_database(link: Link, tmp_path: Path) -> None:
    until(lambda: sidecar_works(link))
    with frozen(link.sidecar):
        for step in range(40):
            link.metrics(step, {f"{number}" * 10: 1.0 for number in range(9_000)})  # 200 kB each, 4 MB fit
    until(lambda: RunReader(tmp_path / "run.db").events("lost"))
    (lost,) = RunReader(tmp_path / "run.db").events("lost")
    assert 10 < lost.data["records"] < 40
    assert "missing" in lost.message


def test_what_is_too_long_is_shortened_or_counted(tmp_path: Path, warnings: list[str]) -> None:
    link = Link(tmp_path, "run", hub="off", record=True)
    link.tell("ack", encode(Outcome(command="a" * 8, state="applied", result={"x": "y" * 400_000})))
    (record,) = link._region.reader("events sent").read()
    outcome = msgspec.json.decode(record.data[1:], type=Outcome)
    assert (outcome.command, outcome.state, outcome.result) == ("a" * 8, "applied", {})
    assert "in the journal" in outcome.message
    link.tell("event", event("x", 1, "y" * 400_000))
    link.metrics(1, {str(number): 1.0 for number in range(100_000)})
    assert sum("too long" in message for message in warnings) == 1
    assert link.close() == 2


def points_of(link: Link) -> list[Point]:
    """Returns the points in the shared memory."""
    records = link._region.reader("metrics sent").read()
    return [point for record in records for point in decode_points(record.data)[0]]


def test_points_are_said_together(link: Link, tmp_path: Path) -> None:
    points: list[Point] = [(1000.0 + step, step, {"loss": step / 2, "count": step}) for step in range(100)]
    copy = list(points)
    link.hand_over(points)
    assert points == []
    link.hand_over(points)
    (record,) = link._region.reader("metrics sent").read()
    assert record.things == 100
    assert points_of(link) == copy
    assert link.close() == 0
    assert RunReader(tmp_path / "run.db").metric("loss").values.tolist() == [step / 2 for step in range(100)]


def test_points_are_counted_one_by_one_where_nobody_fetches_them(tmp_path: Path) -> None:
    link = Link(tmp_path, "run", hub="off")
    link._record = True  # though there is nobody who does
    metrics = {f"{number}" * 10: 1.0 for number in range(500)}
    for first in range(0, 2000, 20):
        link.hand_over([(0.0, step, metrics) for step in range(first, first + 20)])
    records = link._region.reader("metrics recorded").read()
    assert {record.things for record in records} == {10}
    assert max(len(record.data) for record in records) <= 200_000  # so that a batch to the hub is not too large
    assert [step for _, step, _ in points_of(link)] == list(range(records[0].missed, 2000))
    assert records[0].missed > 100
    assert link._undelivered() == 2000


def test_of_many_points_only_those_are_refused_that_are_none(link: Link, tmp_path: Path, warnings: list[str]) -> None:
    points: list[Any] = [(0.0, step, {"loss": 1.0}) for step in range(20)]
    points[3] = (0.0, 3, {"loss": "low"})  # can be said, and is none
    points[7] = (0.0, 7, {"loss": 10**400})
    points[9] = (0.0, 9, {"loss": np.float32(0.5), "large": 2**70})
    points[11] = (0.0, 11, {"\ud800": 1.0})
    points[12] = (0.0, 12, {str(number): 1.0 for number in range(100_000)})
    points[15] = (0.0, 15, {15: 1.0})  # likewise
    link.hand_over(points)
    assert [step for _, step, _ in points_of(link)] == [step for step in range(20) if step not in (3, 7, 11, 12, 15)]
    assert [message for message in warnings if "metrics of step 7 cannot be reported: int too large" in message]
    assert link.close() == 3
    assert RunReader(tmp_path / "run.db").last()["large"] == (9, float(2**70))
    assert "Metrics that are none" in (tmp_path / "sidecar.log").read_text()


def _in_a_fork(link: Link, answers: multiprocessing.Queue[object]) -> None:
    link.metrics(99, {"loss": 1.0})
    link.hand_over([(0.0, 99, {"loss": 1.0})])
    link.tell("event", event("x", 99))
    link.beat(99)
    link.tend()
    answers.put((link.take(), link.close()))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forking with threads: Recorder has none here
def test_a_forked_process_disturbs_nothing(link: Link, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_a_fork, args=(link, answers))
    link._region.offer(b"command")
    link.beat(5)
    child.start()
    assert answers.get(timeout=60) == ([], 0)
    child.join(60)
    assert child.exitcode == 0
    assert link._region.step == 5
    assert link.take() == [b"command"]
    assert link.sidecar is not None
    assert is_running(link.sidecar)
    link.metrics(1, {"loss": 1.0})
    assert link.close() == 0
    assert RunReader(tmp_path / "run.db").metric("loss").steps.tolist() == [1]


_PARENT = """
import sys, time
from pathlib import Path
from aetheria.loom.link import Link
link = Link(Path(sys.argv[1]), "run", hub="off", record=True)
{change}
for step in range(100):
    link.metrics(step, {{"loss": float(step)}})
while link._region.sidecar_age > 5:
    time.sleep(0.01)
print(link.sidecar, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("polling", [False, True], ids=["pidfd", "polling"])
def test_the_sidecar_delivers_and_ends_when_its_parent_is_killed(tmp_path: Path, polling: bool) -> None:
    # With polling: started again by hand with the option that no system here needs.
    change = ""
    if polling:
        change = (
            "link._process.kill(); link._process.wait(); link._process = None\n"
            "link._arguments.append('--by-polling'); link._start()"
        )
    program = _PARENT.format(change=change)
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    sidecar = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until(lambda: not is_running(sidecar))
    assert RunReader(tmp_path / "run.db").metric("loss").steps.tolist() == list(range(100))


def test_shared_memory_without_memfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    link = Link(tmp_path, "run", hub="off", record=True)
    link.metrics(3, {"loss": 1.0})
    assert link.close() == 0
    assert RunReader(tmp_path / "run.db").metric("loss").steps.tolist() == [3]
