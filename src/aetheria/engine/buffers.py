"""Buffers that a forward pass changes (batch-norm statistics) are part of what a dropped window must leave alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aetheria.core import LateAnswer

__all__ = ["BufferGuard"]


class BufferGuard:
    """Remembers the buffers as they were before a window, and puts them back if the window is dropped.

    Only buffers that do change are copied: a tensor's version counter tells. Normalisation layers are the exception:
    torch updates their running statistics without counting, so these are always taken for changed.

    Args:
        model: whose buffers are guarded.

    Attributes:
        any: whether there is anything to guard.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        uncounted = {
            id(buffer)
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        }
        self._uncounted = [id(buffer) in uncounted for buffer in self._buffers]
        self._versions = [buffer._version for buffer in self._buffers]
        self._before = [buffer.detach().clone() for buffer in self._buffers]
        self.any = bool(self._buffers)

    def settle(self, taken: bool | LateAnswer, nonfinite: Tensor) -> None:
        """Accepts what the window did to the buffers, or undoes it.

        Args:
            taken: whether the step was taken. Where only the device knows yet, it chooses by `nonfinite`, and nobody
                waits.
            nonfinite: a scalar tensor on the device, not zero where the window is dropped.
        """
        changed = [
            index
            for index, buffer in enumerate(self._buffers)
            if self._uncounted[index] or buffer._version != self._versions[index]
        ]
        if not changed:
            return
        now, before = [self._buffers[index] for index in changed], [self._before[index] for index in changed]
        with torch.no_grad():
            if taken is True:
                torch._foreach_copy_(before, now)
            elif taken is False:
                torch._foreach_copy_(now, before)
            else:
                kept = [torch.where(nonfinite > 0, old, new) for old, new in zip(before, now, strict=True)]
                torch._foreach_copy_(now, kept)
                torch._foreach_copy_(before, kept)
        for index in changed:
            self._versions[index] = self._buffers[index]._version
