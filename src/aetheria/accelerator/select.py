"""From the words of the configuration to a device."""

from __future__ import annotations

import os

import torch

from aetheria.config import TrainingConfig
from aetheria.core import Accelerator
from aetheria.registry import Registry

__all__ = ["best_device", "create_accelerator", "make_deterministic"]


def best_device() -> str:
    """Returns the name of the fastest accelerator here: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """Returns the accelerator that the configuration asks for; `auto` takes the fastest device there is.

    Raises:
        ConfigError: the device, or the precision on it, is not to be had here.
        RegistryError: nobody registered that name.
    """
    name = best_device() if config.accelerator == "auto" else config.accelerator
    precision = config.precision or "mixed"
    # An accelerator of the user's own need not know about precision until somebody asks for one.
    accelerator: Accelerator = Registry.build(
        "accelerator", name, {} if precision == "fp32" else {"precision": precision}
    )
    return accelerator


def make_deterministic(enabled: bool) -> None:
    """Asks torch for algorithms that give the same bits every time; those that have none then raise.

    See https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before the first CUDA call
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = False
