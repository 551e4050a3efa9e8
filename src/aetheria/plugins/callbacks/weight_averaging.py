"""Averages of the weights along the way, which often generalise better than the last weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from aetheria.core import AetherModel, Callback
from aetheria.core.shards import cut_like
from aetheria.errors import ConfigError, SnapshotMismatchError
from aetheria.plugins.callbacks._run import total_steps
from aetheria.registry import Registry

__all__ = ["ExponentialMovingAverage", "StochasticWeightAverage"]

_averaged_models: WeakSet[AetherModel] = WeakSet()


class _WeightAverage(Callback):
    """Keeps a second set of weights and exchanges it with the model's at the right moments.

    All parameters and persistent buffers are kept. Those of floating point are averaged, batch normalisation's
    running statistics among them (Izmailov et al. compute these anew with a pass over the data; averaging them needs
    none); counters and the like are copied.

    The arithmetic is torch's (`torch.optim.swa_utils`); its `AveragedModel` is not used because it copies the whole
    module, hooks, caches and all, where tensors are enough.

    Whatever is not in the model is in here, and an exchange loses nothing. Training goes on with exactly the weights
    it would have had: after a validation they are exchanged back; after the end of training the averaged ones stay in
    the model, for the last snapshot and a Predictor, and the others are in this callback's state, from where a
    continued run takes them back. A snapshot taken in between, the best one by a metric among them, holds the
    weights that are trained as the model's.
    """

    critical = True

    def __init__(self, *, validate: bool) -> None:
        self.validate = validate
        self._count = 0
        self._exchanged = False
        self._other: dict[str, Tensor] = {}  # the averaged weights, or while exchanged those that are trained

    @abstractmethod
    def _is_due(self, step: int) -> bool:
        """Returns whether the weights after this many steps enter the average."""

    @abstractmethod
    def _average(self, averaged: list[Tensor], current: list[Tensor]) -> None:
        """Moves the average, in place."""

    def on_train_start(self) -> None:
        """Takes back the weights that are trained, if the snapshot was taken after the end of training."""
        if self.context.model in _averaged_models:
            raise ConfigError(
                f"{type(self).__name__} found another average of the same model's weights. "
                "Both would exchange them; keep one of ExponentialMovingAverage and StochasticWeightAverage."
            )
        _averaged_models.add(self.context.model)
        self._model = self.context.model
        self._current = _tensors(self._model)
        if self._other:
            self._other = self._placed_like_the_model(self._other)
        if self._exchanged:
            self._exchange()
            self._exchanged = False

    def _placed_like_the_model(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        if loaded.keys() != self._current.keys():
            different = sorted(loaded.keys() ^ self._current.keys())
            raise SnapshotMismatchError(
                f"The snapshot's averaged weights are of another model: {', '.join(different)} is in one of the two "
                "only. Resume with the model that was trained."
            )
        # Copies even where nothing moves: what was loaded belongs to whoever loaded it.
        return {
            name: torch.empty_like(tensor).copy_(cut_like(loaded[name], tensor))
            for name, tensor in self._current.items()
        }

    @torch.no_grad()
    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        """Lets the new weights enter the average."""
        if not self._is_due(self.context.global_step):
            return
        if self._count == 0:
            self._other = {name: tensor.clone() for name, tensor in self._current.items()}
        else:
            floating = [name for name, tensor in self._current.items() if tensor.is_floating_point()]
            self._average([self._other[name] for name in floating], [self._current[name] for name in floating])
            for name, tensor in self._current.items():
                if not tensor.is_floating_point():
                    self._other[name].copy_(tensor)
        self._count += 1

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._current.items():
            kept = tensor.clone()
            tensor.copy_(self._other[name])
            self._other[name].copy_(kept)

    def on_validation_start(self) -> None:
        """Puts the averaged weights into the model."""
        if self.validate and self._count:
            self._exchange()
            self._exchanged = True

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Puts the weights that are trained back."""
        if self._exchanged:
            self._exchange()
            self._exchanged = False

    def on_train_end(self) -> None:
        """Leaves the averaged weights in the model."""
        if self._count:
            self._exchange()
            self._exchanged = True
        else:
            self.context.record(
                "warning", f"{type(self).__name__} averaged nothing: the run ended before it was to begin."
            )

    def teardown(self) -> None:
        """Gives the model free for another average."""
        if hasattr(self, "_model"):
            _averaged_models.discard(self._model)

    def state_dict(self) -> dict[str, Any]:
        """Returns the set of weights that is not in the model, which set that is, and how many were averaged."""
        return {"count": self._count, "exchanged": self._exchanged, "other": dict(self._other)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._count = state["count"]
        self._exchanged = state["exchanged"]
        self._other = state["other"]


def _tensors(model: AetherModel) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers by name, those shared by several modules once."""
    persistent = model.state_dict(keep_vars=True)
    unique: dict[int, str] = {}
    for name, tensor in persistent.items():
        if isinstance(tensor, Tensor):
            unique.setdefault(id(tensor), name)
    return {name: persistent[name].detach() for name in unique.values()}


@Registry.register_callback("ExponentialMovingAverage")
class ExponentialMovingAverage(_WeightAverage):
    """Averages the weights over about the last `1 / (1 - decay)` steps.

    After every step: average = decay * average + (1 - decay) * weights, begun with the weights themselves. Source:
    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); with a constant decay,
    Tarvainen and Valpola, "Mean teachers are better role models" (https://arxiv.org/abs/1703.01780).

    Args:
        decay: how much of the average stays at each step, at least 0 and less than 1.
        start_step: optimiser steps before the average begins.
        validate: whether validations run on the averaged weights.

    Raises:
        ConfigError: `decay` or `start_step` is out of its range.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0, validate: bool = True) -> None:
        super().__init__(validate=validate)
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"ExponentialMovingAverage got decay={decay}; it must be at least 0 and less than 1.")
        if start_step < 0:
            raise ConfigError(f"ExponentialMovingAverage got start_step={start_step}; it must be 0 or more.")
        self.start_step = start_step
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def _is_due(self, step: int) -> bool:
        return step > self.start_step

    def _average(self, averaged: list[Tensor], current: list[Tensor]) -> None:
        self._update(averaged, current, self._count)


