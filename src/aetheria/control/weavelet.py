"""The Weavelet: what any training script adds, in one line, to be watched and steered while it runs."""

from __future__ import annotations

import atexit
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from loguru import logger

from aetheria.control.desk import Action, Boundary, Desk, Done
from aetheria.control.journal import Journal
from aetheria.control.knobs import Knob, Knobs, declared, knob_of
from aetheria.control.log_buffer import MOST, LogBuffer
from aetheria.control.optimizer_knobs import optimizer_knobs
from aetheria.control.pausing import Pausing
from aetheria.control.telling import Telling
from aetheria.errors import AetheriaError, ConfigError
from aetheria.loom.link import Link
from aetheria.protocol import Note, Outcome, Set, Stop, encode
from aetheria.runs import RunFolder

__all__ = ["TrainingStopped", "Weavelet"]

Function = TypeVar("Function", bound=Callable[..., Any])
_PAUSED_LOOK = 0.005  # seconds between two looks while paused
_TEND_INTERVAL = 1.0  # seconds between two looks after the sidecar
_NEVER = sys.maxsize


class TrainingStopped(AetheriaError):  # noqa: N818 - not an error: what was asked for
    """Somebody has stopped the run, and its loop has never asked `weavelet.should_stop`."""


class Weavelet:
    """Watches and steers a training loop that is not Aetheria's.

        weavelet = Weavelet(optimizer=optimizer).start()

    is all that a plain PyTorch script needs: steps are counted by the optimiser itself, its learning rate can be set,
    the run paused, resumed and stopped. With `step`, `log`, `control` and `handler` there is more.

    Everything that is sent or written is sent and written by a process of its own. With no command given, training is
    bit for bit what it would be without; if that process or the hub dies, training goes on.

    Args:
        replica_id: which replica this is, where several train one model.
        run: the beginning of the run folder's name; the script's name by default.
        hub: "auto" (the hub of this machine, whenever there is one) or "off".
        optimizer: whose steps are counted, and whose learning rate can be set; see `watch`.
        scheduler: what moves that learning rate, one or several: a value that is set rescales it.
        runs_dir: where the run folder is made.
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
        line: Any = None,
    ) -> None:
        self.replica_id = replica_id
        self.global_step = 0
        self.knobs = Knobs()
        self._name = run or Path(sys.argv[0]).stem or "run"
        self._hub = hub
        self._runs_dir = Path(runs_dir)
        self._line = line
        self._devices: list[str] = []
        self._telling = Telling(self.knobs)
        self._pausing = Pausing(lambda: self.global_step)
        self._stop_reason = ""
        self._asked_to_stop = False  # whether the loop has ever looked
        self._changes: dict[str, Any] = {}
        self._buffer: LogBuffer | None = None  # while it is started
        self._actions = {
            **self._pausing.actions(),
            "stop": Action(self._stop),
            "note": Action(self._note),
        }
        self._look_at = _NEVER
        self._looked = (0.0, 0)  # when, and at which step
        self._seen = 0
        self._word = memoryview(bytes(8)).cast("Q")
        self._hook: Any = None
        self._started = False
        if optimizer is not None:
            self.watch(optimizer, scheduler)

    # --- what can be steered ---------------------------------------------------------------------------------------
    def watch(self, optimizer: Any, scheduler: Any = None) -> Weavelet:
        """Counts an optimiser's steps, and makes its learning rate, weight decay, momentum and betas knobs.

        After this `step` need not be called: each `optimizer.step()` is a step.

        Args:
            optimizer: a `torch.optim.Optimizer`.
            scheduler: what moves its learning rate: one scheduler or several.
        """
        schedulers: Sequence[Any] = (
            [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
        )
        self._add(*optimizer_knobs(lambda: optimizer, lambda: schedulers))
        self._hook = optimizer.register_step_post_hook(lambda *_: self.step())
        return self

    def control(self, owner: Any, attribute: str, key: str = "", *, type: Any = None, **options: Any) -> Weavelet:  # noqa: A002
        """Makes a plain attribute a knob.

        Args:
            owner: the object that has it.
            attribute: its name.
            key: the knob's name; the attribute's by default.
            type: of its value; that of the value it has, by default.
            **options: bounds, unit and help, as for `controllable`.
        """
        if not hasattr(owner, attribute):
            raise ConfigError(f"a {owner.__class__.__name__} has no attribute '{attribute}' that could be a knob.")
        kind = getattr(owner, attribute).__class__ if type is None else type
        self._add(
            Knob(
                key or attribute,
                kind,
                lambda value: setattr(owner, attribute, value),
                lambda: getattr(owner, attribute),
                **{"scope": owner.__class__.__name__, **options},
            )
        )
        return self

    def handler(self, key: str, **options: Any) -> Callable[[Function], Function]:
        """Makes a function the setter of a knob; the annotation of its one parameter is the knob's type.

            @weavelet.handler("optimizer_type")
            def swap(kind: Literal["sgd", "adamw"]): ...

        Args:
            key: the knob's name.
            **options: `get` (a function that returns the value), bounds, unit and help, as for `controllable`.
        """

        def declare(function: Function) -> Function:
            self._add(knob_of(function, key=key, **{"scope": "script", **options}))
            return function

        return declare

    def register(self, owner: Any) -> Weavelet:
        """Adds the knobs that an object's class declares with `controllable`."""
        self._add(*declared(owner, owner.__class__.__name__))
        return self

    def _add(self, *knobs: Knob) -> None:
        for knob in knobs:
            self.knobs.add(knob)
        if self._started and knobs:
            self.say_knobs()  # the hub has been told of those that there were

    def prepare(self, accelerator: Any, *objects: Any) -> Any:
        """Lets an `accelerate.Accelerator` prepare objects, and watches what comes out; starts, if that is still to do.

            model, optimizer, loader, scheduler = Weavelet().prepare(accelerator, model, optimizer, loader, scheduler)

        Returns:
            What `accelerator.prepare` returns.
        """
        # By its name: this room is below that one, and what steers a run does not need to know who is steered.
        integration = importlib.import_module("aetheria.integrations.accelerate")
        return integration.prepare(self, accelerator, *objects)

    def action(
        self,
        operation: Literal["snapshot", "validate", "test", "health"],
        check: Callable[[], object] = lambda: None,
    ) -> Callable[[Function], Function]:
        """Makes a function what a command does; it is called without arguments.

        The function may return a sentence for people, or a dictionary for programs, or both as a `Done`.

        Args:
            operation: the command.
            check: raises `CommandError` where it cannot be done now; changes nothing.
        """

        def declare(function: Function) -> Function:
            def perform(_command: Any) -> Done:
                said = function()
                if isinstance(said, Done):
                    return said
                return Done(said if isinstance(said, str) else "", said if isinstance(said, Mapping) else {})

            self._actions[operation] = Action(perform, lambda _command: check())
            if self._started:
                self._desk.actions[operation] = self._actions[operation]
            return function

        return declare

    def register_device(self, *devices: str) -> Weavelet:
        """Says which devices this replica trains on, for instance "cuda:0"; before `start`."""
        self._devices += devices
        return self

    def describe(self) -> str:
        """Returns a Markdown table of all knobs."""
        return self.knobs.describe()

    # --- from start to stop ----------------------------------------------------------------------------------------
    def start(self) -> Weavelet:
        """Makes the run folder and starts the process that sends and writes.

        Raises:
            RunFolderError: the folder cannot be made.
        """
        if self._started:
            raise AetheriaError("this Weavelet has been started already.")
        self._folder = RunFolder.create(self._runs_dir, self._name, seed=None, config={})
        self._folder.acquire()
        self._folder.update(status="running")
        self._journal = Journal(self._folder.path / "journal.jsonl")
        self._link = self._line or Link(
            self._folder.path,
            self.run_id,
            hub=self._hub,
            record=True,
            start_step=self.global_step,
            replica=self.replica_id,
            devices=self._devices,
        )
        self._buffer = LogBuffer(self._link)
        self._desk = Desk(self.run_id, self._journal, self.knobs, self._actions, self._tell)
        self._word, self._seen = self._link.word, 0
        self._look_at = self.global_step + 1
        self._started = True
        atexit.register(self._at_exit)
        self._say("running")
        return self

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
        if self._hook is not None:
            self._hook.remove()
        self._desk.closed = "the run has ended"
        self._take()
        self._buffer, buffer = None, self._buffer
        if buffer is not None:
            buffer.flush()
        if status == "completed" and self._stop_reason:
            status = "stopped"
        self._say("ended")
        self._folder.update(status=status, status_detail=self._stop_reason, global_step=self.global_step)
        left = self._link.close()
        if left:
            logger.warning("{} records of {} were not delivered.", left, self.run_id)
        self._journal.close()
        self._folder.release()
        self._word = memoryview(bytes(8)).cast("Q")
        self._seen, self._look_at = 0, _NEVER

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
    def run_id(self) -> str:
        """The name of the run folder."""
        return self._folder.run_id

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder.path

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

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Records metrics of the present step.

        While logs come within 20 ms of one another, they are written together, twenty times a second. So a fast loop
        that stops short shows its last 50 ms only when it goes on, pauses or ends, and one that is killed (by signal 9)
        takes them with it. What a slow loop logs is written at once.

        Args:
            metrics: numbers or scalar tensors; those on a device are read by a later call, so that nothing waits.

        Raises:
            TypeError, ValueError, RuntimeError: something is not one number.
        """
        buffer = self._buffer
        if buffer is None:
            return
        now = time.time()
        # Written out, and in a loop: a call more, or the set of the types, would take microseconds between two steps.
        for value in metrics.values():
            if type(value) is not float and type(value) is not int:
                break
        else:
            if now < buffer.due and metrics and len(buffer.points) < MOST:
                buffer.points.append((now, self.global_step, dict(metrics)))
                return
        buffer.add(now, self.global_step, metrics)

    def note(self, text: str, author: str = "") -> None:
        """Writes a note about the present step."""
        said = {"kind": "note", "step": self.global_step, "message": text, "data": {"author": author}}
        self._link.tell("event", encode(said))

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

    def publish_training_status(self, status: Mapping[str, Any]) -> None:
        """Publishes anything about the training, as an event; its numbers become metrics, too."""
        numbers = {
            name: value
            for name, value in status.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            self.log(numbers)
        said = {"kind": "status", "step": self.global_step, "message": "training status", "data": dict(status)}
        self._link.tell("event", encode(said))

    # --- at a boundary ---------------------------------------------------------------------------------------------
    def _attend(self) -> None:
        self._take()
        paused = self._pausing.arrive()
        if self._buffer is not None:
            self._buffer.flush(wait=paused)
        if paused:
            self._say("paused")
            self._pausing.wait(self._link, self._take, lambda: self._seen, lambda: bool(self._stop_reason))
            self._say("running")
        self._tend()
        if self._stop_reason and not self._asked_to_stop:
            reason, self._asked_to_stop = self._stop_reason, True
            raise TrainingStopped(reason)

    def _tend(self) -> None:
        """Says that the loop is alive, looks after the sidecar, and plans the step at which to do so again."""
        now, step = time.monotonic(), self.global_step
        then, before = self._looked
        self._looked = now, step
        self._link.beat(step)
        self._link.tend()
        self._telling.refresh(self._link, self._desk.revision)
        # About a second from now, at the pace since the last time: a clock read in every step would cost more.
        pace = (step - before) / (now - then) if then and now > then else 1.0
        self._look_at = step + max(1, int(pace * _TEND_INTERVAL))
        if self._pausing.at_step is not None:
            self._look_at = min(self._look_at, self._pausing.at_step)

    def _take(self) -> None:
        self._seen = self._word[0]
        for data in self._link.take():
            self._desk.receive(data, *Boundary(self.global_step, 0, self.global_step))

    def _say(self, status: str) -> None:
        self._telling.status(self._link, status, self.global_step, self._desk.revision)

    def say_knobs(self) -> None:
        """Tells the hub the knobs and their values as they are now; after `start`."""
        self._telling.knobs(self._link, self._desk.revision)

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
