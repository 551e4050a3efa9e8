"""The window: the micro-batches of one optimiser step, from fetching them to taking it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from aetheria.core import Accelerator, AetherModel, LateAnswer, MicroBatch
from aetheria.core.shards import part_of
from aetheria.engine.buffers import BufferGuard
from aetheria.engine.hooks import Hooks
from aetheria.engine.metrics import NOT_METRICS
from aetheria.errors import ModelError

__all__ = ["Window", "WindowRunner", "windows"]


@dataclass(slots=True)
class Window:
    """The micro-batches accumulated into one step, and what became of them.

    Attributes:
        batches: what was fetched, on the device.
        samples: how many samples are in it, over all ranks.
        positions: how many places in the order of the data it spans, over all ranks; None for as many as samples.
        metrics: of each micro-batch that was computed: its values and its weight.
        norm: total norm of the gradients before clipping, where it was needed.
        taken: whether the optimiser step was taken; a device may answer late.
    """

    batches: list[MicroBatch]
    samples: int
    positions: int | None = None
    metrics: list[tuple[dict[str, Any], float | Tensor]] = field(default_factory=list)
    norm: Tensor | None = None
    taken: bool | LateAnswer = False

    def merged_metrics(self) -> dict[str, Any]:
        """Returns the metrics over the whole window: weighted means of what its micro-batches have in common."""
        if len(self.metrics) == 1:
            return self.metrics[0][0]
        total = sum(weight for _, weight in self.metrics) or 1
        common = set.intersection(*(set(values) for values, _ in self.metrics))
        return {name: sum(values[name] * weight for values, weight in self.metrics) / total for name in common}

    def sample_ids(self, own: bool = False) -> list[Any] | None:
        """Returns the ids of its samples, those of all ranks or this rank's own, or None for data without ids."""
        each = [batch.ids if own else batch.all_ids for batch in self.batches]
        known = [ids for ids in each if ids is not None]
        return np.concatenate(known).tolist() if known else None


def windows(batches: Iterator[MicroBatch], size: Callable[[], int]) -> Generator[Window]:
    """Groups micro-batches into windows; the last one of an epoch may be short, and nothing is carried over.

    Args:
        batches: of one epoch.
        size: is asked before each window how many micro-batches make one.
    """
    for first in batches:
        if (count := size()) == 1:
            yield Window([first], first.total, first.positions)
        else:
            group = [first, *islice(batches, count - 1)]
            samples, positions = sum(batch.total for batch in group), sum(batch.positions for batch in group)
            yield Window(group, samples, positions)


