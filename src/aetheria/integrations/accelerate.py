"""Accelerate: a training loop of one's own, prepared by an `Accelerator` and steered by a Weavelet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aetheria.control.weavelet import Weavelet
from aetheria.errors import MissingDependencyError
from aetheria.integrations.common import add_optimizer_knobs, begin, checkpoint_path

try:
    import torch
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
except ImportError as error:
    raise MissingDependencyError.of("accelerate", "accelerate", "aetheria.integrations.accelerate") from error

__all__ = ["prepare"]


def prepare(weavelet: Weavelet, accelerator: Any, *objects: Any) -> Any:
    """Lets an `Accelerator` prepare objects, and watches what comes out of it: `weavelet.prepare`.

    A step is a step that the optimiser took: neither the micro-batches of a window count, nor the steps that a
    gradient scaler skipped. Commands take effect when the model is called next: then the scheduler has been stepped
    and the gradients are gone, wherever the loop does that, so that a snapshot holds a whole step. Where no model is
    prepared together with the optimiser, they take effect right after the optimiser's step. Of several processes each
    calls the model to train it as often as the others; a call without gradients is none of these.

    Args:
        weavelet: started by this if it has not been.
        accelerator: an `accelerate.Accelerator`.
        *objects: what `accelerator.prepare` takes. Model, optimiser and scheduler belong in one call.

    Returns:
        What `accelerator.prepare` returns.

    Raises:
        ConfigError: several processes train, which have not found one another.
    """
    prepared = accelerator.prepare(*objects)
    everything: Sequence[Any] = prepared if len(objects) > 1 else [prepared]
    optimizers = [each.optimizer for each in everything if isinstance(each, AcceleratedOptimizer)]
    models = [each for each in everything if isinstance(each, torch.nn.Module)]
    schedulers = [each.scheduler for each in everything if isinstance(each, AcceleratedScheduler)]
    if not optimizers:
        return prepared  # a loader, for instance: nothing to steer

    add_optimizer_knobs(
        weavelet, optimizers, lambda optimizer: [each for each in schedulers if each.optimizer is optimizer]
    )
    for model in models:
        weavelet.register(accelerator.unwrap_model(model))

    @weavelet.action("snapshot", together=True)
    def save() -> dict[str, str]:
        return {"path": str(accelerator.save_state(str(checkpoint_path(weavelet))))}

    counter = _Counter(weavelet, early=not models)
    # The optimiser inside: it is called for steps that are taken, and the one around it has no such hook.
    optimizers[0].register_step_post_hook(counter.count)
    for model in models:
        model.register_forward_pre_hook(_AtForward(counter.attend))
    begin(weavelet, accelerator.num_processes, "Accelerate", accelerator.device)
    return prepared


class _Counter:
    """Counts steps when they are taken, and lets commands take effect a little later.

    Args:
        weavelet: is told.
        early: there is no later: commands take effect when a step is counted.
    """

    def __init__(self, weavelet: Weavelet, early: bool) -> None:
        self._weavelet = weavelet
        self._early = early
        self._due = False

    def count(self, *_: Any) -> None:
        self._weavelet.global_step += 1  # now, so that what the loop logs next is logged of this step
        self._due = True
        if self._early:
            self.attend()

    def attend(self) -> None:
        # One process alone may evaluate between two steps, while the others wait for it somewhere else.
        if self._due and (self._early or self._weavelet.world_size == 1 or torch.is_grad_enabled()):
            self._due = False
            self._weavelet.global_step -= 1  # which `step` counts again
            self._weavelet.step({})


class _AtForward:
    """Is called before a model is. A copy of the model, or one that is loaded from a file, is not steered."""

    def __init__(self, attend: Callable[[], None] | None = None) -> None:
        self._attend = attend

    def __call__(self, _model: Any, _inputs: Any) -> None:
        if self._attend is not None:
            self._attend()

    def __reduce__(self) -> tuple[type[_AtForward], tuple[()]]:
        return _AtForward, ()
