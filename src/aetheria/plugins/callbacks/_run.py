"""What several callbacks ask about a run."""

from __future__ import annotations

from torch.optim import Optimizer

from aetheria.core import TrainingContext

__all__ = ["group_suffixes", "total_steps"]


def total_steps(context: TrainingContext) -> int | None:
    """Returns the optimiser steps that the whole run takes, or None while nobody can know."""
    limits = []
    if context.max_steps is not None:
        limits.append(context.max_steps)
    if context.max_epochs is not None and context.steps_per_epoch is not None:
        limits.append(context.max_epochs * context.steps_per_epoch)
    return min(limits, default=None)


def group_suffixes(optimizer: Optimizer) -> list[str]:
    """Returns what a metric's name ends with for each parameter group: "", or ".<name>" where there are several."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [""]
    return [f".{group.get('name', index)}" for index, group in enumerate(groups)]
