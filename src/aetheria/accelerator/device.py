"""What every single device has in common: autocast, loss scaling, and the order in which they meet the guard."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from aetheria.core import Accelerator, LateAnswer
from aetheria.errors import ConfigError

__all__ = ["DeviceAccelerator", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)  # private, though old: may go one day


class DeviceAccelerator(Accelerator):
    """One process on one device, in full or mixed precision.

    Mixed precision is autocast (weights stay fp32); fp16 adds dynamic loss scaling, after Micikevicius et al.,
    "Mixed Precision Training", arXiv:1710.03740, section 3.2.

    Args:
        device: the device to compute on.
        precision: "fp32", "bf16" or "fp16"; "mixed" takes the best lower precision that the device really has.

    Raises:
        ConfigError: the device does not have that precision.
    """

    def __init__(self, device: torch.device, precision: Precision | Literal["mixed"] = "fp32") -> None:
        self._device = device
        self.precision: Precision = self._best_mixed_precision() if precision == "mixed" else precision
        if self.precision != "fp32" and self.precision not in self.precisions():
            raise ConfigError(
                f"precision {self.precision} was asked for, but {self._device.type} offers only: "
                f"{', '.join(('fp32', *self.precisions()))}. Choose one of these, or another accelerator."
            )
        self._autocast: AbstractContextManager[Any] = contextlib.nullcontext()
        if self.precision != "fp32":
            self._autocast = torch.autocast(device.type, dtype=_DTYPES[self.precision])
        self._scaler = torch.amp.GradScaler(device.type) if self.precision == "fp16" else None
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)

    @property
    def device(self) -> torch.device:
        return self._device

    def precisions(self) -> tuple[Precision, ...]:
        """Returns the lower precisions that this device computes in, the preferred one first."""
        return ("bf16", "fp16")

    def _best_mixed_precision(self) -> Precision:
        offered = self.precisions()
        if "bf16" in offered:
            return "bf16"
        if "fp16" in offered and self._device.type == "cuda":
            return "fp16"
        raise ConfigError(
            f"mixed_precision: true was asked for, but {self._device.type} has no bf16. "
            "Write precision: fp32, or choose another accelerator."
        )

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._autocast

    def backward(self, loss: Tensor) -> None:
        if self._scaler is not None:
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        elif _engine is not None and _is_plain(loss, self._one):
            # Straight to autograd's engine: `loss.backward()` spends as long again as everything that this framework
            # adds to a step on finding out that the loss is a scalar, and on making this one (docs/decisions/0008).
            _engine.run_backward((loss,), (self._one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def check_finite(self, gradients: list[Tensor], norm: Tensor | None = None) -> Tensor:
        # GradScaler's own kernel, with a scale of one: one call for all gradients instead of several for each.
        found = self._found.zero_()
        for group in self._grouped(gradients) if norm is None else [[norm]]:
            torch._amp_foreach_non_finite_check_and_unscale_(group, found, self._one)
        return found

    def _grouped(self, gradients: list[Tensor]) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            groups.setdefault(gradient.dtype, []).append(gradient)
        return list(groups.values())

    def step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        taken = self._step(optimizer, nonfinite)
        if self._scaler is not None:
            self._scaler.update()
        return taken

    def _step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        return super().step(optimizer, nonfinite)

    def overflow_expected(self) -> bool:
        # Below a scale of one there is nothing left to scale down: then the gradients themselves are at fault.
        return self._scaler is not None and self._scaler.get_scale() >= 1.0

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._scaler is not None and "scaler" in state:
            self._scaler.load_state_dict(state["scaler"])


def _is_plain(loss: Any, one: Tensor) -> bool:
    return type(loss) is Tensor and not loss.ndim and loss.dtype is one.dtype and loss.device == one.device
