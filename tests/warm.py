"""Programs in processes of their own that need not import torch first: forked from a process that has done it.

`WarmProcess` is used like `subprocess.Popen`, `run_warm` like `subprocess.run`, and what they start is real: it has
descriptors, environment, folder, signals and an end of its own. Where a test is about the start - what is imported
when, what a terminal does - or about how an interpreter is taken to pieces, the program is started cold.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

__all__ = ["WarmProcess", "run_warm"]

_ROOT = Path(__file__).parents[1]
_MESSAGE = 1 << 18  # bytes; most of it is the environment


# --- in the tests ----------------------------------------------------------------------------------------------------


class _Server:
    """The process that forks, started when the first program is wanted; it ends when its socket is closed."""

    _running: _Server | None = None

    @classmethod
    def get(cls) -> _Server:
        if cls._running is None:
            cls._running = cls()
            atexit.register(cls._running.close)
        return cls._running

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.socket, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
        with theirs:
            command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self.process = subprocess.Popen(command, cwd=_ROOT, env=environment, pass_fds=[theirs.fileno()])

    def fork(self, wanted: dict[str, Any], descriptors: list[int]) -> int:
        """Returns the process id of a new program."""
        socket.send_fds(self.socket, [json.dumps(wanted).encode()], descriptors)
        answer = self.socket.recv(64)
        assert answer, f"the process that forks has ended: {self.process.wait()}"
        return int(answer)

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


class WarmProcess:
    """A program that was started with `python ARGUMENTS...`: a file, `-m MODULE` or `-c CODE`, and what it is given."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        theirs = []
        with open(os.devnull, "rb") as nothing:
            given = [nothing.fileno()]
            for name, place, number in (("stdout", stdout, 1), ("stderr", stderr, 2)):
                if place == subprocess.PIPE:
                    reading, writing = os.pipe()
                    setattr(self, name, open(reading, encoding="utf-8"))  # noqa: SIM115 - closed by communicate
                    theirs.append(writing)
                    given.append(writing)
                elif place == subprocess.STDOUT:
                    given.append(given[1])
                elif place == subprocess.DEVNULL:
                    theirs.append(os.open(os.devnull, os.O_WRONLY))
                    given.append(theirs[-1])
                else:
                    given.append(number if place is None else place if isinstance(place, int) else place.fileno())
            end, writing = os.pipe()
            theirs.append(writing)
            wanted = {
                "arguments": self.arguments,
                "folder": str(cwd or Path.cwd()),
                "environment": dict(os.environ if env is None else env),
            }
            try:
                self.pid = _Server.get().fork(wanted, [*given, writing])
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
        self._end = open(end, "rb", buffering=0)  # noqa: SIM115 - closed when the end has been told

    def poll(self) -> int | None:
        """Returns how the program ended, as `Popen` says it: None if it has not, -N for signal N."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], timeout)[0]:
            told = self._end.read(64)
            self._end.close()
            assert told, "the process that forks has ended, and nobody can tell how this one did"
            self.returncode = os.waitstatus_to_exitcode(int(told))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what was written to the pipes, when the program has ended."""
        # Popen's own way of reading several pipes at once; it asks for nothing but what is here.
        written: dict[str, bytes] = {}
        pipes = {name: pipe for name in ("stdout", "stderr") if (pipe := getattr(self, name)) and not pipe.closed}
        poll = select.poll()
        names = {pipe.fileno(): name for name, pipe in pipes.items()}
        for descriptor, name in names.items():
            written[name] = b""
            poll.register(descriptor, select.POLLIN)
        while names:
            events = poll.poll(None if timeout is None else timeout * 1000)
            if not events:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0, str(written).encode())
            for descriptor, _ in events:
                if more := os.read(descriptor, 1 << 16):
                    written[names[descriptor]] += more
                else:
                    poll.unregister(descriptor)
                    del names[descriptor]
        for pipe in pipes.values():
            pipe.close()
        self.wait(timeout)
        output, errors = (
            io.TextIOWrapper(io.BytesIO(written.get(name, b"")), "utf-8").read() for name in ("stdout", "stderr")
        )
        return output, errors

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self.wait()


def run_warm(
    arguments: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; one that takes longer is killed, and that is an error."""
    process = WarmProcess(arguments, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, output, errors)


# --- in the process that forks ---------------------------------------------------------------------------------------


def _import_what_programs_need() -> None:
    import torch

    import aetheria.cli
    import aetheria.inference
    import aetheria.orchestrator
    import aetheria.plugins  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])  # torch imports its compiler when the first optimiser is made


def _serve(asked: socket.socket) -> list[str]:
    """Forks a program for every message. Returns in each of them, with its arguments; ends itself with its socket."""
    wake_up, woken = socket.socketpair()
    for end in (wake_up, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for pytest
    ends: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([asked, wake_up], [], [])
        if wake_up in ready:
            wake_up.recv(4096)
            while ends and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with open(ends.pop(ended[0]), "wb") as end:
                    try:
                        end.write(str(ended[1]).encode())
                        end.flush()
                    except BrokenPipeError:
                        pass  # nobody asks any more
        if asked in ready:
            message, descriptors, _, _ = socket.recv_fds(asked, _MESSAGE, 4)
            if not message:
                os._exit(0)
            *standard, told = descriptors
            if pid := os.fork():
                ends[pid] = told
                for descriptor in standard:
                    os.close(descriptor)
                asked.send(str(pid).encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, descriptor in enumerate(standard):
                os.dup2(descriptor, number)
            for end in (asked, wake_up, woken):
                end.close()
            for descriptor in {*descriptors, *ends.values()}:
                os.close(descriptor)
            return _become(json.loads(message))


def _become(wanted: dict[str, Any]) -> list[str]:
    import numpy as np

    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    np.random.seed()  # as in any new process: from the system
    arguments: list[str] = wanted["arguments"]
    return arguments


def _run(arguments: list[str]) -> int:
    """Does what Python does with these arguments, and returns the exit code."""
    code: Any = 0
    try:
        _run_main(arguments)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - shown, as Python shows it
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    # As Python ends, but for taking everything to pieces: what is shared with the process that forks stays shared.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _run_main(arguments: list[str]) -> None:
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path[0] = os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path[0] = ""
            exec(code, _new_main().__dict__)
        case [file, *rest]:
            sys.argv = [file, *rest]
            sys.path[0] = str(Path(file).resolve().parent)
            main = _new_main()
            main.__file__ = file
            exec(compile(Path(file).read_bytes(), file, "exec"), main.__dict__)


def _new_main() -> ModuleType:
    """Returns the module of the program, which stays until the process ends."""
    sys.modules["__main__"] = main = ModuleType("__main__")
    return main


if __name__ == "__main__":
    _import_what_programs_need()
    gc.freeze()  # what is there is not written to by the programs' collections
    os._exit(_run(_serve(socket.socket(fileno=int(sys.argv[1])))))
