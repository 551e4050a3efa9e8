"""What is trained on, by a plan: easy samples first, other mixtures later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aetheria.core import Callback
from aetheria.errors import ConfigError
from aetheria.plugins.data.sharded import ShardedDataModule
from aetheria.registry import Registry

__all__ = ["Curriculum", "Stage"]


@dataclass(frozen=True)
class Stage:
    """From when on what is trained on.

    Attributes:
        from_step: optimiser steps that have been taken by then; or
        from_epoch: epochs that have been trained by then.
        weights: how much of each stream of data, by name; None leaves it as it is.
        selection: the name of a selection, "" for all samples; None leaves it as it is.
    """

    from_step: int | None = None
    from_epoch: int | None = None
    weights: dict[str, float] | None = None
    selection: str | None = None


@Registry.register_callback("Curriculum")
class Curriculum(Callback):
    """Changes mixture and selection of a `ShardedDataModule` at given steps or epochs.

    A change takes effect as one by a knob does: behind what may have been read ahead. What somebody sets by hand holds
    until the next stage. What holds at the beginning stands with the data.

        callbacks:
          - Curriculum:
              stages:
                - {from_step: 1000, weights: {easy: 1, hard: 1}}
                - {from_epoch: 2, selection: hard}

    Args:
        stages: in any order.

    Raises:
        ConfigError: a stage without a beginning, or without a change; later, other data.
    """

    critical = True

    def __init__(self, stages: Sequence[Stage]) -> None:
        for number, stage in enumerate(stages, 1):
            if (stage.from_step is None) == (stage.from_epoch is None):
                raise ConfigError(
                    f"stage {number} of Curriculum begins at from_step or at from_epoch: give one of them."
                )
            if min(one for one in (stage.from_step, stage.from_epoch) if one is not None) < 1:
                raise ConfigError(
                    f"stage {number} of Curriculum begins at 1 or later; what holds before stands with the data."
                )
            if stage.weights is None and stage.selection is None:
                raise ConfigError(f"stage {number} of Curriculum changes nothing: give weights or selection.")
        self.stages = list(stages)
        self.passed: list[int] = []

    def on_train_start(self) -> None:
        """Looks whether there is something to change."""
        if not isinstance(self.context.data, ShardedDataModule):
            raise ConfigError(
                f"Curriculum changes what a ShardedDataModule reads; the data are {type(self.context.data).__name__}."
            )

    def on_epoch_start(self) -> None:
        """Begins the stages of this epoch."""
        self._begin(lambda stage: stage.from_epoch is not None and self.context.epoch >= stage.from_epoch)

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Begins the stages of this step."""
        if len(self.passed) < len(self.stages):
            self._begin(lambda stage: stage.from_step is not None and self.context.global_step >= stage.from_step)

    def _begin(self, has_come: Any) -> None:
        for number, stage in enumerate(self.stages):
            if number in self.passed or not has_come(stage):
                continue
            self.passed.append(number)
            data = self.context.data
            assert isinstance(data, ShardedDataModule)
            told = [] if stage.weights is None else [data.set_weights(stage.weights)]
            told += [] if stage.selection is None else [data.set_selection(stage.selection or None)]
            self.context.record("data", f"stage {number + 1} of the curriculum {told[0] or 'changes nothing'}")

    def state_dict(self) -> dict[str, Any]:
        """Returns which stages have begun."""
        return {"passed": list(self.passed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.passed = list(state["passed"])
