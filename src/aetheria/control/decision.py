"""What one rank wishes, and what all of them do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Decision", "Wishes"]


class Wishes(NamedTuple):
    """What one rank wishes.

    Attributes:
        signal: the number of the signal it has got; 0 for none.
        stop: why the run should end; empty where it should not.
        save: 1 for a snapshot, 2 for one even where there is one of this step.
        commands: what has arrived, as it arrived; on the first rank.
        configuration: what must be the same on all ranks.
        seconds: how long it has trained, by its own clock.
    """

    signal: int = 0
    stop: str = ""
    save: int = 0
    commands: Sequence[bytes] = ()
    configuration: str = ""
    seconds: float = 0.0


class Decision(NamedTuple):
    """What all ranks do, at this step.

    Attributes:
        signal: a signal that one of them has got; 0 for none.
        stop: why the run is to end.
        save: the most that one of them wishes.
        commands: that take effect now, in this order.
        seconds: how long they have trained, by the clock that is ahead.
    """

    signal: int = 0
    stop: str = ""
    save: int = 0
    commands: tuple[bytes, ...] = ()
    seconds: float = 0.0

    def and_then(self, later: Decision) -> Decision:
        """Returns this decision with another one that was taken at the same step."""
        return Decision(
            self.signal or later.signal,
            self.stop or later.stop,
            max(self.save, later.save),
            self.commands + later.commands,
            max(self.seconds, later.seconds),
        )
