"""Looks into a model every so many steps: are its gradients alive, its weights in bounds, its units working?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from aetheria.core import Callback
from aetheria.core.shards import total_norm
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["GradientHealth"]


@Registry.register_callback("GradientHealth")
class GradientHealth(Callback):
    """Adds norms of gradients and weights, and the share of dead activations, to the metrics.

    - `gradient_norm.total` and `gradient_norm.<part>`: Euclidean norms before clipping, over the whole model and over
      each of its parts (top-level child modules, and parameters that lie directly in the model);
    - `weight_norm.total` and `weight_norm.<part>`: likewise of the weights;
    - `dead_activations.<module>` for every ReLU: the share of its outputs that are zero for every sample of a
      micro-batch, averaged over the window. Units that stay dead learn nothing any more (Lu et al., "Dying ReLU and
      Initialization", https://arxiv.org/abs/1903.06733). Small batches overstate it. A compiled model is not looked
      into: its modules' outputs may never exist.

    Everything stays on the device; the loop reads it with the other metrics. Between two measurements a step costs
    two comparisons.

    Args:
        every: optimiser steps between two measurements; the first is at the first step.

    Raises:
        ConfigError: `every` is less than 1.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ConfigError(f"GradientHealth got every={every}; it must be at least 1.")
        self.every = every
        self._handles: list[RemovableHandle] = []
        self._dead: dict[str, list[Tensor]] = defaultdict(list)

    def on_train_start(self) -> None:
        """Sorts the parameters by the part of the model they belong to."""
        self._parts: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.context.model.named_parameters():
            if parameter.requires_grad:
                self._parts[name.partition(".")[0]].append(parameter)
        self._prepare(self.context.global_step)

    def _counter(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training:  # a validation may come between two windows
                self._dead[name].append((output.detach() == 0).all(dim=0).float().mean())

        return count

    def on_before_step(self) -> None:
        """Measures, if it is time, and prepares for the next step."""
        step = self.context.global_step
        if step % self.every == 0:
            self._measure()
        self._prepare(step + 1)

    def _prepare(self, step: int) -> None:
        """Watches the activations of the window that comes next, if that one is to be measured.

        This cannot wait until the step before it has been taken: on a device that works behind the host, that is known
        only after the next forward pass.
        """
        if step % self.every or self.context.config.compile:
            return
        self._unwatch()
        for name, module in self.context.model.named_modules():
            if isinstance(module, nn.ReLU | nn.ReLU6):
                self._handles.append(module.register_forward_hook(self._counter(name)))

    def _measure(self) -> None:
        values: dict[str, float | Tensor] = {}
        for name, shares in self._dead.items():
            values[f"dead_activations.{name}"] = torch.stack(shares).mean()
        gradients = {
            part: [parameter.grad for parameter in parameters if parameter.grad is not None]
            for part, parameters in self._parts.items()
        }
        values |= _norms("gradient_norm", gradients)
        values |= _norms("weight_norm", self._parts)
        self._unwatch()
        self.context.log(values)

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._dead.clear()

    def teardown(self) -> None:
        """Leaves no hook behind in the model."""
        self._unwatch()


def _norms(name: str, parts: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Returns the Euclidean norm of every part that has tensors, and that of all of them."""
    norms = {
        f"{name}.{part}": total_norm([tensor.detach() for tensor in tensors])
        for part, tensors in parts.items()
        if tensors
    }
    return {f"{name}.total": get_total_norm(list(norms.values())), **norms}
