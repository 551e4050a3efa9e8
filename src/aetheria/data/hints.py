"""Fetching what will be needed: by a few threads, which end when there is nothing to fetch."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable

from aetheria.data.once import begins_anew_in_child
from aetheria.errors import AetheriaError

__all__ = ["Hints"]


class Hints:
    """What will be needed, and the threads that fetch it. They are started when something is said, in this process.

    Args:
        fetch: fetches one; a bound method, whose object is not kept alive by it. If it fails, nothing is said of it.
        threads: that fetch at the same time.
        most: that are remembered; what was said before all others is forgotten.
    """

    def __init__(self, fetch: Callable[[int], object], threads: int, most: int) -> None:
        self._fetch = weakref.WeakMethod(fetch)
        self._most_threads = threads
        self._most = most
        self.begin_anew()
        begins_anew_in_child(self)

    def begin_anew(self) -> None:
        """Forgets everything, in a process that was forked: its threads are not there."""
        self._lock = threading.Lock()
        self._wanted: deque[int] = deque()
        self._threads = 0

    def add(self, numbers: Iterable[int]) -> None:
        """Puts what will be needed, the first one first, before all that was said earlier."""
        newest = list(dict.fromkeys(numbers))[: self._most]
        known = set(newest)
        with self._lock:
            earlier = [number for number in self._wanted if number not in known]
            self._wanted = deque([*newest, *earlier][: self._most])
            begun = max(0, min(len(self._wanted), self._most_threads - self._threads))
            self._threads += begun
        for at in range(begun):
            try:
                threading.Thread(target=self._run, name="aetheria-prefetch", daemon=True).start()
            except RuntimeError:  # the system gives no more threads: who needs it fetches it
                with self._lock:
                    self._threads -= begun - at
                return

    def _run(self) -> None:
        while True:
            fetch = self._fetch()
            with self._lock:
                if fetch is None or not self._wanted:
                    self._threads -= 1
                    return
                number = self._wanted.popleft()
            try:
                fetch(number)
            except (AetheriaError, OSError):
                pass  # who reads it meets the same, and is told
            except BaseException:
                with self._lock:
                    self._threads -= 1
                raise
            del fetch