class WindowRunner:
    """Computes windows: forward, backward, guard, clip, step.

    The gradient is that of the loss over the whole window, on all ranks: the mean over all its samples, or over all its
    tokens where the model returns "weight". It is not the mean of the micro-batches' means. Of ranks that train apart,
    each has a window of its own: the gradient is that of this rank's loss.

    Args:
        model: in training mode.
        optimizer: what takes the step.
        accelerator: the hardware.
        hooks: for `on_before_step`.
        training_step: runs the model's training step on a batch.
        max_grad_norm: clip the total norm of the gradients to this.
        max_grad_value: clip every element of the gradients to this.
    """

    def __init__(
        self,
        model: AetherModel,
        optimizer: Optimizer,
        accelerator: Accelerator,
        hooks: Hooks,
        training_step: Callable[[Any], dict[str, Tensor]],
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.max_grad_value = max_grad_value
        self._model = model
        self._optimizer = optimizer
        self._accelerator = accelerator
        self._apart = accelerator.sync_every is not None  # then a rank's window is its own
        self._ranks = 1 if self._apart else accelerator.data_ranks
        self._sharded = accelerator.sharded
        self._hooks = hooks
        self._training_step = training_step
        self._before_step = hooks.wanted("on_before_step")
        self._buffers = BufferGuard(model)
        self._own_zero_grad = getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad

    def backward(self, window: Window) -> None:
        """Accumulates the gradients of a window's loss."""
        *earlier, batch = batches = window.batches
        outputs: dict[str, Tensor] | None = None
        if not earlier and batch.size and (self._ranks == 1 or batch.size * self._ranks == window.samples):
            outputs = self._forward(batch)
            if self._ranks == 1 or "weight" not in outputs:  # the window's mean is that of the micro-batch
                self._backward(outputs["loss"], outputs)
                self._note(window, outputs, outputs.get("weight", batch.size))
                return
        # The weights of the later micro-batches are not known yet. So each loss is weighted in proportion to the
        # number of samples, which is, and the gradients are put right at the end if the weights turn out otherwise.
        # The gradients of several ranks are averaged, where they should be added up: their number makes good for it.
        sums = _WeightSum(self._accelerator)
        samples = sum(batch.size for batch in batches) if self._apart else window.samples
        for before in earlier:
            with self._accelerator.no_sync():
                self._accumulate(window, before, self._forward(before), sums, samples, last=False)
        self._accumulate(window, batch, outputs or self._forward(batch), sums, samples, last=True)
        if sums.weighted and (gradients := self._gradients()):
            total = sums.total()
            if isinstance(total, Tensor) or total:  # a rank that trains apart may have nothing that counts
                torch._foreach_mul_(gradients, samples / total)

    def _accumulate(
        self, window: Window, batch: MicroBatch, outputs: dict[str, Tensor], sums: _WeightSum, samples: int, last: bool
    ) -> None:
        weight: float | Tensor = outputs.get("weight", batch.size) if batch.size else 0
        if isinstance(weight, Tensor):
            weight = weight.detach()
            # Exact where it is free to read; as precise as the loss where reading it would mean waiting.
            weight = float(weight) if weight.device.type == "cpu" else weight.to(_precise(outputs["loss"]))
        sums.add(weight, "weight" in outputs)
        if last:
            sums.exchange()  # while the gradients are computed
        # A micro-batch of which nothing counts has a loss of 0/0; its share of the window's loss is exactly nothing.
        # (On a device nobody looks: there the guard meets the NaN, and drops the window.)
        if isinstance(weight, Tensor) or weight:
            share = weight * self._ranks / samples
            loss = outputs["loss"]
            self._backward(loss if isinstance(share, float) and share == 1.0 else loss * share, outputs)
        elif self._sharded or (last and (self._ranks > 1 or self._apart)):
            # The others wait for this rank's gradients, or for its step; and sharded weights are brought together for
            # every backward pass, by all ranks.
            with _silenced(outputs["loss"]):
                self._backward(outputs["loss"], outputs)
        self._note(window, outputs, weight)

    def _forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        context = self._accelerator.forward_context()
        if type(context) is nullcontext:
            outputs = self._training_step(batch.data)
        else:
            with context:
                outputs = self._training_step(batch.data)
        if not isinstance(outputs, dict) or "loss" not in outputs:
            raise ModelError(_without_loss(outputs))
        return outputs

    def _backward(self, loss: Tensor, outputs: dict[str, Tensor]) -> None:
        try:
            self._accelerator.backward(loss)
        except (RuntimeError, AttributeError, TypeError) as error:
            if problem := _wrong_with(outputs["loss"]):
                raise ModelError(problem) from error
            raise

    @staticmethod
    def _note(window: Window, outputs: dict[str, Any], weight: float | Tensor) -> None:
        values = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in outputs.items()
            if name not in NOT_METRICS
        }
        window.metrics.append((values, weight.detach() if isinstance(weight, Tensor) else weight))

    def _gradients(self) -> list[Tensor]:
        # A sparse gradient is its values: whatever is not stored in it is zero, and stays zero.
        found = [
            gradient._values() if gradient.is_sparse else gradient
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if (gradient := parameter.grad) is not None
        ]
        return [part_of(gradient) for gradient in found] if self._sharded else found

    def step(self, window: Window) -> None:
        """Guards, clips and takes the step; `window.taken` says whether. A window that is dropped changes nothing."""
        accelerator = self._accelerator
        gradients = self._gradients()
        if gradients:
            accelerator.unscale(self._optimizer)
            if self._before_step:
                self._hooks.call("on_before_step")
            norm = None
            if self.max_grad_norm is not None:
                norm = window.norm = accelerator.total_norm(gradients)
            nonfinite = accelerator.check_finite(gradients, norm)
            if norm is not None and self.max_grad_norm is not None:
                accelerator.clip_grad_norm(gradients, self.max_grad_norm, norm)
            elif self.max_grad_value is not None:
                torch._foreach_clamp_min_(gradients, -self.max_grad_value)
                torch._foreach_clamp_max_(gradients, self.max_grad_value)
            window.taken = accelerator.step(self._optimizer, nonfinite)
            if self._buffers.any:
                self._buffers.settle(window.taken, nonfinite)
        if self._apart and accelerator.end_window():
            self._buffers = BufferGuard(self._model)

    def zero(self) -> None:
        """Lets the gradients go."""
        if self._own_zero_grad:
            self._optimizer.zero_grad()
            return
        # The same without the profiler's record of it, which costs more than the rest of what this loop adds to a step.
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class _WeightSum:
    """The weight of a window: of all its micro-batches, and of all ranks where these are weighted by their model."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._own: float | Tensor = 0.0
        self._arriving: Callable[[], Tensor] | None = None
        self.weighted = False

    def add(self, weight: float | Tensor, weighted: bool) -> None:
        self._own = self._own + weight
        self.weighted = self.weighted or weighted

    def exchange(self) -> None:
        """Begins to add up over the ranks. Without weights of the model's own the sum is known: all samples."""
        if self.weighted and self._accelerator.data_ranks > 1 and self._accelerator.sync_every is None:
            own = self._own if isinstance(self._own, Tensor) else torch.tensor(self._own, dtype=torch.float64)
            self._arriving = self._accelerator.sum_later(own.reshape(1).clone())

    def total(self) -> float | Tensor:
        """Returns the sum, waiting for the others."""
        if self._arriving is None:
            return self._own
        found = self._arriving()[0]
        if (copies := self._accelerator.tensor_parallel) > 1:
            found = found / copies  # each of them has told the same
        return float(found) if found.device.type == "cpu" else found


