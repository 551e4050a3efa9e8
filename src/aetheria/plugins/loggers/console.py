"""Metrics and events as log lines."""

from __future__ import annotations

from loguru import logger

from aetheria.core import Logger, RunEvent
from aetheria.registry import Registry

__all__ = ["ConsoleLogger"]

_GRAVE = ("nonfinite", "warning", "error")


@Registry.register_logger("ConsoleLogger")
class ConsoleLogger(Logger):
    """Writes a line for every set of metrics, and for every event, through loguru.

    Where the lines go, and in what form, is what loguru was told; by default, to standard error. At a terminal
    `ProgressBar` is easier on the eyes.

    Args:
        level: the level of metrics and ordinary events, in loguru's words; grave events are warnings whatever it is.
        metrics: False leaves everything out but grave events, which is what a run without this logger gets.
    """

    def __init__(self, level: str = "INFO", metrics: bool = True) -> None:
        self.level = level
        self.metrics = metrics

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes one line."""
        if self.metrics:
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.log(self.level, "step {}  {}", step, values)

    def on_event(self, event: RunEvent) -> None:
        """Writes one line, on the main process; with the traceback, where there is one."""
        grave = event.kind in _GRAVE
        if self.context.accelerator.is_main_process and (grave or self.metrics):
            trace = f"\n{event.data['traceback']}" if "traceback" in event.data else ""
            logger.log(
                "WARNING" if grave else self.level, "step {}  {}: {}{}", event.step, event.kind, event.message, trace
            )
