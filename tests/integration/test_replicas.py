"""A run of three replicas that know nothing of one another - two scripts, one training of Aetheria's - at one hub."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.warm import WarmProcess
from typer.testing import CliRunner, Result

import aetheria
from aetheria.cli import app
from aetheria.client import Group, Hub, ReplicasRefusedError, Run
from aetheria.errors import CommandError, RunFolderError
from aetheria.loom.hub_file import host_name
from aetheria.mcp_server import Agent
from hub_cases import HubProcess, wait_for

SCRIPT = Path(__file__).parents[1] / "replica_script.py"
MODEL = """
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherDataModule, AetherModel, Registry


@Registry.register_model("Slow")
class Slow(AetherModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        time.sleep(0.02)
        return {"loss": self.layer(batch[0]).square().mean()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@Registry.register_data("Ones")
class Ones(AetherDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(1000, 2)), batch_size=2)
"""
CONFIG = """
model_name: Slow
data_name: Ones
epochs: 100000
accelerator: cpu
run_name: pretrain
snapshots: {every_epochs: null, every_seconds: 1}
"""
REPLICAS = ["a", "b", "c"]


class Stage:
    """A hub, and what trains beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = HubProcess(folder / "home").wait()
        self.processes: dict[str, WarmProcess] = {}
        (folder / "plugins").mkdir()
        (folder / "plugins" / "model.py").write_text(MODEL)
        (folder / "config.yaml").write_text(CONFIG)
        for replica in REPLICAS:
            self.start(replica)

    def start(self, replica: str, runs_dir: str = "runs") -> None:
        arguments: list[Any] = [SCRIPT, runs_dir, "pretrain", replica]
        if replica == "c":
            own = [
                "--set",
                "replica_id=c",
                "--set",
                f"runs_dir={runs_dir}",
                "--resume",
                "auto",
                "--live",
                "on",
                "--quiet",
            ]
            arguments = ["-m", "aetheria", "train", "config.yaml", *own]
        with (self.folder / f"{runs_dir}-{replica}.log").open("a") as output:
            environment = self.hub.environment | {"OMP_NUM_THREADS": "1"}
            self.processes[f"{runs_dir}/{replica}"] = WarmProcess(
                arguments, cwd=self.folder, env=environment, stdout=output, stderr=output
            )

    def revive(self) -> None:
        """Starts those again that an earlier test has ended."""
        for replica in REPLICAS:
            if self.processes[f"runs/{replica}"].poll() is not None:
                self.start(replica)

    def kill(self, replica: str) -> int:
        process = self.processes[f"runs/{replica}"]
        process.kill()
        process.wait(60)
        return process.pid

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(60)
        self.hub.end()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("replicas"))
    try:
        yield stage
    finally:
        stage.end()


