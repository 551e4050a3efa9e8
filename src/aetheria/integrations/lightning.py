"""Lightning: a `Trainer` that can be watched and steered while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aetheria.control.desk import Done
from aetheria.control.knobs import declared
from aetheria.control.weavelet import Weavelet
from aetheria.errors import AetheriaError, CommandError, ConfigError, MissingDependencyError
from aetheria.integrations.common import add_optimizer_knobs, begin, checkpoint_path

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import Checkpoint
except ImportError as error:
    raise MissingDependencyError.of("lightning", "lightning", "aetheria.integrations.lightning") from error

__all__ = ["EnhancedWeaveletLightningModule", "WeaveletCallback", "WeaveletLightningModule", "attach_lightning"]


class WeaveletCallback(Callback):  # type: ignore[misc]  # mypy does not look into Lightning
    """Watches and steers a Lightning `Trainer`.

        Trainer(..., callbacks=[WeaveletCallback()])

    A step is one of `trainer.global_step`. A command takes effect at the end of the batch that completed it, behind
    the schedulers; never in the middle of a window of accumulated batches. A snapshot is the Trainer's checkpoint.
    Where the Trainer trains in several processes, each has this callback, and they do the same at the same step.

    Args:
        weavelet: one of your own, with knobs of your own; good for one `fit`. By default each `fit` is a new run.
        log_every: steps between two reports of metrics; the Trainer's `log_every_n_steps` by default.
        **options: of the Weavelet that is made: `run`, `hub`, `runs_dir`, `replica_id`.

    Attributes:
        weavelet: that of the present `fit`, or of the last one; None before the first.
    """

    def __init__(self, weavelet: Weavelet | None = None, *, log_every: int | None = None, **options: Any) -> None:
        if weavelet is not None and options:
            raise ConfigError(f"{', '.join(options)} cannot be given beside a Weavelet; give them to the Weavelet.")
        self.weavelet = weavelet
        self._given = weavelet is not None
        self._used = False
        self._log_every = log_every
        self._options = options
        self._step = 0
        self._told: dict[str, Any] = {}  # the metrics as they were when they were last told
        self._intervals: dict[str, Any] = {}  # of validations, as they were before somebody asked for one

    # --- what the Trainer calls ------------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the run folder, declares the knobs, starts."""
        weavelet = self._open()
        add_optimizer_knobs(
            weavelet,
            trainer.optimizers,
            lambda optimizer: [
                config.scheduler
                for config in trainer.lr_scheduler_configs
                if getattr(config.scheduler, "optimizer", None) is optimizer
            ],
        )
        if pl_module.automatic_optimization:
            about = "Longest gradient; longer ones are scaled down to it. null lets all pass."
            weavelet.control(
                trainer, "gradient_clip_val", "max_grad_norm", type=float | None, gt=0, help=about, scope="run"
            )
        weavelet.register(pl_module)
        if getattr(trainer, "datamodule", None) is not None:
            weavelet.register(trainer.datamodule)
        weavelet.action("snapshot", together=True)(lambda: self._save(trainer))
        weavelet.action("validate", lambda: _check_validate(trainer))(lambda: self._validate_next(trainer))
        weavelet.global_step = self._step = trainer.global_step  # more than 0 where it continues from a checkpoint
        self._told, self._intervals = {}, {}
        begin(weavelet, trainer.world_size, "the Trainer", trainer.strategy.root_device)
        if weavelet.should_stop:
            _stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forgets a validation that was asked for."""
        self._validate_as_before(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The boundary, if this batch completed a step."""
        if trainer.global_step == self._step:
            return  # within a window of accumulated batches
        assert self.weavelet is not None
        self._step = trainer.global_step
        self.weavelet.global_step = self._step - 1  # which `step` counts
        every = trainer.log_every_n_steps if self._log_every is None else self._log_every
        metrics: dict[str, Any] = {}
        if every and self._step % every == 0:
            if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
                # Lightning hands out the share that a batch has in its window.
                share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                metrics["loss"] = outputs["loss"] * share
            metrics |= self._news(trainer)
        self.weavelet.step(metrics)
        if self.weavelet.should_stop:
            _stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets a validation that was asked for: this is it."""
        self._validate_as_before(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Passes on what a validation found."""
        if not trainer.sanity_checking:
            self._tell(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Passes on the means of an epoch."""
        self._tell(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delivers what is queued."""
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Delivers what is queued, and says how the run ended."""
        interrupted = isinstance(exception, KeyboardInterrupt | SystemExit)
        self._close(trainer, "interrupted" if interrupted else "failed")

    # --- metrics ---------------------------------------------------------------------------------------------------
    def _news(self, trainer: Trainer) -> dict[str, Any]:
        """Returns the metrics that have been computed since the last look. Nothing waits for a device."""
        metrics = dict(trainer.callback_metrics)
        # Told by where it lies in memory, for its value is not known yet. What was told is kept, so that nothing else
        # can have come to lie there.
        news = {
            name: value
            for name, value in metrics.items()
            if name not in self._told or value.data_ptr() != self._told[name].data_ptr()
        }
        self._told = metrics
        return news

    def _tell(self, trainer: Trainer) -> None:
        if self.weavelet is not None and self.weavelet.started and (news := self._news(trainer)):
            self.weavelet.log(news)

    # --- commands --------------------------------------------------------------------------------------------------
    def _save(self, trainer: Trainer) -> dict[str, str]:
        assert self.weavelet is not None
        path = checkpoint_path(self.weavelet, ".ckpt")
        trainer.save_checkpoint(path)
        return {"path": str(path)}

    def _validate_next(self, trainer: Trainer) -> Done:
        """Lets the Trainer find that a validation is due when it looks next, which is before the next batch."""
        often = {"val_check_batch": 1, "check_val_every_n_epoch": 1, "_val_check_time_interval": None}
        for name, value in often.items():
            if hasattr(trainer, name):
                self._intervals.setdefault(name, getattr(trainer, name))
                setattr(trainer, name, value)
        return Done("the Trainer does it before its next step; what it finds comes as metrics")

    def _validate_as_before(self, trainer: Trainer) -> None:
        while self._intervals:
            setattr(trainer, *self._intervals.popitem())

    # --- from start to stop ----------------------------------------------------------------------------------------
    def _open(self) -> Weavelet:
        """Returns the Weavelet of this `fit`."""
        if not self._given:
            self.weavelet = Weavelet(**self._options)
        elif self._used:
            raise ConfigError(
                "a Weavelet is good for one fit. For several, give WeaveletCallback its options (run, hub, runs_dir) "
                "instead of a Weavelet."
            )
        self._used = True
        assert self.weavelet is not None
        return self.weavelet

    def _close(self, trainer: Trainer, status: Any = "completed") -> None:
        self._validate_as_before(trainer)
        self._told = {}
        if self.weavelet is not None:
            self.weavelet.stop(status)


def _check_validate(trainer: Trainer) -> None:
    if not trainer.enable_validation:
        raise CommandError("this Trainer has nothing to validate on: no validation_step, or no validation data.")


def _stop(trainer: Trainer) -> None:
    trainer.should_stop = True
    # These hold back early stopping, not people: a stop that is acknowledged takes effect.
    trainer.fit_loop.min_epochs = None
    trainer.fit_loop.epoch_loop.min_steps = None


class WeaveletLightningModule(LightningModule):  # type: ignore[misc]  # mypy does not look into Lightning
    """A LightningModule that brings its `WeaveletCallback` along.

    A subclass that overrides `configure_callbacks` must add what this one returns.

    Args:
        **options: of `WeaveletCallback`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._weavelet_options = options

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callback that steers."""
        return [WeaveletCallback(**self._weavelet_options)]

    @property
    def weavelet(self) -> Weavelet:
        """The Weavelet that steers the present `fit`.

        Raises:
            AetheriaError: there is none yet.
        """
        # Looked up, not kept: a model is copied and pickled, and a Weavelet cannot be.
        for callback in self.trainer.callbacks:
            if isinstance(callback, WeaveletCallback) and callback.weavelet is not None:
                return callback.weavelet
        raise AetheriaError("there is no Weavelet yet: it is made when training starts, before the first batch.")


EnhancedWeaveletLightningModule = WeaveletLightningModule  # torchLoom's name for it


def attach_lightning(trainer: Trainer, module: LightningModule | None = None, **options: Any) -> WeaveletCallback:
    """Adds a Weavelet to a Trainer that is there already: one line.

    Args:
        trainer: a `lightning.pytorch.Trainer`.
        module: the model, if its knobs are to be checked now and not when training starts.
        **options: of `WeaveletCallback`.

    Returns:
        The callback; its `weavelet` is there once training has started.

    Raises:
        ConfigError: it has one already, or the model declares a knob wrongly.
    """
    if any(isinstance(callback, WeaveletCallback) for callback in trainer.callbacks):
        raise ConfigError("this Trainer has a WeaveletCallback already; one is enough.")
    if module is not None:
        declared(module, type(module).__name__)
    callback = WeaveletCallback(**options)
    # Before those that save, which are last: what they save at a step is what was set at it.
    place = next((at for at, each in enumerate(trainer.callbacks) if isinstance(each, Checkpoint)), None)
    trainer.callbacks.insert(len(trainer.callbacks) if place is None else place, callback)
    return callback
