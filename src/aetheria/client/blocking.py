"""What a run, or several replicas, can be told: a method for each operation, for scripts and notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping
from typing import Any, Unpack

from aetheria.client.models import CommandOptions

__all__ = ["Commands"]


class Commands(ABC):
    """Every operation; each waits until it is known what came of it, or returns a future with `wait=False`."""

    aio: Any  # the same for asynchronous programs

    @abstractmethod
    def _do(self, work: Coroutine[Any, Any, Any], wait: bool) -> Any: ...

    def set(self, values: Mapping[str, Any] | None = None, /, *, wait: bool = True, **knobs: Any) -> Any:
        """Gives knobs new values, all or none: `run.set(learning_rate=1e-4, reason="plateau")`.

        Args:
            values: by knob; for those whose names Python does not take as keywords, such as "learning_rate.head".
            wait: for the final outcome.
            **knobs: values by knob, and the options that every command takes.
        """
        return self._do(self.aio.set(values, **knobs), wait)

    def pause(self, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Lets the run wait at its next boundary."""
        return self._do(self.aio.pause(**options), wait)

    def resume(self, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Lets a paused run go on."""
        return self._do(self.aio.resume(**options), wait)

    def stop(self, snapshot: bool = True, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Ends the run, with a snapshot unless that is not wanted."""
        return self._do(self.aio.stop(snapshot, **options), wait)

    def run_for(
        self,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        wait: bool = True,
        **options: Unpack[CommandOptions],
    ) -> Any:
        """Lets the run go on for so many steps or epochs, and pause then."""
        return self._do(self.aio.run_for(steps=steps, epochs=epochs, **options), wait)

    def snapshot(
        self, name: str = "", pinned: bool = False, *, wait: bool = True, **options: Unpack[CommandOptions]
    ) -> Any:
        """Takes a snapshot; a pinned one is kept for ever."""
        return self._do(self.aio.snapshot(name, pinned, **options), wait)

    def rewind(self, step: int, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Goes back to the snapshot of a step."""
        return self._do(self.aio.rewind(step, **options), wait)

    def validate(self, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Validates now; the outcome's `result` holds the metrics."""
        return self._do(self.aio.validate(**options), wait)

    def test(self, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Evaluates on the test data now."""
        return self._do(self.aio.test(**options), wait)

    def note(self, text: str, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Writes a note about this step."""
        return self._do(self.aio.note(text, **options), wait)

    def health(self, check: str = "numerics", *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Looks into the run: "numerics", "activations", "throughput", "determinism" or "ranks"."""
        return self._do(self.aio.health(check, **options), wait)

    def ping(self, *, wait: bool = True, **options: Unpack[CommandOptions]) -> Any:
        """Asks for a sign of life."""
        return self._do(self.aio.ping(**options), wait)

    def command(
        self, op: str, args: dict[str, Any] | None = None, *, wait: bool = True, **options: Unpack[CommandOptions]
    ) -> Any:
        """Sends any command of `aetheria.protocol`."""
        return self._do(self.aio.command(op, args, **options), wait)
