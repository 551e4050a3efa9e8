"""Aetheria: PyTorch training that can be steered while it runs.

The public names are imported when they are first used, so that `aetheria --help` never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aetheria.client import connect as connect
    from aetheria.config import TrainingConfig as TrainingConfig
    from aetheria.control.knobs import controllable as controllable
    from aetheria.control.knobs import weavelet_controllable as weavelet_controllable
    from aetheria.control.knobs import weavelet_handler as weavelet_handler
    from aetheria.control.weavelet import TrainingStopped as TrainingStopped
    from aetheria.control.weavelet import Weavelet as Weavelet
    from aetheria.core import Accelerator as Accelerator
    from aetheria.core import AetherDataModule as AetherDataModule
    from aetheria.core import AetherModel as AetherModel
    from aetheria.core import Callback as Callback
    from aetheria.core import Logger as Logger
    from aetheria.core import OptimizerPlan as OptimizerPlan
    from aetheria.core import RunResult as RunResult
    from aetheria.core import Schedule as Schedule
    from aetheria.data.module import LoaderDataModule as LoaderDataModule
    from aetheria.inference import Predictor as Predictor
    from aetheria.orchestrator import Orchestrator as Orchestrator
    from aetheria.registry import Registry as Registry

__version__ = "0.1.0"

_HOMES = {
    "connect": "aetheria.client",
    "TrainingConfig": "aetheria.config",
    "controllable": "aetheria.control.knobs",
    "weavelet_controllable": "aetheria.control.knobs",
    "weavelet_handler": "aetheria.control.knobs",
    "TrainingStopped": "aetheria.control.weavelet",
    "Weavelet": "aetheria.control.weavelet",
    "Accelerator": "aetheria.core",
    "AetherDataModule": "aetheria.core",
    "AetherModel": "aetheria.core",
    "Callback": "aetheria.core",
    "Logger": "aetheria.core",
    "OptimizerPlan": "aetheria.core",
    "RunResult": "aetheria.core",
    "Schedule": "aetheria.core",
    "LoaderDataModule": "aetheria.data.module",
    "Predictor": "aetheria.inference",
    "Orchestrator": "aetheria.orchestrator",
    "Registry": "aetheria.registry",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'aetheria' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