@Registry.register_callback("StochasticWeightAverage")
class StochasticWeightAverage(_WeightAverage):
    """Averages the weights at the end of every epoch in the last part of a run, all with equal weight.

    It needs a learning rate that keeps the weights moving: constant, cyclic, or torch's `SWALR`, which is registered
    as the scheduler "swa". The schedule is the model's to choose (`configure_optimizers`). Source: Izmailov et al.,
    "Averaging Weights Leads to Wider Optima and Better Generalization" (https://arxiv.org/abs/1803.05407).

    Args:
        start_step: optimiser steps before the first weights are taken; None stands for three quarters of the run.
        every_steps: optimiser steps between two weights that are taken; None stands for one epoch.
        validate: whether validations run on the averaged weights.

    Raises:
        ConfigError: a number is out of its range, or None was given where the run does not know its length.
    """

    def __init__(self, start_step: int | None = None, every_steps: int | None = None, validate: bool = True) -> None:
        super().__init__(validate=validate)
        if start_step is not None and start_step < 0:
            raise ConfigError(f"StochasticWeightAverage got start_step={start_step}; it must be 0 or more.")
        if every_steps is not None and every_steps < 1:
            raise ConfigError(f"StochasticWeightAverage got every_steps={every_steps}; it must be at least 1.")
        self.start_step = start_step
        self.every_steps = every_steps
        self._update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def on_train_start(self) -> None:
        """Works out when to average."""
        total, epoch = total_steps(self.context), self.context.steps_per_epoch
        if (self.start_step is None and total is None) or (self.every_steps is None and epoch is None):
            raise ConfigError(
                "StochasticWeightAverage cannot tell three quarters of a run, or an epoch, of a data loader that does "
                "not know its length. Give it start_step and every_steps."
            )
        self._start = 3 * total // 4 if self.start_step is None and total is not None else self.start_step or 0
        self._every = self.every_steps or epoch or 1
        super().on_train_start()

    def _is_due(self, step: int) -> bool:
        return step > self._start and step % self._every == 0

    def _average(self, averaged: list[Tensor], current: list[Tensor]) -> None:
        self._update(averaged, current, self._count)
