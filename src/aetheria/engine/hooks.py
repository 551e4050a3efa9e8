"""Calling the callbacks. Which hooks anybody overrides is found out once; the others cost nothing."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aetheria.core import Callback, Logger

__all__ = ["Hooks"]

_NAMES = (
    "on_train_start",
    "on_train_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_before_step",
    "on_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_snapshot",
    "on_command",
    "on_event",
    "on_exception",
    "teardown",
    "log_metrics",
    "log_hyperparameters",
)


class Hooks:
    """The callbacks of a run.

    A critical callback that raises stops the run with its own traceback. Any other is reported once, counted, and the
    run goes on.

    Args:
        callbacks: in the order in which they are called.
        report: is told, once for each callback and hook, what it raised: a sentence and the traceback.
    """

    def __init__(self, callbacks: Sequence[Callback], report: Callable[[str, str], None]) -> None:
        self.callbacks = list(callbacks)
        self.failures: Counter[str] = Counter()
        self._report = report
        self._overridden = {
            name: [(callback, getattr(callback, name)) for callback in callbacks if _overrides(callback, name)]
            for name in _NAMES
        }

    def wanted(self, name: str) -> bool:
        """Returns whether any callback overrides a hook."""
        return bool(self._overridden[name])

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a hook of every callback that overrides it."""
        for callback, method in self._overridden[name]:
            try:
                method(*arguments)
            except Exception as error:
                if callback.critical:
                    raise
                self._count(callback, name, error)

    def _count(self, callback: Callback, name: str, error: Exception) -> None:
        place = f"{type(callback).__name__}.{name}"
        self.failures[place] += 1
        if self.failures[place] == 1:
            self._report(
                f"{place} raised {type(error).__name__}: {error}. The run goes on; further failures there are counted.",
                "".join(traceback.format_exception(error)),
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all callbacks, by class name and number."""
        return {name: state for name, callback in self._named() if (state := callback.state_dict())}

    def load_state_dict(self, states: dict[str, Any]) -> list[str]:
        """Gives the callbacks their states back; returns the names of states whose callback is not here any more."""
        named = dict(self._named())
        for name in states.keys() & named.keys():
            named[name].load_state_dict(states[name])
        return sorted(states.keys() - named.keys())

    def _named(self) -> list[tuple[str, Callback]]:
        seen: Counter[str] = Counter()
        named = []
        for callback in self.callbacks:
            kind = type(callback).__name__
            seen[kind] += 1
            named.append((kind if seen[kind] == 1 else f"{kind}-{seen[kind]}", callback))
        return named


def _overrides(callback: Callback, name: str) -> bool:
    method = getattr(type(callback), name, None)
    return method is not None and method is not getattr(Logger, name)
