"""What `configure_optimizers` returned, checked, and the learning rates that follow from it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aetheria.core import OptimizerPlan, Schedule
from aetheria.errors import ConfigError, ModelError, did_you_mean

__all__ = ["Schedules", "as_plan"]


def as_plan(configured: Any) -> OptimizerPlan:
    """Returns the plan that any of the accepted forms stands for.

    Raises:
        ModelError: it is none of them.
    """
    if isinstance(configured, Optimizer):
        configured = OptimizerPlan(configured)
    elif isinstance(configured, tuple) and len(configured) == 2 and _is_scheduler(configured[1]):
        configured = OptimizerPlan(configured[0], (Schedule(configured[1]),))
    if not isinstance(configured, OptimizerPlan) or not isinstance(configured.optimizer, Optimizer):
        raise ModelError(
            f"configure_optimizers returned {_describe(configured)}; expected an Optimizer, a pair of Optimizer and "
            "scheduler, or an OptimizerPlan."
        )
    if isinstance(configured.optimizer, LBFGS):
        raise ModelError("LBFGS evaluates the loss several times a step, which this loop does not. Use another one.")
    for schedule in configured.schedules:
        if not isinstance(schedule, Schedule) or not _is_scheduler(schedule.scheduler):
            raise ModelError(f"an OptimizerPlan's schedules must be Schedule(scheduler, ...); found {schedule!r}.")
        if isinstance(schedule.scheduler, ReduceLROnPlateau) and (
            schedule.interval != "epoch" or schedule.monitor is None
        ):
            raise ModelError(
                "ReduceLROnPlateau needs a metric to look at: "
                'OptimizerPlan(optimizer, [Schedule(scheduler, "epoch", monitor="val_loss")]).'
            )
    return configured


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, LRScheduler | ReduceLROnPlateau)


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}"
    return "None" if value is None else f"a {type(value).__name__}"


class Schedules:
    """Steps the schedulers and tells the learning rates.

    Args:
        plan: the optimiser and its schedules.
    """

    def __init__(self, plan: OptimizerPlan) -> None:
        self.follow(plan)

    def follow(self, plan: OptimizerPlan) -> None:
        """Goes on with another plan."""
        self.plan = plan
        self.per_step = [item.scheduler for item in plan.schedules if item.interval == "step"]

    def step(self) -> None:
        """Steps the per-step schedulers; called after each optimiser step that was taken."""
        for scheduler in self.per_step:
            scheduler.step()

    def epoch(self, metrics: dict[str, float]) -> None:
        """Steps the per-epoch schedulers.

        Raises:
            ConfigError: a scheduler monitors a metric that this epoch does not have.
        """
        for item in self.plan.schedules:
            if item.interval != "epoch":
                continue
            if isinstance(item.scheduler, ReduceLROnPlateau):
                if item.monitor not in metrics:
                    raise ConfigError(
                        f"ReduceLROnPlateau monitors '{item.monitor}', which this epoch does not have. "
                        f"{did_you_mean(str(item.monitor), metrics)}"
                    )
                item.scheduler.step(metrics[item.monitor])
            else:
                item.scheduler.step()

    def learning_rates(self) -> dict[str, float | Tensor]:
        """Returns `learning_rate`, or `learning_rate.<group>` for each of several groups."""
        groups = self.plan.optimizer.param_groups
        if len(groups) == 1:
            return {"learning_rate": groups[0]["lr"]}
        return {f"learning_rate.{group.get('name', index)}": group["lr"] for index, group in enumerate(groups)}

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the state of every scheduler."""
        return [item.scheduler.state_dict() for item in self.plan.schedules]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Takes back what `state_dict` returned."""
        for item, state in zip(self.plan.schedules, states, strict=True):
            item.scheduler.load_state_dict(state)

    def describe(self) -> dict[str, Any]:
        """Returns what a manifest says about the optimiser."""
        optimizer = self.plan.optimizer
        kinds: list[Literal["step", "epoch"] | str] = [type(item.scheduler).__name__ for item in self.plan.schedules]
        return {
            "class": type(optimizer).__name__,
            "groups": [len(group["params"]) for group in optimizer.param_groups],
            "schedulers": kinds,
        }
