"""A plain DDP script with a Weavelet on every rank: a command takes effect at the same step on all, or nowhere."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranked import launch, run_ranks, wait_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aetheria import TrainingStopped, Weavelet
from aetheria.control import agreement
from aetheria.control.journal import read_journal
from aetheria.loom.reader import RunReader
from aetheria.protocol import AnyCommand, command_of
from aetheria.runs import RunFolder
from scripted import ScriptedLine, set_, weights

STEPS = 120


class Line(ScriptedLine):
    """Sends what is sent while the loop is paused a while later."""

    since = after = 0.0
    later: tuple[AnyCommand, ...] = ()

    def pause_for(self, seconds: float, *commands: AnyCommand) -> None:
        self.after, self.later = seconds, commands

    def __getitem__(self, index: int) -> int:
        assert self.weavelet is not None
        if self.weavelet.paused and self.later:
            self.since = self.since or time.monotonic()
            if time.monotonic() > self.since + self.after:
                self.put(self.later)
                self.later = ()
        return super().__getitem__(index)


_alive: list[Script] = []  # gloo's end hangs now and then, if DDP is the last to let it go: not before the answer


class Script:
    """What such a script has: a model in DDP, an optimiser, and one line more."""

    def __init__(self, runs_dir: str, script: dict[int, list[AnyCommand]], **options: Any) -> None:
        agreement._INTERVAL = 0.02  # not half a second: these trainings are over by then
        self.rank = int(os.environ["RANK"])
        self.line = Line(script if self.rank == 0 else {})  # which alone is told anything
        self.weavelet = Weavelet(run="plain", runs_dir=runs_dir, line=self.line, **options)
        self.line.weavelet = self.weavelet
        self.taste = 1.0
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.draws = torch.Generator().manual_seed(self.rank)
        _alive.append(self)

    def begin(self, timeout: float = 60.0) -> None:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
        self.model = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 100, 0.5)

    def steer(self) -> None:
        self.weavelet.watch(self.optimizer, self.schedule)

        @self.weavelet.handler("taste", get=lambda: self.taste, gt=0.0, le=4.0)
        def set_taste(value: float) -> None:
            self.taste = value
            if value == 3.0 and self.rank == 1:
                raise RuntimeError("three is not to rank 1's taste")

        @self.weavelet.action("snapshot")
        def save() -> str:
            if self.rank == 0 and self.taste > 1.5:
                raise OSError("no space left")
            return "saved"

    def step(self) -> Tensor:
        x = torch.randn(8, 4, generator=self.draws)
        loss = (self.model(x) - x.sum(1, keepdim=True)).abs().pow(self.taste).mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def report(self) -> dict[str, Any]:
        said = [each for each in self.line.told if each["as"] == "ack"]
        return {
            "weights": weights(self.net),
            "outcomes": [(each["step"], each["command"], each["state"], each["message"]) for each in said],
            "statuses": self.line.statuses,
            "messages": [each["message"] for each in said],
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "step": self.weavelet.global_step,
            "folder": str(self.weavelet.folder),
        }


def commands_of(seed: int) -> dict[int, list[AnyCommand]]:
    """Returns random commands, some of which are refused, and some of which fail on one rank."""
    chance = random.Random(seed)
    kinds: list[Any] = [
        lambda: set_(learning_rate=round(chance.uniform(1e-3, 1e-2), 6)),
        lambda: set_(taste=chance.choice([9.0, 3.0])),  # refused by all; or by one rank, when it is carried out
        lambda: set_(taste=chance.uniform(1.0, 2.0), weight_decay=0.01),
        lambda: command_of("note", {"text": "x" * chance.choice([3, 900])}),
        lambda: command_of("snapshot"),
        lambda: command_of("validate"),
        lambda: command_of("ping", {}, dry_run=chance.random() < 0.5),
        lambda: set_(learning_rate=-1.0),
    ]
    steps = [chance.randrange(STEPS) for _ in range(20)]
    script = {step: [chance.choice(kinds)() for _ in range(chance.choice([1, 1, 3]))] for step in steps}
    return script | {3: [set_(taste=3.0), set_(taste=2.0), command_of("snapshot")]}  # which fail on one rank


def train(runs_dir: str, start: str, seed: int) -> dict[str, Any]:
    script = Script(runs_dir, commands_of(seed))
    delays = random.Random(os.getpid())
    if start == "before":
        script.weavelet.start()
    script.begin()
    script.steer()
    if start == "after":
        script.weavelet.start()
    for _ in range(STEPS):
        script.step()
        if delays.random() < 0.02:
            time.sleep(delays.random() * 0.01)
    script.weavelet.stop()
    return script.report()


@pytest.mark.parametrize(("ranks", "start"), [(2, "before"), (3, "after")])
def test_every_rank_does_the_same_at_the_same_step(tmp_path: Path, ranks: int, start: str) -> None:
    found = run_ranks(ranks, train, str(tmp_path), start, ranks)
    first = found[0]
    assert len({each["weights"] for each in found}) == 1
    assert len({each["folder"] for each in found}) == 1
    for each in found[1:]:
        assert each["outcomes"] == first["outcomes"][: len(each["outcomes"])]
        rest = first["outcomes"][len(each["outcomes"]) :]  # too late for an exchange: the first refuses it by itself
        assert all("has ended" in message for *_, message in rest)
    final = [outcome for outcome in first["outcomes"] if outcome[2] != "accepted"]
    assert {state for _, _, state, _ in final} >= {"applied", "rejected", "failed"}
    assert any("rank 1: RuntimeError: three is not" in message for *_, message in final)
    assert any("rank 0: OSError: no space left" in message for *_, message in final)
    (folder,) = tmp_path.iterdir()
    journalled = {(each.outcome.command, each.outcome.state) for each in read_journal(folder / "journal.jsonl")}
    assert {(command, state) for _, command, state, _ in final if state in ("applied", "failed")} <= journalled
    assert RunFolder(folder).read()["status"] == "completed"


# --- pauses, and the end ---------------------------------------------------------------------------------------------
def wait(runs_dir: str, seconds: float, timeout: float) -> dict[str, Any]:
    script = Script(runs_dir, {5: [command_of("pause")]})
    script.line.pause_for(seconds, set_(learning_rate=0.5), command_of("ping"), command_of("resume"))
    script.begin(timeout)
    script.steer()
    script.weavelet.start()
    script.train(20)
    script.weavelet.stop()
    return script.report()


def test_a_pause_outlasts_the_time_out_of_the_process_group(tmp_path: Path) -> None:
    found = run_ranks(2, wait, str(tmp_path), 2.5, 1.5)
    assert found[0]["statuses"] == ["running", "paused", "running", "ended"]
    assert found[0]["outcomes"] == found[1]["outcomes"]
    assert "paused" in found[1]["messages"]
    assert [each["step"] for each in found] == [20, 20]
    assert [each["rates"] for each in found] == [[0.5], [0.5]]
    assert found[0]["weights"] == found[1]["weights"]


def stop(runs_dir: str) -> dict[str, Any]:
    script = Script(runs_dir, {5: [command_of("stop", author="ana", reason="lunch")]})
    script.begin()
    script.steer()
    with pytest.raises(TrainingStopped, match="stopped by ana: lunch"), script.weavelet:
        script.train(1000)
    return script.report()


def test_a_stop_leaves_at_the_same_step_on_all(tmp_path: Path) -> None:
    found = run_ranks(2, stop, str(tmp_path))
    assert found[0]["step"] == found[1]["step"] < 1000
    assert found[0]["outcomes"] == found[1]["outcomes"]
    assert found[0]["weights"] == found[1]["weights"]
    assert RunFolder(Path(found[0]["folder"])).read()["status"] == "stopped"


def interrupted(runs_dir: str) -> dict[str, Any]:
    script = Script(runs_dir, {3: [command_of("pause")]})
    script.begin()
    script.steer()
    raised = ""
    try:
        with script.weavelet:
            script.train(1000)
    except (KeyboardInterrupt, RuntimeError) as error:  # torch's, of a rank that has lost the other
        raised = type(error).__name__
    dist.destroy_process_group()
    return script.report() | {"raised": raised}


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_interrupted_in_a_pause_leaves_none_parked(tmp_path: Path, who: int) -> None:
    ranks = launch(2, interrupted, str(tmp_path / "runs"))
    wait_for(lambda: list(tmp_path.glob("runs/*/journal.jsonl")), "a run")
    (journal,) = tmp_path.glob("runs/*/journal.jsonl")
    wait_for(lambda: [entry for entry in read_journal(journal) if entry.outcome.state == "applied"], "a pause")
    ranks[who].kill(signal.SIGINT)
    found = [rank.result() for rank in ranks]
    assert found[who]["raised"] == "KeyboardInterrupt"
    assert found[1 - who]["raised"] == "RuntimeError"
    assert found[0]["outcomes"][-1][2] in ("applied", "rejected")


# --- ranks that do not fit together ----------------------------------------------------------------------------------
def uneven(runs_dir: str, steps: list[int]) -> dict[str, Any]:
    """Trains by itself on each rank, as local SGD does: the gradients would otherwise wait for one another."""
    fewest = min(steps)
    late = [set_(learning_rate=0.1), command_of("pause"), command_of("stop")]  # nobody can take these up everywhere
    script = Script(runs_dir, {fewest - 4: [set_(learning_rate=0.5)], fewest: late})
    script.begin()
    script.steer()
    script.model = script.net  # type: ignore[assignment]
    script.weavelet.start()
    script.train(steps[script.rank])
    script.weavelet.stop()
    dist.barrier()
    dist.destroy_process_group()
    return script.report()


@pytest.mark.parametrize("steps", [[10, 60], [60, 10]])
def test_where_one_rank_takes_fewer_steps_it_is_the_steering_that_ends(tmp_path: Path, steps: list[int]) -> None:
    begun = time.monotonic()
    found = run_ranks(2, uneven, str(tmp_path), steps)
    assert time.monotonic() - begun < 40
    assert [each["step"] for each in found] == steps
    states = [{command: state for _, command, state, _ in each["outcomes"]} for each in found]
    assert list(states[0].values())[-3:] == ["rejected"] * 3
    assert "applied" not in list(states[1].values())[1:]
    assert found[0]["rates"] == found[1]["rates"]
    if steps[0] > steps[1]:
        assert f"rank 1 has ended after {steps[1]} steps" in found[0]["messages"][-1]


def joined(runs_dir: str, steps: list[int]) -> dict[str, Any]:
    """Trains as DDP lets ranks with fewer batches: they answer the others' collectives, and know of nothing else."""
    script = Script(runs_dir, {})
    script.begin()
    script.steer()
    script.weavelet.start()
    with script.model.join():
        script.train(steps[script.rank])
    script.weavelet.stop()
    dist.destroy_process_group()
    return script.report()


