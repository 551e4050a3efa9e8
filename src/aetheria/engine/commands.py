"""What commands do to a run: the operations that `Steering` calls, at a boundary."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import closing
from typing import Any

from aetheria.control.decision import Decision, Wishes
from aetheria.control.desk import Boundary
from aetheria.core import AetherDataModule, OptimizerPlan
from aetheria.data import BatchSource, prepare_loader
from aetheria.engine.context import RunContext
from aetheria.engine.evaluation import evaluate
from aetheria.engine.health import check_health
from aetheria.engine.hooks import Hooks
from aetheria.engine.loop_state import LoopState
from aetheria.engine.state import Restored, RunParts
from aetheria.engine.steering import Steering, describe
from aetheria.engine.window import WindowRunner
from aetheria.errors import CommandError
from aetheria.loom.recorder import Recorder
from aetheria.protocol import AnyCommand, Outcome
from aetheria.snapshot import Snapshot

__all__ = ["CommandedRun"]


class CommandedRun(RunContext):
    """A run that does what it is told, between two steps."""

    data: AetherDataModule
    _val: BatchSource | None
    _hooks: Hooks
    _parts: RunParts
    _runner: WindowRunner
    _snapshot_at_end: bool
    _steering: Steering

    @abstractmethod
    def _validate(self) -> bool: ...
    @abstractmethod
    def _save(self, reason: str, pinned: bool = False, ending: bool = False) -> None: ...
    @abstractmethod
    def _new_runner(self) -> WindowRunner: ...
    @abstractmethod
    def _recorder_from(self, step: int) -> Recorder: ...

    @property
    def boundary(self) -> Boundary:
        return Boundary(self.global_step, self.epoch, self.state.cursor.windows)

    def stop_requested(self) -> bool:
        return self._signal is not None or bool(self._stop_reason)

    def signal_received(self) -> int:
        return self._signals.received or 0

    def act_on(self, decision: Decision) -> None:
        self._agreed = self._agreed.and_then(decision._replace(commands=(), save=0, seconds=0))
        self.state.seconds = max(self.state.seconds, decision.seconds)

    def _wishes(self) -> Wishes:
        commands = self._steering.arrived() if self.accelerator.is_main_process else []
        alike = f"revision {self._steering.desk.revision} of {self.config!r}"
        signal, seconds = self.signal_received(), self.clock.seconds
        return Wishes(signal, self._wished_stop, self._keeper.wish, commands, alike, seconds)

    def save_now(self, reason: str, pinned: bool) -> None:
        self._save(reason, pinned)

    def leave_no_snapshot(self) -> None:
        self._snapshot_at_end = False

    def can_rewind_to(self, step: int) -> None:
        self._keeper.wait()
        self._keeper.snapshot_at(step)

    def rewind_to(self, step: int) -> int:
        self._keeper.wait()
        snapshot = self._keeper.snapshot_at(step)
        try:
            return self._move_to(snapshot, step)
        except Exception:
            # Half here and half there it must not go on. Whoever continues it begins at its newest snapshot.
            self.leave_no_snapshot()
            self.request_stop(f"rewinding to step {step:,} failed half-way; continue the run from its newest snapshot")
            raise

    def _move_to(self, snapshot: Snapshot, step: int) -> int:
        restored = self._parts.restore(snapshot)
        self._take_over(restored)
        self._keeper.rewound_to(step, self._steering.desk.revision + 1)
        self._reporter.begin_again(self._recorder_from, step)
        self._runner = self._new_runner()
        restored.restore_generators()
        for warning in restored.warnings:
            self.record("warning", warning)
        return restored.position

    def _take_over(self, restored: Restored) -> None:
        self.state = LoopState.from_state(restored.loop)
        self.clock.set(self.state.seconds)
        if restored.ranks != self.accelerator.data_ranks and self.state.cursor.batches:
            self._train.continued(self.state.cursor, restored.ranks)
        self._train.follow(self.state.cursor)

    def validate_now(self) -> dict[str, float]:
        if self._val is None:
            raise CommandError("this run has no validation data.")
        if not self._validate():
            raise CommandError("the validation was interrupted.")
        return {name: value for name, value in self.state.fresh.items() if name.startswith("val_")}

    def test_now(self) -> dict[str, float]:
        loader = self.data.test_dataloader()
        if loader is None:
            raise CommandError("this run has no test data: test_dataloader() returns None.")
        share = self.accelerator.data_rank, self.accelerator.data_ranks
        source = prepare_loader(
            loader, role="test", seed=self.config.seed, seed_samples=self.config.sample_seeding, share=share
        )
        with closing(source), self.accelerator.shared_weights(self.model):
            step = self.accelerator.step_function(self.model, "test_step")
            found = evaluate(self.model, source, self.accelerator, step, seed=self.config.seed)
        metrics = {f"test_{name}": value for name, value in (found or {}).items()}
        self._reporter.publish(metrics, self.global_step)
        return metrics

    def check_health(self, check: str) -> dict[str, Any]:
        return check_health(check, self)

    def note(self, text: str, author: str) -> None:
        self._reporter.note(self.global_step, text, author)

    def _reconfigure(self, **changes: Any) -> None:
        config = self.config.model_copy(update=changes)
        if config.epochs is None and config.max_steps is None and config.max_time is None:
            raise CommandError("one of epochs, max_steps and max_time must stay: otherwise the run would never end.")
        if config.max_grad_norm is not None and config.max_grad_value is not None:
            raise CommandError("max_grad_norm and max_grad_value exclude one another: set the other one to null first.")
        self.config = config
        self._keeper.config = config.snapshots
        if hasattr(self, "_runner"):
            self._runner.max_grad_norm, self._runner.max_grad_value = config.max_grad_norm, config.max_grad_value

    def _replan(self, plan: OptimizerPlan) -> None:
        if plan.optimizer is not self.optimizer:
            self.accelerator.setup_optimizer(plan.optimizer)
        self._schedules.follow(plan)
        if hasattr(self, "_runner"):
            self._runner = self._new_runner()

    def _note_outcome(self, command: AnyCommand | None, outcome: Outcome) -> None:
        if command is None or outcome.state == "accepted":
            return
        self.record("command", describe(command, outcome), command=command.id, state=outcome.state)
        if outcome.state == "applied":
            self._hooks.call("on_command", command)
