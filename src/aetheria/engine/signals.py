"""SIGTERM, SIGINT and SIGUSR1: finish the step, save, leave. A second Ctrl-C leaves at once.

SIGTERM is how Kubernetes and torchrun end a process; SIGUSR1 is what batch systems are asked to send some time before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """Notes the first stop signal while it is entered; the handlers that were there before are put back on leaving.

    In any other thread than the main one Python cannot handle signals: then nothing is installed.

    Args:
        notify: called, in the handler, when the first one arrives.

    Attributes:
        received: the number of the signal, or None.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.received: int | None = None
        self._notify = notify
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("second Ctrl-C: stopped at once, without a snapshot of this step")
        self.received = self.received or number
        self._notify()

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
