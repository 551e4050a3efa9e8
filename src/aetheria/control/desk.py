"""The desk at which commands arrive: checked, journalled, carried out between two steps, and answered."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from loguru import logger

from aetheria.control.journal import Journal
from aetheria.control.knobs import Knobs, plain
from aetheria.errors import CommandError
from aetheria.protocol import AnyCommand, Command, Outcome, Set, decode_command

__all__ = ["Action", "Boundary", "Desk", "Done"]


class Boundary(NamedTuple):
    """A moment between two steps; see `Outcome` for why the step alone does not name it."""

    step: int
    epoch: int = 0
    window: int = 0


class Done(NamedTuple):
    """What an action did.

    Attributes:
        message: for people.
        result: for programs: JSON data.
        position: for a rewind, the journal position of the snapshot it went back to.
        boundary: where the run is afterwards, if the action moved it.
    """

    message: str = ""
    result: Mapping[str, Any] = {}
    position: int | None = None
    boundary: Boundary | None = None


class Action(NamedTuple):
    """How a run carries out an operation.

    Attributes:
        perform: does it, at a boundary.
        check: raises `CommandError` where it cannot be done now; changes nothing.
        together: whether ranks talk to one another while they do it: one that fails must then end them all.
    """

    perform: Callable[[Any], Done | None]
    check: Callable[[Any], object] = lambda command: None
    together: bool = False


class Desk:
    """Takes commands at boundaries. One at a time, in the order in which they come, each once.

    What a command does is in the journal before it happens. A command of an earlier life that lies behind the snapshot
    this life began from is done again, at the step at which it was done then.

    Args:
        run: the run's name; commands for other runs are refused.
        journal: of the run.
        knobs: what `set` may set.
        actions: how to carry out every other operation that this run can do, by name.
        tell: is told every outcome.
        fingerprint: returns a digest of the weights; asked after each change of the training.
        vote: of several ranks, each of which has a desk and deals with the same commands at the same boundary: is told
            this one's problem, or none, and returns the problem that is everybody's.
    """

    def __init__(
        self,
        run: str,
        journal: Journal,
        knobs: Knobs,
        actions: Mapping[str, Action],
        tell: Callable[[Outcome], object],
        fingerprint: Callable[[], str] = lambda: "",
        vote: Callable[[str], str] | None = None,
    ) -> None:
        self.run = run
        self.journal = journal
        self.knobs = knobs
        self.actions = {"set": Action(self._set, self._check_set), **actions}
        self.revision = journal.revision
        self.closed = ""  # why nothing is accepted any more
        self._tell = tell
        self._fingerprint = fingerprint
        self._alone = vote is None
        self._vote = vote or (lambda problem: problem)
        self._planned: list[tuple[Boundary, AnyCommand, Outcome]] = []
        self._unwritten: dict[str, Outcome] = {}  # what the journal should know, and does not

    def answer_alone(self) -> None:
        """From here on no other rank is asked: nothing takes effect any more."""
        self._vote = lambda problem: problem

    def answer_together(self, vote: Callable[[str], str]) -> None:
        """From here on there are other ranks; see `vote`."""
        self._alone, self._vote = False, vote

    def on_every_rank(self, function: Callable[[], Any]) -> Any:
        """Returns what a function does here, if it does it on every rank.

        Raises:
            Exception: whatever it has raised here.
            CommandError: it has raised something on another rank.
        """
        try:
            done = function()
        except Exception as error:
            own = f"{error}" if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
            if (problem := self._vote(own)) != own:
                raise CommandError(problem) from error
            raise
        if problem := self._vote(""):
            raise CommandError(problem)
        return done

    # --- an earlier life -------------------------------------------------------------------------------------------
    def continue_from(self, position: int, stops_passed: int = 0) -> None:
        """Plans what lies behind the snapshot from which this life begins.

        Args:
            position: the journal position that the snapshot remembers.
            stops_passed: see `Journal.behind`.
        """
        self._planned = [
            (Boundary(accepted.step, accepted.epoch, accepted.window), command, latest)
            for accepted, command, latest in self.journal.behind(position, stops_passed)
        ]

    def plan(self, commands: Iterable[tuple[Boundary, AnyCommand]]) -> None:
        """Plans commands for boundaries that are still to come: what a replay does."""
        self._planned = [
            (boundary, command, Outcome(command=command.id, state="received")) for boundary, command in commands
        ]

    @property
    def next_step(self) -> int | None:
        """The next step at which something planned is to be done."""
        return self._planned[0][0].step if self._planned else None

    def catch_up(self, boundary: Boundary) -> None:
        """Does what is planned for this boundary.

        Raises:
            CommandError: it was done in the earlier life, and cannot be done now; or its boundary has been passed.
        """
        while self._planned and self._planned[0][0].step <= boundary.step:
            planned, command, earlier = self._planned[0]
            if planned[1:] > boundary[1:] and planned.step == boundary.step:
                return  # a later boundary of the same step: behind a dropped window, or at the end of the epoch
            if planned != boundary:
                raise CommandError(
                    f"{command.op_name} was to take effect at step {planned.step} (epoch {planned.epoch}, window "
                    f"{planned.window}), which this run has passed without it: it is at step {boundary.step} (epoch "
                    f"{boundary.epoch}, window {boundary.window}). Journal and snapshots do not belong together."
                )
            del self._planned[0]
            self._catch_up_with(command, earlier, boundary)

    def _catch_up_with(self, command: AnyCommand, earlier: Outcome, boundary: Boundary) -> None:
        if earlier.state == "received":  # planned by a replay, whose own journal does not know it yet
            outcome = self.handle(command, *boundary)
            if outcome.state != "applied":
                raise CommandError(f"{command.op_name} cannot be replayed at step {boundary.step}: {outcome.message}")
            return
        done_before = earlier.state == "applied"
        if problem := self._vote(_problem(lambda: self._check_action(command))):
            outcome = self._end(command, "failed", boundary, problem, again=done_before)
        else:
            outcome = self._perform(command, boundary, again=done_before)
        if done_before and outcome.state == "failed":
            raise CommandError(
                f"the journal says that {command.op_name} took effect at step {boundary.step}, but now it fails: "
                f"{outcome.message} Has the code changed since? Put it back, or start a new run from a snapshot."
            )
        if done_before and earlier.digest and outcome.digest != earlier.digest:
            logger.warning(
                "After {} at step {} the weights are not those of the earlier life.", command.op_name, boundary.step
            )

    # --- what arrives ----------------------------------------------------------------------------------------------
    def receive(self, data: bytes, step: int, epoch: int = 0, window: int = 0) -> Outcome:
        """Deals with one command; returns its outcome, which has been told too.

        Args:
            data: as it arrived.
            step: the optimiser steps taken.
            epoch: the epoch, from 0.
            window: the windows of that epoch that lie behind.
        """
        try:
            command = decode_command(data)
        except CommandError as error:
            return self._answer(Outcome(command=_id_in(data), run=self.run, state="rejected", message=str(error)))
        return self.handle(command, step, epoch, window)

    def handle(self, command: AnyCommand, step: int, epoch: int = 0, window: int = 0) -> Outcome:
        """Deals with one command that has been decoded; see `receive`."""
        boundary = Boundary(step, epoch, window)
        known = self._unwritten.get(command.id) or self.journal.outcome(command.id)
        if known is not None:
            return self._answer(known)
        if problem := self._vote(_problem(lambda: self._check(command, step))):
            outcome = self._outcome(command, "rejected", boundary, message=problem)
            if not command.dry_run:
                self._write_down(outcome, command, durable=False)
            return self._answer(outcome)
        accepted = self._outcome(command, "accepted", boundary)
        if command.dry_run:
            return self._answer(self._outcome(command, "accepted", boundary, message="dry run: nothing was changed"))
        try:
            self.journal.append(accepted, command)
        except OSError as error:
            problem = f"the journal cannot be written: {error}. Nothing was changed."
        if problem := self._vote(problem):
            # On every rank alike: whoever sends it again finds all of them ready to do it, or none.
            self.journal.take_back(command.id)
            return self._answer(self._outcome(command, "rejected", boundary, message=problem))
        self._answer(accepted)
        return self._perform(command, boundary)

    def _check(self, command: AnyCommand, step: int) -> None:
        if self.closed:
            raise CommandError(f"{self.closed}; it takes no more commands.")
        if command.run and command.run != self.run:
            raise CommandError(f"this is the run {self.run}; the command is for {command.run}.")
        if command.expect_revision is not None and command.expect_revision != self.revision:
            raise CommandError(
                f"the run is at revision {self.revision}, the command expects {command.expect_revision}: somebody "
                "else has changed it meanwhile. Look again, and decide anew."
            )
        if command.not_after_step is not None and step > command.not_after_step:
            raise CommandError(f"the command was to take effect by step {command.not_after_step}; this is step {step}.")
        self._check_action(command)

    def _check_action(self, command: AnyCommand) -> None:
        action = self.actions.get(command.op_name)
        if action is None:
            raise CommandError(f"this run cannot {command.op_name}. It can: {', '.join(self.actions)}.")
        try:
            action.check(command)
        except CommandError:
            raise
        except Exception as error:  # a look at whether it can be done must not end the run
            logger.warning("{} could not be checked: {}", command.op_name, traceback.format_exc())
            raise CommandError(f"{type(error).__name__}: {error}") from error

    def _perform(self, command: AnyCommand, boundary: Boundary, again: bool = False) -> Outcome:
        try:
            done = self.actions[command.op_name].perform(command) or Done()
        except Exception as error:  # said in the outcome, with its traceback in the log; training goes on
            if self.actions[command.op_name].together and not self._alone and not isinstance(error, CommandError):
                raise
            told = error if isinstance(error, CommandError) else traceback.format_exc()
            logger.warning("{} failed at step {}: {}", command.op_name, boundary.step, told)
            notes = " ".join(getattr(error, "__notes__", ()))
            message = f"{error}" if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
            return self._end(command, "failed", boundary, f"{message} {notes}".strip(), again=again)
        if command.changes_training and not again:
            self.revision += 1
        done_at = boundary if done.boundary is None else done.boundary
        digest = self._fingerprint() if command.changes_training else ""
        return self._end(command, "applied", done_at, done.message, done, digest, again)

    def _end(
        self,
        command: AnyCommand,
        state: Any,
        boundary: Boundary,
        message: str,
        done: Done | None = None,
        digest: str = "",
        again: bool = False,
    ) -> Outcome:
        done = done or Done()
        outcome = self._outcome(
            command, state, boundary, message=message, result=plain(dict(done.result)), digest=digest
        )
        if not again:
            # Durable, or a crash now would do a command again that is neither planned nor undone, such as a note.
            self._write_down(outcome, position=done.position)
            self._answer(outcome)
        return outcome

    def _write_down(self, outcome: Outcome, command: AnyCommand | None = None, **options: Any) -> None:
        """Adds a line that changes nothing any more: if it is missing, whoever resumes the run finds the same out."""
        try:
            self.journal.append(outcome, command, **options)
        except OSError as error:
            self._unwritten[outcome.command] = outcome
            logger.error(
                "{} cannot be written: {}. The outcome of a command is missing there.", self.journal.path, error
            )

    def _outcome(self, command: Command, state: Any, boundary: Boundary, **more: Any) -> Outcome:
        where = boundary._asdict()
        return Outcome(command=command.id, run=self.run, state=state, revision=self.revision, **where, **more)

    def _answer(self, outcome: Outcome) -> Outcome:
        self._tell(outcome)
        return outcome

    # --- set -------------------------------------------------------------------------------------------------------
    def _check_set(self, command: Set) -> None:
        self.knobs.check(command.args.values)

    def _set(self, command: Set) -> Done:
        change = self.knobs.apply(self.knobs.check(command.args.values), self._vote)
        return Done("; ".join(change.remarks), {"before": change.before, "after": change.after})


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except CommandError as error:
        return str(error)
    return ""


def _id_in(data: bytes) -> str:
    """Returns the id of a command that cannot be decoded, as far as there is one: its sender waits for an answer."""
    found = re.search(rb'"id"\s*:\s*"([0-9A-Za-z-]{8,64})"', data[:4096])
    return found.group(1).decode() if found else ""
