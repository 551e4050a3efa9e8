"""What several threads want at the same time is done by one of them; and what a fork leaves behind of that."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

__all__ = ["Once", "begins_anew_in_child"]

T = TypeVar("T")
_forked: weakref.WeakSet[object] = weakref.WeakSet()


def begins_anew_in_child(something: object) -> None:
    """Has `something.begin_anew()` called in every child that this process forks.

    A lock that a thread held at that moment is held for ever in the child, and what a thread was about to finish will
    never be: there is no such thread there.
    """
    _forked.add(something)


def _in_child() -> None:
    for something in list(_forked):
        something.begin_anew()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_in_child)


class Once(Generic[T]):
    """Lets one of several threads do what all of them want; the others wait, and get the same.

    What it returned or raised is not kept: who comes later does it again.
    """

    def __init__(self) -> None:
        self.begin_anew()
        begins_anew_in_child(self)

    def begin_anew(self) -> None:
        """Forgets what other threads are doing: for a process that has none of them."""
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[T]] = {}

    def __call__(self, key: Hashable, work: Callable[[], T]) -> T:
        """Returns what the work returned, and raises what it raised, whoever has done it."""
        with self._lock:
            running = self._running.get(key)
            if mine := running is None:
                running = self._running[key] = Future()
        assert running is not None
        if not mine:
            try:
                return running.result()
            except CancelledError:  # the other thread was interrupted
                return self(key, work)
        try:
            found = work()
        except Exception as error:
            running.set_exception(error)
            raise
        except BaseException:
            running.cancel()
            raise
        else:
            running.set_result(found)
            return found
        finally:
            with self._lock:
                self._running.pop(key, None)
