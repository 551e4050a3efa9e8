"""A Weavelet among several ranks: every command at the same step on all of them, or on none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loguru import logger

from aetheria.control.decision import Wishes
from aetheria.control.desk import Boundary, Desk
from aetheria.control.line import Line
from aetheria.control.meeting import Place
from aetheria.control.pausing import Pausing
from aetheria.errors import RankError

if TYPE_CHECKING:  # only imported where there is more than one rank
    from aetheria.control.joined_ranks import JoinedAgreement, JoinedRanks

__all__ = ["Others", "Together"]


class _Steered(Protocol):
    """What is steered: the Weavelet."""

    global_step: int

    def say(self, status: str) -> None: ...


@dataclass(slots=True)
class Others:
    """How a Weavelet stands to other ranks.

    Attributes:
        alone: whether it looks for none.
        place: this process's among all; None where there are no others.
        awaited: whether there is to be a process group, and is none yet.
        looked: whether there has been a boundary at which it looked for a process group.
        met: whether the ranks have found one another.
        together: what agrees with them, from then on until that ends.
    """

    alone: bool
    place: Place | None = None
    awaited: bool = False
    looked: bool = False
    met: bool = False
    together: Together | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process has the run folder."""
        return self.place is None or self.place.rank == 0


class Together:
    """Carries out at each boundary what all ranks have agreed on.

    The loop is not ours. If the ranks turn out not to take the same steps, or one of them is gone, it is the steering
    that ends: commands are refused from then on, and the training takes its own course.

    Args:
        steered: the Weavelet.
        desk: its desk, where commands are dealt with, on every rank.
        ranks: of the training.
        agreement: of these ranks.
        line: on which commands arrive, at the first rank.
        pausing: whether the loop waits.

    Attributes:
        closed: why commands are not taken any more; empty while they are.
    """

    def __init__(
        self,
        steered: _Steered,
        desk: Desk,
        ranks: JoinedRanks,
        agreement: JoinedAgreement,
        line: Line,
        pausing: Pausing,
    ) -> None:
        self.closed = ""
        self._steered = steered
        self._desk = desk
        self._ranks = ranks
        self._agreement = agreement
        self._line = line
        self._pausing = pausing
        self._seen = 0
        self._undecided: list[bytes] = []  # what is on its way to the other ranks
        desk.answer_together(self._vote)

    def _vote(self, problem: str) -> str:
        """Returns the problem that is everybody's; empty where no rank has one. For the desk."""
        if self.closed:
            return problem or self.closed
        try:
            return self._agreement.vote(problem)
        except RankError as error:
            self._close(str(error))
            return problem or self.closed

    def attend(self) -> None:
        """Is at a boundary, on every rank: what has been agreed on takes effect, and here a paused loop waits."""
        try:
            self._attend()
        except RankError as error:
            self._close(str(error))
        if self.closed:
            self._refuse_the_rest()

    @property
    def next_step(self) -> int:
        """The step at which all ranks attend next."""
        due = self._agreement.due_at
        return due if self._pausing.at_step is None else min(due, self._pausing.at_step)

    def end(self) -> None:
        """Says that this rank takes no further steps, and waits for nobody; what has not been decided is refused."""
        if not self.closed:
            self.closed = "the run has ended"
            self._tell_others(f"rank {self._ranks.where.rank} has ended after {self._steered.global_step:,} steps")
        self._refuse_the_rest()

    def _tell_others(self, why: str) -> None:
        try:
            self._ranks.say_over(why)
        except RankError as error:  # whoever is gone need not be told
            logger.debug("The other ranks could not be told that {}: {}", why, error)

    def _attend(self) -> None:
        if self._agreement.under_way and self._steered.global_step >= self._agreement.due_at:
            self._read()
        if self._pausing.arrive() and not self.closed:
            self._wait()
        if not self._agreement.under_way and not self.closed:
            self._launch()

    def _launch(self) -> None:
        step = self._steered.global_step
        self._undecided = self._arrived() if self._agreement.is_first else []
        alike = f"revision {self._desk.revision} at step {step}"
        self._agreement.launch(step, Wishes(commands=self._undecided, configuration=alike))

    def _read(self) -> None:
        decision = self._agreement.read()
        self._undecided = []
        self._receive(decision.commands)

    def _arrived(self) -> list[bytes]:
        self._seen = self._line.word[0]
        return list(self._line.take())

    def _receive(self, commands: Iterable[bytes]) -> None:
        step = self._steered.global_step
        for data in commands:
            self._desk.receive(data, *Boundary(step, 0, step))

    def _wait(self) -> None:
        """Waits outside any collective: those have a time-out, a pause has none."""
        self._steered.say("paused")
        if self._agreement.under_way:  # what is in it would otherwise wait for the end of the pause
            self._read()
        while self._pausing.paused and not self.closed:
            if self._agreement.is_first:
                self._pausing.wait(self._line, lambda: None, lambda: self._seen, self._has_news)
                self._undecided = self._arrived()
                self._agreement.pass_on(self._undecided)
            _, commands = self._agreement.await_word(self._no_signal)
            self._undecided = []
            self._receive(commands)
        self._steered.say("running")

    def _has_news(self) -> bool:
        self._ranks.check_all_there()
        return bool(self._line.word[0] != self._seen)

    def _no_signal(self) -> int:
        """Signals are the loop's own business; but a rank that has ended resumes nobody."""
        self._ranks.check_all_there()
        return 0

    def _close(self, why: str) -> None:
        self._tell_others(why)  # who may be waiting for this one
        self.closed = f"{why.rstrip('.')}. This training is steered no more"
        logger.warning("{}; it goes on by itself.", self.closed)
        self._desk.closed = self.closed
        self._pausing.paused = False
        self._pausing.forget()

    def _refuse_the_rest(self) -> None:
        """Answers what has come and was not decided: on the first rank, which alone has it."""
        self._desk.closed = self.closed
        self._desk.answer_alone()
        undecided, self._undecided = self._undecided, []
        if self._agreement.is_first:
            self._receive([*undecided, *self._arrived()])
