"""What follows from a window that was dropped because its gradients were NaN or infinite."""

from __future__ import annotations

from typing import Literal, Protocol

from aetheria.engine.loop_state import LoopState
from aetheria.engine.window import Window
from aetheria.errors import NonFiniteError

__all__ = ["DroppedWindows"]


class _Record(Protocol):
    def __call__(self, kind: str, message: str, **data: object) -> None: ...


class _Stop(Protocol):
    def __call__(self, reason: str) -> None: ...


class DroppedWindows:
    """Records dropped windows, and decides when there were too many.

    Args:
        policy: "skip" goes on, "stop" ends the run with a snapshot, "raise" fails it.
        limit: dropped windows in a row that fail the run whatever the policy.
        record: takes the event.
        request_stop: ends the run at the next boundary.
        own: whether a window is this rank's alone, so that only its own samples can be at fault.
    """

    def __init__(
        self,
        policy: Literal["skip", "stop", "raise"],
        limit: int,
        record: _Record,
        request_stop: _Stop,
        own: bool = False,
    ) -> None:
        self._policy = policy
        self._limit = limit
        self._record = record
        self._request_stop = request_stop
        self._own = own

    def note(self, window: Window, state: LoopState, overflow_expected: bool) -> None:
        """Notes one that was dropped.

        Args:
            window: which.
            state: of the loop; the window is counted in it.
            overflow_expected: whether the loss scale (fp16) is merely looking for its place. That is recorded as what
                it is, and never by itself a reason to end a run.

        Raises:
            NonFiniteError: the policy says so, or there were too many in a row.
        """
        state.dropped_in_a_row += 1
        after = f"after step {state.global_step}, {state.dropped_in_a_row} in a row"
        if overflow_expected:
            self._record("overflow", f"fp16 overflow {after}: the window was dropped and the loss scale lowered")
        else:
            self._record(
                "nonfinite",
                f"NaN or infinite gradients {after}: the window was dropped, nothing changed",
                epoch=state.cursor.epoch,
                sample_ids=window.sample_ids(self._own),
            )
        if state.dropped_in_a_row >= self._limit or (self._policy == "raise" and not overflow_expected):
            raise NonFiniteError(
                f"NaN or infinite gradients {after} (max_skipped_in_a_row: {self._limit}). The weights are as they "
                "were before. Look at the data (the event names the samples), lower the learning rate, set "
                "max_grad_norm, or compute in fp32."
            )
        if self._policy == "stop" and not overflow_expected:
            self._request_stop("NaN or infinite gradients")
