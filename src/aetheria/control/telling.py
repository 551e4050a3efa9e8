"""What a run says of itself: how it is, and where its knobs are."""

from __future__ import annotations

import time
from typing import Any

from aetheria.control.knobs import Knobs
from aetheria.control.line import Line, NoLine
from aetheria.protocol import encode

__all__ = ["Telling"]

_REFRESH_INTERVAL = 1.0  # seconds between two looks at the knobs


class Telling:
    """Tells the other end of a line the status of a run, and its knobs with their values.

    Args:
        knobs: of the run.
    """

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._told: dict[str, Any] = {}
        self._refresh_at = 0.0

    def status(self, line: Line, status: str, step: int, revision: int) -> None:
        """Tells how the run is, and the knobs."""
        line.tell("status", encode({"kind": "status", "status": status, "step": step}))
        self.knobs(line, revision)

    def knobs(self, line: Line, revision: int) -> None:
        """Tells which knobs there are, and their values."""
        self._told = self._knobs.values()
        content = {"schema": self._knobs.schema(), "values": self._told, "revision": revision}
        line.tell("status", encode({"kind": "knobs", **content}))

    def refresh(self, line: Line, revision: int) -> None:
        """Tells the values again where they have moved by themselves, as schedules move a learning rate.

        Looks once a second at most, and not at all where nobody is at the other end.
        """
        now = time.monotonic()
        if now < self._refresh_at or type(line) is NoLine:
            return
        self._refresh_at = now + _REFRESH_INTERVAL
        values = self._knobs.values()
        if values != self._told:
            self._told = values
            line.tell("status", encode({"kind": "values", "values": values, "revision": revision}))