@contextmanager
def _silenced(loss: Any) -> Iterator[None]:
    """Has a backward pass put zeros into every gradient that it reaches, whatever it computes on its way."""
    nodes, handles, seen = [getattr(loss, "grad_fn", None)], [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if not node.next_functions:  # what accumulates the gradient of a parameter
            handles.append(node.register_prehook(_zeros))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)


def _precise(loss: Tensor) -> torch.dtype:
    return torch.float64 if loss.dtype is torch.float64 else torch.float32


def _without_loss(outputs: Any) -> str:
    expected = 'expected a dictionary with "loss": a scalar tensor with a gradient'
    if not isinstance(outputs, dict):
        return f"training_step returned a {type(outputs).__name__}; {expected}."
    return f'training_step returned a dictionary without "loss" (it has {sorted(map(str, outputs))}); {expected}.'


def _wrong_with(loss: Any) -> str:
    if not isinstance(loss, Tensor):
        return f'training_step returned "loss" as a {type(loss).__name__}; expected a scalar tensor with a gradient.'
    if loss.numel() != 1:
        return (
            f'training_step returned "loss" of shape {list(loss.shape)}; expected a scalar. Take its mean(); '
            'the losses of single samples go under "sample_loss".'
        )
    if not loss.requires_grad:
        return (
            'training_step returned a "loss" without a gradient: nothing it was computed from requires one. Is it '
            "detached, computed under no_grad, or is every parameter frozen?"
        )
    return ""
