"""Steer a run at random while its trainer, its sidecar, the message server and the hub are killed at random.

Every command that the hub has acknowledged must be carried out exactly once, at the boundary that the journal names,
and training again from the journal must give the weights of the steered run. How many kills: the environment variable
AETHERIA_CHAOS_STEERED_KILLS (`make chaos` sets 60).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import aetheria.plugins  # noqa: F401 - imported before forking, not by every life anew
from aetheria.config import TrainingConfig
from aetheria.control.journal import read_journal
from aetheria.control.knobs import controllable
from aetheria.core import AetherModel, Callback, OptimizerPlan, Schedule
from aetheria.data import LoaderDataModule
from aetheria.orchestrator import Orchestrator
from aetheria.protocol import command_of, encode
from aetheria.registry import Registry
from aetheria.replay import replay_run
from aetheria.runs import RunFolder, find_runs
from aetheria.snapshot import list_snapshots

KILLS = int(os.environ.get("AETHERIA_CHAOS_STEERED_KILLS", "6"))
DEADLINE = 300.0  # seconds that anything may take

torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports torch's compiler, which not every life shall do

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found through /proc")


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), index / 40) + torch.randn(4)


class SteeredAndKilled(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.sharpness = 2.0

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0)
    def set_sharpness(self, value: float) -> None:
        self.sharpness = value

    def training_step(self, batch: Tensor) -> dict[str, Any]:
        return {"loss": ((self.net(batch).squeeze(-1) - batch.sum(-1)).abs() ** self.sharpness).mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 500, 0.9), "step")])


class ManyNumbers(LoaderDataModule):
    def __init__(self) -> None:
        super().__init__(DataLoader(Numbers(), batch_size=4, shuffle=True), DataLoader(Numbers(), batch_size=8))


class Unhurried(Callback):
    """Makes steps long enough for something to happen between them."""

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        time.sleep(0.004)  # not for luck: it is the length of a step


def trainer(runs_dir: Path) -> int:
    """Forks a life of the run: its beginning, or its continuation. Returns the process id."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        config = TrainingConfig(
            max_steps=1_000_000,
            snapshots={"every_steps": 25, "every_epochs": None, "keep_last": 3},
            val_interval=50,
            log_every=5,
            live="on",
            model_name="steered-and-killed",
            data_name="steered-and-killed",
            runs_dir=runs_dir,
            run_name="chaos",
        )
        runs = find_runs(runs_dir)
        Orchestrator.from_config(config, callbacks=[Unhurried()]).run(runs[0].path if runs else None)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - a forked life must not return into pytest
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def processes(*words: str) -> list[int]:
    """Returns the processes in whose command line all these words stand."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in line for word in words):
                    found.append(int(entry.name))
    return found


class Stage:
    """The hub and the trainer, and how to kill and restart them."""

    def __init__(self, home: Path, runs_dir: Path) -> None:
        self.home, self.runs_dir = home, runs_dir
        self.pid = 0
        self.hub: subprocess.Popen[bytes] | None = None
        self.killed: Counter[str] = Counter()

    def start(self) -> None:
        self.start_hub()
        self.pid = trainer(self.runs_dir)

    def start_hub(self) -> None:
        self.hub = subprocess.Popen([sys.executable, "-m", "aetheria.weaver", "--folder", str(self.home / "hub")])

    def kill(self, who: str) -> bool:
        """Kills one of them, and starts again what nobody else would."""
        if who == "trainer":
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = trainer(self.runs_dir)
        elif who == "hub":
            assert self.hub is not None
            self.hub.kill()
            self.hub.wait()
            self.start_hub()
        else:
            words = (
                ("aetheria.loom.sidecar", str(self.runs_dir)) if who == "sidecar" else ("nats-server", str(self.home))
            )
            victims = processes(*words)
            if not victims:
                return False
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        self.killed[who] += 1
        return True

    def check(self) -> None:
        """Fails if the trainer has ended by itself."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        assert not done, f"the trainer ended by itself, with {status}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.hub is not None:
            self.hub.terminate()
            self.hub.wait(DEADLINE)


