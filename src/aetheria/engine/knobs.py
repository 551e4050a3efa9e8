"""The knobs that every run has: what of its configuration and of its optimiser may be changed while it trains."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from aetheria.config import TrainingConfig
from aetheria.control.knobs import Knob, Knobs, declared
from aetheria.control.optimizer_knobs import keep_groups, optimizer_knobs
from aetheria.core import Accelerator, AetherDataModule, AetherModel, Callback, OptimizerPlan, Schedule
from aetheria.durations import SecondsOrText
from aetheria.engine.schedules import Schedules
from aetheria.errors import CommandError
from aetheria.registry import Registry

__all__ = ["Choice", "Steered", "builtin_knobs"]


class Choice(BaseModel):
    """A registered name with its parameters: never a class or an import path."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    params: dict[str, Any] = {}
    interval: Literal["step", "epoch"] = "epoch"
    monitor: str | None = None


class Steered(Protocol):
    """What the built-in knobs reach into: the Orchestrator."""

    config: TrainingConfig
    model: AetherModel
    accelerator: Accelerator
    data: AetherDataModule
    callbacks: list[Callback]
    _schedules: Schedules

    def _reconfigure(self, **changes: Any) -> None: ...
    def _replan(self, plan: OptimizerPlan) -> None: ...


def builtin_knobs(run: Steered) -> Knobs:
    """Returns the knobs of a run: those every run has, and what model, data module and callbacks declare."""
    plan = run._schedules
    rates = optimizer_knobs(lambda: plan.plan.optimizer, lambda: [item.scheduler for item in plan.plan.schedules])
    knobs = Knobs([*_of_config(run), *rates, *_swaps(run), *_of_model(run)])
    for owner, scope in (
        (run.model, "model"),
        (run.data, "data"),
        *((one, type(one).__name__) for one in run.callbacks),
    ):
        for knob in declared(owner, scope):
            number = sum(other.key.partition("#")[0] == knob.key for other in knobs)
            again = isinstance(owner, Callback) and number  # two callbacks of a kind are nothing unusual
            knobs.add(dataclasses.replace(knob, key=f"{knob.key}#{number + 1}") if again else knob)
    return knobs


# --- the configuration -----------------------------------------------------------------------------------------------


def _of_config(run: Steered) -> Iterator[Knob]:
    def knob(key: str, kind: Any, about: str, unit: str = "", **bounds: Any) -> Knob:
        *section, name = key.split(".")

        def get() -> Any:
            return getattr(run.config.snapshots if section else run.config, name)

        def put(value: Any) -> None:
            if section:
                run._reconfigure(snapshots=run.config.snapshots.model_copy(update={name: value}))
            else:
                run._reconfigure(**{name: value})

        return Knob(key, kind, put, get, unit=unit, help=about, **bounds)

    yield knob("max_grad_norm", float | None, "Gradients are scaled down to this total norm.", gt=0)
    yield knob("max_grad_value", float | None, "Every component of the gradients is clipped to this.", gt=0)
    yield knob(
        "grad_accumulation_steps", int, "Micro-batches in an optimiser step, from the next window on.", "batches", ge=1
    )
    yield knob("epochs", int | None, "Passes over the training data; the run ends after them.", "epochs", ge=1)
    yield knob("max_steps", int | None, "Optimiser steps; the run ends after them.", "steps", ge=1)
    about = "Time of training, pauses apart; the run ends after it. A number, or for instance 90m, 12h, 1d6h30m."
    yield knob("max_time", SecondsOrText | None, about, "s")
    yield knob("val_interval", int | None, "A validation after every so many epochs.", "epochs", ge=1)
    yield knob("val_every_steps", int | None, "A validation after every so many steps.", "steps", ge=1)
    yield knob("log_every", int, "Metrics are logged every so many steps.", "steps", ge=1)
    yield knob("snapshots.every_steps", int | None, "A snapshot after every so many steps.", "steps", ge=1)
    yield knob("snapshots.every_epochs", int | None, "A snapshot after every so many epochs.", "epochs", ge=1)
    yield knob("snapshots.every_seconds", float | None, "A snapshot when the last one is so old.", "s", gt=0)
    yield knob("snapshots.keep_last", int, "How many of the newest snapshots are kept.", "snapshots", ge=2)
    if (accelerator := run.accelerator).sync_every is not None:
        yield Knob(
            "sync_every",
            int,
            lambda value: setattr(accelerator, "sync_every", value),
            lambda: accelerator.sync_every,
            ge=1,
            unit="steps",
            help="Ranks that train apart (accelerator local_sgd) exchange what they have changed every so many steps.",
        )


# --- the optimiser ---------------------------------------------------------------------------------------------------