def test_ranks_that_ddp_lets_end_earlier_are_not_waited_for_long(tmp_path: Path) -> None:
    found = run_ranks(2, joined, str(tmp_path), [5, 100], AETHERIA_RANK_TIMEOUT="1")
    assert [each["step"] for each in found] == [5, 100]
    assert found[0]["weights"] == found[1]["weights"]


def unsaved(runs_dir: str) -> str:
    script = Script(runs_dir, {2: [command_of("snapshot")]})
    script.begin()
    script.steer()

    @script.weavelet.action("snapshot", together=True)
    def save() -> None:
        if script.rank == 0:
            raise OSError("no space left")
        dist.barrier()

    raised = ""
    try:
        with script.weavelet:
            script.train(200)
    except (OSError, RuntimeError) as error:
        raised = type(error).__name__
    dist.destroy_process_group()
    return raised


def test_where_ranks_wait_for_one_another_in_an_action_its_failure_on_one_ends_all(tmp_path: Path) -> None:
    assert run_ranks(2, unsaved, str(tmp_path)) == ["OSError", "RuntimeError"]
    (folder,) = tmp_path.iterdir()
    assert RunFolder(folder).read()["status"] == "failed"


def lonely(runs_dir: str, part: str) -> str:
    script = Script(runs_dir, {}, ranks="alone" if part == "alone" else "auto")
    script.begin()
    script.steer()
    if part == "without" and script.rank == 1:
        dist.distributed_c10d._get_default_store().wait(["named"])  # there, until the other has missed it
        return "without"
    if part == "ahead":
        script.weavelet.global_step = script.rank
    try:
        script.weavelet.start()
    finally:
        dist.distributed_c10d._get_default_store().set("named", "yes")
    script.train(3)
    script.weavelet.stop()
    return script.weavelet.run_id


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("without", "RankError: rank 1 of 2 has no Weavelet"),
        ("ahead", "ConfigError: the ranks have taken different numbers of steps: 0 on rank 0, 1 on rank 1"),
        ("folder", "FileExistsError|RunFolderError: cannot make a run folder"),
    ],
)
def test_a_rank_that_does_not_come_along_is_named(tmp_path: Path, part: str, error: str) -> None:
    if part == "folder":
        (tmp_path / "runs").touch()
    ranks = launch(2, lonely, str(tmp_path / "runs"), part, AETHERIA_RENDEZVOUS_TIMEOUT="1")
    with pytest.raises(RuntimeError, match=error):
        ranks[0].result()
    if part != "without":
        with pytest.raises(RuntimeError, match=error if part == "ahead" else "RankError: rank 0 failed"):
            ranks[1].result()
    else:
        assert ranks[1].result() == "without"


