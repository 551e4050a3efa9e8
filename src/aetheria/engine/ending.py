"""How a run ends: by itself, because it was told to, or with an error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch

from aetheria.core import RunResult
from aetheria.durations import duration_in_words
from aetheria.engine.commands import CommandedRun
from aetheria.errors import RunFolderError, SnapshotError
from aetheria.snapshot import weights_digest
from aetheria.snapshot.format import model_tensors

__all__ = ["EndingRun"]


class EndingRun(CommandedRun):
    """A run that says how it ended."""

    _status: Literal["completed", "stopped", "interrupted"]

    @abstractmethod
    def _settle(self) -> None: ...
    @abstractmethod
    def _epoch_metrics(self) -> dict[str, float]: ...

    def _finish(self) -> RunResult:
        self._settle()
        interrupted = self._signal is not None
        if not interrupted:
            self.accelerator.come_together()
            if self.state.cursor.windows:  # ended in the middle of an epoch
                self._validate()
        self._note_remarks()
        metrics = (
            self._epoch_metrics()
            if self.state.cursor.windows
            else (self.state.history[-1] if self.state.history else {})
        )
        if not interrupted:
            self._hooks.call("on_train_end")
        reason = self._describe_end()
        self._steering.end()
        if self._snapshot_at_end:
            self._save(reason, ending=True)
        if (path := self._keeper.wait()) is not None:
            self._hooks.call("on_snapshot", path)
        self._reporter.deliver(wait=True)
        self.record("end", reason)
        self._opened.folder.update(
            status=self._status,
            status_detail=reason,
            global_step=self.global_step,
            metrics=metrics,
            callback_failures=dict(self._hooks.failures),
        )
        with self.accelerator.shared_weights(self.model):
            digest = weights_digest(model_tensors(self.model)[0])
        return RunResult(
            run_id=self.run_id,
            folder=self.folder,
            status=self._status,
            global_step=self.global_step,
            metrics=metrics,
            digest=digest,
            history=self.state.history,
            reason=reason,
            signal=self._signal,
        )

    def _describe_end(self) -> str:
        if self._signal is not None:
            self._status = "interrupted"
            return f"signal {self._signal}"
        if self._stop_reason:
            self._status = "stopped"
            return self._stop_reason
        self._status = "completed"
        up = ""
        if self._reached() == "max_time" and self.config.max_time is not None:
            up = f"; the time is up (max_time {duration_in_words(self.config.max_time)})"
        return f"{self.epoch} epochs, {self.global_step} steps{up}"

    def _reached(self) -> Literal["epochs", "max_steps", "max_time", ""]:
        """Returns the limit of the configuration that has been reached; all ranks find the same."""
        config, state = self.config, self.state
        if config.epochs is not None and self.epoch >= config.epochs:
            return "epochs"
        if config.max_steps is not None and self.global_step >= config.max_steps:
            return "max_steps"
        if config.max_time is not None and state.seconds >= config.max_time:
            return "max_time"
        return ""

    def _say_if_over(self) -> None:
        """Says, at the beginning of a run that is continued, that nothing will be trained."""
        if self._opened.snapshot is None or not (limit := self._reached()):
            return
        there: dict[str, str] = {"epochs": f"{self.epoch}", "max_steps": f"{self.global_step}"}
        there["max_time"] = duration_in_words(round(self.state.seconds))
        asked = getattr(self.config, limit)
        asked = duration_in_words(asked) if limit == "max_time" else asked
        self.record(
            "warning",
            f"nothing is left to train: {limit} is {asked}, and {there[limit]} lie behind. To go on, continue with "
            f"more: --set {limit}=...",
        )

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            error.add_note("Out of memory: lower batch_size and raise grad_accumulation_steps by the same factor.")
        detail = f"{type(error).__name__}: {error}"
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self._opened.folder.update(status=status, status_detail=detail, global_step=self.global_step)
        except (OSError, RunFolderError) as second:
            error.add_note(f"run.json could not be told: {second}")
        try:
            self._keeper.wait()
        except SnapshotError as second:
            error.add_note(f"besides, a snapshot failed: {second}")
        self.record("failure", f"the run ended with {detail}")
        self._hooks.call("on_exception", error)
