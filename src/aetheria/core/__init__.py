"""The contracts: what a model, a data module, a callback, a logger and an accelerator promise each other.

Nothing here trains. The loop (`aetheria.orchestrator`) is written against these classes only, so that a test can
hand it an accelerator of ten lines and a callback of three.
"""

from aetheria.core.hardware import Accelerator, LateAnswer, Reading, recursive_to_device
from aetheria.core.observers import Callback, Logger, RunEvent, RunResult, TrainingContext
from aetheria.core.science import AetherDataModule, AetherModel, MicroBatch, OptimizerPlan, Schedule, Scheduler

__all__ = [
    "Accelerator",
    "AetherDataModule",
    "AetherModel",
    "Callback",
    "LateAnswer",
    "Logger",
    "MicroBatch",
    "OptimizerPlan",
    "Reading",
    "RunEvent",
    "RunResult",
    "Schedule",
    "Scheduler",
    "TrainingContext",
    "recursive_to_device",
]
