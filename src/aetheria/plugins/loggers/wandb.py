"""Metrics for Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from aetheria.core import Logger
from aetheria.errors import MissingDependencyError
from aetheria.registry import Registry

if TYPE_CHECKING:
    import wandb

__all__ = ["WandbLogger"]


@Registry.register_logger("WandbLogger")
class WandbLogger(Logger):
    """Logs to the W&B run whose id is the run folder's name, so that a continued run continues there too.

    Metrics are plotted over `global_step`, not over W&B's own count of calls: that one refuses to go back to the step
    of the snapshot that a run continues from.

    Args:
        project: the W&B project.
        entity: the W&B user or team; None stands for the default of whoever is logged in.
        mode: "online", "offline" (into the run folder; `wandb sync` uploads it later) or "disabled"; None leaves it
            to W&B's own settings.

    Raises:
        MissingDependencyError: wandb is not installed.
    """

    def __init__(
        self,
        project: str = "aetheria",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        try:
            import wandb  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise MissingDependencyError.of("wandb", "wandb", "WandbLogger") from error
        self.project = project
        self.entity = entity
        self.mode = mode
        self._run: wandb.Run | None = None
        self._failed = False

    def log_hyperparameters(self, config: dict[str, Any]) -> None:
        """Writes the configuration; a continued run may have changed it."""
        self._open().config.update(config, allow_val_change=True)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Logs the metrics with their step."""
        self._open().log({**metrics, "global_step": step})

    def _open(self) -> wandb.Run:
        if self._run is None:
            import wandb  # noqa: PLC0415

            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                id=self.context.run_id,
                name=self.context.run_id,
                resume="allow",
                dir=str(self.context.folder),
                # Capturing the output would take the terminal away from a progress bar.
                settings=wandb.Settings(console="off"),
            )
            self._run.define_metric("*", step_metric="global_step")
        return self._run

    def on_exception(self, error: BaseException) -> None:
        """Remembers that the run failed."""
        self._failed = True

    def teardown(self) -> None:
        """Sends what is pending and closes the run."""
        if self._run is not None:
            self._run.finish(exit_code=1 if self._failed else 0)
            self._run = None
