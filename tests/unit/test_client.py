"""The client, against a real hub and a run that answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.freezing import frozen

import aetheria
from aetheria.client import AsyncHub, CommandRefusedError, Hub, KnobValues, NoAnswerError, Run
from aetheria.client.models import allowed_in_words
from aetheria.errors import CommandError, HubError, RunFolderError
from hub_cases import HubProcess, running_hub, running_trainer, wait_for


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def name(process: HubProcess) -> Iterator[str]:
    with running_trainer(process) as run_id:
        yield run_id


@pytest.fixture(autouse=True)
def _environment(process: HubProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(process.home))
    for variable in ("AETHERIA_HUB_URL", "AETHERIA_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # is not asked


@pytest.fixture
def hub() -> Iterator[Hub]:
    with aetheria.connect() as connection:
        yield connection


@pytest.fixture
def run(hub: Hub, name: str) -> Run:
    def known() -> Run | None:
        if name not in [run.id for run in hub.runs()]:
            return None
        found = hub.run(name)
        return found if found.knobs.schema else None

    return wait_for(known, "the run's knobs")  # type: ignore[return-value]


# --- finding runs ----------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_a_part_of_its_name(hub: Hub, run: Run, process: HubProcess) -> None:
    assert hub.run("@last").id == hub.run("digits").id == run.id
    with pytest.raises(RunFolderError, match="no run called 'digitz'"):
        hub.run("digitz")
    with running_trainer(process, "digits-two") as other:
        wait_for(lambda: other in [known.id for known in hub.runs()], "the other run")
        with pytest.raises(RunFolderError, match=f"fits 2 runs: .*{other}"):
            hub.run("digits")
        assert hub.run("@last").id == other
        assert hub.run("digits-two").id == other
    wait_for(lambda: hub.run("two").status.status == "completed", "the other run's end")


# --- commands --------------------------------------------------------------------------------------------------------


def test_set_returns_what_the_run_did(run: Run) -> None:
    before = run.knobs
    outcome = run.set(learning_rate=0.125, reason="plateau", author="ada")
    assert outcome.state == "applied"
    assert outcome.result == {"before": {"learning_rate": before["learning_rate"]}, "after": {"learning_rate": 0.125}}
    assert outcome.revision == before.revision + 1
    line = next(line for line in run.journal if line.command is not None and line.command.id == outcome.command)
    assert line.command is not None
    assert (line.command.author, line.command.reason) == ("ada", "plateau")
    assert run.set({"learning_rate.head": 0.5}, optimizer="adamw").state == "applied"
    wait_for(lambda: run.knobs["optimizer"] == "adamw", "the observed value")
    assert run.knobs.desired == {"learning_rate": 0.125, "learning_rate.head": 0.5, "optimizer": "adamw"}


def test_the_author_is_who_is_logged_in(run: Run) -> None:
    outcome = run.note("a thought")
    command = next(line.command for line in run.journal if line.command and line.command.id == outcome.command)
    assert command.author.endswith(f"@{socket.gethostname()}")


def test_what_the_run_refuses_is_raised_with_its_reason(run: Run) -> None:
    with pytest.raises(CommandRefusedError, match=r"learning_rate = 7.*Allowed: a number, >= 0, <= 1") as refused:
        run.set(learning_rate=7)
    assert refused.value.outcome.state == "rejected"
    with pytest.raises(CommandError, match="the test data are broken") as failed:
        run.test()
    assert isinstance(failed.value, CommandRefusedError)
    assert failed.value.outcome.state == "failed"
    with pytest.raises(CommandError, match="no snapshot of step 3"):
        run.rewind(3)
    with pytest.raises(CommandError, match="cannot run_for"):
        run.run_for(steps=3)
    with pytest.raises(CommandError, match="either steps or epochs"):
        run.run_for()
    with pytest.raises(CommandError, match="expects 99"):
        run.set(learning_rate=0.5, expect_revision=99)
    with pytest.raises(CommandError, match="by step 0"):
        run.set(learning_rate=0.5, not_after_step=0)


def test_a_dry_run_changes_nothing(run: Run) -> None:
    before = dict(run.knobs)
    assert run.set(learning_rate=0.0625, dry_run=True).state == "accepted"
    with pytest.raises(CommandError, match="refused"):
        run.set(learning_rate=-1, dry_run=True)
    assert run.ping().state == "applied"
    assert dict(run.knobs) == before


def test_pause_resume_and_the_others(run: Run) -> None:
    assert run.pause().state == "applied"
    wait_for(lambda: run.status.status == "paused", "the pause to be seen")
    step = run.status.step
    assert run.resume().state == "applied"
    wait_for(lambda: run.status.step > step, "more steps")
    assert run.snapshot("best", pinned=True).result == {"name": "best"}
    assert run.validate().result == {"val_loss": 0.25}


def test_without_waiting_there_is_a_future(run: Run) -> None:
    futures = [run.note(f"{index}", wait=False) for index in range(5)]
    assert all(isinstance(future, Future) for future in futures)
    assert {future.result(20).state for future in futures} == {"applied"}


def test_a_run_that_does_not_answer_in_time_is_told(run: Run) -> None:
    pid = run.status.pid
    with frozen(pid):
        with pytest.raises(NoAnswerError, match="The note stands") as late:
            run.note("late", timeout=0.2)
        assert late.value.outcome is None
    outcome = run.outcome(late.value.command, timeout=20.0)
    assert outcome is not None
    assert outcome.state == "applied"


def test_the_same_id_has_one_effect(run: Run) -> None:
    outcomes = [run.note("once", id="0123456789abcdef") for _ in range(3)]
    assert len({(outcome.step, outcome.time) for outcome in outcomes}) == 1


# --- looking ---------------------------------------------------------------------------------------------------------


def test_curves_are_arrays(run: Run) -> None:
    wait_for(lambda: len(run.metrics("loss")[0]) > 5, "points")
    steps, values = run.metrics("loss")
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    np.testing.assert_allclose(values, 1 / steps)
    assert run.metrics("loss", from_step=30)[0][0] == 30
    assert len(run.metrics("loss", points=4)[0]) <= 4
    assert run.metrics("nothing")[0].shape == (0,)
    assert run.status.metrics["loss"].value is not None


def test_knobs_are_a_mapping_with_a_table(run: Run) -> None:
    knobs = run.knobs
    assert set(knobs) == {"learning_rate", "learning_rate.head", "optimizer"}
    assert "a number, >= 0, <= 1" in knobs.describe()
    assert "| one of sgd, adamw |" in knobs.describe()
    assert "step size \\| of every group" in knobs.describe()


def test_events_come_as_they_happen(run: Run) -> None:
    begun = threading.Event()
    found: list[Any] = []

    def watch() -> None:
        for event in run.watch():
            begun.set()
            found.append(event)
            if event.type == "outcome" and event.data["state"] == "applied":
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert begun.wait(20)
    outcome = run.note("seen")
    watcher.join(20)
    assert found[-1].data["command"] == outcome.command
    again = run.watch(since=found[-1].seq - 1)
    assert next(event for event in again if event.seq) == found[-1]
    again.close()  # type: ignore[attr-defined]


def test_a_watcher_survives_a_restart_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path / "home"))
    process = HubProcess(tmp_path / "home").wait()
    try:
        with running_trainer(process) as name, aetheria.connect() as hub:
            wait_for(lambda: name in [run.id for run in hub.runs()] and hub.run(name).knobs.schema, "the run")
            run = hub.run(name)
            events = run.watch(since=0)
            first = next(event for event in events if event.seq)
            process.kill()
            sending = [run.note(f"{index}", wait=False) for index in range(2)]
            process = HubProcess(tmp_path / "home").wait()
            told = run.note("after")
            seen = []
            for event in events:
                seen.append(event)
                if event.type == "outcome" and (event.data["command"], event.data["state"]) == (
                    told.command,
                    "applied",
                ):
                    break
            numbers = [event.seq for event in seen if event.seq]
            assert numbers == list(range(first.seq + 1, numbers[-1] + 1))  # none is missing, none comes twice
            events.close()  # type: ignore[attr-defined]
            for future in sending:  # no connection at all when they were sent: said at once
                with pytest.raises(HubError, match="No hub is running"):
                    future.result(20)
    finally:
        process.end()


# --- asynchronously --------------------------------------------------------------------------------------------------


def test_the_same_asynchronously(run: Run) -> None:
    async def scenario() -> None:
        async with AsyncHub() as hub:
            steered = await hub.run(run.id)
            outcomes = await asyncio.gather(*(steered.note(f"{index}") for index in range(5)))
            assert {outcome.state for outcome in outcomes} == {"applied"}
            assert (await steered.status()).status == "running"
            async with contextlib.aclosing(steered.watch(since=0)) as events:  # type: ignore[type-var]
                event = await anext(events)  # type: ignore[call-overload]
                assert event.run == run.id
            await asyncio.sleep(0.05)

    asyncio.run(scenario())


# --- hubs that are not there -----------------------------------------------------------------------------------------


def test_without_a_hub_it_is_said_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path))
    with pytest.raises(HubError, match=r"^No hub is running\. Start one with: aetheria up$"):
        aetheria.connect()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(HubError, match="No hub is running"):
        aetheria.connect(f"http://127.0.0.1:{port}", "secret")


def test_a_wrong_token_is_told_at_once(process: HubProcess) -> None:
    begun = time.monotonic()
    with pytest.raises(HubError, match="The token is wrong"):
        aetheria.connect(token="wrong")
    assert time.monotonic() - begun < 20.0


def test_a_viewer_cannot_command(process: HubProcess, run: Run) -> None:
    with aetheria.connect(token=process.viewer) as hub:
        with pytest.raises(HubError, match="operator"):
            hub.run(run.id).pause()
        assert hub.run(run.id).knobs


def test_a_connection_that_was_closed_says_so(process: HubProcess) -> None:
    hub = aetheria.connect()
    hub.close()
    hub.close()
    with pytest.raises(RuntimeError, match="has been closed"):
        hub.runs()


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number, >= 0, < 1"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "a whole number or null"),
        ({"enum": ["a", 1]}, "one of a, 1"),
        ({"type": "array", "items": {"type": "string"}}, "a list, each a text"),
        ({"const": "adamw"}, "adamw"),
        ({}, ""),
    ],
)
def test_schemas_in_words(schema: dict[str, Any], words: str) -> None:
    assert allowed_in_words(schema) == words


def test_knobs_that_nobody_told_are_empty() -> None:
    knobs = KnobValues(None, {}, {}, None)
    assert (len(knobs), knobs.rows(), knobs.describe().count("\n")) == (0, [], 1)
