"""The process beside a training process: all that waits for a disk or a network happens here. Without torch.

Started by `Link`, as `python -m aetheria.loom.sidecar`; ends when it is asked to, or when the training process has
ended, in whatever way. Signals that a terminal or a batch system sends to everybody are left to the training process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from loguru import logger

from aetheria.errors import HubError
from aetheria.loom.deliveries import Deliveries
from aetheria.loom.hub_file import Access, HubAddress, host_name, hub_file, read_hub_file, register
from aetheria.loom.messages import BEATS, Heartbeat
from aetheria.loom.mirroring import Mirroring
from aetheria.loom.processes import ended
from aetheria.loom.region import Region
from aetheria.loom.reports import Recording, Reporting
from aetheria.loom.subjects import ACK_WAIT

if TYPE_CHECKING:
    from aetheria.loom.run_end import RunEnd

__all__ = ["Settings", "Sidecar", "main"]

_EAGER_LOOK = 0.0005  # seconds between two looks at the events just behind a command
_BUSY_LOOK = 0.002  # while an answer is expected
_IDLE_LOOK = 0.05  # what it costs to look is taken from the training, where their processors share anything
_METRICS = 0.2  # seconds between two batches of metrics
_RECORDING = 0.5
_LIFE = 1.0
_SEARCH = 2.0  # seconds between two looks for a hub
_ORPHANED = 3.0  # seconds to deliver what there is when the training process is gone


class Settings(NamedTuple):
    """What a sidecar is told.

    Attributes:
        region: the descriptor of the shared memory.
        parent: the training process.
        run: the run's name.
        folder: the run's folder.
        hub: "auto", "off", or a path.
        record: whether to write `run.db`.
        start_step: the step from which this life of the run continues.
        group: the name that the replicas of the run have in common; "" where it has no others.
        replica: which of them this is.
        devices: what it trains on.
        by_polling: watch the parent without a pidfd.
    """

    region: int
    parent: int
    run: str
    folder: Path
    hub: str = "auto"
    record: bool = False
    start_step: int = 0
    group: str = ""
    replica: str = ""
    devices: tuple[str, ...] = ()
    by_polling: bool = False


class Sidecar:
    """Carries commands to the training process, and its reports to the disk and to the hub."""

    def __init__(self, settings: Settings) -> None:
        """Opens the shared memory.

        Raises:
            HubError: it is of another version.
        """
        self._settings = settings
        self._region = Region(settings.region)
        self._deliveries = Deliveries(self._region)
        self._reporting = Reporting(self._region, self._deliveries, settings.replica)
        self._mirroring = Mirroring(settings.folder)
        self._recording: Recording | None = None
        if settings.record:
            self._recording = Recording(self._region, settings.folder / "run.db", settings.start_step)
        self._hub_file = hub_file(settings.hub)
        self._address: HubAddress | None = None
        self._access: Access | None = None
        self._end: RunEnd | None = None  # while it is connected
        self._searched = asyncio.Event()  # whether a hub is there is known
        self._said = ""
        if self._hub_file is None:
            self._searched.set()

    async def run(self) -> None:
        """Works until the training process asks for the end, or is gone; then delivers what there is."""
        tasks = [asyncio.create_task(work) for work in self._work()]
        orphaned = asyncio.create_task(ended(self._settings.parent, by_polling=self._settings.by_polling))
        asked = asyncio.create_task(self._asked())
        await asyncio.wait([orphaned, asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # never ends by itself: this raises
        deadline = time.monotonic() + _ORPHANED
        if self._region.closing and not orphaned.done():
            deadline = self._region.closing / 1e9
        await self._drain(deadline)
        if self._end is not None:
            await self._mirroring.finish(self._end, deadline)
        for task in (*tasks, orphaned, asked):
            task.cancel()
        await asyncio.gather(*tasks, orphaned, asked, return_exceptions=True)
        if self._recording is not None:
            await self._recording.close(max(0.5, deadline - time.monotonic()))
        if self._end is not None:
            await self._end.close()

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        works = [self._send_events(), self._send_metrics(), self._give_signs_of_life()]
        if self._hub_file is not None:
            works.append(self._stay_connected(self._hub_file))
        if self._recording is not None:
            works.append(self._record(self._recording))
        return works

    # --- the rings -------------------------------------------------------------------------------------------------
    async def _send_events(self) -> None:
        while True:
            self._deliveries.fill()
            again = False
            if self._end is not None:
                again = await self._attempt(self._reporting.send_events(self._end)) is True
            if again:
                continue
            if self._deliveries.eager:
                await asyncio.sleep(_EAGER_LOOK)
            elif self._deliveries.busy:
                await asyncio.sleep(_BUSY_LOOK)
            else:
                await self._deliveries.rest(_IDLE_LOOK)

    async def _send_metrics(self) -> None:
        while True:
            if self._end is not None:
                await self._attempt(self._reporting.send_metrics(self._end))
            await asyncio.sleep(_METRICS)

    async def _record(self, recording: Recording) -> None:
        while True:
            await recording.copy()
            await asyncio.sleep(_RECORDING)

    async def _give_signs_of_life(self) -> None:
        told: RunEnd | None = None
        for number in itertools.count():
            self._region.sidecar_beat()
            if (end := self._end) is not None:
                if end is not told or number % BEATS == 0:
                    await self._attempt(self._beat(end))
                    told = end
                await self._attempt(self._deliveries.keep(end.unanswered))
            await asyncio.sleep(_LIFE)

    async def _beat(self, end: RunEnd) -> None:
        beat = Heartbeat(
            replica=self._settings.replica,
            host=host_name(),
            pid=self._settings.parent,
            sidecar=os.getpid(),
            devices=self._settings.devices,
            step=self._region.step,
            age=self._region.trainer_age,
            dropped=self._reporting.dropped,
            time=time.time(),
        )
        await end.beat(msgspec.json.encode(beat))

    async def _attempt(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Returns what came of it; None where the hub did not take it: it is tried again."""
        try:
            return await work
        except HubError as error:
            logger.debug("{}", error)
            await asyncio.sleep(_IDLE_LOOK)
            return None

    # --- the hub ---------------------------------------------------------------------------------------------------
    async def _stay_connected(self, file: Path) -> None:
        delay = 0.1
        while True:
            try:
                end = await self._connect(file)
            except HubError as error:
                self._say(str(error))
                end = None
            if end is None:
                self._searched.set()
                await asyncio.sleep(_SEARCH if self._access is None else delay)
                delay = min(2 * delay, _SEARCH)
                continue
            delay = 0.1
            self._said = ""
            await self._talk(end, file)

    async def _connect(self, file: Path) -> RunEnd | None:
        """Returns a connection: with the key that we have, or with one that the hub gives. None where no hub is."""
        if self._access is not None:
            try:
                return await self._open(self._access)
            except HubError as error:
                logger.debug("{}", error)  # the hub may have moved: ask it
        address = await asyncio.to_thread(read_hub_file, file)
        if address is None:
            return None
        self._access = await self._register(address)
        return await self._open(self._access)

    async def _register(self, address: HubAddress) -> Access:
        settings = self._settings
        said = {
            "folder": str(settings.folder),
            "group": settings.group,
            "replica": settings.replica,
            "devices": list(settings.devices),
            "pid": settings.parent,
            "host": host_name(),
        }
        access = await asyncio.to_thread(register, address, settings.run, said)
        self._address = address
        return access

    async def _open(self, access: Access) -> RunEnd:
        from aetheria.loom.run_end import RunEnd  # noqa: PLC0415 - a run without a hub need not hold it in memory

        credentials = Path(access.credentials) if access.credentials else None
        end = RunEnd(access.nats_url, access.seed, self._settings.run, credentials=credentials)
        await end.connect()
        return end

    async def _talk(self, end: RunEnd, file: Path) -> None:
        """Uses a connection until it ends, or the hub gives us another one."""
        self._region.hub_known = True
        self._end = end
        await self._attempt(self._beat(end))  # the hub makes our consumer when it hears of us
        await self._attempt(self._reporting.repeat_statuses(end))
        self._searched.set()
        receiving = asyncio.create_task(self._receive(end))
        mirroring = asyncio.create_task(self._mirroring.keep_up(end))
        try:
            while not end.closed.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(end.closed.wait(), _SEARCH)
                for task in (receiving, mirroring):
                    if task.done():
                        task.result()  # never ends by itself: this raises
                if not end.closed.is_set() and await self._hub_moved(file, end):
                    break
        finally:
            receiving.cancel()
            mirroring.cancel()
            await asyncio.gather(receiving, mirroring, return_exceptions=True)
            self._end = None
            self._deliveries.disconnected()
            await end.close()

    async def _hub_moved(self, file: Path, end: RunEnd) -> bool:
        """Registers again where the hub was started again; returns whether it wants us to connect elsewhere."""
        try:
            address = await asyncio.to_thread(read_hub_file, file)
            if address is None or address == self._address:
                return False
            access = await self._register(address)
        except HubError as error:
            self._say(str(error))
            return False
        moved, self._access = access != self._access, access
        if not moved:
            self._mirroring.ask_again()
            await self._attempt(self._reporting.repeat_statuses(end))
        return moved

    async def _receive(self, end: RunEnd) -> None:
        """Takes commands, in their order."""
        before: int | None = None
        while before is None and not end.closed.is_set():
            with suppress(HubError):  # slow, or gone: then the loop ends
                before = await end.unanswered()
            if before is None:
                await asyncio.sleep(0.1)  # the hub has not heard of us yet
        if before:
            # They were delivered to a connection before this one, and come again when their time is out. What is new
            # must not overtake them.
            await asyncio.sleep(ACK_WAIT + 0.2)
        await self._attempt(end.overhear(self._deliveries.heard))
        while not end.closed.is_set():
            try:
                await self._deliveries.arrived(await end.next_command(), end.unanswered)
            except HubError as error:
                logger.debug("{}", error)
                await asyncio.sleep(0.05)

    def _say(self, what: str) -> None:
        """Writes a reason into the log, once."""
        if what != self._said:
            self._said = what
            logger.warning("{} Trying again.", what)

    # --- the end ---------------------------------------------------------------------------------------------------
    async def _asked(self) -> None:
        while not self._region.closing:
            await asyncio.sleep(_IDLE_LOOK)

    async def _drain(self, deadline: float) -> None:
        """Waits until everything is delivered, or cannot be."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._searched.wait(), max(0.0, deadline - time.monotonic()))
        while time.monotonic() < deadline:
            to_send = self._reporting.pending if self._region.hub_known and self._hub_file is not None else 0
            to_record = self._recording.pending if self._recording is not None else 0
            if not to_send and not to_record:
                return
            if self._end is not None:
                await self._attempt(self._reporting.send_metrics(self._end))
            await asyncio.sleep(_BUSY_LOOK)


def main() -> None:
    """Runs a sidecar; arguments as `Link` gives them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # nats-py loads it for websockets where it happens to be installed: 15 MB and 0.2 s for nothing.
    sys.modules.setdefault("aiohttp", None)  # type: ignore[arg-type]
    settings = _arguments()
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{time:YYYY-MM-DD HH:mm:ss} {level} {message}", colorize=False)
    try:
        asyncio.run(Sidecar(settings).run())
    except HubError as error:
        logger.error("{}", error)
        sys.exit(1)


def _arguments() -> Settings:
    parser = argparse.ArgumentParser(prog="python -m aetheria.loom.sidecar", description=__doc__)
    parser.add_argument("--region", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hub", default="auto")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--start-step", type=int, default=0)
    parser.add_argument("--group", default="")
    parser.add_argument("--replica", default="")
    parser.add_argument("--device", action="append", default=[])
    parser.add_argument("--by-polling", action="store_true")
    given = vars(parser.parse_args())
    return Settings(devices=tuple(given.pop("device")), **given)


if __name__ == "__main__":
    main()
