"""The optimisers and learning-rate schedulers of torch under short names, and one schedule it lacks."""

from __future__ import annotations

import math

from torch import optim
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["warmup_cosine"]

OPTIMIZERS = {
    "adadelta": optim.Adadelta,
    "adafactor": optim.Adafactor,
    "adagrad": optim.Adagrad,
    "adam": optim.Adam,
    "adamax": optim.Adamax,
    "adamw": optim.AdamW,
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "rmsprop": optim.RMSprop,
    "sgd": optim.SGD,
}

SCHEDULERS = {
    "constant": lr_scheduler.ConstantLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "cosine_restarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "exponential": lr_scheduler.ExponentialLR,
    "linear": lr_scheduler.LinearLR,
    "multistep": lr_scheduler.MultiStepLR,
    "onecycle": lr_scheduler.OneCycleLR,
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "polynomial": lr_scheduler.PolynomialLR,
    "step": lr_scheduler.StepLR,
    "swa": swa_utils.SWALR,
}

for name, optimizer_class in OPTIMIZERS.items():
    Registry.register_optimizer(name)(optimizer_class)
for name, scheduler_class in SCHEDULERS.items():
    Registry.register_scheduler(name)(scheduler_class)


@Registry.register_scheduler("warmup_cosine")
def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, minimum_factor: float = 0.0
) -> LambdaLR:
    """Returns a schedule that rises linearly, then falls along half a cosine, and stays down.

    Unlike `OneCycleLR`, which raises, and `CosineAnnealingLR`, which climbs again, it may be stepped past the end:
    a run that is made longer while it trains keeps its last learning rate. The cosine is that of Loshchilov and
    Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (https://arxiv.org/abs/1608.03983), without the
    restarts.

    Args:
        optimizer: its groups' learning rates are the peak.
        total_steps: the step from which the learning rate stays at its minimum.
        warmup_steps: steps of linear rise; the first is taken at 1 / (warmup_steps + 1) of the peak.
        minimum_factor: the learning rate at the end, as a share of the peak.

    Raises:
        ConfigError: nothing is left for the cosine.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(
            f"warmup_cosine got total_steps={total_steps} and warmup_steps={warmup_steps}; the warm-up must be "
            "shorter than the whole, and neither negative."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return minimum_factor + (1.0 - minimum_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
