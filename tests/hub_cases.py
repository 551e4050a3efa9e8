"""Real hubs and real runs for tests: processes that are started, waited for, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

TRAINER = Path(__file__).with_name("hub_trainer.py")

Value = TypeVar("Value")


def wait_for(condition: Callable[[], Value], what: str, seconds: float = 60.0) -> Value:
    """Returns what the condition returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return value


class HubProcess:
    """A hub in a folder of its own."""

    def __init__(self, home: Path, *arguments: str, umask: int = -1) -> None:
        self.home = home
        self.folder = home / "hub"
        self.log = home / "hub.log"
        home.mkdir(exist_ok=True)
        self.environment = os.environ | {"AETHERIA_HOME": str(home)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aetheria.weaver", *arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                umask=umask,
            )

    def wait(self) -> HubProcess:
        """Returns when it can be found."""

        def known() -> Any:
            assert self.process.poll() is None, self.log.read_text()
            try:
                content = json.loads((self.folder / "hub.json").read_text())
            except FileNotFoundError:
                return None
            return content if content["pid"] == self.process.pid else None

        self.known = wait_for(known, "the hub to start")
        return self

    @property
    def url(self) -> str:
        return str(self.known["url"])

    @property
    def operator(self) -> str:
        return str(self.known["operator_token"])

    @property
    def viewer(self) -> str:
        return str(self.known["viewer_token"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def end(self) -> None:
        """Ends it, and the message server that it may have left behind when it was killed."""
        self.process.terminate()
        self.process.wait(60)
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((self.folder / "nats" / "nats.pid").read_text()), signal.SIGKILL)


@contextmanager
def running_hub(home: Path, *arguments: str, umask: int = -1) -> Iterator[HubProcess]:
    hub = HubProcess(home, *arguments, umask=umask)
    try:
        yield hub.wait()
    finally:
        hub.end()


@contextmanager
def running_trainer(hub: HubProcess, name: str = "digits") -> Iterator[str]:
    """Yields the run's name once the hub knows its knobs."""
    process = subprocess.Popen(
        [sys.executable, str(TRAINER), str(hub.home / "runs"), name],
        env=hub.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
