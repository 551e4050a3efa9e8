"""Lightning, Transformers and Accelerate in two processes of their own: steered as one, or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aetheria.control.journal import read_journal
from aetheria.runs import RunFolder

SCRIPT = Path(__file__).parents[1] / "framework_ranks.py"
END, SNAPSHOT = 40, 30  # the steps at which its commands of these kinds are given
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(folder: Path, launcher: list[str], *names: str) -> list[list[dict[str, Any]]]:
    """Returns what the two ranks of each training have seen."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs: pip install 'aetheria[{name}]'")
    with subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), str(folder), *names],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=240)
        finally:
            if process.poll() is None:  # torchrun ends its ranks when it is told to; Lightning's are in this group
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-6000:]
    return [[json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names]


def check(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Checks that both have done the same at the same step; returns the step at which the snapshot was taken."""
    assert first["outcomes"] == second["outcomes"]
    assert first["weights"] == second["weights"]
    assert first["values"] == second["values"] == [0.002, 0.01, 1.5]
    assert first["ranks"] == second["ranks"] == 2
    assert first["step"] == second["step"]
    assert END <= first["step"] < 2 * END  # a little after the stop was sent, long before the data ends
    assert first["statuses"] == ["running", "paused", "running", "ended"]

    final = {command: (state, message) for _, command, state, message in first["outcomes"]}
    became = {int(step): [final[command] for command in commands] for step, commands in first["asked"].items()}
    negative, too_much, failed = became.pop(8)
    assert [negative[0], too_much[0]] == ["rejected", "rejected"]
    assert failed == ("failed", "rank 1: RuntimeError: three is not to rank 1's taste")
    assert {state for commands in became.values() for state, _ in commands} == {"applied"}
    assert [final[command][0] for command in first["asked_when_paused"]] == ["applied"] * 3

    folder = Path(first["folder"])
    assert second["folder"] == first["folder"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # one run, not two
    assert RunFolder(folder).read()["status"] == "stopped"
    journalled = {(each.outcome.command, each.outcome.state) for each in read_journal(folder / "journal.jsonl")}
    assert {(command, state) for command, (state, _) in final.items()} <= journalled

    (snapshot,) = first["asked"][str(SNAPSHOT)]
    (step,) = (step for step, command, state, _ in first["outcomes"] if (command, state) == (snapshot, "applied"))
    return int(step)


def test_lightning_in_two_processes_is_steered_as_one(tmp_path: Path) -> None:
    ((first, second),) = train(tmp_path, [], "lightning")  # which launches the second process itself
    step = check(first, second)
    assert (Path(first["folder"]) / "checkpoints" / f"step-{step:08d}.ckpt").is_file()


def test_transformers_and_accelerate_in_two_processes_are_steered_as_one(tmp_path: Path) -> None:
    transformers, accelerate = train(tmp_path, TORCHRUN, "transformers", "accelerate")
    step = check(*transformers)
    written = {each.name for each in (tmp_path / "transformers" / "output" / f"checkpoint-{step}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= written
    step = check(*accelerate)
    written = {each.name for each in (Path(accelerate[0]["folder"]) / "checkpoints" / f"step-{step:08d}").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= written