@pytest.fixture(autouse=True)
def _environment(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HOME", str(stage.hub.home))
    for variable in ("AETHERIA_HUB_URL", "AETHERIA_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def hub(stage: Stage) -> Iterator[Hub]:
    stage.revive()
    with aetheria.connect() as connection:
        wait_for(lambda: all_there(connection), "the replicas and their knobs", 120.0)
        yield connection


@pytest.fixture
def group(hub: Hub) -> Group:
    found = hub.run("pretrain")
    assert isinstance(found, Group)
    return found


def all_there(hub: Hub) -> bool:
    runs = {run.replica: run for run in hub.runs() if run.group == "pretrain"}
    return sorted(runs) == REPLICAS and all(
        run.connected and run.status == "running" and "learning_rate" in hub.run(run.id).knobs for run in runs.values()
    )


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def changes(run: Run) -> list[Any]:
    """Returns what the journal of a run says about changes of its learning rate: the values that took effect."""
    applied = [entry.outcome.result.get("after", {}) for entry in run.journal if entry.outcome.state == "applied"]
    return [after["learning_rate"] for after in applied if "learning_rate" in after]


# --- who they are ----------------------------------------------------------------------------------------------------


def test_the_hub_knows_who_trains_where_and_on_what(stage: Stage, hub: Hub, group: Group) -> None:
    known = {each["id"]: each for each in hub.replicas() if each["run"] == "pretrain"}
    assert sorted(known) == REPLICAS
    for replica, each in known.items():
        assert (each["name"], each["host"], each["devices"]) == (f"pretrain@{replica}", host_name(), ["cpu"])
        assert each["connected"]
        assert each["pid"] == stage.processes[f"runs/{replica}"].pid
    status = group.status
    assert (status.id, status.status, status.connected) == ("pretrain", "running", True)
    assert [(each.id, each.replica, each.devices) for each in group.replicas] == [
        (f"pretrain@{replica}", replica, ["cpu"]) for replica in REPLICAS
    ]
    folders = sorted(path.name for path in (stage.folder / "runs").iterdir())
    assert folders == [f"pretrain@{replica}" for replica in REPLICAS]


def test_names_mean_all_of_them_or_one(hub: Hub) -> None:
    assert {type(hub.run(name)) for name in ("pretrain", "pre", "@last")} == {Group}
    assert (hub.run("pretrain@b").id, hub.run("@b").id) == ("pretrain@b", "pretrain@b")
    assert hub.run("pretrain").replica("c").status.replica == "c"
    with pytest.raises(RunFolderError, match="fits 3 runs: pretrain@"):
        hub.run("train@")
    with pytest.raises(RunFolderError, match="no run called 'pretrain@x'"):
        hub.run("pretrain").replica("x").status  # noqa: B018
    for what in (lambda: hub.run("pretrain").knobs, lambda: hub.run("pretrain").journal):
        with pytest.raises(RunFolderError, match=r"each replica of pretrain has its own .*: pretrain@a, pretrain@b"):
            what()
    with pytest.raises(RunFolderError, match="pretrain@a is not a run of several replicas"):
        hub.run("pretrain@a").ping(replicas=["a"])


def test_a_second_one_of_the_same_id_is_not_let_in(stage: Stage, group: Group) -> None:
    pid = group.replica("a").status.pid
    stage.start("a", "elsewhere")
    log = stage.folder / "elsewhere" / "pretrain@a" / "sidecar.log"
    wait_for(lambda: log.exists() and "pretrain@a trains already" in log.read_text(), "the hub to send it away")
    twin = stage.processes.pop("elsewhere/a")
    assert twin.poll() is None  # it trains on, and is not steered
    twin.kill()
    twin.wait(60)
    assert group.replica("a").status.pid == pid
    assert len(group.replicas) == 3


def test_what_says_that_it_is_a_replica_must_be_called_like_one(stage: Stage, group: Group) -> None:
    headers = {"Authorization": f"Bearer {stage.hub.operator}"}
    with httpx.Client(base_url=stage.hub.url, headers=headers, trust_env=False) as http:
        for run, said, status, told in (
            ("digits", {"group": "pretrain", "replica": "a"}, 422, "digits is not replica 'a' of pretrain"),
            ("pretrain@a b", {"group": "pretrain", "replica": "a b"}, 422, "is not replica 'a b' of pretrain"),
            ("pretrain", {}, 409, "a run called pretrain with replicas, and another one without"),
        ):
            answer = http.post(f"/api/v1/runs/{run}/register", json=said)
            assert (answer.status_code, told in answer.json()["detail"]) == (status, True), answer.text
        answer = http.post("/api/v1/runs/pretrain@a/commands", params={"replica": "a"}, content=b"{}")
        assert (answer.status_code, "there is none to choose" in answer.json()["detail"]) == (404, True)
        for what in ("knobs", "journal", "metrics", "events"):
            answer = http.get(f"/api/v1/runs/pretrain/{what}")
            assert (answer.status_code, "a run of 3 replicas" in answer.json()["detail"]) == (404, True)
    assert len(group.replicas) == 3


# --- what they are told ----------------------------------------------------------------------------------------------


def test_all_some_and_one_of_them_are_told(group: Group) -> None:
    before = {replica: len(changes(group.replica(replica))) for replica in REPLICAS}
    everybody = group.set(learning_rate=0.05, reason="all")
    some = group.set(learning_rate=0.04, replicas=["c", "a"])
    one = group.replica("b").set(learning_rate=0.03)
    assert sorted(everybody) == REPLICAS
    assert {outcome.state for outcome in everybody.values()} == {"applied"}
    assert {outcome.run for outcome in everybody.values()} == {f"pretrain@{replica}" for replica in REPLICAS}
    assert len({outcome.command for outcome in everybody.values()}) == 3
    assert sorted(some) == ["a", "c"]
    assert one.step > everybody["b"].step
    for replica, expected in (("a", [0.05, 0.04]), ("b", [0.05, 0.03]), ("c", [0.05, 0.04])):
        assert changes(group.replica(replica))[before[replica] :] == expected
        assert group.replica(replica).knobs["learning_rate"] == expected[-1]


def test_each_of_them_refuses_for_itself(group: Group) -> None:
    with pytest.raises(
        ReplicasRefusedError, match=r"3 of 3 replicas .*a: learning_rate = -1 is refused.*c: "
    ) as all_of:
        group.set(learning_rate=-1)
    assert [each.outcome and each.outcome.state for each in all_of.value.outcomes] == ["rejected"] * 3
    group.replica("b").set(learning_rate=0.02)
    revisions = {replica: group.replica(replica).knobs.revision for replica in REPLICAS}
    with pytest.raises(CommandError, match="have not done it") as expecting:
        group.set(learning_rate=0.06, expect_revision=revisions["b"])
    assert isinstance(expecting.value, ReplicasRefusedError)
    done = {each.replica for each in expecting.value.outcomes if each.outcome and each.outcome.state == "applied"}
    assert done == {replica for replica in REPLICAS if revisions[replica] == revisions["b"]}
    assert "b" in done
    tried = group.set(learning_rate=0.5, dry_run=True)
    assert {outcome.state for outcome in tried.values()} == {"accepted"}
    with pytest.raises(RunFolderError, match=r"pretrain has no replica 'x'\. It has: a, b, c\."):
        group.ping(replicas=["a", "x"])


def test_the_same_request_twice_has_one_effect_on_each(hub: Hub, group: Group) -> None:
    before = {replica: len(changes(group.replica(replica))) for replica in REPLICAS}
    first, second = (group.set(learning_rate=0.07, id="0123456789abcdef", author="ana") for _ in range(2))
    assert first == second
    for replica in REPLICAS:
        assert len(changes(group.replica(replica))) == before[replica] + 1
    assert {each.replica: each.outcome for each in group.outcomes("0123456789abcdef")} == first
    with pytest.raises(CommandError, match="belongs to another command"):
        group.set(learning_rate=0.08, id="0123456789abcdef", author="ana")


def test_they_pause_take_snapshots_and_notes_together(group: Group) -> None:
    assert sorted(group.pause()) == REPLICAS
    wait_for(lambda: {each.status for each in group.replicas} == {"paused"}, "the pauses to be seen")
    assert group.status.status == "paused"
    assert {outcome.message for outcome in group.ping().values()} == {"paused"}
    group.resume()
    assert sorted(group.note("look here")) == REPLICAS
    assert group.snapshot("good", replicas=["c"])["c"].state == "applied"
    with pytest.raises(ReplicasRefusedError, match=r"2 of 3 .*a: this run cannot snapshot.* Done: c at step") as some:
        group.snapshot("again")  # scripts that have not said how
    assert [each.outcome and each.outcome.state for each in some.value.outcomes] == ["rejected", "rejected", "applied"]


# --- other ways to tell them -----------------------------------------------------------------------------------------


def test_the_command_line(group: Group) -> None:
    result = call("set", "pretrain", "learning_rate=0.011", "--reason", "plateau")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == REPLICAS
    assert all("-> 0.011 at step" in line for line in lines)
    assert call("get", "pretrain", "learning_rate").stdout == "a: 0.011\nb: 0.011\nc: 0.011\n"
    result = call("set", "pretrain", "learning_rate=0.012", "--replica", "a", "--replica", "b", "--json")
    assert [each["outcome"]["state"] for each in json.loads(result.stdout)] == ["applied", "applied"]
    assert json.loads(call("get", "pretrain", "learning_rate", "--json").stdout)["b"] == {"learning_rate": 0.012}
    assert call("get", "pretrain@c", "learning_rate").stdout == "0.011\n"
    result = call("undo", "pretrain", "--replica", "a", "--replica", "b")
    assert [line.partition(" at ")[0] for line in result.stdout.splitlines()] == [
        f"{replica}: learning_rate 0.012 -> 0.011" for replica in "ab"
    ]
    refused = call("set", "pretrain", "learning_rate=-9", "--replica", "b")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("b: learning_rate = -9")
    for wrong in (["ping", "pretrain", "--replica", "x"], ["ping", "pretrain@a", "--replica", "a"], ["ping", "nobody"]):
        assert call(*wrong).exit_code == 2, wrong


def test_the_command_line_looks(stage: Stage, group: Group) -> None:
    table = call("status").stdout.splitlines()
    lines = [line.split() for line in table if line.startswith("pretrain@")]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        (f"pretrain@{each}", "running", "cpu") for each in REPLICAS
    ]
    shown = call("watch", "pretrain", "--once").stdout
    assert all(f"pretrain@{replica}: running, step" in shown for replica in REPLICAS)
    assert "loss" in shown
    status = json.loads(call("watch", "pretrain", "--once", "--json").stdout)
    assert [each["id"] for each in status["replicas"]] == [f"pretrain@{replica}" for replica in REPLICAS]
    knobs = call("knobs", "pretrain").stdout
    assert all(f"pretrain@{replica}\n" in knobs for replica in REPLICAS)
    assert sorted(json.loads(call("knobs", "pretrain", "--json", "--replica", "a", "--replica", "c").stdout)) == [
        "a",
        "c",
    ]
    runs = ["--runs-dir", str(stage.folder / "runs")]
    listed = call("journal", "pretrain", *runs)
    assert listed.exit_code == 2
    assert "is a run of 3 replicas" in listed.stderr
    assert "learning_rate" in call("journal", "pretrain@a", *runs).stdout


def test_what_happens_in_them_is_watched_together(group: Group) -> None:
    begun = next(event for event in group.watch(since=0) if event.seq)
    told = group.note("seen")
    heard: dict[str, str] = {}
    for event in group.watch(since=begun.seq):
        if event.type == "outcome" and event.data["state"] == "applied":
            heard[event.data["command"]] = event.run
        if heard.keys() >= {outcome.command for outcome in told.values()}:
            break
    assert {heard[outcome.command] for outcome in told.values()} == {f"pretrain@{replica}" for replica in REPLICAS}


def test_an_agent_tells_them(group: Group) -> None:
    async def work() -> Any:
        agent = Agent(allow_commands=True, budget=1)
        values = {"values": {"learning_rate": 0.013}}
        told = await agent.command("pretrain", "set", values, reason="a test", replicas=["a"])
        with pytest.raises(CommandError, match="budget of 1"):
            await agent.command("pretrain", "pause")
        await (await agent.hub()).close()
        return told

    assert [(replica, outcome.state) for replica, outcome in asyncio.run(work()).items()] == [("a", "applied")]
    assert group.replica("a").knobs["learning_rate"] == 0.013


# --- they come and go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replica", ["b", "c"])
def test_one_that_is_killed_is_missed_and_comes_back_as_itself(stage: Stage, group: Group, replica: str) -> None:
    others = [each for each in REPLICAS if each != replica]
    group.set(learning_rate=0.021)
    was = group.replica(replica)
    snapshots = stage.folder / "runs" / "pretrain@c" / "snapshots"
    wait_for(lambda: list(snapshots.glob("step-*/manifest.json")), "a snapshot")
    folder, before = was.status.folder, changes(was)
    pid = stage.kill(replica)
    wait_for(lambda: was.status.status == "killed", "its death to be seen")
    with pytest.raises(
        ReplicasRefusedError, match=rf"1 of 3 .*{replica}: pretrain@{replica} does not train any"
    ) as lost:
        group.set(learning_rate=0.022)
    states = {each.replica: each.outcome and each.outcome.state for each in lost.value.outcomes}
    assert states == dict.fromkeys(others, "applied") | {replica: "rejected"}
    assert sorted(group.ping(replicas=others)) == others
    stage.start(replica)
    wait_for(lambda: was.status.connected and was.status.pid != pid and "learning_rate" in was.knobs, "its return")
    assert [each.id for each in group.replicas] == [f"pretrain@{each}" for each in REPLICAS]
    assert was.status.folder == folder
    assert changes(was) == before  # what it has been told is in its journal, once
    assert sorted(group.set(learning_rate=0.023)) == REPLICAS


def test_a_hub_that_was_killed_knows_them_again(stage: Stage, hub: Hub, group: Group) -> None:
    told = group.set(learning_rate=0.031, id="fedcba9876543210", author="ana")
    counts = {replica: len(changes(group.replica(replica))) for replica in REPLICAS}
    hub.close()
    stage.hub.kill()
    dead = stage.kill("a")  # while nobody looks
    stage.hub = HubProcess(stage.hub.home).wait()
    with aetheria.connect() as hub:
        group = hub.run("pretrain")
        assert isinstance(group, Group)
        known = {each.replica: each for each in group.replicas}
        assert sorted(known) == REPLICAS
        assert (known["a"].status, known["a"].pid, known["a"].devices) == ("killed", dead, ["cpu"])
        again = group.set(learning_rate=0.031, id="fedcba9876543210", author="ana")
        assert again == told
        stage.start("a")
        wait_for(lambda: all_there(hub), "the replicas")
        assert group.set(learning_rate=0.031, id="fedcba9876543210", author="ana") == told
        assert {replica: len(changes(group.replica(replica))) for replica in REPLICAS} == counts
        assert sorted(group.set(learning_rate=0.032)) == REPLICAS


def test_one_leaves_and_the_others_are_still_told(stage: Stage, group: Group) -> None:
    group.stop(replicas=["b"])
    assert stage.processes["runs/b"].wait(60) == 0
    wait_for(lambda: group.replica("b").status.status == "stopped", "the hub to know that it has ended")
    assert sorted(group.ping()) == ["a", "c"]
    with pytest.raises(ReplicasRefusedError, match="b: pretrain@b does not train any more: it is stopped"):
        group.ping(replicas=["b"])
    with pytest.raises(CommandError, match="it is stopped"):
        group.replica("b").ping()
    os.kill(stage.processes["runs/a"].pid, signal.SIGSTOP)  # it does not answer; the other one does
    try:
        with pytest.raises(
            ReplicasRefusedError, match=r"a: has not said anything yet\. The note stands.*Done: c"
        ) as late:
            group.note("late", timeout=0.5)
    finally:
        os.kill(stage.processes["runs/a"].pid, signal.SIGCONT)
    outcomes = {each.replica: each.outcome for each in group.outcomes(late.value.command, timeout=30.0)}
    assert {replica: outcome and outcome.state for replica, outcome in outcomes.items()} == dict.fromkeys(
        "ac", "applied"
    )
    group.stop()
    for replica in "ac":
        stage.processes[f"runs/{replica}"].wait(60)
    wait_for(lambda: {each.status for each in group.replicas} == {"stopped"}, "the hub to know")
    with pytest.raises(CommandError, match="no replica of pretrain trains any more: a is stopped, b is stopped"):
        group.ping()
