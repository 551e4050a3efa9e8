"""What the integrations have in common: the knobs of optimisers, the beginning, and where checkpoints go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aetheria.control.optimizer_knobs import optimizer_knobs
from aetheria.control.weavelet import Weavelet
from aetheria.errors import ConfigError

__all__ = ["add_optimizer_knobs", "begin", "checkpoint_path"]


def add_optimizer_knobs(
    weavelet: Weavelet, optimizers: Sequence[Any], schedulers_of: Callable[[Any], Sequence[Any]]
) -> None:
    """Makes learning rate, weight decay, momentum and betas of optimisers knobs.

    Where there are several optimisers, the names begin with their number: `optimizer_1.learning_rate`.

    Args:
        weavelet: gets the knobs.
        optimizers: anything with `param_groups`.
        schedulers_of: returns the schedulers that move an optimiser's learning rate, as they are now.
    """
    for number, optimizer in enumerate(optimizers):
        # Arguments, not closures over the loop's variables, which would all mean the last optimiser.
        def itself(optimizer: Any = optimizer) -> Any:
            return optimizer

        def its_schedulers(optimizer: Any = optimizer) -> Sequence[Any]:
            return schedulers_of(optimizer)

        for knob in optimizer_knobs(itself, its_schedulers):
            key = knob.key if len(optimizers) == 1 else f"optimizer_{number}.{knob.key}"
            weavelet.knobs.add(dataclasses.replace(knob, key=key))
    if weavelet.started:
        weavelet.say_knobs()


def checkpoint_path(weavelet: Weavelet, suffix: str = "") -> Path:
    """Returns where a checkpoint of the present step goes, in the run folder; its parent is there.

    Not among Aetheria's own snapshots: a framework's checkpoint is in that framework's format.
    """
    folder = weavelet.folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)  # also on a machine that the first rank is not on
    return folder / f"step-{weavelet.global_step:08d}{suffix}"


def begin(weavelet: Weavelet, processes: int, framework: str, device: Any) -> None:
    """Starts a Weavelet, if that has not been done, and lets it find the other processes; every one of them calls it.

    Args:
        weavelet: has its knobs and its step by now.
        processes: how many train, as the framework says.
        framework: its name, for people.
        device: on which this process trains.

    Raises:
        ConfigError: there are other processes, with which it cannot agree.
        RankError: another process has not come as far, or has failed.
    """
    if weavelet.started:
        weavelet.join_ranks()
    else:
        weavelet.register_device(str(device))
        weavelet.start()
    if weavelet.world_size != processes:
        weavelet.stop("failed")
        raise ConfigError(
            f"{framework} trains in {processes} processes here, but the Weavelet knows of {weavelet.world_size}: it "
            "finds the others through torch.distributed, which all of them must have initialised, and not where it was "
            'made with ranks="alone". Steered by parts, the processes would come to have different models.'
        )