class Operator:
    """Gives commands over HTTP, each with an id of its own, and again when nobody has answered."""

    def __init__(self, home: Path, run_id: str) -> None:
        self.home, self.run_id = home, run_id
        self.unanswered: list[bytes] = []
        self.acknowledged: set[str] = set()

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        try:
            hub = msgspec.json.decode((self.home / "hub" / "hub.json").read_bytes())
            headers = {"Authorization": f"Bearer {hub['operator_token']}"}
            url = f"{hub['url']}/api/v1/runs/{self.run_id}/{path}"
            return httpx.request(method, url, headers=headers, timeout=10, **options)
        except (OSError, msgspec.DecodeError, httpx.HTTPError):
            return None  # it has just been killed

    def give(self, op: str, args: dict[str, Any]) -> None:
        self.unanswered.append(encode(command_of(op, args, run=self.run_id, author="chaos")))
        self.press()

    def press(self) -> None:
        """Gives again what has not been acknowledged."""
        still = []
        for data in self.unanswered:
            answer = self._request("POST", "commands", content=data)
            if answer is not None and answer.status_code == 202:
                self.acknowledged.add(msgspec.json.decode(data)["id"])
            else:
                still.append(data)
        self.unanswered = still


def random_command(chance: random.Random, folder: RunFolder) -> tuple[str, dict[str, Any]]:
    steps = [snapshot.manifest.step for snapshot in list_snapshots(folder.snapshots)[:1]]
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("set", {"values": {"learning_rate": chance.choice([0.005, 0.01, 0.02])}}),
        ("set", {"values": {"sharpness": chance.choice([1.5, 2.0, 9.0]), "momentum": 0.8}}),
        ("set", {"values": {"grad_accumulation_steps": chance.choice([1, 2])}}),
        ("set", {"values": {"max_grad_norm": chance.choice([0.5, None])}}),
        ("validate", {}),
        ("snapshot", {"name": "chaos"}),
        ("pause", {}),
        ("note", {"text": "still here"}),
    ]
    if steps and chance.random() < 0.2:
        return "rewind", {"step": steps[0]}
    return chance.choice(kinds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_every_acknowledged_command_is_carried_out_once_and_the_journal_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(int(os.environ.get("AETHERIA_CHAOS_SEED", "1")))
    Registry.register_model("steered-and-killed")(SteeredAndKilled)
    Registry.register_data("steered-and-killed")(ManyNumbers)
    home, runs_dir = tmp_path / "home", tmp_path / "runs"
    monkeypatch.setenv("AETHERIA_HOME", str(home))
    runs_dir.mkdir()
    home.mkdir()
    stage = Stage(home, runs_dir)
    stage.start()
    try:
        folder = wait_for(lambda: next(iter(find_runs(runs_dir)), None), stage)
        wait_for(lambda: list_snapshots(folder.snapshots), stage)
        operator = Operator(home, folder.run_id)
        while sum(stage.killed.values()) < KILLS:
            for _ in range(chance.randint(0, 3)):
                op, args = random_command(chance, folder)
                operator.give(op, args)
                if op == "pause":
                    operator.give("resume", {})
            time.sleep(chance.uniform(0.0, 0.6))  # not for luck: the instant is what is tried
            stage.check()
            stage.kill(chance.choice(["trainer", "sidecar", "nats", "hub"]))

        def settled() -> bool:
            operator.press()
            final = {entry.outcome.command for entry in journal(folder) if entry.outcome.is_final}
            return not operator.unanswered and operator.acknowledged <= final

        wait_for(settled, stage)
        operator.give("stop", {})
        wait_for(lambda: operator.press() or not operator.unanswered, stage)  # type: ignore[func-returns-value]
        deadline = time.monotonic() + DEADLINE
        while not (done := os.waitpid(stage.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, "the run did not stop"
            operator.press()
            time.sleep(0.05)
        assert done[1] == 0
    finally:
        stage.end()
    entries = journal(folder)
    finals = Counter(entry.outcome.command for entry in entries if entry.outcome.is_final)
    assert set(finals.values()) == {1}, "a command has two ends"
    assert operator.acknowledged <= finals.keys()
    states = Counter(entry.outcome.state for entry in entries if entry.outcome.is_final)
    replayed = replay_run(folder.path)
    assert replayed.equal, f"the replay differs from step {replayed.differs_at} on"
    print(f"{sum(stage.killed.values())} kills {dict(stage.killed)}; {len(finals)} commands {dict(states)}; ")
    print(f"{replayed.result.global_step} steps, compared at {len(replayed.compared)}")


def journal(folder: RunFolder) -> list[Any]:
    return read_journal(folder.path / "journal.jsonl")


def wait_for(condition: Any, stage: Stage) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        stage.check()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)
    return found
