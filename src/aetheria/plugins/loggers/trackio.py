"""Metrics for Trackio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aetheria.core import Logger
from aetheria.errors import MissingDependencyError
from aetheria.registry import Registry

if TYPE_CHECKING:
    import trackio

__all__ = ["TrackioLogger"]


@Registry.register_logger("TrackioLogger")
class TrackioLogger(Logger):
    """Logs to the Trackio run named like the run folder, so that a continued run continues there too.

    Trackio keeps its data on this machine (`TRACKIO_DIR` says where) unless it was told of a server or a Space; look at
    it with `trackio show`.

    Args:
        project: the Trackio project.
        space_id: the Hugging Face Space to log to; None keeps the data on this machine.

    Raises:
        MissingDependencyError: trackio is not installed.
    """

    def __init__(self, project: str = "aetheria", space_id: str | None = None) -> None:
        try:
            import trackio  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise MissingDependencyError.of("trackio", "trackio", "TrackioLogger") from error
        self.project = project
        self.space_id = space_id
        self._run: trackio.Run | None = None

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Opens the run with the configuration."""
        self._open(config)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Logs the metrics with their step."""
        self._open().log(metrics, step=step)

    def _open(self, config: dict[str, Any] | None = None) -> trackio.Run:
        if self._run is None:
            import trackio  # noqa: PLC0415

            self._run = trackio.init(
                project=self.project,
                name=self.context.run_id,
                space_id=self.space_id,
                config=config,
                resume="allow",
                embed=False,
            )
        return self._run

    def teardown(self) -> None:
        """Waits until everything is stored, and closes the run."""
        if self._run is not None:
            import trackio  # noqa: PLC0415

            trackio.finish()
            self._run = None
