"""The README is run from top to bottom: its files are written, its commands typed, its claims checked."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.warm import WarmProcess, run_warm

README = Path(__file__).parents[2] / "README.md"
DEADLINE = 600.0  # seconds after which something is not slow but stuck


def blocks(language: str) -> list[str]:
    """Returns the code blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_of(folder: Path) -> Path:
    """Returns the newest run folder."""
    return max((folder / "runs").iterdir(), key=lambda run: run.stat().st_mtime_ns)


class Reader:
    """Somebody who types what the README says, in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_files(self) -> None:
        """Writes the blocks whose first line names a file."""
        for block in blocks("python") + blocks("yaml"):
            if named := re.match(r"# (\S+\.(?:py|yaml))\n", block):
                path = self.folder / named[1]
                path.parent.mkdir(exist_ok=True)
                path.write_text(block)

    def start(self, command: str) -> WarmProcess:
        """Starts a command line that begins with `aetheria`."""
        return WarmProcess(self.arguments(command), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def arguments(self, command: str) -> list[str]:
        """Returns what Python is given for a command line."""
        words = shlex.split(command.partition(" #")[0])
        assert words[0] == "aetheria", command
        return ["-m", *words]

    def type(self, command: str) -> str:
        """Runs a command to its end and returns what it wrote."""
        with self.start(command) as process:
            output, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, output
        return output

    def type_cold(self, command: str) -> None:
        """Runs a command to its end with a Python that has imported nothing yet, as somebody's first one."""
        line = [sys.executable, *self.arguments(command)]
        done = subprocess.run(line, cwd=self.folder, capture_output=True, text=True, check=False, timeout=DEADLINE)
        assert done.returncode == 0, done.stderr

    def try_to_type(self, command: str) -> str:
        """Runs a command that may not work yet, and returns what it wrote."""
        with self.start(command) as process:
            return process.communicate(timeout=DEADLINE)[0]

    def type_and_kill(self, command: str) -> None:
        """Runs a command until its first snapshot is there, and no longer."""
        before = set((self.folder / "runs").iterdir())
        with self.start(command) as process:
            while process.poll() is None:
                runs = set((self.folder / "runs").iterdir()) - before
                if any(list((run / "snapshots").glob("step-*")) for run in runs):
                    process.kill()
                time.sleep(0.005)


def commands(block: str) -> list[str]:
    """Returns the command lines of a console block."""
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def test_what_the_readme_shows_works(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the README trains on scikit-learn's digits")
    reader = Reader(tmp_path)
    reader.write_files()
    training, continuing, using, looking, *_ = (commands(block) for block in blocks("console"))

    for command in training:
        reader.type_cold(command)
    whole = reader.type("aetheria snapshot digest @last").split()[0]

    to_be_killed, *after = continuing
    assert "kill -9" in to_be_killed
    reader.type_and_kill(to_be_killed)
    killed = run_of(tmp_path)
    assert reader.type("aetheria runs").count("killed") == 1
    outputs = [reader.type(command) for command in after]
    assert outputs[-1].split()[0] == whole
    assert str(killed) in outputs[-1]

    (script,) = (block for block in blocks("python") if "Predictor(" in block)
    script = re.sub(r"runs/net-[\w-]+", f"runs/{killed.name}", script)
    done = run_warm(["-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    read = [int(digit) for digit in re.findall(r"\d", done.stdout)]
    assert len(read) == 5
    assert sum(digit == label for digit, label in zip(read, range(5), strict=True)) >= 4, read

    np.save(tmp_path / "images.npy", np.zeros((3, 64), dtype=np.float32))
    for command in using + looking:
        reader.type(command)
    assert np.load(tmp_path / "logits.npy").shape == (3, 10)
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_what_the_readme_shows_of_steering_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the README trains on scikit-learn's digits")
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path / "home"))
    reader = Reader(tmp_path)
    reader.write_files()
    ((train,), steering, afterwards) = (commands(block) for block in blocks("console")[4:7])
    (script,) = (block for block in blocks("python") if "aetheria.connect()" in block)
    training = reader.start(train)
    try:
        wait_for(lambda: "running" in reader.try_to_type("aetheria status"), training)
        wait_for(lambda: reader.try_to_type("aetheria ping @last").startswith("alive"), training)
        outputs = [reader.type(command) for command in steering[:-1]]
        assert re.match(r"learning_rate \S+ -> 0.0001 at step [\d,]+ \(revision 1\)", outputs[0])
        assert "max_grad_norm 1 -> null" in outputs[-2]
        done = run_warm(["-c", script], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        reader.type(steering[-1])
        training.communicate(timeout=DEADLINE)
        assert training.returncode == 0
        journal, replay = (reader.type(command) for command in afterwards)
        assert "good enough" in journal
        assert replay.startswith("EQUAL")
    finally:
        if training.poll() is None:
            training.kill()
            training.communicate()
        reader.type("aetheria down")


def wait_for(condition: Callable[[], bool], process: WarmProcess) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_commands_of_the_first_lines_can_be_made() -> None:
    makefile = README.with_name("Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
