"""Ends a run when a metric no longer improves."""

from __future__ import annotations

import math
from typing import Any, Literal

from aetheria.control.knobs import controllable
from aetheria.core import Callback
from aetheria.errors import ConfigError, did_you_mean
from aetheria.registry import Registry

__all__ = ["EarlyStopping"]


@Registry.register_callback("EarlyStopping")
class EarlyStopping(Callback):
    """Stops the run after `patience` looks at a metric that did not improve on the best one so far.

    A `val_` metric is looked at after every validation, any other at the end of every epoch. A value that is NaN or
    infinite counts as no improvement. What was seen is part of every snapshot, so a continued run stops where the
    uninterrupted one would have.

    Args:
        monitor: the metric to look at.
        mode: "min" if less of it is better, "max" if more is.
        min_delta: how much better than the best a value must be to count as an improvement, in the metric's unit.
        patience: how many looks without improvement end the run; 1 ends it at the first.

    Raises:
        ConfigError: an argument is out of its range; later, the metric is not there where it should be.
    """

    critical = True

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        patience: int = 3,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"EarlyStopping got mode={mode!r}; it must be 'min' or 'max'.")
        if min_delta < 0:
            raise ConfigError(f"EarlyStopping got min_delta={min_delta}; it must be 0 or more, whatever the mode.")
        if patience < 1:
            raise ConfigError(f"EarlyStopping got patience={patience}; it must be at least 1.")
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.patience = patience
        self.best: float | None = None
        self.waited = 0

    @controllable("early_stopping.patience", get="patience", ge=1, unit="looks")
    def set_patience(self, patience: int) -> None:
        """How many looks without improvement end the run."""
        self.patience = patience

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Looks at a `val_` metric; an interrupted validation, which has no metrics, is passed over."""
        if metrics and self.monitor.startswith("val_"):
            self._look(metrics, "the validation")

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Looks at any other metric; makes sure that a `val_` metric has come by the time it should have."""
        if not self.monitor.startswith("val_"):
            self._look(metrics, "the epoch")
        elif self.best is None and self.waited == 0 and self._validation_was_due():
            raise ConfigError(
                f"EarlyStopping monitors {self.monitor!r}, but epoch {self.context.epoch} ended without a "
                "validation. Return a loader from val_dataloader and set val_interval or val_every_steps, or monitor "
                "one of: " + ", ".join(sorted(metrics))
            )

    def _validation_was_due(self) -> bool:
        config = self.context.config
        if config.val_every_steps is not None:
            return self.context.global_step >= config.val_every_steps
        return config.val_interval is None or (self.context.epoch + 1) % config.val_interval == 0

    def _look(self, metrics: dict[str, float], source: str) -> None:
        if self.monitor not in metrics:
            raise ConfigError(
                f"EarlyStopping monitors {self.monitor!r}, which is not among the metrics of {source}: "
                f"{', '.join(sorted(metrics))}. {did_you_mean(self.monitor, metrics)}"
            )
        value = metrics[self.monitor]
        if self._improves(value):
            self.best = value
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = "never finite" if self.best is None else f"at best {self.best:.6g}"
            self.context.request_stop(f"{self.monitor} did not improve in {self.waited} looks: now {value:.6g}, {best}")

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value so far and how many looks ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.best = state["best"]
        self.waited = state["waited"]
