"""Keeps the best snapshots by a metric, and takes one at the end of every epoch."""

from __future__ import annotations

from typing import Literal

from aetheria.core import Callback
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["ModelCheckpoint"]


@Registry.register_callback("ModelCheckpoint")
class ModelCheckpoint(Callback):
    """Says which snapshots are worth keeping. How they are written, verified and removed is the engine's business.

    Args:
        monitor: the metric that makes a snapshot good, for instance "val_loss".
        mode: "min" if less of it is better, "max" if more is.
        save_top_k: how many of the best snapshots are kept; 0 takes none for being good.
        save_last: whether a snapshot is taken at the end of every epoch.

    Raises:
        ConfigError: `mode` or `save_top_k` is none of these.
    """

    critical = True

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"ModelCheckpoint got mode={mode!r}; it must be 'min' or 'max'.")
        if save_top_k < 0:
            raise ConfigError(f"ModelCheckpoint got save_top_k={save_top_k}; give the number to keep, 0 for none.")
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self.save_top_k = save_top_k
        self.save_last = save_last

    def on_train_start(self) -> None:
        """Asks that the best snapshots are kept."""
        if self.save_top_k:
            self.context.keep_best(self.monitor, self.mode, self.save_top_k)

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Asks for a snapshot."""
        if self.save_last:
            self.context.request_snapshot("end of an epoch")