def test_alone_every_process_has_a_run_of_its_own(tmp_path: Path) -> None:
    found = run_ranks(2, lonely, str(tmp_path), "alone")
    assert sorted(found) == sorted(path.name for path in tmp_path.iterdir())
    assert len(set(found)) == 2


# --- a process group that comes late ---------------------------------------------------------------------------------
def late(runs_dir: str, warm_up: int, told: bool) -> dict[str, Any]:
    place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = set_(learning_rate=0.5)
    script = Script(runs_dir, {1: [command]})
    if not told:
        for name in place:
            del os.environ[name]
    script.weavelet.start()
    for _ in range(warm_up):
        script.weavelet.step()
    os.environ.update(place)
    script.begin()
    script.steer()
    script.train(30)
    script.weavelet.stop()
    return script.report()


@pytest.mark.parametrize(("warm_up", "told"), [(5, True), (0, False)])
def test_ranks_find_one_another_at_the_first_step_with_a_process_group(
    tmp_path: Path, warm_up: int, told: bool
) -> None:
    found = run_ranks(2, late, str(tmp_path), warm_up, told)
    assert found[0]["outcomes"] == found[1]["outcomes"]
    assert [state for _, _, state, _ in found[1]["outcomes"]] == ["accepted", "applied"]
    assert found[0]["outcomes"][0][0] > warm_up
    assert [each["rates"] for each in found] == [[0.5], [0.5]]
    assert len(list(tmp_path.iterdir())) == (1 if told else 2)
    statuses = {RunFolder(path).read()["status"] for path in tmp_path.iterdir()}
    assert statuses == ({"completed"} if told else {"completed", "stopped"})


