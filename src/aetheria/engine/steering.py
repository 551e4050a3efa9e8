"""Steering a run: the desk at which its commands arrive, and what each of them does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from aetheria.control.decision import Decision
from aetheria.control.desk import Action, Boundary, Desk, Done
from aetheria.control.journal import Journal
from aetheria.control.knobs import Knobs
from aetheria.control.line import Line
from aetheria.control.pausing import Pausing
from aetheria.control.telling import Telling
from aetheria.core import Accelerator, AetherModel
from aetheria.engine.clock import TrainingClock
from aetheria.engine.fingerprint import fingerprint
from aetheria.protocol import (
    AnyCommand,
    Health,
    Note,
    Outcome,
    Rewind,
    Set,
    Snapshot,
    Stop,
    Test,
    Validate,
    encode,
)
from aetheria.snapshot.format import model_tensors

if TYPE_CHECKING:  # only imported where there is more than one rank
    from aetheria.control.agreement import Agreement

__all__ = ["Steerable", "Steering", "describe"]


class Steerable(Protocol):
    """What commands do to a run: the Orchestrator."""

    model: AetherModel
    accelerator: Accelerator
    clock: TrainingClock

    @property
    def boundary(self) -> Boundary:
        """Where the run is."""
        ...

    def request_stop(self, reason: str) -> None: ...
    def signal_received(self) -> int:
        """Returns the number of a signal that this process has got, or 0."""
        ...

    def act_on(self, decision: Decision) -> None:
        """Does what all ranks have agreed on, the commands apart."""
        ...

    def stop_requested(self) -> bool: ...
    def save_now(self, reason: str, pinned: bool) -> None: ...
    def rewind_to(self, step: int) -> int:
        """Goes back to a snapshot; returns the journal position that it remembers."""
        ...

    def can_rewind_to(self, step: int) -> None:
        """Raises `CommandError` where it cannot."""
        ...

    def validate_now(self) -> dict[str, float]: ...
    def test_now(self) -> dict[str, float]: ...
    def check_health(self, check: str) -> dict[str, Any]: ...
    def note(self, text: str, author: str) -> None: ...
    def leave_no_snapshot(self) -> None: ...


class Steering:
    """Carries out the commands of a run, at its boundaries.

    Args:
        run: what is steered.
        run_id: its name.
        journal: of the run.
        knobs: of the run.
        line: to the sidecar.
        told: is called with every outcome, after it has been sent.
        agreement: of several ranks; None where there is one.

    Attributes:
        seen: the command word when the commands were last taken; another value means that there are new ones.
        pausing: whether the run waits.
    """

    def __init__(
        self,
        run: Steerable,
        run_id: str,
        journal: Journal,
        knobs: Knobs,
        line: Line,
        told: Callable[[AnyCommand | None, Outcome], None],
        agreement: Agreement | None = None,
    ) -> None:
        self.line = line
        self.word = line.word
        self.seen = 0
        self.pausing = Pausing(lambda: run.boundary.step, lambda: run.boundary.epoch)
        self._run = run
        self._run_id = run_id
        self.knobs = knobs
        self._told = told
        self._telling = Telling(knobs)
        self._rewound = False
        self._agreement = agreement
        self._arrived: list[bytes] = []  # and not agreed on yet
        vote = None if agreement is None else agreement.vote
        self.desk = Desk(run_id, journal, knobs, self._actions(), self._tell, self._fingerprint, vote)

    def _fingerprint(self) -> str:
        with self._run.accelerator.shared_weights(self._run.model):
            return fingerprint(model_tensors(self._run.model)[0])

    # --- an earlier life -------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns what a snapshot must remember: where the journal was, and what had been set."""
        self.desk.journal.sync()
        return {"position": self.desk.journal.position, "knobs": self.knobs.touched()}

    def plan(self, commands: Iterable[tuple[Boundary, AnyCommand]]) -> None:
        """Plans the commands of a replay."""
        self.desk.plan(commands)

    @property
    def next_step(self) -> int | None:
        """The next step at which there is something to do, whoever asks for it; None where there is nothing."""
        steps = [step for step in (self.desk.next_step, self.pausing.at_step) if step is not None]
        return min(steps, default=None)

    # --- at a boundary ---------------------------------------------------------------------------------------------
    def arrived(self) -> list[bytes]:
        """Returns the commands that have arrived since this was last called; they take effect once all ranks know."""
        self._fetch()
        arrived, self._arrived = self._arrived, []
        return arrived

    def _fetch(self) -> list[bytes]:
        self.seen = self.word[0]
        self._arrived += self.line.take()
        return self._arrived

    def attend(self, commands: Sequence[bytes] = ()) -> bool:
        """Does what is planned for this boundary, then what has arrived; waits here while the run is paused.

        Args:
            commands: what several ranks have agreed on; where there is one, it takes what has arrived.

        Returns:
            Whether the run has been taken somewhere else: then this boundary is not the one that it was.
        """
        self._rewound = False
        self.desk.catch_up(self._run.boundary)
        if self._agreement is None:
            self._take()
        else:
            self._receive(commands)
        if self.pausing.arrive(between_epochs=self._run.boundary.window == 0) and not self._rewound:
            self._wait()
        return self._rewound

    def _take(self) -> None:
        self._receive(self.arrived())

    def _receive(self, commands: Iterable[bytes]) -> None:
        for data in commands:
            self.desk.receive(data, *self._run.boundary)

    def _wait(self) -> None:
        self.say("paused")
        with self._run.clock.standing_still():
            if self._agreement is None:
                self.pausing.wait(self.line, self._take, lambda: self.seen, self._run.stop_requested)
            else:
                self._wait_together(self._agreement)
        self.say("running")

    def _wait_together(self, agreement: Agreement) -> None:
        """Waits outside any collective: those have a time-out, a pause has none."""
        signal = self._run.signal_received
        if agreement.under_way:  # what is in it would otherwise wait for the end of the pause
            decision = agreement.read()
            self._run.act_on(decision)
            self._receive(decision.commands)
        while self.pausing.paused and not self._run.stop_requested():
            if agreement.is_first:
                self.pausing.wait(
                    self.line,
                    lambda: None,
                    lambda: self.seen,
                    lambda: bool(self.word[0] != self.seen or signal() or agreement.signal_of_others()),
                )
                agreement.pass_on(self.arrived(), signal() or agreement.signal_of_others())
            number, commands = agreement.await_word(signal)
            self._run.act_on(Decision(signal=number))
            self._receive(commands)

    # --- what is said ----------------------------------------------------------------------------------------------
    def say(self, status: str) -> None:
        """Tells how the run is, and all knobs with their values."""
        self._telling.status(self.line, status, self._run.boundary.step, self.desk.revision)

    def refresh(self) -> None:
        """Tells the knobs that have moved by themselves; called now and then."""
        self._telling.refresh(self.line, self.desk.revision)

    def end(self) -> None:
        """Refuses what comes from here on, and says that the run has ended."""
        self.desk.closed = "the run has ended"
        late = () if self._agreement is None else self._agreement.read().commands
        self.desk.answer_alone()
        if self._agreement is None or self._agreement.is_first:
            self._receive(late)
            self._take()
        self.say("ended")

    def _tell(self, outcome: Outcome) -> None:
        self.line.tell("ack", encode(outcome))
        command = self.desk.journal.command(outcome.command)
        if outcome.state == "applied" and command is not None and command.changes_training:
            self._telling.knobs(self.line, self.desk.revision)
        self._told(command, outcome)

    # --- what commands do ------------------------------------------------------------------------------------------
    def _actions(self) -> dict[str, Action]:
        return {
            "stop": Action(self._stop),
            "snapshot": Action(self._snapshot, together=True),
            "rewind": Action(self._rewind, lambda command: self._run.can_rewind_to(command.args.step), together=True),
            "validate": Action(self._validate, together=True),
            "test": Action(self._test, together=True),
            "note": Action(self._note),
            "health": Action(self._health, together=True),
            **self.pausing.actions(),
        }

    def _stop(self, command: Stop) -> None:
        if not command.args.snapshot:
            self._run.leave_no_snapshot()
        by = f" by {command.author}" if command.author else ""
        self._run.request_stop(f"stopped{by}" + (f": {command.reason}" if command.reason else ""))
        self.pausing.paused = False

    def _snapshot(self, command: Snapshot) -> Done:
        self._run.save_now(command.args.name or command.reason or "command", command.args.pinned)
        return Done("it becomes durable while training goes on")

    def _rewind(self, command: Rewind) -> Done:
        step = self._run.boundary.step
        position = self._run.rewind_to(command.args.step)
        self._rewound = True
        self.pausing.forget()
        return Done(f"from step {step} to step {command.args.step}", {"from": step}, position, self._run.boundary)

    def _validate(self, _command: Validate) -> Done:
        return Done(result=self._run.validate_now())

    def _test(self, _command: Test) -> Done:
        return Done(result=self._run.test_now())

    def _note(self, command: Note) -> None:
        self._run.note(command.args.text, command.author)

    def _health(self, command: Health) -> Done:
        return Done(result=self._run.check_health(command.args.check))


def describe(command: AnyCommand, outcome: Outcome) -> str:
    """Returns one sentence about a command and what came of it."""
    what = command.op_name
    if isinstance(command, Set):
        before, after = outcome.result.get("before", {}), outcome.result.get("after", {})
        what = ", ".join(
            f"{key} {before.get(key)} -> {after[key]}" if key in after else f"{key} = {value}"
            for key, value in command.args.values.items()
        )
    by = f" by {command.author}" if command.author else ""
    why = f" ({command.reason})" if command.reason else ""
    became = "" if outcome.state == "applied" else f": {outcome.state}, {outcome.message}"
    return f"{what}{by}{why}{became}"
