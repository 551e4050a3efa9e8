"""What a training says of itself through a Weavelet: metrics, notes, how it is and where its knobs are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aetheria.control.declaring import Declaring
from aetheria.control.desk import Desk
from aetheria.control.log_buffer import MOST, LogBuffer
from aetheria.control.telling import Telling
from aetheria.protocol import encode

__all__ = ["Reporting"]


class Reporting(Declaring):
    """What a loop reports. Among several ranks the first one's reports are the run's; the others' are heard by nobody.

    Attributes:
        global_step: the steps taken.
    """

    _link: Any  # the line to the sidecar
    _desk: Desk  # there, once the run is known

    def __init__(self) -> None:
        super().__init__()
        self.global_step = 0
        self._identity = ("", Path())  # the run's name and folder, once they are known
        self._telling = Telling(self.knobs)
        self._buffer: LogBuffer | None = None  # while it is started, on the first rank

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Records metrics of the present step.

        While logs come within 20 ms of one another, they are written together, twenty times a second. So a fast loop
        that stops short shows its last 50 ms only when it goes on, pauses or ends, and one that is killed (by signal 9)
        takes them with it. What a slow loop logs is written at once.

        Args:
            metrics: numbers or scalar tensors; those on a device are read by a later call, so that nothing waits.

        Raises:
            TypeError, ValueError, RuntimeError: something is not one number.
        """
        buffer = self._buffer
        if buffer is None:
            return
        now = time.time()
        # Written out, and in a loop: a call more, or the set of the types, would take microseconds between two steps.
        for value in metrics.values():
            if type(value) is not float and type(value) is not int:
                break
        else:
            if now < buffer.due and metrics and len(buffer.points) < MOST:
                buffer.points.append((now, self.global_step, dict(metrics)))
                return
        buffer.add(now, self.global_step, metrics)

    def note(self, text: str, author: str = "") -> None:
        """Writes a note about the present step."""
        said = {"kind": "note", "step": self.global_step, "message": text, "data": {"author": author}}
        self._link.tell("event", encode(said))

    def publish_training_status(self, status: Mapping[str, Any]) -> None:
        """Publishes anything about the training, as an event; its numbers become metrics, too."""
        numbers = {
            name: value
            for name, value in status.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            self.log(numbers)
        said = {"kind": "status", "step": self.global_step, "message": "training status", "data": dict(status)}
        self._link.tell("event", encode(said))

    def say(self, status: str) -> None:
        """Tells how the run is, and the knobs."""
        self._flush(wait=status == "paused")
        if self._identity[0]:
            self._telling.status(self._link, status, self.global_step, self._desk.revision)

    def say_knobs(self) -> None:
        """Tells the hub the knobs and their values as they are now; after `start`."""
        if self._identity[0]:
            self._telling.knobs(self._link, self._desk.revision)

    def _flush(self, wait: bool = False) -> None:
        if self._buffer is not None:
            self._buffer.flush(wait)
