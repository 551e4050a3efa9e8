"""A run on another machine: the hub keeps a copy of its folder, and what reads history reads it there."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aetheria.client import Run, connect
from aetheria.control.journal import read_journal
from aetheria.errors import AetheriaError, HubError
from aetheria.loom import mirroring
from aetheria.loom.broker import Broker
from aetheria.loom.mirroring import Mirroring
from aetheria.loom.parts import decode_parcel
from aetheria.loom.reader import RunReader
from aetheria.loom.recorder import Recorder
from aetheria.loom.transport import HubEnd, RunEnd
from aetheria.weaver.mirror import Mirrors
from hub_cases import HubProcess, running_hub, wait_for

TRAINER = Path(__file__).parents[1] / "mirror_trainer.py"


class Training:
    """A training process that says that it is elsewhere."""

    def __init__(self, home: Path, *arguments: str, host: str = "elsewhere") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TRAINER), *(arguments or (str(home / "runs"), "digits"))],
            env=os.environ | {"AETHERIA_HOME": str(home), "AETHERIA_HOST": host},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())
        self.name = self.folder.name

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextmanager
def training(home: Path, *arguments: str, host: str = "elsewhere") -> Iterator[Training]:
    started = Training(home, *arguments, host=host)
    try:
        yield started
    finally:
        started.kill()
        assert started.process.stdout is not None
        started.process.stdout.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub") / "home", umask=0) as running:
        yield running


@contextmanager
def known(hub: HubProcess, name: str) -> Iterator[Run]:
    with connect(hub.url, hub.operator) as connection:
        yield wait_for(lambda: unless_refused(lambda: connection.run(name)), "the hub to know the run")


def unless_refused(ask: Callable[[], Any]) -> Any:
    """Returns what is asked for; None where there is nothing yet."""
    try:
        return ask()
    except AetheriaError:
        return None


def curve(hub: HubProcess, name: str, series: str = "loss") -> tuple[list[int], list[float]]:
    with connect(hub.url, hub.operator) as connection:
        steps, values = connection.run(name).metrics(series)
        return steps.tolist(), values.tolist()


def assert_copied(hub: HubProcess, folder: Path) -> None:
    """The hub answers from its copy what the folder itself says."""
    own = RunReader(folder / "run.db")
    with known(hub, folder.name) as run:
        for series in own.series():
            expected = own.metric(series)
            steps, values = run.metrics(series)
            np.testing.assert_array_equal(steps, expected.steps)
            np.testing.assert_array_equal(values, expected.values)
        assert run.journal == read_journal(folder / "journal.jsonl")
        events = run.events(last=10_000)
        assert events["recorded"] == [event._asdict() | {"data": dict(event.data)} for event in own.events()]
        assert events["notes"] == [note._asdict() for note in own.notes()]
    copy = hub.folder / "mirrors" / folder.name
    assert RunReader(copy / "run.db").lives() == own.lives()
    for file in ("journal.jsonl", "run.json"):
        assert (copy / file).read_bytes() == (folder / file).read_bytes(), file


def complete(hub: HubProcess, folder: Path) -> Callable[[], bool]:
    """Returns a function that says whether the copy has all that is in the folder."""

    def compare() -> bool:
        copy = hub.folder / "mirrors" / folder.name
        files = ((copy / name, folder / name) for name in ("journal.jsonl", "run.json"))
        same = all(one.exists() and one.read_bytes() == other.read_bytes() for one, other in files)
        readers = RunReader(copy / "run.db"), RunReader(folder / "run.db")
        lengths = [[len(reader.metric(name).steps) for name in reader.series()] for reader in readers]
        rest = [(reader.lives(), len(reader.events()), len(reader.notes())) for reader in readers]
        return same and lengths[0] == lengths[1] and rest[0] == rest[1]

    return compare


def test_the_history_of_a_run_elsewhere_is_read_as_that_of_any_other(hub: HubProcess) -> None:
    with training(hub.home) as trainer, known(hub, trainer.name) as run:
        wait_for(lambda: unless_refused(lambda: run.metrics("loss")[0].size > 100), "its curve")
        assert run.set(learning_rate=0.5, reason="plateau").state == "applied"
        assert run.note("looks well").state == "applied"
        before = run.status
        assert (before.status, before.host, before.folder) == ("running", "elsewhere", str(trainer.folder))
        assert run.rewind(40).state == "applied"
        assert run.set(learning_rate=0.25).state == "applied"
        wait_for(lambda: len(run.journal) >= 8, "the journal while it trains")
        assert [entry.outcome.state for entry in run.journal if entry.outcome.result] == ["applied"] * 2
        wait_for(lambda: run.metrics("learning_rate")[1][-1] == 0.25, "the curve while it trains")
        trainer.end()
        wait_for(complete(hub, trainer.folder), "the copy to be complete")
        assert_copied(hub, trainer.folder)
        steps, _ = curve(hub, trainer.name)
        assert steps == sorted(set(steps)), "the way back is not shown twice"
        assert run.status.status == "completed"
        with pytest.raises(AetheriaError, match="completed"):
            run.set(learning_rate=0.1)
        copy = hub.folder / "mirrors"
        for path in (copy, *copy.rglob("*")):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        shown = [sys.executable, "-m", "aetheria", "show", str(copy / trainer.name), "--json"]
        content = json.loads(subprocess.run(shown, capture_output=True, check=True, text=True).stdout)
        assert content["status"] == "completed"
        assert content["metrics"]["loss"]["last"]["step"] == steps[-1]


def test_a_hub_that_is_killed_goes_on_with_its_copy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running_hub(home) as hub:
        with training(home) as trainer:
            for _ in range(2):
                with known(hub, trainer.name) as run:
                    wait_for(lambda run=run: unless_refused(lambda: run.metrics("loss")[0].size), "the curve")
                    assert run.set(learning_rate=0.3).state == "applied"
                hub.kill()
                hub = HubProcess(home).wait()
            hub.kill()
            trainer.end()  # while no hub is there: JetStream keeps what it says
        hub = HubProcess(home).wait()
        try:
            wait_for(complete(hub, trainer.folder), "the copy to be complete")
            assert_copied(hub, trainer.folder)
        finally:
            hub.end()


def test_a_message_server_that_loses_its_store_and_a_damaged_copy_are_made_up_for(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running_hub(home) as first, training(home) as trainer:
        with known(first, trainer.name) as run:
            wait_for(lambda: unless_refused(lambda: run.metrics("loss")[0].size > 200), "the curve")
            run.set(learning_rate=0.3)
            wait_for(lambda: unless_refused(lambda: len(run.journal) > 1), "the journal")
        first.kill()
        os.kill(int((first.folder / "nats" / "nats.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(first.folder / "nats" / "store")
        copy = first.folder / "mirrors" / trainer.name
        (copy / "run.db-wal").unlink()  # has the newest version of every page
        content = bytearray((copy / "run.db").read_bytes())
        content[: 3 * 4096] = b"\xff" * (3 * 4096)
        (copy / "run.db").write_bytes(content)
        journal = bytearray((copy / "journal.jsonl").read_bytes())
        journal[20:30] = b"??????????"
        (copy / "journal.jsonl").write_bytes(journal)
        with running_hub(home) as hub:
            step = RunReader(trainer.folder / "run.db").last()["loss"][0]
            with known(hub, trainer.name) as run:
                again = lambda: run.metrics("loss")[0].max(initial=0) >= step  # noqa: E731
                wait_for(lambda: unless_refused(again), "the curve, again")
            trainer.end()
            wait_for(complete(hub, trainer.folder), "the copy to be complete")
            assert_copied(hub, trainer.folder)
            assert (copy / "run.db.damaged").exists()
            with known(hub, trainer.name) as run:
                told = [message["data"] for message in run.events()["told"]]
            sentences = [event["message"] for event in told if event["kind"] == "mirror"]
            assert any("run.db was damaged" in sentence for sentence in sentences), sentences
            assert any("copy of the journal differs" in sentence for sentence in sentences), sentences


def test_a_run_that_is_killed_and_continued_has_one_copy(hub: HubProcess) -> None:
    with training(hub.home) as trainer, known(hub, trainer.name) as run:
        wait_for(lambda: unless_refused(lambda: run.metrics("loss")[0].size > 50), "the curve")
        trainer.end()
        wait_for(lambda: run.status.status == "completed", "its end")
    with training(hub.home, str(trainer.folder)) as again, known(hub, again.name) as run:
        wait_for(lambda: run.status.connected and run.status.status == "running", "the run to go on")
        assert run.set(learning_rate=0.3).state == "applied"
        wait_for(lambda: len(RunReader(hub.folder / "mirrors" / again.name / "run.db").lives()) == 2, "its life")
        again.kill()
        wait_for(complete(hub, again.folder), "what it had said when it was killed")
        assert_copied(hub, again.folder)
        assert run.status.status == "running", "nobody can tell yet"


def test_a_copy_that_grows_too_large_ends_and_the_run_is_steered_all_the_same(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    (home / "hub" / "settings.json").write_text(json.dumps({"mirror_bytes": 150_000}))
    with running_hub(home) as hub, training(home) as trainer, known(hub, trainer.name) as run:

        def told() -> list[str]:
            events = [message["data"] for message in run.events()["told"]]
            return [event["message"] for event in events if event["kind"] == "mirror"]

        wait_for(told, "the hub to say that it takes no more")
        assert "would exceed the 150,000 that are allowed" in told()[0]
        length = run.metrics("loss")[0].size
        assert length > 0
        assert run.set(learning_rate=0.3).state == "applied"
        trainer.end()
        wait_for(lambda: run.status.status == "completed", "the end: run.json is still taken")
        assert run.metrics("loss")[0].size == length
        assert (hub.folder / "mirrors" / trainer.name / "run.db").stat().st_size < 150_000
        assert len(told()) == 1


def test_nothing_is_copied_of_a_run_in_sight(hub: HubProcess) -> None:
    with training(hub.home, host="") as trainer, known(hub, trainer.name) as run:
        assert run.set(learning_rate=0.3).state == "applied"
        assert run.status.folder == str(trainer.folder)
        trainer.end()
        wait_for(lambda: run.status.status == "completed", "its end")
        assert not (hub.folder / "mirrors" / trainer.name).exists()


class Heard:
    """A hub's end that takes a part only the second time it comes."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.questions: list[str] = []

    async def take_part(self, run: str, data: bytes) -> bool:
        self.parts.append((run, data))
        return len(self.parts) > 1

    async def say_what_there_is(self, run: str) -> bytes:
        self.questions.append(run)
        return run.encode()


