"""The boundary: what is done between two steps, and where all that steers a run takes effect."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from aetheria.control.agreement import Agreement
from aetheria.control.decision import Decision
from aetheria.control.line import Line
from aetheria.engine.ending import EndingRun
from aetheria.engine.evaluation import evaluate
from aetheria.engine.metrics import MetricMeans
from aetheria.engine.together import compare_ranks
from aetheria.snapshot import SnapshotContent

__all__ = ["BoundedRun"]


class BoundedRun(EndingRun):
    """A run with boundaries."""

    _agreement: Agreement | None
    _line: Line
    _means: MetricMeans
    _validation_step: Any
    _deadline: float
    _next_due: int = 0  # the step at which the next boundary has something to do
    _compared_at: int = 0

    @abstractmethod
    def _epoch_is_over(self) -> bool: ...

    def _boundary(self, together: bool = False) -> bool:
        """Does what is due between two steps. Everything in here is done once for a step, however often it is asked.

        Args:
            together: whether all ranks are here; otherwise one may be alone, and what it wishes has to wait.

        Returns:
            Whether a command has taken the run somewhere else.
        """
        self._settle()
        self._pending = False
        config, step = self.config, self.global_step
        if step % config.log_every == 0 and self.state.logged_at != step:
            self.state.logged_at = step
            self._reporter.log(step, self._means.since_reading(), self._schedules.learning_rates())
            self._line.beat(step)
            self._line.tend()
            self._steering.refresh()
            self._note_remarks()
        if config.val_every_steps is not None and step % config.val_every_steps == 0:
            together = together or self.state.validated_at != step
            self._validate()
        if self._compares and step % self._compares == 0 and self._compared_at != step:
            self._compared_at = step
            compare_ranks(self.accelerator, self.model, step)
        if (path := self._keeper.finished()) is not None:
            self._hooks.call("on_snapshot", path)
        agreed = Decision()
        if self._agreement is not None:
            agreed = self._agreement.decide(step, together, self._wishes)
            self.act_on(agreed)
        else:
            self.state.seconds = self.clock.seconds
        if self._steering.attend(agreed.commands):
            self._next_due = 0
            return True
        config = self.config  # a command may have changed it
        # After an epoch's last window the snapshot waits for the validation: then it knows what it is worth.
        if not self._epoch_is_over() and (reason := self._keeper.due(step, agreed.save)) and not self._done():
            self._save(reason)
        elif step:
            self._keeper.reserve(lambda: self._captured(exchange=False))
        self._next_due = min(
            step - step % every + every
            for every in (
                config.log_every,
                config.val_every_steps,
                config.snapshots.every_steps,
                config.max_steps,
                self._compares,
            )
            if every
        )
        if step == 0:
            self._next_due = 1  # to reserve the snapshots' memory once the first step has made the optimiser's state
        if (planned := self._steering.next_step) is not None:
            self._next_due = min(self._next_due, planned)
        if self._agreement is not None:
            if not self._agreement.under_way:
                self._agreement.launch(step, self._wishes())
                self._reporter.exchange()  # all ranks are here, and threads have been woken anyway
            self._next_due = min(self._next_due, self._agreement.due_at)
        self._deadline = self._keeper.deadline()
        if self._alone:  # several ranks look when they begin an exchange, and end when they have agreed
            self._deadline = min(self._deadline, self.clock.when(config.max_time))
        return False

    @property
    def _compares(self) -> int:
        """How many steps are between two comparisons of the ranks' weights; 0 where they cannot be compared."""
        accelerator = self.accelerator
        has_copies = not (self._alone or accelerator.sharded or accelerator.sync_every is not None)
        return (self.config.compare_ranks_every or 0) if has_copies else 0

    def _done(self) -> bool:
        return self.stop_requested() or bool(self._reached())

    def _validate(self) -> bool:
        """Validates, unless that has been done at this step; returns whether it was not interrupted."""
        if self._val is None or self.state.validated_at == self.global_step:
            return True
        self._reporter.deliver(wait=True)
        self.accelerator.share_buffers(self.model)
        metrics: dict[str, float] = {}
        with self.accelerator.shared_weights(self.model):
            self._hooks.call("on_validation_start")
            try:
                found = evaluate(
                    self.model,
                    self._val,
                    self.accelerator,
                    self._validation_step,
                    seed=self.config.seed,
                    interrupted=lambda: self._signal is not None,
                )
                if found is not None:
                    metrics = {f"val_{name}": value for name, value in found.items()}
            finally:
                self._hooks.call("on_validation_end", metrics)
        if not metrics:
            return False
        self.state.validated_at = self.global_step
        self.state.fresh = self.state.fresh | metrics
        self._keeper.check_rules(metrics, validation=True)
        self._keeper.judge(metrics)
        self._reporter.publish(metrics, self.global_step)
        return True

    def _save(self, reason: str, pinned: bool = False, ending: bool = False) -> None:
        self._reporter.deliver(wait=True)  # what was logged before is not logged again by whoever continues from here
        self._keeper.save(self._captured(reason, pinned), ending)

    def _captured(self, reason: str = "", pinned: bool = False, exchange: bool = True) -> SnapshotContent:
        return self._parts.capture(
            self.state.state_dict(),
            run_id=self.run_id,
            step=self.global_step,
            epoch=self.epoch,
            reason=reason,
            metrics=self.state.fresh,
            pinned=pinned,
            exchange=exchange,
        )

    def _notify(self) -> None:
        self._pending = True
