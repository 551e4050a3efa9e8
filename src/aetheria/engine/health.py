"""A look into a run's health that changes nothing in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aetheria.core import Accelerator, AetherModel
from aetheria.core.shards import whole
from aetheria.data import BatchSource, Cursor
from aetheria.data.order import mix
from aetheria.data.randomness import isolated_generators
from aetheria.engine.evaluation import EVALUATION_STREAM, evaluating
from aetheria.engine.together import fingerprints
from aetheria.errors import CommandError

__all__ = ["Patient", "check_health"]


class Patient(Protocol):
    """What is looked into: the Orchestrator."""

    model: AetherModel
    accelerator: Accelerator
    _val: BatchSource | None

    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def samples_seen(self) -> int: ...


def check_health(check: str, run: Patient) -> dict[str, Any]:
    """Looks into one of "numerics", "activations", "throughput", "determinism", "ranks".

    Raises:
        CommandError: it needs validation data, and there are none.
    """
    checks = {
        "numerics": _numerics,
        "activations": _activations,
        "throughput": _throughput,
        "determinism": _determinism,
        "ranks": _ranks,
    }
    return checks[check](run)


def _ranks(run: Patient) -> dict[str, Any]:
    """Compares the weights of all ranks."""
    digests = fingerprints(run.accelerator, run.model)
    return {"healthy": len(set(digests)) == 1, "digests": digests}


def _numerics(run: Patient) -> dict[str, Any]:
    """Counts what is not finite, in the weights and in the optimiser's state, by name."""
    wrong: dict[str, int] = {}
    largest = 0.0
    for name, parameter in run.model.named_parameters():
        for place, tensor in ((name, parameter), *_states(run.optimizer, name, parameter)):
            if tensor.is_floating_point() and tensor.numel():
                tensor = whole(tensor.detach())
                if count := int((~torch.isfinite(tensor)).sum()):
                    wrong[place] = count
                elif place == name:
                    largest = max(largest, float(tensor.abs().max()))
    return {"healthy": not wrong, "not_finite": wrong, "largest_weight": largest}


def _states(optimizer: Optimizer, name: str, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value


def _activations(run: Patient) -> dict[str, Any]:
    """Watches what every module puts out for one validation batch."""
    found: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                found[name] = {
                    "mean": float(output.mean()),
                    "deviation": float(output.std(correction=0)),
                    "zeros": float((output == 0).float().mean()),
                    "not_finite": int((~torch.isfinite(output)).sum()),
                }

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in run.model.named_modules() if name]
    try:
        with _one_batch(run) as batch:
            run.accelerator.step_function(run.model, "validation_step")(batch)
    finally:
        for handle in handles:
            handle.remove()
    dead = [name for name, values in found.items() if values["zeros"] == 1.0]
    wrong = [name for name, values in found.items() if values["not_finite"]]
    return {"healthy": not dead and not wrong, "dead": dead, "not_finite": wrong, "modules": found}


def _throughput(run: Patient) -> dict[str, Any]:
    """Times one validation batch; the training's own rate is among the metrics of `Throughput`."""
    step = run.accelerator.step_function(run.model, "validation_step")
    with _one_batch(run) as batch:
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            step(batch)
            run.accelerator.synchronize()
            seconds.append(time.perf_counter() - begun)
    return {"validation_batch_seconds": min(seconds), "samples_seen": run.samples_seen}


def _determinism(run: Patient) -> dict[str, Any]:
    """Computes one validation batch twice, and compares the bits."""
    step = run.accelerator.step_function(run.model, "validation_step")
    results = []
    for _ in range(2):
        with _one_batch(run) as batch:
            results.append({name: value for name, value in step(batch).items() if isinstance(value, Tensor)})
    different = [name for name, value in results[0].items() if not torch.equal(value, results[1][name])]
    return {"healthy": not different, "different": different}


@contextmanager
def _one_batch(run: Patient) -> Iterator[Any]:
    if run._val is None:
        raise CommandError("this check needs a validation batch, and the run has no validation data.")
    state = run.accelerator.generator_state()
    try:
        accelerator = run.accelerator
        key = mix(0, EVALUATION_STREAM)
        accelerator.seed_generator(key)
        generators = isolated_generators(key)
        with evaluating(run.model, accelerator.sharded), generators, accelerator.forward_context():
            yield run.accelerator.process_batch(next(iter(run._val.iterate(Cursor()))).data)
    finally:
        if state is not None:
            run.accelerator.set_generator_state(state)