def test_a_run_speaks_of_its_own_folder_only_and_what_comes_too_early_comes_again(tmp_path: Path) -> None:
    async def talk() -> None:
        hub, heard = HubEnd(broker.url, broker.hub_seed), Heard()
        run = RunEnd(broker.url, broker.admit("one"), "one")
        broker.admit("two")
        await hub.start()
        listening = asyncio.create_task(hub.listen(nothing, copies=heard))
        await run.connect()
        try:
            while await run.ask() is None:  # the hub is about to listen
                await asyncio.sleep(0.02)
            assert await run.ask() == b"one"
            stranger = RunEnd(broker.url, "", "two")
            stranger._connection = run._connection
            assert await stranger.ask(timeout=0.5) is None
            with pytest.raises(HubError):
                await stranger.report([("mirror", b"forged", "")], timeout=0.5)
            await run.report([("mirror", b"of its own", "")])
            while len(heard.parts) < 2:
                await asyncio.sleep(0.02)
            assert set(heard.questions) == {"one"}
            assert heard.parts == [("one", b"of its own")] * 2
        finally:
            await run.close()
            await hub.close()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def nothing(run: str, kind: str, data: bytes) -> None:
        raise AssertionError(f"{run} said {kind}")

    broker = Broker(tmp_path / "nats")
    broker.start()
    try:
        asyncio.run(asyncio.wait_for(talk(), 30.0))
    finally:
        broker.stop()


