"""How a run ends: by itself, because it was told to, or with an error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch

from aetheria.core import RunResult
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
        return f"{self.epoch} epochs, {self.global_step} steps"

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
