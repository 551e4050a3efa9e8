"""What a run tells the world: metrics, read late, and events. It never waits, unless asked to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from torch import Tensor

from aetheria.control.line import Line
from aetheria.core import Accelerator, RunEvent
from aetheria.engine.hooks import Hooks
from aetheria.engine.metrics import Arriving, ArrivingMetrics, SharedMetrics
from aetheria.loom.recorder import Recorder
from aetheria.protocol import encode

__all__ = ["Reporter"]

_MOST = 64  # readings that wait for their exchange


class Reporter:
    """Brings metrics from the device to the recorder and the loggers.

    Args:
        accelerator: knows how to read without waiting.
        hooks: the loggers are among them.
        recorder: writes `run.db`; None on every rank but the first.
        line: to the sidecar.
    """

    def __init__(self, accelerator: Accelerator, hooks: Hooks, recorder: Recorder | None, line: Line) -> None:
        self._line = line
        self._accelerator = accelerator
        self._hooks = hooks
        self._recorder = recorder
        self._added: dict[str, float | Tensor] = {}
        self._waiting: list[tuple[int, Arriving, Arriving]] = []  # for the other ranks
        self._arriving: deque[tuple[int, Arriving, Arriving]] = deque()

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Adds values to whatever is logged next."""
        self._added.update(metrics)

    def log(self, step: int, means: Arriving, metrics: Mapping[str, float | Tensor]) -> None:
        """Logs the metrics of a step: now if they are on the host, else when they have arrived.

        Those of several ranks wait until `exchange`. Every rank must call this, and that, at the same steps.

        Args:
            step: the step they belong to.
            means: on their way.
            metrics: numbers, or scalar tensors, that go with them.
        """
        reading = step, means, ArrivingMetrics(self._accelerator, {**metrics, **self._added})
        self._added = {}
        if self._accelerator.world_size == 1:
            self._arriving.append(reading)
            self.deliver()
        else:
            self._waiting.append(reading)
            if len(self._waiting) >= _MOST:
                self.exchange()

    def exchange(self) -> None:
        """Hands on what the ranks have exchanged last time, and begins to exchange what has been logged since."""
        self._hand_on(wait=True)
        self._arriving.extend(self._waiting)
        SharedMetrics.exchange([means for _, means, _ in self._waiting if isinstance(means, SharedMetrics)])
        self._waiting = []

    def deliver(self, wait: bool = False) -> None:
        """Hands on the metrics that have arrived, in their order; all of them if `wait`."""
        if wait:
            self.exchange()
        self._hand_on(wait)

    def _hand_on(self, wait: bool) -> None:
        while self._arriving and (wait or (self._arriving[0][1].ready() and self._arriving[0][2].ready())):
            step, means, more = self._arriving.popleft()
            if metrics := means.values() | more.values():
                self.publish(metrics, step)

    def publish(self, metrics: dict[str, float], step: int) -> None:
        """Hands on metrics that are numbers already."""
        if self._recorder is not None:
            self._recorder.metrics(metrics, step)
            self._line.metrics(step, metrics)
            self._hooks.call("log_metrics", metrics, step)

    def note(self, step: int, text: str, author: str) -> None:
        """Hands on a note about a step."""
        if self._recorder is not None:
            self._recorder.note(step, text, author)

    def begin_again(self, recorder_from: Callable[[int], Recorder], step: int) -> None:
        """Goes on from an earlier step: what was recorded after it does not count any more."""
        self.deliver(wait=True)
        self._added = {}
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = recorder_from(step)

    def flush(self) -> None:
        """Waits until what has been handed on is durable."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Writes what is left."""
        if self._recorder is not None:
            self._recorder.close()

    def record(self, event: RunEvent) -> None:
        """Hands on an event."""
        if self._recorder is not None:
            self._recorder.event(event.kind, event.step, event.message, dict(event.data))
            said = {"kind": event.kind, "step": event.step, "message": event.message, "data": event.data}
            self._line.tell("event", encode(said))
        self._hooks.call("on_event", event)
