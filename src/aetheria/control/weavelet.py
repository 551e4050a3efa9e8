"""The Weavelet: what any training script adds, in one line, to be watched and steered while it runs."""

from __future__ import annotations

import atexit
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from loguru import logger

from aetheria.control.desk import Action, Boundary, Desk
from aetheria.control.folders import open_folder, settle
from aetheria.control.journal import Journal
from aetheria.control.line import NoLine
from aetheria.control.log_buffer import LogBuffer
from aetheria.control.meeting import Card, Place, launched_place, place_in_group
from aetheria.control.pausing import Pausing
from aetheria.control.reporting import Reporting
from aetheria.control.together import Others, Together
from aetheria.errors import AetheriaError
from aetheria.loom.link import Link
from aetheria.protocol import Note, Outcome, Set, Stop, encode
from aetheria.replicas import check_replica_id

__all__ = ["TrainingStopped", "Weavelet"]

_TEND_INTERVAL = 1.0  # seconds between two looks after the sidecar
_NEVER = sys.maxsize


class TrainingStopped(AetheriaError):  # noqa: N818 - not an error: what was asked for
    """Somebody has stopped the run, and its loop has never asked `weavelet.should_stop`."""


class Weavelet(Reporting):
    """Watches and steers a training loop that is not Aetheria's.

        weavelet = Weavelet(optimizer=optimizer).start()

    is all that a plain PyTorch script needs: steps are counted by the optimiser itself, its learning rate can be set,
    the run paused, resumed and stopped. With `step`, `log`, `control` and `handler` there is more.

    Everything that is sent or written is sent and written by a process of its own. With no command given, training is
    bit for bit what it would be without; if that process or the hub dies, training goes on.

    Where several ranks train (torch's process group, or torchrun's environment, says so), each of them has a Weavelet,
    started at the same place. The first one has the run folder and that process; a command takes effect at the same
    step on all of them, or on none.

    Args:
        replica_id: which replica this is of the run, where trainings belong together that know nothing of one another.
            Its folder is `<run>@<replica_id>`, and it comes back to it when it is started again.
        run: the beginning of the run folder's name; the script's name by default. All replicas of a run give the same.
        hub: "auto" (the hub of this machine, whenever there is one) or "off".
        optimizer: whose steps are counted, and whose learning rate can be set; see `watch`.
        scheduler: what moves that learning rate, one or several: a value that is set rescales it.
        runs_dir: where the run folder is made.
        ranks: "auto", or "alone" for a process that is to be steered by itself, whatever others there are.
        line: what takes the place of a `aetheria.loom.link.Link`, and of the process behind it.

    Attributes:
        global_step: the steps taken.
    """

    def __init__(
        self,
        replica_id: str = "",
        run: str | None = None,
        hub: Literal["auto", "off"] = "auto",
        *,
        optimizer: Any = None,
        scheduler: Any = None,
        runs_dir: Path | str = "runs",
        ranks: Literal["auto", "alone"] = "auto",
        line: Any = None,
    ) -> None:
        super().__init__()
        if replica_id != "":
            check_replica_id(replica_id)
        self.replica_id = replica_id
        self._name = run or Path(sys.argv[0]).stem or "run"
        self._hub = hub
        self._runs_dir = Path(runs_dir)
        self._line = line
        self._link = line or NoLine()
        self._pausing = Pausing(lambda: self.global_step)
        self._stop_reason = ""
        self._asked_to_stop = False  # whether the loop has ever looked
        self._changes: dict[str, Any] = {}
        self._actions |= {
            **self._pausing.actions(),
            "stop": Action(self._stop),
            "note": Action(self._note),
        }
        self._look_at = _NEVER
        self._looked = (0.0, 0)  # when, and at which step
        self._seen = 0
        self._word = memoryview(bytes(8)).cast("Q")
        self._started = False
        # One object, not six attributes: with more than thirty of them Python finds each more slowly, in every step.
        self._others = Others(alone=ranks == "alone")
        if optimizer is not None:
            self.watch(optimizer, scheduler)

    # --- from start to stop ----------------------------------------------------------------------------------------
    def start(self) -> Weavelet:
        """Opens the run folder and starts the process that sends and writes; finds the other ranks, if there are any.

        Where the environment says that there will be several ranks, and there is no process group yet, they find one
        another at the end of the first step at which there is. Commands that have come until then wait for it.

        Raises:
            RunFolderError: the folder cannot be made, or another process trains as the same replica.
            RankError: another rank has not started its Weavelet, or has failed.
        """
        if self._started:
            raise AetheriaError("this Weavelet has been started already.")
        here = None if self._others.alone else place_in_group()
        self._others.place = here if here is not None or self._others.alone else launched_place()
        self._others.awaited = self._others.place is not None
        if self._others.is_first:
            try:
                self._open()
            except BaseException as error:
                if here is not None:
                    _joined_ranks().Meeting(here).announce(Card(problem=f"{type(error).__name__}: {error}"))
                raise
        self._look_at = self.global_step + 1
        self._started = True
        atexit.register(self._at_exit)
        self.join_ranks()
        self.say("running")
        return self

    def _open(self) -> None:
        self._folder, member = open_folder(self._runs_dir, self._name, self.replica_id)
        self._identity = self._folder.run_id, self._folder.path
        self._journal = Journal(self._folder.path / "journal.jsonl")
        left = settle(self._journal)
        self._link = self._line or Link(
            self._folder.path,
            self.run_id,
            hub=self._hub,
            record=True,
            start_step=self.global_step,
            group=member.group,
            replica=member.replica,
            devices=self._devices,
        )
        for outcome in left:
            self._link.tell("ack", encode(outcome))
        self._buffer = LogBuffer(self._link)
        self._desk = Desk(self.run_id, self._journal, self.knobs, self._actions, self._tell)
        if not self._others.awaited:
            self._word, self._seen = self._link.word, 0

    def _at_exit(self) -> None:
        """Delivers what a script that never called `stop` has left."""
        crashed = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        self.stop("failed" if crashed is not None and not isinstance(crashed, TrainingStopped) else "completed")

    def stop(self, status: Literal["completed", "stopped", "failed", "interrupted"] = "completed") -> None:
        """Delivers what is queued, and ends that process. Stopping again changes nothing."""
        if not self._started:
            return
        self._started = False
        atexit.unregister(self._at_exit)
        for hook in self._hooks:
            hook.remove()
        if self._others.together is not None:
            self._others.together.end()
        if status == "completed" and self._stop_reason:
            status = "stopped"
        if self._others.is_first:
            self._close(status, self._stop_reason)
        self._word = memoryview(bytes(8)).cast("Q")
        self._seen, self._look_at = 0, _NEVER

    def _close(self, status: str, detail: str) -> None:
        self._desk.closed = self._desk.closed or "the run has ended"
        if self._others.together is None:
            self._take()
        self._buffer, buffer = None, self._buffer
        if buffer is not None:
            buffer.flush()
        self.say("ended")
        self._folder.update(status=status, status_detail=detail, global_step=self.global_step)
        left = self._link.close()
        if left:
            logger.warning("{} records of {} were not delivered.", left, self.run_id)
        self._journal.close()
        self._folder.release()

    # --- several ranks ---------------------------------------------------------------------------------------------
    def join_ranks(self) -> None:
        """Finds the other ranks, if there is a process group by now, and agrees with them from here on.

        `start` and `step` do it by themselves; called where it has been done, or where there is one process, it changes
        nothing. Every rank calls it at the same place.

        Raises:
            RankError: another rank has not come, or has failed.
            ConfigError: the ranks have taken different numbers of steps, or commands, on their own.
        """
        here = None if self._others.alone else place_in_group()
        if here is None or not self._started or self._others.together is not None:
            return
        try:
            self._meet(here)
        except BaseException:
            self.stop("failed")
            raise

    def _meet(self, here: Place) -> None:
        if here.rank == 0 and not self._others.is_first:  # the environment has called another process the first
            self._others.place = here
            self._open()
        run, folder = self._identity
        own = Card(self.global_step)
        if self._others.is_first:
            journal = (folder / "journal.jsonl").read_text(encoding="utf-8")
            own = Card(self.global_step, self._desk.revision, run, str(folder), journal)
        first, ranks, agreement = _joined_ranks().join(here, own)
        if self._others.is_first and here.rank:
            self._close("stopped", f"this process is rank {here.rank} of {first.run}")
        self._others.place, self._identity = here, (first.run, Path(first.folder))
        if here.rank:
            self._link = self._line or NoLine()
            self._journal = Journal(self.folder / "journal.jsonl", copy=first.journal.encode())
            self._desk = Desk(self.run_id, self._journal, self.knobs, self._actions, self._tell)
        self._others.together = Together(self, self._desk, ranks, agreement, self._link, self._pausing)
        self._others.awaited, self._others.met = False, True
        self._word, self._seen = memoryview(bytes(8)).cast("Q"), 0
        self._look_at = self.global_step + 1

    def _on_every_rank(self, function: Callable[[], Any]) -> Any:
        return function() if self._others.together is None else self._desk.on_every_rank(function)

    def _act(self, operation: str, action: Action) -> None:
        self._actions[operation] = action
        if self._started and self._identity[0]:
            self._desk.actions[operation] = action

    def __enter__(self) -> Weavelet:
        return self if self._started else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, TrainingStopped):
            self.stop()
        else:
            self.stop("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    @property
    def started(self) -> bool:
        """Whether it has been started, and not been stopped since."""
        return self._started

    @property
    def world_size(self) -> int:
        """How many processes are steered together: 1, or the number of ranks once they have met."""
        place = self._others.place
        return place.size if self._others.met and place is not None else 1

    @property
    def run_id(self) -> str:
        """The name of the run folder.

        Raises:
            AetheriaError: it has not been made; or this is not the first rank, and has not met that one yet.
        """
        return self._known()[0]

    @property
    def folder(self) -> Path:
        """The run folder; see `run_id`."""
        return self._known()[1]

    def _known(self) -> tuple[str, Path]:
        if not self._identity[0]:
            raise AetheriaError(
                "the run folder is not known yet: the first rank makes it when its Weavelet is started, and the others "
                "learn of it at the first step with a process group."
            )
        return self._identity

    # --- in the loop -----------------------------------------------------------------------------------------------
    def step(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Ends a training step: commands that have come take effect here, and here a paused run waits.

        Args:
            metrics: for `log`.

        Raises:
            TrainingStopped: the run is to stop, and its loop has never asked `should_stop`.
        """
        self.global_step += 1
        if metrics is not None:
            self.log(metrics)
        if self._word[0] != self._seen or self.global_step >= self._look_at:
            self._attend()

    @property
    def should_stop(self) -> bool:
        """Whether somebody has stopped the run. A loop that asks ends by itself; to any other it is said by raising."""
        self._asked_to_stop = True
        return bool(self._stop_reason)

    @property
    def paused(self) -> bool:
        """Whether the run waits, in `step`."""
        return self._pausing.paused

    # --- torchLoom's words -----------------------------------------------------------------------------------------
    def get_config_update(self) -> dict[str, Any]:
        """Returns the knobs that have been set since this was last called, with their values: manual polling."""
        changes, self._changes = self._changes, {}
        return changes

    # --- at a boundary ---------------------------------------------------------------------------------------------
    def _attend(self) -> None:
        if self._others.together is None and not self._others.alone:
            self._look_for_ranks()
        together = self._others.together
        if together is not None:
            self._flush()
            together.attend()
            self._look_at = together.next_step
            if together.closed:  # what comes now is refused, by each for itself
                self._others.together, self._others.alone = None, True
                self._word, self._seen = self._link.word, self._link.word[0]
        elif not self._others.awaited:
            self._take()
            self._flush()
            if self._pausing.arrive():
                self.say("paused")
                self._pausing.wait(self._link, self._take, lambda: self._seen, lambda: bool(self._stop_reason))
                self.say("running")
        self._tend()
        if self._stop_reason and not self._asked_to_stop:
            reason, self._asked_to_stop = self._stop_reason, True
            raise TrainingStopped(reason)

    def _look_for_ranks(self) -> None:
        """Joins the other ranks, if there are any by now; where nobody has said so, only at the first step."""
        others = self._others
        first, others.looked = not others.looked, True
        if place_in_group() is None:
            if first and self._others.awaited:
                logger.warning(
                    "The environment says that this is rank {} of {}, but torch.distributed has not been initialised. "
                    "Commands wait until it is.",
                    *(self._others.place or ()),
                )
        elif first or self._others.awaited:
            self.join_ranks()
        elif not self._desk.closed:
            self._desk.closed = (
                "other ranks have come after this Weavelet had begun by itself; it was started too early to agree with "
                "them"
            )
            logger.warning("{}. It takes no more commands.", self._desk.closed.capitalize())

    def _tend(self) -> None:
        """Says that the loop is alive, looks after the sidecar, and plans the step at which to do so again."""
        now, step = time.monotonic(), self.global_step
        then, before = self._looked
        if self._others.awaited:
            self._look_at = step + 1
            if now - then < _TEND_INTERVAL:
                return
            self._flush()
        self._looked = now, step
        if self._others.is_first:
            self._link.beat(step)
            self._link.tend()
            self._telling.refresh(self._link, self._desk.revision)
        if self._others.together is not None or self._others.awaited:
            return
        # About a second from now, at the pace since the last time: a clock read in every step would cost more.
        pace = (step - before) / (now - then) if then and now > then else 1.0
        self._look_at = step + max(1, int(pace * _TEND_INTERVAL))
        if self._pausing.at_step is not None:
            self._look_at = min(self._look_at, self._pausing.at_step)

    def _take(self) -> None:
        self._seen = self._link.word[0]
        for data in self._link.take():
            self._desk.receive(data, *Boundary(self.global_step, 0, self.global_step))

    def _tell(self, outcome: Outcome) -> None:
        self._link.tell("ack", encode(outcome))
        command = self._journal.command(outcome.command)
        if outcome.state == "applied" and isinstance(command, Set):
            self._changes |= {key: self.knobs.observed(key) for key in command.args.values}
            self.say_knobs()

    def _stop(self, command: Stop) -> None:
        if command.args.snapshot and (snapshot := self._actions.get("snapshot")) is not None:
            snapshot.perform(command)  # if it fails, so does the stop: nothing is lost unless somebody says so
        by = f" by {command.author}" if command.author else ""
        self._stop_reason = f"stopped{by}" + (f": {command.reason}" if command.reason else "")
        self._pausing.paused = False

    def _note(self, command: Note) -> None:
        self.note(command.args.text, command.author)


def _joined_ranks() -> Any:
    """Returns the module that knows process groups: whoever has one process does without it."""
    return importlib.import_module("aetheria.control.joined_ranks")
