"""How long a run has been trained, over all of its lives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TrainingClock"]


class TrainingClock:
    """A clock that a snapshot can set, and that stands still while the run waits.

    It counts what this process trains, on top of what lies behind the snapshot that it began from: validations and
    snapshots included, what has to be done again after a crash counted once.
    """

    def __init__(self) -> None:
        self._behind = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """How long the run has been trained."""
        return self._behind + (0.0 if self._since is None else time.monotonic() - self._since)

    def start(self) -> None:
        """Begins to count."""
        self._since = time.monotonic()

    def set(self, seconds: float) -> None:
        """Goes on from what a snapshot says."""
        self._behind = seconds
        if self._since is not None:
            self._since = time.monotonic()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Does not count what happens meanwhile: the run is paused."""
        self._behind, self._since = self.seconds, None
        try:
            yield
        finally:
            self.start()

    def when(self, seconds: float | None) -> float:
        """Returns the time, on the monotonic clock, at which it will show so many seconds; infinity for None."""
        return float("inf") if seconds is None else time.monotonic() + seconds - self.seconds
