"""Metrics for TensorBoard, written without TensorFlow."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from aetheria.core import Logger
from aetheria.errors import MissingDependencyError
from aetheria.registry import Registry

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

__all__ = ["TensorBoardLogger"]


@Registry.register_logger("TensorBoardLogger")
class TensorBoardLogger(Logger):
    """Writes event files into `tensorboard/` in the run folder; look at them with `tensorboard --logdir runs`.

    A continued run writes one more file there. TensorBoard is told to forget what was logged after the snapshot that
    the run continued from.

    Raises:
        MissingDependencyError: tensorboardX is not installed.
    """

    def __init__(self) -> None:
        try:
            import tensorboardX  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise MissingDependencyError.of("tensorboardX", "tensorboard", "TensorBoardLogger") from error
        self._config: dict[str, Any] = {}
        self._writer: SummaryWriter | None = None

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Keeps the configuration until the file is opened: only then is the step known that a run continues from."""
        self._config = config

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes one scalar for each metric."""
        writer = self._writer or self._open(self.context.global_step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def _open(self, step: int) -> SummaryWriter:
        from tensorboardX import SummaryWriter  # noqa: PLC0415

        self._writer = SummaryWriter(
            str(self.context.folder / "tensorboard"),
            purge_step=step + 1 if step else None,
            flush_secs=10,
            # Files are named after the second; a run that dies and continues within it would lose the first.
            filename_suffix=f".{time.time_ns()}",
        )
        self._writer.add_text("config", f"```json\n{json.dumps(self._config, indent=2)}\n```", step)
        return self._writer

    def teardown(self) -> None:
        """Writes what is pending and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