class Losing:
    """A hub that loses parcels, and keeps the others."""

    def __init__(self, folder: Path, lost: set[int]) -> None:
        self.mirrors = Mirrors(folder)
        self.lost = lost

    async def take_part(self, run: str, data: bytes) -> bool:
        if decode_parcel(data).number in self.lost:
            return True
        taken, said = await self.mirrors.take(run, data)
        assert not said
        return taken

    async def say_what_there_is(self, run: str) -> bytes:
        return (await self.mirrors.have(run))[0]


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "has fallen silent"])
def test_what_was_lost_on_the_way_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    monkeypatch.setattr(mirroring, "_ASK", 1.0)
    monkeypatch.setattr(mirroring, "_LOOK", 0.05)
    monkeypatch.setattr(mirroring, "_LEISURE", 1)
    folder = tmp_path / "one"
    folder.mkdir()
    recorder = Recorder(folder / "run.db")
    copy = RunReader(tmp_path / "mirrors" / "one" / "run.db")
    losing = Losing(tmp_path / "mirrors", {3, 6})

    async def train() -> None:
        for step in range(1, 1_000_000):
            if step <= 10 or goes_on:
                recorder.metrics({"loss": 1 / step}, step)
            if step < 8:
                recorder.metrics({f"at {step}": 1.0}, step)
                with (folder / "journal.jsonl").open("ab") as file:
                    file.write(b"%d\n" % step)
                (folder / "run.json").write_text(json.dumps({"global_step": step}))
            await asyncio.sleep(0.1)

    def complete() -> bool:
        files = [place / "journal.jsonl" for place in (folder, tmp_path / "mirrors" / "one")]
        return (
            all(file.exists() and len(file.read_bytes()) == 14 for file in files)
            and {f"at {step}" for step in range(1, 8)} <= set(copy.series())
            and len(copy.metric("loss").steps) >= (20 if goes_on else 10)
        )

    async def talk() -> None:
        hub, run = HubEnd(broker.url, broker.hub_seed), RunEnd(broker.url, broker.admit("one"), "one")
        await hub.start()
        await run.connect()
        work = [hub.listen(nothing, copies=losing), train(), Mirroring(folder).keep_up(run)]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            while not await asyncio.to_thread(complete):
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.05)
        finally:
            await run.close()
            await hub.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await losing.mirrors.close()

    async def nothing(run: str, kind: str, data: bytes) -> None:
        raise AssertionError(f"{run} said {kind}")

    broker = Broker(tmp_path / "nats")
    broker.start()
    try:
        asyncio.run(asyncio.wait_for(talk(), 30.0))
    finally:
        broker.stop()
        recorder.close()
    steps = copy.metric("loss").steps.tolist()
    assert steps == list(range(1, len(steps) + 1))
