"""Callbacks: who is called, and what happens when one raises."""

from __future__ import annotations

from typing import Any

import pytest

from aetheria.core import Callback, Logger
from aetheria.engine.hooks import Hooks


class Counting(Callback):
    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch_start(self) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


class Raising(Callback):
    def on_epoch_start(self) -> None:
        raise ValueError("broken")


class Writing(Logger):
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...


def test_only_what_is_overridden_is_called() -> None:
    hooks = Hooks([Counting(), Writing()], lambda *_: None)
    assert hooks.wanted("on_epoch_start")
    assert hooks.wanted("log_metrics")
    assert not hooks.wanted("on_batch_end")
    hooks.call("on_batch_end", 0, {})


def test_an_observer_that_raises_is_reported_once_and_the_others_are_still_called() -> None:
    reports: list[tuple[str, str]] = []
    last = Counting()
    hooks = Hooks([Raising(), last], lambda *report: reports.append(report))
    for _ in range(3):
        hooks.call("on_epoch_start")
    assert last.epochs == 3
    assert hooks.failures == {"Raising.on_epoch_start": 3}
    [(message, trace)] = reports
    assert "Raising.on_epoch_start raised ValueError: broken" in message
    assert "test_hooks.py" in trace


def test_a_critical_callback_that_raises_ends_it() -> None:
    class Critical(Raising):
        critical = True

    with pytest.raises(ValueError, match="broken"):
        Hooks([Critical()], lambda *_: None).call("on_epoch_start")


def test_states_are_kept_by_class_and_number() -> None:
    first, second = Counting(), Counting()
    first.epochs, second.epochs = 1, 2
    states = Hooks([first, second], lambda *_: None).state_dict()
    assert states == {"Counting": {"epochs": 1}, "Counting-2": {"epochs": 2}}
    new, newer = Counting(), Counting()
    assert Hooks([new, newer], lambda *_: None).load_state_dict(states | {"Gone": {}}) == ["Gone"]
    assert (new.epochs, newer.epochs) == (1, 2)
