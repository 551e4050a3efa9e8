"""Transformers: a `Trainer` that can be watched and steered while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aetheria.control.desk import Done
from aetheria.control.weavelet import Weavelet
from aetheria.errors import CommandError, ConfigError, MissingDependencyError
from aetheria.integrations.common import add_optimizer_knobs, begin

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingDependencyError.of("transformers", "transformers", "aetheria.integrations.transformers") from error

__all__ = ["WeaveletTrainerCallback", "attach_transformers"]

_SOON = "the Trainer does it before its next step"


class WeaveletTrainerCallback(TrainerCallback):  # type: ignore[misc]  # without types of its own
    """Watches and steers a `transformers.Trainer`.

        Trainer(..., callbacks=[WeaveletTrainerCallback()])

    A step is the Trainer's own: an optimiser step, however many micro-batches it took. A command takes effect after
    it, when the scheduler has been stepped. A snapshot is the Trainer's checkpoint, in its `output_dir`. Where the
    Trainer trains in several processes, each has this callback, and they do the same at the same step.

    Args:
        weavelet: one of your own, with knobs of your own; good for one `train`. By default each `train` is a new run.
        trainer: the Trainer, which tells whether there is something to evaluate on; see `attach_transformers`.
        **options: of the Weavelet that is made: `run`, `hub`, `runs_dir`, `replica_id`.

    Attributes:
        weavelet: that of the present training, or of the last one; None before the first.
    """

    def __init__(self, weavelet: Weavelet | None = None, *, trainer: Any = None, **options: Any) -> None:
        if weavelet is not None and options:
            raise ConfigError(f"{', '.join(options)} cannot be given beside a Weavelet; give them to the Weavelet.")
        self.weavelet = weavelet
        self._given = weavelet is not None
        self._used = False
        self._options = options
        self._trainer = trainer
        self._args: Any = None
        self._state: Any = None
        self._control: Any = None
        self._awaits_file = False

    # --- what the Trainer calls ------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Makes the run folder, declares the knobs, starts."""
        self._args, self._state, self._control = args, state, control
        weavelet = self._open()
        scheduler = parts.get("lr_scheduler")
        if not hasattr(scheduler, "base_lrs"):
            scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's, around the one that moves
        schedulers = [] if scheduler is None else [scheduler]
        if parts.get("optimizer") is not None:
            add_optimizer_knobs(weavelet, [parts["optimizer"]], lambda _: schedulers)
        about = "Longest gradient; longer ones are scaled down to it. 0 lets all pass."
        weavelet.control(args, "max_grad_norm", type=float, ge=0, help=about, scope="run")
        weavelet.register(parts["model"])
        weavelet.action("snapshot")(self._save_next)
        weavelet.action("validate", self._check_validate)(self._evaluate_next)
        weavelet.global_step = state.global_step  # more than 0 where it continues from a checkpoint
        begin(weavelet, args.world_size, "the Trainer", args.device)
        control.should_training_stop = control.should_training_stop or weavelet.should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The boundary."""
        assert self.weavelet is not None
        self._control = control
        self.weavelet.global_step = state.global_step - 1  # which `step` counts
        self.weavelet.step({})
        if self.weavelet.should_stop:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Passes on what the Trainer logs: training metrics and those of evaluations."""
        if self.weavelet is not None and self.weavelet.started:
            numbers = {
                name: value
                for name, value in (logs or {}).items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self.weavelet.log(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Says that a checkpoint somebody asked for has been written."""
        if self._awaits_file and self.weavelet is not None:
            self._awaits_file = False
            self.weavelet.note(f"written: {self._path()}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Delivers what is queued."""
        if self.weavelet is not None:
            self.weavelet.stop()

    # --- commands --------------------------------------------------------------------------------------------------
    def _save_next(self) -> Done:
        self._control.should_save = self._awaits_file = True
        return Done(_SOON, {"path": str(self._path())})

    def _path(self) -> Path:
        return Path(self._args.output_dir).absolute() / f"checkpoint-{self._state.global_step}"

    def _check_validate(self) -> None:
        # Asked to evaluate on nothing, a Trainer raises, and that would be the end of the training.
        if self._trainer is not None:
            can = self._trainer.eval_dataset is not None
        else:
            can = str(getattr(self._args.eval_strategy, "value", self._args.eval_strategy)) != "no"
        if not can:
            raise CommandError(
                "this Trainer has nothing to evaluate on, or this callback cannot know: give the Trainer an "
                "eval_dataset, and either an eval_strategy or its callback with attach_transformers(trainer)."
            )

    def _evaluate_next(self) -> Done:
        self._control.should_evaluate = True
        return Done(f"{_SOON}; what it finds comes as metrics")

    def _open(self) -> Weavelet:
        """Returns the Weavelet of this training."""
        if self._given:
            if self._used:
                raise ConfigError(
                    "a Weavelet is good for one training. For several, give WeaveletTrainerCallback its options "
                    "(run, hub, runs_dir) instead of a Weavelet."
                )
            self._used = True
        else:
            if self.weavelet is not None:
                self.weavelet.stop("failed")  # a training that raised: the Trainer tells no callback
            self.weavelet = Weavelet(**self._options)
        assert self.weavelet is not None
        return self.weavelet


def attach_transformers(trainer: Any, **options: Any) -> WeaveletTrainerCallback:
    """Adds a Weavelet to a Trainer that is there already: one line.

    Args:
        trainer: a `transformers.Trainer`.
        **options: of `WeaveletTrainerCallback`.

    Returns:
        The callback; its `weavelet` is there once training has begun.

    Raises:
        ConfigError: it has one already.
    """
    if any(isinstance(callback, WeaveletTrainerCallback) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this Trainer has a WeaveletTrainerCallback already; one is enough.")
    callback = WeaveletTrainerCallback(trainer=trainer, **options)
    trainer.add_callback(callback)
    return callback
