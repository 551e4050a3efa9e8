"""The state machine of a run: epochs, windows, boundaries. Everything it does, a part in `engine/` does for it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import torch

from aetheria.accelerator import create_accelerator
from aetheria.accelerator.select import deterministic
from aetheria.config import TrainingConfig
from aetheria.control.agreement import Agreement
from aetheria.control.desk import Boundary
from aetheria.control.journal import Journal
from aetheria.control.line import Line
from aetheria.core import Accelerator, AetherDataModule, AetherModel, Callback, RunResult
from aetheria.data import LoaderDataModule
from aetheria.data.order import mix
from aetheria.data.randomness import seed_generators
from aetheria.engine.assembly import build_callbacks, build_model_and_data, config_of_run, prepare_loaders
from aetheria.engine.boundary import BoundedRun
from aetheria.engine.clock import TrainingClock
from aetheria.engine.dropped import DroppedWindows
from aetheria.engine.hooks import Hooks
from aetheria.engine.keeper import SnapshotKeeper
from aetheria.engine.knobs import builtin_knobs
from aetheria.engine.live import devices_of, open_line
from aetheria.engine.loop_state import LoopState
from aetheria.engine.metrics import MetricMeans
from aetheria.engine.reporting import Reporter
from aetheria.engine.schedules import Schedules, as_plan
from aetheria.engine.signals import StopSignals
from aetheria.engine.state import RunParts
from aetheria.engine.steering import Steering
from aetheria.engine.together import check_alike, open_together
from aetheria.engine.window import Window, WindowRunner, windows
from aetheria.errors import AetheriaError, DataError
from aetheria.loom.recorder import Recorder
from aetheria.protocol import AnyCommand

__all__ = ["Orchestrator", "continue_run"]

TRAINING_STREAM = 8  # part of the key of the generators that training draws from


class Orchestrator(BoundedRun):
    """Trains a model. It is its callbacks' `TrainingContext`.

    Args:
        model: what is trained.
        data: where the samples come from: a data module, or a training loader.
        config: how.
        accelerator: the hardware; by default what the configuration asks for.
        callbacks: besides those that the configuration names.
        planned: commands and the boundaries at which they take effect: a replay.
        line: to whoever steers; by default what `live` in the configuration says.
    """

    def __init__(
        self,
        model: AetherModel,
        data: AetherDataModule | Iterable[Any],
        config: TrainingConfig,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
        planned: Iterable[tuple[Boundary, AnyCommand]] | None = None,
        line: Line | None = None,
    ) -> None:
        self.model = model
        self.data = data if isinstance(data, AetherDataModule) else LoaderDataModule(data)
        self.config = config
        self.accelerator = create_accelerator(config) if accelerator is None else accelerator
        self.callbacks = build_callbacks(config, callbacks)
        self.state = LoopState()
        self.clock = TrainingClock()
        self._status: Literal["completed", "stopped", "interrupted"] = "completed"
        self._unsettled: Window | None = None
        self._snapshot_at_end = True
        self._planned = None if planned is None else list(planned)
        self._own_line = line

    @classmethod
    def from_config(
        cls,
        config: TrainingConfig,
        callbacks: Sequence[Callback] = (),
        planned: Iterable[tuple[Boundary, AnyCommand]] | None = None,
    ) -> Orchestrator:
        """Builds the model and the data module that a configuration names.

        Raises:
            ConfigError: it names none, or a parameter does not fit.
            RegistryError: nobody registered the name.
            PluginError: the `plugins/` folder beside the configuration cannot be imported.
        """
        accelerator = create_accelerator(config)
        model, data = build_model_and_data(config, accelerator.data_ranks)
        return cls(model, data, config, accelerator, callbacks, planned)

    # --- a run, from outside ---------------------------------------------------------------------------------------
    def run(self, resume_from: str | Path | None = None, new_run: bool = False) -> RunResult:
        """Trains until the configured end, a request to stop, or a signal.

        Args:
            resume_from: a run folder (its newest good snapshot is taken, and the run goes on in that folder), a
                snapshot (likewise, if it is that one; an older one starts a new run from there), "latest": the
                newest run in `runs_dir`, or "auto": the run that the same launch has begun, or a new one.
            new_run: a snapshot, even the newest one of its run, is where a new run begins.

        Raises:
            AetheriaError: what the user can put right: configuration, model, data, snapshot, run folder.
            BaseException: whatever the model, the data or a critical callback raised, with its own traceback.
        """
        if hasattr(self, "_opened"):
            raise AetheriaError(
                "this Orchestrator has run already. Make a new one, and give run() the folder of the run that is to "
                "be continued: resume_from=result.folder."
            )
        try:
            check_alike(self.accelerator, self.config, self.model)
            devices = devices_of(self.accelerator)
            self._opened = open_together(self.accelerator, self.config, self.model, resume_from, new_run)
        except BaseException as error:
            ended_by = self.accelerator.explain(error)
            self.accelerator.cleanup()
            if ended_by is not error:
                raise ended_by from None
            raise
        with ExitStack() as self._stack:
            self._stack.callback(self._opened.folder.release)
            self._hooks = Hooks(self.callbacks, lambda message, trace: self.record("error", message, traceback=trace))
            main = self.accelerator.is_main_process
            self._line = (
                open_line(self.config, self._opened, main, devices) if self._own_line is None else self._own_line
            )
            self._stack.callback(self._line.close)
            recorder = self._recorder_from(self._opened.step) if main else None
            self._reporter = Reporter(self.accelerator, self._hooks, recorder, self._line)
            self._stack.callback(self._reporter.close)
            self._keeper = SnapshotKeeper(
                self._opened.folder.snapshots,
                self.config.snapshots,
                self.accelerator.synchronize,
                self._reporter.flush,
                self._notify,
                writes=main,
                alone=self._alone,
                team=self.accelerator.team,
            )
            self._stack.callback(self._keeper.close)
            self._stack.callback(self.accelerator.cleanup)
            self._stack.enter_context(deterministic(self.config.deterministic))
            with StopSignals(self._notify) as self._signals:
                try:
                    self._prepare()
                    self._train_until_done()
                    return self._finish()
                except BaseException as error:
                    ended_by = self.accelerator.explain(error)
                    self._fail(ended_by)
                    if ended_by is not error:
                        raise ended_by from None
                    raise
                finally:
                    self._hooks.call("teardown")

    def _prepare(self) -> None:
        config, opened = self.config, self._opened
        opened.folder.update(status="running")
        for callback in self.callbacks:
            callback.context = self
        for warning in opened.warnings:
            self.record("warning", warning)
        key = mix(config.seed, TRAINING_STREAM, self.accelerator.data_rank)
        seed_generators(key)
        self.accelerator.seed_generator(key)
        self.accelerator.setup(self.model)
        self._schedules = Schedules(as_plan(self.model.configure_optimizers()))
        self.accelerator.setup_optimizer(self.optimizer)
        loaders = prepare_loaders(self.data, config, self.accelerator)
        self._train, self._val = loaders.train, loaders.val
        self._stack.callback(loaders.close)
        for warning in loaders.warnings:
            self.record("warning", warning)
        self._means = MetricMeans(self.accelerator)
        journal = self._open_journal()
        self._stack.callback(journal.close)
        if journal.repaired:
            self.record("warning", journal.repaired)
        self._agreement = self._open_agreement()
        self._steering = Steering(
            self, self.run_id, journal, builtin_knobs(self), self._line, self._note_outcome, self._agreement
        )
        self._parts = RunParts(
            self.model, self._schedules, self.accelerator, self._hooks, self._means, self._train, self._steering
        )
        if self.accelerator.is_main_process:
            self._hooks.call("log_hyperparameters", config.resolved())
        restored = None
        if opened.snapshot is not None:
            restored = self._parts.restore(opened.snapshot, opened.overridden)
            self._take_over(restored)
            for warning in restored.warnings:
                self.record("warning", warning)
        if self._planned is None:
            position = restored.position if restored and opened.continues else 0
            self._steering.desk.continue_from(position, opened.stops_passed)
        else:
            self._steering.desk.plan(self._planned)
        self.model.train()
        self._hooks.call("on_train_start")
        if self._val is None or (config.val_interval is None and config.val_every_steps is None):
            self._keeper.check_rules({}, validation=True)
        self._training_step, self._validation_step = (
            self._compiled(name) for name in ("training_step", "validation_step")
        )
        self._runner = self._new_runner()
        apart = self.accelerator.sync_every is not None
        self._dropped = DroppedWindows(
            config.nonfinite, config.max_skipped_in_a_row, self.record, self.request_stop, own=apart
        )
        self._on_batch_end = self._hooks.wanted("on_batch_end")
        self._steering.say("running")
        if restored is not None:
            restored.restore_generators()

    def _new_runner(self) -> WindowRunner:
        return WindowRunner(
            self.model,
            self.optimizer,
            self.accelerator,
            self._hooks,
            self._training_step,
            self.config.max_grad_norm,
            self.config.max_grad_value,
        )

    def _open_journal(self) -> Journal:
        path = self.folder / "journal.jsonl"
        if self._alone:
            return Journal(path)
        opened: list[Journal] = []

        def open_it() -> bytes:
            opened.append(Journal(path))
            return path.read_bytes()

        content = self.accelerator.main_says(open_it)
        return opened[0] if opened else Journal(path, copy=content)

    def _open_agreement(self) -> Agreement | None:
        return None if self._alone else Agreement(self.accelerator.ranks)

    def _recorder_from(self, step: int) -> Recorder:
        return Recorder(self.folder / "run.db", step)

    def _compiled(self, name: str) -> Any:
        function = self.accelerator.step_function(self.model, name)
        if self.config.compile is False:
            return function
        options = {} if self.config.compile is True else self.config.compile.model_dump()
        return torch.compile(function, **options)

    # --- the loop --------------------------------------------------------------------------------------------------
    def _train_until_done(self) -> None:
        self.clock.start()
        self._train.follow(self.state.cursor)
        self._boundary()  # what a resumed run still owes to the boundary at which it was saved
        self._say_if_over()
        while not self._done():
            self._run_epoch()

    def _run_epoch(self) -> None:
        steering = self._steering
        if self.state.cursor.windows == 0:
            self._hooks.call("on_epoch_start")
        with closing(self._windows()) as epoch:  # ends its workers, however this is left
            for window in epoch:
                self._step(window)
                if (
                    self._pending
                    or steering.word[0] != steering.seen
                    or self.global_step + (self._unsettled is not None) >= self._next_due
                    or time.monotonic() >= self._deadline
                ):
                    moved = self._boundary()
                    if moved or (self._done() and not self._epoch_is_over()):
                        return
        self._end_epoch()

    def _epoch_is_over(self) -> bool:
        return self._train.is_over(self.state.cursor)

    def _windows(self) -> Generator[Window]:
        size = self.config.grad_accumulation_steps
        batches = self._train.iterate(self.state.cursor)
        if self._train.looks_ahead:
            batches = self.accelerator.prepare_dataloader(batches, size)
        else:
            batches = Accelerator.prepare_dataloader(self.accelerator, batches)
        return windows(batches, lambda: self.config.grad_accumulation_steps)

    def _step(self, window: Window) -> None:
        self._runner.backward(window)
        if self._unsettled is not None:
            self._settle()  # its answer decides the learning rate of this step; the device is long past it
        self._runner.step(window)
        self._runner.zero()
        self.state.cursor.advance(len(window.batches), window.samples, window.positions)
        self._unsettled = window
        if window.taken is True or window.taken is False:
            self._settle()

    def _settle(self) -> None:
        window, self._unsettled = self._unsettled, None
        if window is None:
            return
        if window.taken:
            self.state.dropped_in_a_row = 0
            for values, weight in window.metrics:
                self._means.add(values, weight)
            if window.norm is not None:
                self._means.add({"grad_norm": window.norm}, 1.0 / self.accelerator.data_ranks)  # once, not once a rank
        else:
            self._dropped.note(window, self.state, self.accelerator.overflow_expected())
            if self.accelerator.sync_every is None:
                return
            # Ranks that train apart count it all the same: the others have taken their step.
        self.state.global_step += 1
        if self.state.fresh:
            self.state.fresh = {}
        if self._schedules.per_step:
            self._schedules.step()
        if self._on_batch_end:
            self._hooks.call("on_batch_end", self.state.cursor.windows - 1, window.merged_metrics())

    def _end_epoch(self) -> None:
        self._settle()
        if self.state.cursor.windows == 0:
            raise DataError(
                f"epoch {self.epoch} is empty: train_dataloader gave no batch. An iterable must give its batches anew "
                "each time it is iterated; a generator cannot."
            )
        if (self._done() or self.epoch + 1 == self.config.epochs) and self._signal is None:
            self.accelerator.come_together()  # before the last validation: this is what it ends with
        every = self.config.val_interval
        if every is not None and (self.epoch + 1) % every == 0 and not self._validate():
            return  # interrupted: the epoch is ended by whoever continues the run
        metrics = self._epoch_metrics()
        self._schedules.epoch(metrics)
        self._keeper.check_rules(metrics, validation=False)
        self.state.history.append(metrics)
        self.state.fresh = metrics
        self._hooks.call("on_epoch_end", metrics)
        self._keeper.judge(metrics)
        self._reporter.publish(self._epoch_means("epoch_"), self.global_step)
        self._means.new_epoch()
        self.state.cursor.next_epoch()
        self._keeper.end_epoch(self.epoch)
        self._boundary(together=True)

    def _epoch_means(self, prefix: str = "") -> dict[str, float]:
        self._reporter.deliver(wait=True)
        return {prefix + name: value for name, value in self._means.since_epoch().values().items()}

    def _epoch_metrics(self) -> dict[str, float]:
        return self._epoch_means() | {
            name: value for name, value in self.state.fresh.items() if name.startswith("val_")
        }


def continue_run(path: Path, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()) -> RunResult:
    """Goes on with a run in its folder, from its newest good snapshot, with nothing but what the folder says.

    Args:
        path: the run folder.
        overrides: changes to its configuration, for instance "epochs=20".
        callbacks: besides those that the configuration names.
    """
    return Orchestrator.from_config(config_of_run(path, overrides), callbacks).run(resume_from=path)