def _swaps(run: Steered) -> Iterator[Knob]:
    """Optimiser and scheduler by their registered names."""
    first = run._schedules.plan
    chosen: dict[str, Any] = {"optimizer": None, "scheduler": None}

    def describe(kind: Literal["optimizer", "scheduler"]) -> Any:
        if chosen[kind] is not None:
            return chosen[kind]
        plan = run._schedules.plan
        parts: list[Any] = [plan.optimizer] if kind == "optimizer" else [item.scheduler for item in plan.schedules]
        names = [Registry.name_of(kind, type(part)) or type(part).__name__ for part in parts]
        return {"name": " + ".join(names)} if names else "none"

    def put_optimizer(choice: Choice) -> str:
        old = run._schedules.plan
        optimizer, fresh = _swapped(old.optimizer, choice)
        for item in old.schedules:
            _point(item.scheduler, optimizer)
        run._replan(OptimizerPlan(optimizer, old.schedules))
        chosen["optimizer"] = choice.model_dump(include={"name", "params"})
        return f"state carried over, but for {fresh} of them, which begin anew" if fresh else "state carried over"

    def put_scheduler(choice: Literal["none"] | Choice) -> str:
        optimizer = run._schedules.plan.optimizer
        if choice == "none":
            run._replan(OptimizerPlan(optimizer))
            chosen["scheduler"] = "none"
            return "the learning rate stays where it is until it is set"
        assert isinstance(choice, Choice)
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)  # it begins from the learning rate as it is
        scheduler = Registry.build("scheduler", choice.name, {**choice.params, "optimizer": optimizer})
        run._replan(OptimizerPlan(optimizer, [Schedule(scheduler, choice.interval, choice.monitor)]))
        chosen["scheduler"] = choice.model_dump()
        return "it begins from the learning rate as it was"

    def keep() -> Callable[[], None]:
        plan, chosen_now = run._schedules.plan, dict(chosen)
        groups_back = keep_groups(plan.optimizer, [item.scheduler for item in plan.schedules])

        def put_back() -> None:
            groups_back()  # a scheduler that is built moves the learning rates at once
            for item in plan.schedules:
                _point(item.scheduler, plan.optimizer)
            run._replan(plan)
            chosen.update(chosen_now)

        return put_back

    def reset(kind: str) -> None:
        chosen[kind] = None
        plan = run._schedules.plan
        if kind == "optimizer":
            for item in plan.schedules:
                _point(item.scheduler, first.optimizer)
            run._replan(OptimizerPlan(first.optimizer, plan.schedules))
        else:
            for item in first.schedules:
                _point(item.scheduler, plan.optimizer)
            run._replan(OptimizerPlan(plan.optimizer, first.schedules))

    yield Knob(
        "optimizer",
        Choice,
        put_optimizer,
        lambda: describe("optimizer"),
        help="A registered optimiser; state is carried over where names and shapes agree.",
        structural=True,
        reset=lambda: reset("optimizer"),
        keep=keep,
    )
    yield Knob(
        "scheduler",
        Literal["none"] | Choice,
        put_scheduler,
        lambda: describe("scheduler"),
        help='A registered schedule, from the learning rate as it is; "none" hands the learning rate over.',
        structural=True,
        reset=lambda: reset("scheduler"),
        keep=keep,
    )


def _swapped(old: Optimizer, choice: Choice) -> tuple[Optimizer, int]:
    """Returns a new optimiser on the same groups, and the number of parameters whose state begins anew."""
    groups = [
        {name: group[name] for name in ("params", "lr", "weight_decay", "name", "initial_lr") if name in group}
        for group in old.param_groups
    ]
    kept: dict[str, Any] = (
        {} if "weight_decay" not in choice.params else {"weight_decay": choice.params["weight_decay"]}
    )
    new: Optimizer = Registry.build("optimizer", choice.name, {**choice.params, "params": [g | kept for g in groups]})
    fresh = 0
    for parameter, state in old.state.items():
        wanted = _state_names(new, parameter)
        carried = {name: value for name, value in state.items() if name in wanted}
        if wanted - carried.keys():
            fresh += 1
        elif carried:
            new.state[parameter] = carried
    return new, fresh


def _state_names(optimizer: Optimizer, parameter: Tensor) -> set[str]:
    """Returns what an optimiser remembers of a parameter: found out on a stand-in of one element."""
    group = next(group for group in optimizer.param_groups if any(parameter is member for member in group["params"]))
    stand_in = nn.Parameter(parameter.detach().new_zeros(2, 2))
    stand_in.grad = parameter.detach().new_zeros(2, 2)
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in group.items() if name in optimizer.defaults and name in known}
    probe = type(optimizer)([stand_in], **options)
    probe.step()
    return set(probe.state[stand_in])


def _point(scheduler: Any, optimizer: Optimizer) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):
        _point(inner, optimizer)
    scheduler.optimizer = optimizer
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])


# --- the model -------------------------------------------------------------------------------------------------------


def _of_model(run: Steered) -> Iterator[Knob]:
    weights = getattr(run.model, "loss_weights", None)
    if isinstance(weights, Mapping):
        for name in weights:
            yield Knob(
                f"loss_weights.{name}",
                float,
                _setter(weights, name),
                _getter(weights, name),
                help=f"Weight of the part '{name}' of the loss.",
                scope="model",
            )
    trained = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    frozen: list[str] = []

    def freeze(patterns: list[str]) -> str:
        for pattern in patterns:
            if not fnmatch.filter(trained, pattern):
                raise CommandError(
                    f"frozen: '{pattern}' is the name of no parameter. There are, for instance: "
                    f"{', '.join(list(trained)[:5])}."
                )
        frozen[:] = patterns
        count = 0
        for name, parameter in run.model.named_parameters():
            matched = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            count += matched
            parameter.requires_grad_(trained[name] and not matched)
        run.accelerator.follow(run.model)
        return f"{count} of {len(trained)} parameters are frozen"

    yield Knob(
        "frozen",
        list[str],
        freeze,
        lambda: list(frozen),
        help="Patterns of names of parameters that are not trained, for instance encoder.*.",
        scope="model",
        structural=True,
    )


def _setter(values: Any, name: str) -> Callable[[float], None]:
    def put(value: float) -> None:
        values[name] = value

    return put


def _getter(values: Any, name: str) -> Callable[[], float]:
    return lambda: float(values[name])
