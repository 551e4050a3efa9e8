"""Follows what else a schedule moves beside the learning rate."""

from __future__ import annotations

from torch import Tensor

from aetheria.core import Callback
from aetheria.plugins.callbacks._run import group_suffixes
from aetheria.registry import Registry

__all__ = ["LearningRateMonitor"]


@Registry.register_callback("LearningRateMonitor")
class LearningRateMonitor(Callback):
    """Adds `momentum` and `weight_decay` of every parameter group to the metrics, where the optimiser has them.

    The learning rate itself is always among them, without this callback. One-cycle schedules move the momentum, and
    a steered run may move the weight decay: here both are seen. Momentum is SGD's `momentum` or the first of Adam's
    `betas`. With several groups the names end in the group's name or index: `weight_decay.matrices`.
    """

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Reads the groups once in each log interval."""
        if self.context.global_step % self.context.config.log_every:
            return
        values: dict[str, float | Tensor] = {}
        optimizer = self.context.optimizer
        for group, suffix in zip(optimizer.param_groups, group_suffixes(optimizer)):
            if "momentum" in group:
                values[f"momentum{suffix}"] = group["momentum"]
            elif "betas" in group:
                values[f"momentum{suffix}"] = group["betas"][0]
            if "weight_decay" in group:
                values[f"weight_decay{suffix}"] = group["weight_decay"]
        self.context.log(values)
