"""The message server that comes with a hub: `nats-server` in a folder of its own, on this machine only.

The folder holds all there is: its configuration and keys (0600), the store, the log, the port it was given for good. A
server whose hub was killed goes on; the next hub that opens the folder takes it over, and nobody was disconnected.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from loguru import logger

from aetheria.errors import HubError
from aetheria.loom.binary import find_binary
from aetheria.loom.broker_config import MEGABYTE, configuration
from aetheria.loom.keys import is_admitted, new_seed, public_key
from aetheria.loom.private_files import private_folder, write_private
from aetheria.loom.processes import command_of_process, is_running
from aetheria.loom.subjects import token_of

__all__ = ["Broker", "find_binary"]

_PORTS = range(20_000, 32_000)  # below those that systems lend to outgoing connections
_KEY_LIFE = 60 * 24 * 3600.0  # seconds after which a run that never came back is forgotten


class Broker:
    """An embedded NATS server with JetStream. For one hub at a time; safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        *,
        binary: Path | None = None,
        port: int | None = None,
        disk: int = 2048 * MEGABYTE,
        memory: int = 128 * MEGABYTE,
    ) -> None:
        """Starts nothing yet.

        Args:
            folder: its own; made if it is not there, and closed to everybody else.
            binary: the nats-server to run; found by `find_binary` otherwise.
            port: to listen on. Otherwise that of the last time, and at the very first a free one.
            disk: the most bytes its store may take.
            memory: the most bytes its streams in memory may take.
        """
        self.folder = folder.absolute()
        self._binary = binary
        self._wanted_port = port
        self._port = 0
        self._disk = disk
        self._memory = memory
        self._lock = threading.RLock()
        self._folder_lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._public_keys: dict[str, str] = {}  # of runs; to compute one takes as long as to write a file
        self._let_in: set[str] = set()  # whose keys the server has certainly read

    # --- what it is ------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """Where it listens, for instance "nats://127.0.0.1:24222". Known once it has been started."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def hub_seed(self) -> str:
        """The seed of the hub's user, who may do everything. A secret."""
        return self._seed("hub")

    @property
    def pid(self) -> int | None:
        """The server's process; None while it was not started."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether the process is there. One that is stopped or stuck counts; see `answers`."""
        if self._child is not None:
            return self._child.poll() is None
        return self._pid is not None and is_running(self._pid)

    def answers(self, timeout: float = 2.0) -> bool:
        """Returns whether the hub's user can log in now."""
        try:
            return is_admitted(self._port, self.hub_seed, timeout)
        except HubError:
            return False

    # --- its life --------------------------------------------------------------------------------------------------
    def start(self, timeout: float = 15.0) -> None:
        """Starts it, or takes over the one that an earlier hub left behind. Returns when it answers.

        Raises:
            HubError: another hub uses the folder; there is no binary; the port is taken; it ended, or did not answer
                in time. What its log says last is in the message.
        """
        with self._lock:
            private_folder(self.folder)
            self._take_folder()
            try:
                self._start(timeout)
            except BaseException:
                self._kill()
                self._give_folder()
                raise

    def stop(self, timeout: float = 5.0) -> None:
        """Ends it: SIGTERM, and SIGKILL if it is still there after `timeout` seconds."""
        with self._lock:
            self._end(timeout)
            self._give_folder()

    def restart(self, timeout: float = 15.0) -> None:
        """Ends what is left of it and starts it again: same port, same keys, same store.

        Raises:
            HubError: as of `start`.
        """
        with self._lock:
            self._end(2.0)
            self.start(timeout)

    # --- who may talk ----------------------------------------------------------------------------------------------
    def admit(self, run: str, timeout: float = 5.0) -> str:
        """Lets a run in, with rights to its own subjects only. Returns the seed to log in with: a secret.

        A run that has been let in before keeps its seed. Runs that are connected stay so.

        Raises:
            HubError: the server does not run, or did not take the new user in time.
        """
        return self.admit_all([run], timeout)[run]

    def admit_all(self, runs: Iterable[str], timeout: float = 5.0) -> dict[str, str]:
        """Lets several runs in, as `admit` does, in the time that one of them takes.

        Returns:
            The seed of each, by run.

        Raises:
            HubError: as of `admit`; then none of the new ones may be in.
        """
        with self._lock:
            seeds: dict[str, str] = {}
            missing = ""
            for run in runs:
                name = f"run-{token_of(run)}"
                known = self._key_file(name).exists()
                seeds[run] = seed = self._seed(name)
                os.utime(self._key_file(name))
                if not known:
                    self._public_keys.pop(name, None)  # of a key that somebody has deleted
                    self._let_in.discard(name)
                if name not in self._let_in and not (known and self.alive and self._is_in(seed)):
                    missing = seed
            if not self.alive:
                raise HubError("the message server does not run. The hub starts it again; try again then.")
            if missing:
                self._reload(missing, timeout)  # where one of them is known, all are
            return seeds

    # --- starting --------------------------------------------------------------------------------------------------
    def _start(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._forget_old_keys()
        self._port = self._choose_port()
        seed = self.hub_seed
        if self._adopt(seed):
            return
        if not _is_free(self._port):
            raise HubError(
                f"port {self._port} on 127.0.0.1, where this hub's message server lives, is taken by another program. "
                f"End that program, or delete {self._port_file}: then another port is chosen."
            )
        self._write_configuration()
        self._launch()
        while True:
            if not self.alive:
                if self._wanted_port is None and not self._port_file.exists() and not _is_free(self._port):
                    self._port = self._choose_port()  # somebody took the free one in the moment between
                    self._write_configuration()
                    self._launch()
                    continue
                raise HubError(f"the message server ended at once. {self._last_words()}")
            if self._is_in(seed):
                break
            if time.monotonic() > deadline:
                raise HubError(f"the message server did not answer in {timeout:g} seconds. {self._last_words()}")
            time.sleep(0.02)
        self._let_in = set(self._public_keys)
        write_private(self._port_file, f"{self._port}\n".encode())

    def _launch(self) -> None:
        binary = find_binary(self._binary)
        try:
            self._child = subprocess.Popen(
                [binary, "--config", self._config_file],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in the terminal of the hub is the hub's to act on
                umask=0o077,
            )
        except OSError as error:
            raise HubError(f"cannot run {binary}: {error.strerror or error}.") from error
        self._pid = self._child.pid

    def _adopt(self, seed: str) -> bool:
        """Returns whether a server that an earlier hub left behind was taken over. One that is stuck is ended."""
        try:
            pid = int((self.folder / "nats.pid").read_text())
        except (OSError, ValueError):
            return False
        if not is_running(pid) or str(self._config_file) not in command_of_process(pid):
            return False
        self._child, self._pid = None, pid
        self._let_in.clear()
        if self._is_in(seed):
            logger.info("Took over the message server of an earlier hub: process {}.", pid)
            return True
        self._kill()
        return False

    def _choose_port(self) -> int:
        if self._wanted_port is not None:
            return self._wanted_port
        try:
            return int(self._port_file.read_text())
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise HubError(f"{self._port_file} does not hold a port: {error}. Delete it.") from error
        for port in random.SystemRandom().sample(_PORTS, 100):
            if _is_free(port):
                return port
        raise HubError(f"of a hundred ports between {_PORTS.start} and {_PORTS.stop} on 127.0.0.1 none is free.")

    # --- ending ----------------------------------------------------------------------------------------------------
    def _end(self, timeout: float) -> None:
        if not self.alive:
            self._reap()
            return
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        self._kill()

    def _kill(self) -> None:
        if self.alive:
            self._signal(signal.SIGKILL)
            deadline = time.monotonic() + 5.0
            while self.alive and time.monotonic() < deadline:
                time.sleep(0.01)
        self._reap()

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):  # it ended by itself meanwhile: `alive` says so
                os.kill(self._pid, number)

    def _reap(self) -> None:
        if self._child is not None:
            self._child.poll()
        self._child, self._pid = None, None

    # --- its users -------------------------------------------------------------------------------------------------
    def _reload(self, seed: str, timeout: float) -> None:
        """Makes the server read its configuration again, and waits until it knows the owner of this seed."""
        deadline = time.monotonic() + timeout
        self._write_configuration()
        asked = 0.0
        while not self._is_in(seed):
            now = time.monotonic()
            if now > deadline:
                raise HubError(f"the message server did not take a new user in {timeout:g} s. {self._last_words()}")
            if now - asked > 1.0:
                self._signal(signal.SIGHUP)
                asked = now
            time.sleep(0.005)
        self._let_in = set(self._public_keys)

    def _is_in(self, seed: str) -> bool:
        try:
            return is_admitted(self._port, seed, 2.0)
        except HubError:
            return False

    def _seed(self, name: str) -> str:
        file = self._key_file(name)
        try:
            return file.read_text().strip()
        except FileNotFoundError:
            private_folder(file.parent)
            seed = new_seed()
            write_private(file, f"{seed}\n".encode())
            return seed

    def _forget_old_keys(self) -> None:
        for file in self._key_file("").parent.glob("run-*.seed"):
            if time.time() - file.stat().st_mtime > _KEY_LIFE:
                file.unlink()
        self._public_keys.clear()

    def _runs(self) -> Iterator[tuple[str, str]]:
        """Every run that was let in: how it is called on the server, and its public key."""
        for file in sorted(self._key_file("").parent.glob("run-*.seed")):
            name = file.name.removesuffix(".seed")
            if name not in self._public_keys:
                self._public_keys[name] = public_key(file.read_text())
            yield name.removeprefix("run-"), self._public_keys[name]

    def _write_configuration(self) -> None:
        text = configuration(
            self.folder,
            port=self._port,
            disk=self._disk,
            memory=self._memory,
            hub=public_key(self.hub_seed),
            runs=self._runs(),
        )
        write_private(self._config_file, text.encode())

    # --- its folder ------------------------------------------------------------------------------------------------
    @property
    def _config_file(self) -> Path:
        return self.folder / "nats.conf"

    @property
    def _port_file(self) -> Path:
        return self.folder / "port"

    def _key_file(self, name: str) -> Path:
        return self.folder / "keys" / f"{name}.seed"

    def _take_folder(self) -> None:
        if self._folder_lock is not None:
            return
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise HubError(
                f"another hub, process {owner or 'unknown'}, uses {self.folder}. Use that one, or stop it first."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._folder_lock = descriptor

    def _give_folder(self) -> None:
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None

    def _last_words(self) -> str:
        file = self.folder / "nats.log"
        try:
            lines = file.read_text(errors="replace").splitlines()[-3:]
        except OSError:
            return "It wrote no log."
        return f"The end of {file}: " + " | ".join(lines)


def _is_free(port: int) -> bool:
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