def test_a_group_that_comes_after_the_first_step_of_a_process_that_nobody_has_told_of_it(tmp_path: Path) -> None:
    found = run_ranks(2, late, str(tmp_path), 2, False)
    first = [each for each in found if each["outcomes"]]
    assert len(first) == 1
    assert first[0]["rates"] == [0.01]


# --- the real process beside it, and one training after the other ----------------------------------------------------
def watched(runs_dir: str, runs: int) -> list[dict[str, Any]]:
    """Trains several times, with no command, and with the real sidecar; zero times stands for once, without."""
    found = []
    for number in range(max(runs, 1)):
        script = Script(runs_dir, {})
        script.weavelet = Weavelet(run="watched", runs_dir=runs_dir, hub="off")
        if number:
            dist.barrier()
            script.model = DistributedDataParallel(script.net)
            script.optimizer = torch.optim.SGD(script.model.parameters(), lr=0.01)
            script.schedule = torch.optim.lr_scheduler.StepLR(script.optimizer, 100, 0.5)
        else:
            script.begin()
        if runs:
            script.weavelet.watch(script.optimizer).start()
        for _ in range(10):
            loss = script.step()
            script.weavelet.log({"loss": loss})
        children = len(multiprocessing.active_children()) + len(_children())
        script.weavelet.stop()
        said = {"weights": weights(script.net), "children": children, "threads": threading.active_count()}
        found.append(said | ({"folder": str(script.weavelet.folder)} if runs else {}))
    found[-1]["groups"] = len(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    return found


def _children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_only_the_first_rank_writes_and_watching_changes_nothing(tmp_path: Path) -> None:
    found = run_ranks(2, watched, str(tmp_path), 3)
    assert [[each["children"] for each in rank] for rank in found] == [[1, 1, 1], [0, 0, 0]]
    assert [each["folder"] for each in found[0]] == [each["folder"] for each in found[1]]
    assert [rank[-1]["groups"] for rank in found] == [2, 2]  # one of the script's, one of ours, used again
    for each in found[0]:
        assert list(RunReader(Path(each["folder"]) / "run.db").metric("loss").steps) == list(range(1, 11))
    (without,), _ = run_ranks(2, watched, str(tmp_path), 0)
    assert {each["weights"] for rank in found for each in rank} == {without["weights"]}


def killed(runs_dir: str) -> dict[str, Any]:
    script = Script(runs_dir, {})
    script.begin()
    script.steer()
    script.model = script.net  # type: ignore[assignment]  # else it is DDP that notices first
    script.weavelet.start()
    script.train(10)
    if script.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    def refused() -> list[dict[str, Any]]:
        script.line.put([command_of("ping")])
        script.step()
        return [each for each in script.line.told if each.get("state") == "rejected"]

    told = wait_for(refused, "the steering to end")
    script.train(10)
    script.weavelet.stop()
    return script.report() | {"why": told[0]["message"]}


def test_a_rank_that_is_killed_ends_the_steering_at_once(tmp_path: Path) -> None:
    ranks = launch(2, killed, str(tmp_path))
    found = ranks[0].result()
    with pytest.raises(ChildProcessError):
        ranks[1].result()
    assert "another rank is gone" in found["why"]
    assert found["step"] > 20
    assert RunFolder(Path(found["folder"])).read()["status"] == "completed"
