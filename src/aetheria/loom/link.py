"""The training process's end of the shared memory, and the life of its sidecar. Nothing here waits for anybody.

A forked process (a worker that loads data) inherits the object, but it is not its own: there everything does nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec
from loguru import logger

from aetheria.loom.messages import Kind, Point, encode_points, marked
from aetheria.loom.region import Region
from aetheria.protocol import Outcome, encode

__all__ = ["Link"]

_FIRST_DELAY = 0.5  # seconds until a sidecar that died is started again; doubled each time
_LONGEST_DELAY = 30.0
_SOUND = 60.0  # seconds: one that lived as long died of something new
_LOG = "sidecar.log"
_RECORD_BYTES = 200_000  # of several points in a record: what is sent to a hub at once has room for it
_links: weakref.WeakSet[Link] = weakref.WeakSet()


class _Tagged(msgspec.Struct):
    """Of a status, which one it is."""

    kind: str = ""


class Link:
    """Hands over what the training says, and takes what it is told.

    Attributes:
        word: one word of format "Q". Its value changes when there is something to take.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        hub: Literal["auto", "off"] | Path = "auto",
        record: bool = False,
        start_step: int = 0,
        group: str = "",
        replica: str = "",
        devices: Sequence[str] = (),
    ) -> None:
        """Starts the sidecar, and does not wait for it.

        Args:
            folder: of the run; where the sidecar writes its log, if it has anything to say.
            run: the run's name.
            hub: "auto" finds the hub of this user, "off" looks for none, a path is that of its `hub.json`. Where it is
                off and nothing is to be recorded, there is no sidecar.
            record: whether the sidecar also writes `folder/run.db`; otherwise the caller does.
            start_step: the step from which this life of the run continues.
            group: the name that the replicas of a run have in common; "" where it has no others.
            replica: which of them this is.
            devices: what it trains on.
        """
        self._region = Region.create()
        self.word = self._region.word
        self._folder = folder = folder.absolute()
        self._needed = record or hub != "off"
        self._arguments = ["--run", run, "--folder", str(folder), "--hub", str(hub)]
        self._arguments += [f"--group={group}", f"--replica={replica}"]
        self._arguments += ["--start-step", str(start_step), *(f"--device={device}" for device in devices)]
        self._arguments += ["--record"] if record else []
        self._record = record
        self._pid = os.getpid()
        self._mine = True  # False in a forked process
        self._lock = threading.Lock()
        self._closed = False
        self._unsaid = 0  # too long for the ring, or no numbers
        self._statuses: dict[str, bytes] = {}  # the newest of each kind: a new sidecar may meet a hub that has none
        self._process: subprocess.Popen[bytes] | None = None
        self._delay = _FIRST_DELAY
        self._started = self._restart_at = 0.0
        self._region.beat(start_step)
        _links.add(self)
        if self._needed:
            self._start()

    # --- what is told ----------------------------------------------------------------------------------------------
    def take(self) -> list[bytes]:
        """Returns the commands that have arrived, the oldest first. Costs next to nothing when there are none."""
        return self._region.take() if self._mine else []

    def tell(self, kind: Kind, data: bytes) -> None:
        """Says something, never waiting; when nobody fetches it for long, the oldest is dropped and counted.

        Args:
            kind: "ack" for the outcome of a command, "event" for something that happened, "status" for something of
                which only the newest counts.
            data: JSON.
        """
        if not self._mine:
            return
        if kind == "status":
            said = msgspec.json.decode(data, type=_Tagged).kind
            self._statuses[said] = data
            if said == "knobs":
                self._statuses.pop("values", None)  # these were where the knobs were before
        if len(data) >= self._region.events.longest:
            data = self._shortened(kind, data)
            if not data:
                return
        with self._lock:
            self._region.events.write(marked(kind, data))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says the metrics of a step, never waiting; when nobody fetches them, the oldest are dropped and counted."""
        self.hand_over([(time.time(), step, metrics if type(metrics) is dict else dict(metrics))])

    def hand_over(self, points: list[Point]) -> None:
        """Says what is in a list, and takes it out. Never waits, as `metrics`.

        Another thread may append to the list meanwhile, or hand it over too: every point is said once.

        Args:
            points: the oldest first.
        """
        with self._lock:
            said = points[:]
            if said and self._mine:
                self._write(said)
            del points[: len(said)]  # last: if Ctrl-C comes in between, they are still there

    def _write(self, points: list[Point]) -> None:
        """Writes points as one record if that is possible, as several if not; counts those that cannot be said."""
        try:
            data = encode_points(points)
            room = self._region.metrics.longest
            if len(data) <= (room if len(points) == 1 else min(room, _RECORD_BYTES)):
                self._region.metrics.write(data, len(points))
                return
            problem = f"{len(data):,} bytes are too long"
        except (TypeError, ValueError, OverflowError) as error:
            problem = str(error)
        half = len(points) // 2
        if half:
            self._write(points[:half])
            self._write(points[half:])
            return
        when, step, values = points[0]
        if any(type(value) is not float for value in values.values()):  # numbers of NumPy and the like
            try:
                values = {name: float(value) for name, value in values.items()}
            except (TypeError, ValueError, OverflowError) as error:
                problem = str(error)
            else:
                self._write([(when, step, values)])
                return
        self._refuse(f"The metrics of step {step}", problem)

    def beat(self, step: int) -> None:
        """Says that the training is alive, and so far."""
        if self._mine:
            self._region.beat(step)

    def _shortened(self, kind: Kind, data: bytes) -> bytes:
        """Returns what is left to say of something too long; nothing of an event."""
        if kind != "ack":
            self._refuse(f"A record of kind {kind}", f"{len(data):,} bytes are too long")
            return b""
        outcome = msgspec.json.decode(data, type=Outcome)
        remark = (
            f"{outcome.message[:1000]} (its result, {len(data):,} bytes, is too long to be sent; it is in the journal)"
        )
        return encode(msgspec.structs.replace(outcome, message=remark, result={}))

    def _refuse(self, what: str, problem: str) -> None:
        self._unsaid += 1
        if self._unsaid == 1:
            logger.warning("{} cannot be reported: {}. What follows of this kind is counted.", what, problem)

    # --- the sidecar -----------------------------------------------------------------------------------------------
    @property
    def sidecar(self) -> int | None:
        """The sidecar's process number; None while there is none."""
        return None if self._process is None else self._process.pid

    def tend(self) -> None:
        """Starts the sidecar again if it has died: after half a second, the next time after one, at most 30.

        Never waits. To be called now and then, by the thread that trains.
        """
        if not self._mine or self._closed or not self._needed:
            return
        now = time.monotonic()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            if now - self._started > _SOUND:
                self._delay = _FIRST_DELAY
            self._restart_at = now + self._delay
            logger.warning(
                "The sidecar of {} ended ({}); training goes on, and it is started again in {:g} s. See {}.",
                self._folder.name,
                f"signal {-status}" if status < 0 else f"exit status {status}",
                self._delay,
                self._folder / _LOG,
            )
            self._delay = min(2 * self._delay, _LONGEST_DELAY)
        if now >= self._restart_at:
            self._start()
            for data in self._statuses.values():
                with self._lock:
                    self._region.events.write(marked("status", data))

    def close(self, timeout: float = 5.0) -> int:
        """Asks the sidecar to deliver what is queued and to end; kills it if it does not.

        Args:
            timeout: seconds to wait at most.

        Returns:
            How many records were not delivered: to the hub if one has ever been met, to `run.db` if it is recorded.
            0 when closed again, and in a forked process.
        """
        if not self._mine or self._closed:
            return 0
        deadline = time.monotonic() + timeout
        self._region.closing = time.monotonic_ns() + int(0.8 * timeout * 1e9)
        if self._process is None or self._process.poll() is not None:
            if self._undelivered():
                self._start()  # one more, for what is left
            else:
                self._process = None
        self._closed = True
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("The sidecar of {} did not end in {:g} s; it is killed.", self._folder.name, timeout)
                self._process.kill()
                self._process.wait()
            self._process = None
        undelivered = self._undelivered()
        self._region.close()
        log = self._folder / _LOG
        try:
            if log.stat().st_size == 0:
                log.unlink()
        except OSError as error:
            logger.debug("{}", error)  # no log was made, or its folder is gone
        return undelivered

    def _undelivered(self) -> int:
        left = {"metrics": 0, "events": 0}
        for name in left:
            for way, counts in (("sent", self._region.hub_known), ("recorded", self._record)):
                if counts:
                    reader = self._region.reader(f"{name} {way}")
                    left[name] = max(left[name], reader.pending + reader.missed)
        return sum(left.values()) + self._unsaid

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "aetheria.loom.sidecar"]
        command += ["--region", str(self._region.descriptor), "--parent", str(self._pid), *self._arguments]
        log: IO[bytes] | int = subprocess.DEVNULL
        try:
            log = (self._folder / _LOG).open("ab")
        except OSError as error:
            logger.debug("The sidecar has no log: {}", error)
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(self._region.descriptor,),
                start_new_session=True,  # Ctrl-C is for the training, which ends the sidecar when it has finished
            )
        except OSError as error:
            self._restart_at = self._started + self._delay
            self._delay = min(2 * self._delay, _LONGEST_DELAY)
            logger.warning("The sidecar of {} cannot be started: {}. Training goes on.", self._folder.name, error)
        finally:
            if not isinstance(log, int):
                log.close()

    def _disown(self) -> None:
        """In a forked process: this is not ours. Its lock may have been held by a thread that does not exist here."""
        self._mine = False
        self._process = None
        self._lock = threading.Lock()


def _after_fork() -> None:
    for link in _links:
        link._disown()


os.register_at_fork(after_in_child=_after_fork)
