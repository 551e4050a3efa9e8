"""From the words of the configuration to a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aetheria.accelerator.ranks import launched_ranks
from aetheria.config import TrainingConfig
from aetheria.core import Accelerator
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["best_device", "create_accelerator", "deterministic"]

_OF_RANKS = ("ddp", "fsdp", "local_sgd")


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
    params: dict[str, Any] = {} if precision == "fp32" else {"precision": precision}
    if launched_ranks() > 1:
        if name in ("cpu", "cuda"):
            name, params = "ddp", params | {"device": name}
        elif name == "mps":
            raise ConfigError("accelerator mps: there is one in a machine, and no ranks on it. Launch one process.")
    elif name in _OF_RANKS:
        raise ConfigError(
            f"accelerator {name} is for several ranks, and this process was launched alone. Launch them with "
            "`aetheria launch --nproc N CONFIG`, or write accelerator: auto, which fits both."
        )
    accelerator: Accelerator = Registry.build("accelerator", name, params | config.accelerator_params)
    return accelerator


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Asks torch, for the time of a block, for algorithms that give the same bits every time.

    Operations that have none then raise. See https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if not enabled:  # not even to say so: torch imports its compiler when it is asked, which takes seconds
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first CUDA call
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
