"""What a Weavelet is told of a training before, and while, it steers it: knobs, optimisers, actions, devices."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from aetheria.control.desk import Action, Done
from aetheria.control.knobs import Knob, Knobs, declared, knob_of
from aetheria.control.optimizer_knobs import optimizer_knobs
from aetheria.errors import ConfigError

__all__ = ["Declaring"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Declaring(ABC):
    """What can be steered in a training, and how.

    Attributes:
        knobs: what `set` may set.
    """

    def __init__(self) -> None:
        self.knobs = Knobs()
        self._actions: dict[str, Action] = {}
        self._devices: list[str] = []
        self._hooks: list[Any] = []  # of optimisers

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether it has been started, and not been stopped since."""

    @abstractmethod
    def step(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Ends a training step."""

    @abstractmethod
    def say_knobs(self) -> None:
        """Tells the hub the knobs and their values as they are now."""

    @abstractmethod
    def _act(self, operation: str, action: Action) -> None: ...
    @abstractmethod
    def _on_every_rank(self, function: Callable[[], Any]) -> Any: ...

    def watch(self, optimizer: Any, scheduler: Any = None) -> Self:
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
        found = {str(parameter.device) for group in optimizer.param_groups for parameter in group["params"]}
        self.register_device(*sorted(found - {"meta"}))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.step()))
        return self

    def control(self, owner: Any, attribute: str, key: str = "", *, type: Any = None, **options: Any) -> Self:  # noqa: A002
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

    def register(self, owner: Any) -> Self:
        """Adds the knobs that an object's class declares with `controllable`."""
        self._add(*declared(owner, owner.__class__.__name__))
        return self

    def _add(self, *knobs: Knob) -> None:
        for knob in knobs:
            self.knobs.add(knob)
        if self.started and knobs:
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
        *,
        together: bool = False,
    ) -> Callable[[Function], Function]:
        """Makes a function what a command does; it is called without arguments, on every rank.

        The function may return a sentence for people, or a dictionary for programs, or both as a `Done`. Among several
        ranks the command has failed where it has failed on one of them.

        Args:
            operation: the command.
            check: raises `CommandError` where it cannot be done now; changes nothing.
            together: whether ranks wait for one another in it, as in a barrier or a collective. Then a rank on which it
                raises cannot go on without the others, and the exception ends the training.
        """

        def declare(function: Function) -> Function:
            def perform(_command: Any) -> Done:
                said = function() if together else self._on_every_rank(function)
                if isinstance(said, Done):
                    return said
                return Done(said if isinstance(said, str) else "", said if isinstance(said, Mapping) else {})

            self._act(operation, Action(perform, lambda _command: check(), together))
            if operation == "snapshot":  # which a stop takes, too
                self._act("stop", self._actions["stop"]._replace(together=together))
            return function

        return declare

    def register_device(self, *devices: str) -> Self:
        """Says which devices this process trains on, for instance "cuda:0"; before `start`.

        Those that hold the parameters of watched optimisers are known without it.
        """
        self._devices += [device for device in dict.fromkeys(devices) if device not in self._devices]
        return self

    def describe(self) -> str:
        """Returns a Markdown table of all knobs."""
        return self.knobs.describe()
