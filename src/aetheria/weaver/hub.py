"""The hub itself: takes commands, passes them on, hears what comes back, and tells everybody who asks."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

import msgspec
from loguru import logger

from aetheria.client.models import ENDED, settled
from aetheria.control.journal import read_journal
from aetheria.errors import AetheriaError, CommandError, HubError, RunFolderError
from aetheria.loom.messages import decode_heartbeat, decode_metrics
from aetheria.loom.parts import Have, encode_have
from aetheria.protocol import AnyCommand, Outcome, decode_command, encode
from aetheria.weaver.feed import Feed
from aetheria.weaver.known_run import KnownRun
from aetheria.weaver.mirror import Mirrors
from aetheria.weaver.registry import Registry
from aetheria.weaver.store import KnobState, Store

__all__ = ["CommandConflictError", "Hub", "RunEndedError", "Transport", "has_ended"]

Handler = Callable[[str, str, bytes], Awaitable[None]]

_SWEEP_SECONDS = 30.0  # between two looks for commands that nobody has answered
_JOURNAL_AFTER = 0.25  # seconds after which an answer is looked for in the run's journal, too; doubled each time
_JOURNAL_EVERY = 4.0
_SAVE_SECONDS = 5.0


class Transport(Protocol):
    """What carries commands to the runs; `aetheria.loom.transport.HubEnd`."""

    async def publish_command(self, run: str, data: bytes, command_id: str, /) -> object:
        """Returns once the command is safe; raises `HubError` where that could not be found out."""
        ...


class RunEndedError(CommandError):
    """A command for a run that does not train any more."""


class CommandConflictError(CommandError):
    """A command whose id was used for another one."""


class Hub:
    """Joins the store, the runs, the transport and the live feed. For one event loop."""

    def __init__(self, store: Store, transport: Transport, mirrors: Mirrors) -> None:
        self.store = store
        self.registry = Registry(store, mirrors.folder)
        self._mirrors = mirrors
        self.feed = Feed(store, self.registry.group_of)
        self._transport = transport
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._on_the_way: dict[str, asyncio.Task[None]] = {}  # commands that are being published
        self.closing = asyncio.Event()

    # --- commands --------------------------------------------------------------------------------------------------
    async def submit(self, run: str, data: bytes, wait: float = 0.0) -> tuple[AnyCommand, Outcome | None]:
        """Accepts a command: checked, kept, published, in this order.

        The same command twice is the same command; it is published again unless that is known to have happened.

        Args:
            run: which it is for.
            data: the command, as JSON.
            wait: up to how many seconds to wait for its final outcome. A run may take a command that it hears before
                the message server has confirmed it; what the run says is worth more than the confirmation.

        Returns:
            The command, and how far it got: None if that was not to be waited for, or nothing is known.

        Raises:
            CommandError: it is none, or for another run.
            CommandConflictError: another command has that id.
            UnknownRunError: there is no such run.
            RunEndedError: the run does not train.
            HubError: the message server did not confirm it.
        """
        command = decode_command(data)
        if command.run not in ("", run):
            raise CommandError(f"the command is for {command.run}, but it was sent to {run}.")
        command = msgspec.structs.replace(command, run=run)
        known = self.store.command(command.id)
        same = known is None or known == msgspec.structs.replace(command, created=known.created)
        if not same or self.store.request(command.id) is not None:
            raise CommandConflictError(f"the id {command.id} belongs to another command. Give each command its own id.")
        if known is not None and self.store.delivery(command.id) == "published":
            return known, await self.outcome(run, command.id, wait) if wait else None
        status = self.registry.status_at_once(run)
        self._refuse_if_ended(run, await asyncio.to_thread(self.registry.status, run) if status is None else status)
        # From here to the publication nothing else runs, so that commands are published in the order they were kept.
        if self.store.command(command.id) is None:
            self.store.accept(command, time.time())
        return command, await self.answer(command, self.publish(command), wait)

    async def answer(self, command: AnyCommand, publishing: asyncio.Task[None], wait: float) -> Outcome | None:
        """Returns what a run says to a command that is being published; see `submit`.

        Raises:
            HubError: the message server did not confirm it, and the run has not said anything.
        """
        if not wait:
            await asyncio.shield(publishing)
            return None
        answering = asyncio.create_task(self.outcome(command.run, command.id, wait))
        try:
            await asyncio.wait((publishing, answering), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and not self.is_answered(command):
                publishing.result()  # or it is said that nobody knows
            return await answering
        finally:
            answering.cancel()

    def is_answered(self, command: AnyCommand) -> bool:
        """Returns whether the last word on a command is known."""
        outcome = self.store.outcome(command.run, command.id)
        return outcome is not None and settled(outcome, command.dry_run)

    def _refuse_if_ended(self, run: str, status: str) -> None:
        if status in ENDED:
            raise RunEndedError(has_ended(run, status))
        if self.registry.get(run) is None:
            raise RunEndedError(f"{run} does not listen to this hub: it was started with live: off, or before the hub.")

    def publish(self, command: AnyCommand) -> asyncio.Task[None]:
        """Begins to publish a command, which goes on if nobody waits for it any more."""
        task = asyncio.create_task(self._publish_now(command))
        self._on_the_way[command.id] = task

        def done(task: asyncio.Task[None]) -> None:
            if self._on_the_way.get(command.id) is task:
                del self._on_the_way[command.id]
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.debug("{}", error)  # whoever waits is told, too

        task.add_done_callback(done)
        return task

    def on_the_way(self, command_id: str) -> asyncio.Task[None] | None:
        """Returns the publication of a command, while it goes on."""
        return self._on_the_way.get(command_id)

    async def _publish_now(self, command: AnyCommand) -> None:
        try:
            await self._transport.publish_command(command.run, encode(command), command.id)
        except HubError as error:
            self.store.delivered(command.id, "unconfirmed")
            raise HubError(
                f"the message server did not confirm the command: {error} It may still be carried out: look at its "
                f"outcome (id {command.id}), or send it again with the same id."
            ) from error
        self.store.delivered(command.id, "published")

    async def sweep(self) -> int:
        """Publishes again what nobody has answered; returns how many commands those were.

        The hub may have been killed between keeping a command and publishing it; the message server may have lost its
        store. A run takes each id once, however often it comes.
        """
        count = 0
        for command in self.store.unanswered():
            known = self.registry.get(command.run)
            if known is None or command.id in self._on_the_way or await asyncio.to_thread(known.status) in ENDED:
                continue
            try:
                await self.publish(command)
            except HubError as error:
                logger.warning("{} for {} is still to be published: {}", command.op_name, command.run, error)
                self.store.delivered(command.id, "unknown")  # it was accepted: it is tried again
                break
            count += 1
        return count

    async def outcome(
        self, run: str, command_id: str, wait: float = 0.0, until: Literal["any", "final"] = "final"
    ) -> Outcome | None:
        """Returns how far a command got; None where nothing is known yet.

        Args:
            run: which it was for.
            command_id: the command's.
            wait: up to how many seconds to wait for what `until` says.
            until: "final", or "any" outcome at all.
        """
        command = self.store.command(command_id)
        deadline = time.monotonic() + wait
        patience = _JOURNAL_AFTER
        event = asyncio.Event()
        self._waiting[command_id].add(event)
        try:
            while True:
                event.clear()
                outcome = self.store.outcome(run, command_id)
                if outcome is not None and (
                    until == "any" or settled(outcome, command is not None and command.dry_run)
                ):
                    return outcome
                left = deadline - time.monotonic()
                if self.closing.is_set() or (left <= 0 and not await self._journal_knows(run, command_id, outcome)):
                    return self.store.outcome(run, command_id)
                try:
                    async with asyncio.timeout(min(max(left, 0.0), patience)):
                        await event.wait()
                except TimeoutError:
                    patience = min(2 * patience, _JOURNAL_EVERY)
                    await self._journal_knows(run, command_id, outcome)
        finally:
            self._waiting[command_id].discard(event)
            if not self._waiting[command_id]:
                del self._waiting[command_id]

    async def _journal_knows(self, run: str, command_id: str, known: Outcome | None) -> bool:
        """Looks into the run's journal, which is the truth; returns whether it knows more than was reported."""
        try:
            folder = self.registry.folder(run)
            entries = await asyncio.to_thread(read_journal, folder.path / "journal.jsonl")
        except (AetheriaError, OSError):
            return False  # elsewhere, or damaged: then what was reported is all there is
        found = [entry.outcome for entry in entries if entry.outcome.command == command_id]
        if not found or (known is not None and (known.is_final or found[-1].state == known.state)):
            return False
        for outcome in found:
            self._keep(run, outcome)
        return True

    # --- what runs report ------------------------------------------------------------------------------------------
    async def handle(self, run: str, kind: str, data: bytes) -> None:
        """Takes one message from a run. What does not read is reported and passed over; it would not read later."""
        try:
            match kind:
                case "ack":
                    self._keep(run, msgspec.json.decode(data, type=Outcome))
                case "event" | "status":
                    self._event(run, {"kind": kind} | msgspec.json.decode(data, type=dict[str, Any]))
                case "metric":
                    known = self.registry.measured(run, decode_metrics(data))
                    if known is not None:
                        self.feed.show(run, "metrics", known.metrics)
                case "hb":
                    beat = decode_heartbeat(data)
                    known = self.registry.beat(run, beat)
                    if known is not None:
                        self.feed.show(run, "beat", {"step": beat.step, "age": beat.age, "dropped": beat.dropped})
                case _:
                    logger.warning("{} sent something of the unknown kind '{}'.", run, kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.warning("{} sent something of the kind '{}' that does not read: {}", run, kind, error)

    async def take_part(self, run: str, data: bytes) -> bool:
        """Takes a part of a run's folder, if that is out of sight; returns False where it comes too early."""
        known = self.registry.get(run)
        if known is None or await asyncio.to_thread(_in_sight, known):
            return known is not None  # one that has not registered with this hub is about to
        try:
            taken, said = await self._mirrors.take(run, data)
        except msgspec.MsgspecError as error:
            logger.warning("{} sent parts of its folder that do not read: {}", run, error)
            return True
        self._say_of_copy(known, said)
        return taken

    async def say_what_there_is(self, run: str) -> bytes:
        """Returns what there is of a run's folder here, as the run is told; nothing more is wanted of one in sight."""
        known = self.registry.get(run)
        if known is None or await asyncio.to_thread(_in_sight, known):
            return encode_have(Have())
        answer, said = await self._mirrors.have(run)
        self._say_of_copy(known, said)
        return answer

    def _say_of_copy(self, known: KnownRun, said: list[str]) -> None:
        for sentence in said:
            event = {"kind": "mirror", "step": known.stored.step, "message": sentence, "data": {}}
            self.feed.say(known.stored.id, "event", event)

    def _keep(self, run: str, outcome: Outcome) -> None:
        self._observe(run, outcome)
        message = self.store.add_outcome(run, outcome)
        if message is not None:
            self.feed.publish(message)
        for event in self._waiting.get(outcome.command, ()):
            event.set()

    def _observe(self, run: str, outcome: Outcome) -> None:
        """Notes where knobs are after a `set`: its outcome is heard before the run's own word about its knobs comes."""
        after, known = outcome.result.get("after"), self.store.knobs(run)
        if outcome.state == "applied" and isinstance(after, dict) and known and outcome.revision > known.revision:
            self.store.set_knobs(run, KnobState(known.schema, known.observed | after, outcome.revision, time.time()))

    def _event(self, run: str, event: dict[str, Any]) -> None:
        known_run = self.registry.get(run)
        if event.get("kind") == "status" and known_run is not None:
            reported = event.get("status")
            known_run.reported = reported if reported == "paused" else ""
        if event.get("kind") not in ("knobs", "values"):  # all there is to know of them, or where they are now
            self.feed.say(run, "event", event, event.get("time") if isinstance(event.get("time"), float) else None)
            return
        schema, values, revision = (event.get(name) for name in ("schema", "values", "revision"))
        known = self.store.knobs(run)
        if known is not None and isinstance(revision, int) and revision < known.revision:
            return  # said before what is known already
        state = KnobState(
            schema if isinstance(schema, dict) else (known.schema if known is not None else {}),
            values if isinstance(values, dict) else {},
            revision if isinstance(revision, int) else 0,
            time.time(),
        )
        self.store.set_knobs(run, state)
        self.feed.say(run, "knobs", {"values": state.observed, "revision": state.revision})

    # --- time ------------------------------------------------------------------------------------------------------
    async def tend(self) -> None:
        """Looks after everything that time changes, until it is cancelled."""
        next_save = next_sweep = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                if now >= next_sweep:
                    next_sweep = now + _SWEEP_SECONDS
                    await self.sweep()
                await self._tell_statuses()
                if now >= next_save:
                    next_save = now + _SAVE_SECONDS
                    self.registry.save()
            except (AetheriaError, OSError, sqlite3.Error) as error:
                logger.warning("The hub could not look after its runs: {}", error)
            await asyncio.sleep(1.0)

    async def _tell_statuses(self) -> None:
        # What has ended changes nothing any more without a sign of life.
        asked = [known for known in self.registry.known() if known.fresh or known.told not in ENDED]
        statuses = await asyncio.to_thread(lambda: [known.status() for known in asked])
        for known, status in zip(asked, statuses, strict=True):
            if status != known.told:
                known.told = status
                self.feed.say(known.stored.id, "status", {"status": status, "step": known.stored.step})

    def close(self) -> None:
        """Lets everybody who waits go, and writes what is only in memory."""
        self.closing.set()
        for events in self._waiting.values():
            for event in events:
                event.set()
        try:
            self.registry.save()
        except (RunFolderError, OSError) as error:
            logger.warning("When the runs were last seen could not be written: {}", error)


def has_ended(run: str, status: str) -> str:
    """Returns why a run that has ended takes no commands, in a sentence."""
    return f"{run} does not train any more: it is {status}. Continue it first: aetheria continue {run}"


def _in_sight(known: KnownRun) -> bool:
    """Returns whether the hub can look into the run's own folder; on a file system that hangs, after a long time."""
    return known.folder is not None
