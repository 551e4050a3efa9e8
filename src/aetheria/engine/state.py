"""What goes into a snapshot, and how a run is put back into it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from aetheria.core import Accelerator, AetherModel
from aetheria.core.shards import as_part_of, cut_like, is_sharded, part_of
from aetheria.data import BatchSource
from aetheria.data.order import mix
from aetheria.data.randomness import GeneratorStates, isolated_generators
from aetheria.engine.hooks import Hooks
from aetheria.engine.metrics import MetricMeans
from aetheria.engine.schedules import Schedules
from aetheria.engine.steering import Steering
from aetheria.errors import SnapshotMismatchError
from aetheria.registry import Registry
from aetheria.runs import now, versions
from aetheria.snapshot import Manifest, Snapshot, SnapshotContent
from aetheria.snapshot.format import clean_name, model_tensors
from aetheria.snapshot.writer import encode_state

__all__ = ["Restored", "RunParts", "describe_model", "restore_model"]

ELASTIC_STREAM = 10  # part of the key of the generators of ranks that no snapshot knows


class Restored(NamedTuple):
    """What a snapshot says to the loop.

    Attributes:
        loop: the loop's own state.
        restore_generators: to be called when nothing else will draw from them before the first step.
        position: of the journal when it was taken.
        ranks: among how many the samples were shared until then.
        warnings: what could not be put back as it was.
    """

    loop: dict[str, Any]
    restore_generators: Callable[[], None]
    position: int
    ranks: int
    warnings: list[str]


@dataclass(frozen=True)
class RunParts:
    """Everything in a run that has a state of its own, besides the loop."""

    model: AetherModel
    schedules: Schedules
    accelerator: Accelerator
    hooks: Hooks
    means: MetricMeans
    source: BatchSource
    steering: Steering

    def capture(
        self,
        loop: dict[str, Any],
        *,
        run_id: str,
        step: int,
        epoch: int,
        reason: str,
        metrics: dict[str, float],
        pinned: bool = False,
        exchange: bool = True,
    ) -> SnapshotContent:
        """Returns everything needed to continue from here. The tensors are the live ones.

        Args:
            loop: the loop's own state: plain containers.
            run_id: the run that takes it.
            step: optimiser steps taken.
            epoch: the epoch it lies in.
            reason: why it is taken.
            metrics: of exactly this step.
            pinned: whether it is kept for ever.
            exchange: whether every rank calls this now, and gives its own part.
        """
        if exchange:
            self.accelerator.share_buffers(self.model)
        with self.accelerator.shared_weights(self.model):
            weights, extra = model_tensors(self.model)
        manifest = Manifest(
            run_id=run_id,
            step=step,
            epoch=epoch,
            created=now(),
            reason=reason,
            pinned=pinned,
            metrics=metrics,
            model=describe_model(self.model),
            optimizer=self.schedules.describe(),
            world_size=self.accelerator.world_size,
            versions=_circumstances(),
        )
        state = {
            "loop": loop,
            "optimizer": self.schedules.plan.optimizer.state_dict(),
            "schedulers": self.schedules.state_dict(),
            "accelerator": self.accelerator.state_dict(),
            "callbacks": self.hooks.state_dict(),
            "model_extra": extra,
            "steering": self.steering.state_dict(),
        }
        rank_state = {
            "generators": GeneratorStates.capture().to_plain(),
            "means": self.means.state_dict(),
            "device_generator": self.accelerator.generator_state(),
            "loader": self.source.state_dict(),
            "accelerator": self.accelerator.own_state(),
        }
        others: list[bytes] = []
        if exchange and self.accelerator.world_size > 1:
            others = self.accelerator.gather(b"" if self.accelerator.is_main_process else encode_state(rank_state))[1:]
        return SnapshotContent(manifest, weights, state, rank_state, others)

    def restore(self, snapshot: Snapshot, overridden: Collection[str] = ()) -> Restored:
        """Puts everything back, except the random generators.

        Args:
            snapshot: of this run, or of one like it.
            overridden: knobs that keep the value they have, whatever they were when the snapshot was taken.

        Raises:
            SnapshotMismatchError: the snapshot is of another model or another optimiser.
        """
        state = snapshot.state(self._part if self.accelerator.sharded else None)
        together = state["accelerator"].get("tensor_parallel", 1)
        rank_state = self._rank_state(snapshot, together)
        steering = state.get("steering", {"position": 0, "knobs": {}})
        knobs = {key: value for key, value in steering["knobs"].items() if key not in overridden}
        warnings = self.steering.knobs.restore(knobs, structural=True)
        restore_model(self.model, self._weights(snapshot), state["model_extra"])
        _restore_optimizer(self.schedules, snapshot.manifest.optimizer, state)
        self.accelerator.load_state_dict(state["accelerator"])
        warnings += self.accelerator.load_own_state(rank_state.get("accelerator", {}))
        self.means.load_state_dict(rank_state["means"])
        self.source.load_state_dict(rank_state["loader"])
        warnings += self.steering.knobs.restore(knobs, structural=False)
        warnings += [
            f"the snapshot holds the state of a callback {name}, which this run does not have; it is left out"
            for name in self.hooks.load_state_dict(state["callbacks"])
        ]
        then, here = snapshot.manifest.versions, _circumstances()
        if changed := [
            f"{name} {then[name]} -> {here[name]}" for name in then.keys() & here if then[name] != here[name]
        ]:
            warnings.append(f"changed since the snapshot: {', '.join(changed)}. Bits may differ from here on")

        def restore_generators() -> None:
            GeneratorStates.from_plain(rank_state["generators"]).restore()
            if isinstance(device := rank_state["device_generator"], Tensor):
                self.accelerator.set_generator_state(device)
            else:  # of other ranks, or of another device
                self.accelerator.seed_generator(self._elastic_key(snapshot))

        ranks = snapshot.manifest.world_size
        if not self._arranged_like(ranks, together):
            here_are = _arrangement(self.accelerator.world_size, self.accelerator.tensor_parallel)
            warnings.append(
                f"the snapshot is of {_arrangement(ranks, together)}, and is continued by {here_are}: in the same "
                "order of samples, but a model that draws (dropout) draws anew"
            )
        return Restored(state["loop"], restore_generators, steering["position"], ranks // together, warnings)

    def _arranged_like(self, ranks: int, together: int) -> bool:
        return (ranks, together) == (self.accelerator.world_size, self.accelerator.tensor_parallel)

    def _elastic_key(self, snapshot: Snapshot) -> int:
        """Returns what generators are seeded with whose states nobody has saved."""
        return mix(snapshot.manifest.step, ELASTIC_STREAM, self.accelerator.data_ranks, self.accelerator.data_rank)

    def _part(self, _name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.accelerator.new_shard(shape, dtype)

    def _weights(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Returns the snapshot's weights; of a sharded model, this rank's parts."""
        if not self.accelerator.sharded:
            return snapshot.weights()
        own, _ = model_tensors(self.model)

        def place(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            ours = own.get(name)
            if ours is None or not is_sharded(ours):
                return torch.empty(shape, dtype=dtype)
            if ours.shape != shape:
                return self.accelerator.new_shard(shape, dtype)  # it is refused when all names and shapes are known
            return as_part_of(ours, torch.empty_like(part_of(ours), dtype=dtype))

        return snapshot.weights(place)

    def _rank_state(self, snapshot: Snapshot, together: int) -> dict[str, Any]:
        """Returns this rank's state; where ranks were arranged otherwise, what they had is the first share's now."""
        ranks, share = snapshot.manifest.world_size, self.accelerator.data_rank
        if self._arranged_like(ranks, together):
            return snapshot.rank_state(self.accelerator.rank)
        states = [snapshot.rank_state(number) for number in range(0, ranks, together)]  # one of each share
        with isolated_generators(self._elastic_key(snapshot)):
            generators = GeneratorStates.capture().to_plain()
        means: dict[str, Any] = {"reading": {}, "epoch": {}}
        if share == 0:
            means = {kept: _added_up([state["means"][kept] for state in states]) for kept in means}
        own = self.accelerator.combined([state.get("accelerator", {}) for state in states])
        return states[0] | {"generators": generators, "device_generator": None, "means": means, "accelerator": own}


def _added_up(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: tuple(map(sum, zip(*(part[name] for part in parts if name in part), strict=True))) for name in names}


def _arrangement(ranks: int, together: int) -> str:
    return f"{ranks} ranks" + (f" (tensor_parallel: {together})" if together > 1 else "")


def _circumstances() -> dict[str, str]:
    """Returns what decides the bits, besides what is stored: versions, and among how many threads sums are divided."""
    return versions() | {"threads": str(torch.get_num_threads())}


def describe_model(model: AetherModel) -> dict[str, Any]:
    """Returns what a manifest says about a model: enough to build it again, where it is registered."""
    stored: dict[str, Any] = {}
    unstored = []
    for name, value in model.hyperparameters.items():
        try:
            stored[name] = _as_json(value)
        except TypeError:
            unstored.append(name)
    return {
        "name": Registry.name_of("model", type(model)),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "hyperparameters": stored,
        "unstored": unstored,
    }


def _as_json(value: Any) -> Any:
    """Returns a constructor argument as a configuration would spell it; the registry turns it back when it builds."""
    if isinstance(value, Enum):
        return _as_json(value.value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is not plain")


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Copies weights and buffers into a model, in place.

    Args:
        model: what is written to.
        tensors: by clean names, as a snapshot holds them.
        extra: extra state, by clean names.

    Raises:
        SnapshotMismatchError: names, shapes or dtypes differ; the message shows the first of each.
    """
    own, own_extra = model_tensors(model)
    wanted, saved = {**own, **own_extra}, {**tensors, **extra}
    problems = []
    if missing := [name for name in wanted if name not in saved]:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected := [name for name in saved if name not in wanted]:
        problems.append(f"it has {_some(unexpected)}, which the model does not")
    for name, ours in own.items():
        theirs = tensors.get(name, ours)
        if is_lazy(ours):  # becomes whatever it is given
            continue
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            problems.append(
                f"{name} is {list(theirs.shape)} {theirs.dtype} there and {list(ours.shape)} {ours.dtype} here"
            )
    if problems:
        raise SnapshotMismatchError(
            f"the snapshot is of another model: {'; '.join(problems[:4])}. "
            "Use the model, and the parameters, that it was trained with."
        )
    model.load_state_dict({name: saved[clean_name(name)] for name in model.state_dict()})


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _restore_optimizer(schedules: Schedules, saved: dict[str, Any], state: dict[str, Any]) -> None:
    if saved != (ours := schedules.describe()):
        raise SnapshotMismatchError(
            f"the snapshot is of another optimiser: {_describe(saved)} there, {_describe(ours)} here. "
            "Resume with the model's configure_optimizers as it was, or start a new run."
        )
    optimizer: Optimizer = schedules.plan.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                values[name] = cut_like(value, parameters[index])  # the snapshot may be of one process
    optimizer.load_state_dict(state["optimizer"])
    schedules.load_state_dict(state["schedulers"])
    # Schedulers warn when they are stepped before the optimiser was, and look at this mark; it was, in a former life.
    optimizer._opt_called = True  # type: ignore[attr-defined]


def _describe(description: Mapping[str, Any]) -> str:
    groups = "+".join(map(str, description.get("groups", [])))
    schedulers = ", ".join(description.get("schedulers", [])) or "no scheduler"
    return f"{description.get('class')} over {groups} parameters with {schedulers}"
