"""Metrics on their way from a loop to the sidecar: one by one while the loop is slow, together while it is fast.

After a step of training nothing of Python is in the processor's caches any more, and whatever is touched to log a few
numbers has to be fetched from memory: writing a record into shared memory takes 3 us in a loop that does nothing else,
and ten times as long between two steps of 2 ms. So a fast loop only notes its numbers, and what it has noted is written
together, twenty times a second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from aetheria.control.line import Line
from aetheria.loom.messages import Point

__all__ = ["MOST", "LogBuffer"]

MOST = 100  # points in a record: a loop that does nothing but log shall not wait long for it
_INTERVAL = 0.05  # seconds between two records of a fast loop
_QUICK = 0.02  # seconds: a log that comes this soon after the one before it is one of a fast loop
_FAST = 16  # so many of them in a row make one


class LogBuffer:
    """Holds points back while a loop is fast, and hands them over to a line when it is time to. For any thread.

    Args:
        line: to the sidecar.

    Attributes:
        points: what is held back; always this list, for another thread may be about to append to it.
        due: until when numbers may just be appended to it, if there are fewer than `MOST`; in seconds since 1970. For
            all else there is `add`.
    """

    __slots__ = ("_late", "_line", "_quick", "_when", "due", "points")

    def __init__(self, line: Line) -> None:
        self.points: list[Point] = []
        self.due = 0.0
        self._line = line
        self._late: deque[tuple[float, int, dict[str, Any]]] = deque()  # what a device may still be computing
        self._when = 0.0  # when there was last something to decide
        self._quick = 0

    def add(self, now: float, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step as they are now, and hands over what is due.

        Args:
            now: seconds since 1970.
            step: the step.
            metrics: numbers or scalar tensors; those on a device are read by a later call, so that nothing waits.

        Raises:
            TypeError, ValueError, RuntimeError: something is not one number.
        """
        numbers, late = _apart(metrics)
        due = now >= self.due or len(self.points) >= MOST
        if due:
            self._read_late()  # that of calls before this one
        if numbers:
            self.points.append((now, step, numbers))
        if late:
            self._late.append((now, step, late))
        if due:
            self._line.hand_over(self.points)
            self._plan(now)

    def flush(self, wait: bool = True) -> None:
        """Hands over what there is.

        Args:
            wait: also for what a device is still computing.
        """
        if wait:
            self._read_late()
        self._line.hand_over(self.points)

    def _plan(self, now: float) -> None:
        """Decides until when points are held back from now on: not at all, unless the loop is fast."""
        since = now - self._when  # less than 0 if the clock was set back
        self._when = now
        if self.due:
            fast = 0 <= since < _INTERVAL + _QUICK
        else:
            self._quick = self._quick + 1 if 0 <= since < _QUICK else 0
            fast = self._quick >= _FAST
        if fast:
            self.due = now + _INTERVAL
        elif self.due:
            self._quick, self.due = 0, 0.0

    def _read_late(self) -> None:
        while self._late:
            try:
                when, step, values = self._late.popleft()
            except IndexError:  # another thread was faster
                return
            self.points.append((when, step, {name: float(value) for name, value in values.items()}))


def _apart(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns as numbers what can be read now, and, as scalars of their own, what a device may still be computing."""
    numbers: dict[str, float] = {}
    late: dict[str, Any] = {}
    for name, value in metrics.items():
        if not hasattr(value, "detach"):
            numbers[name] = float(value)
        elif str(value.device) == "cpu":
            numbers[name] = float(value.detach())  # a loss that still has its graph
        else:
            late[name] = value.detach().reshape(()).clone()  # the loop may add to it, a CUDA graph writes over it
    return numbers, late
