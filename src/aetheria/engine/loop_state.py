"""Where the loop is: all of it that must survive, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aetheria.data import Cursor

__all__ = ["LoopState"]


@dataclass
class LoopState:
    """The loop's own state.

    Attributes:
        cursor: where training is in its data.
        global_step: optimiser steps taken since the run began; dropped windows do not count.
        history: the metrics of every epoch, oldest first.
        dropped_in_a_row: windows dropped since the last step that was taken.
        logged_at: the step at which metrics were last logged.
        validated_at: the step at which a validation last ran to its end.
        seconds: how long has been trained, as of the last boundary at which that was looked up; the ranks agree on it.
        fresh: metrics of exactly this step: what a snapshot taken here is worth.
    """

    cursor: Cursor = field(default_factory=Cursor)
    global_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    dropped_in_a_row: int = 0
    logged_at: int = 0
    validated_at: int = 0
    seconds: float = 0.0
    fresh: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain containers."""
        return {**vars(self), "cursor": self.cursor.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LoopState:
        """Takes back what `state_dict` returned."""
        return cls(**{**state, "cursor": Cursor.from_state(state["cursor"])})
