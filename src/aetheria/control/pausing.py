"""Waiting between two steps: pause, resume, run so far and no further."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aetheria.control.desk import Action, Done
from aetheria.control.line import Line
from aetheria.errors import CommandError
from aetheria.protocol import RunFor

__all__ = ["Pausing"]

_LOOK = 0.005  # seconds between two looks while paused
_TEND_INTERVAL = 1.0  # seconds between two looks after the other end of the line, while paused


class Pausing:
    """Whether a run waits, and until when.

    Args:
        step: returns the steps taken.
        epoch: returns the epochs ended; None for a loop that does not say where its epochs end.

    Attributes:
        paused: whether it waits, or will at this boundary.
        at_step: the step at which it will.
        at_epoch: the number of epochs after which it will.
    """

    def __init__(self, step: Callable[[], int], epoch: Callable[[], int] | None = None) -> None:
        self.paused = False
        self.at_step: int | None = None
        self.at_epoch: int | None = None
        self._step = step
        self._epoch = epoch

    def actions(self) -> dict[str, Action]:
        """Returns how the commands that are about waiting are carried out."""
        return {
            "pause": Action(self._pause),
            "resume": Action(self._resume),
            "run_for": Action(self._run_for, self._check_run_for),
            "ping": Action(lambda _: Done("paused" if self.paused else "running")),
        }

    def arrive(self, between_epochs: bool = False) -> bool:
        """Says that the run is at a boundary; returns whether it is to wait there."""
        if self.at_step is not None and self._step() >= self.at_step:
            self.paused, self.at_step = True, None
        if self.at_epoch is not None and between_epochs and self._epoch is not None and self._epoch() >= self.at_epoch:
            self.paused, self.at_epoch = True, None
        return self.paused

    def forget(self) -> None:
        """Forgets where it was to wait: the run has been taken somewhere else, or stopped."""
        self.at_step = self.at_epoch = None

    def wait(self, line: Line, take: Callable[[], object], seen: Callable[[], int], ended: Callable[[], bool]) -> None:
        """Waits until somebody resumes the run.

        Args:
            line: on which commands arrive meanwhile.
            take: deals with the commands that have arrived.
            seen: returns the command word when they were last taken.
            ended: returns whether the run is to end.
        """
        tended = 0.0
        while self.paused and not ended():
            if line.word[0] != seen():
                take()
            now = time.monotonic()
            if now - tended > _TEND_INTERVAL:
                tended = now
                line.beat(self._step())
                line.tend()
            time.sleep(_LOOK)

    def _pause(self, _command: Any) -> Done:
        already, self.paused = self.paused, True
        return Done("paused already" if already else "")

    def _resume(self, _command: Any) -> Done:
        was, self.paused = self.paused, False
        self.forget()
        return Done("" if was else "it was not paused")

    def _check_run_for(self, command: RunFor) -> None:
        if command.args.epochs is not None and self._epoch is None:
            raise CommandError("this loop does not say where its epochs end; run_for takes steps here.")

    def _run_for(self, command: RunFor) -> Done:
        self.paused = False
        self.forget()
        if command.args.steps is not None:
            self.at_step = self._step() + command.args.steps
            return Done(f"pauses at step {self.at_step}")
        assert command.args.epochs is not None
        assert self._epoch is not None
        self.at_epoch = self._epoch() + command.args.epochs
        return Done(f"pauses at the end of epoch {self.at_epoch - 1}")
