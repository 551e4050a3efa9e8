"""Looking at a model without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aetheria.core import Accelerator, AetherModel
from aetheria.data.cursor import Cursor
from aetheria.data.order import mix
from aetheria.data.randomness import isolated_generators
from aetheria.data.sources import BatchSource
from aetheria.engine.metrics import NOT_METRICS, MetricMeans
from aetheria.errors import DataError, ModelError

__all__ = ["evaluate", "evaluating"]

EVALUATION_STREAM = 5  # part of the key of what a model may draw while it is evaluated


@contextmanager
def evaluating(model: nn.Module, sharded: bool = False) -> Iterator[None]:
    """Puts every module into eval mode, and afterwards each back into the mode it was in, whatever happens.

    Sharded weights are brought together in memory that is used again in training: not in inference mode, whose tensors
    are of no use there.

    Not `model.train()`: a module that the user keeps in eval mode while training (a frozen batch norm) stays there.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad() if sharded else torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: AetherModel,
    source: BatchSource,
    accelerator: Accelerator,
    step: Callable[[Any], dict[str, Tensor]],
    *,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the weighted means of what a step returns over a whole loader; None if it was interrupted.

    Every sample counts once, and by its weight. The training's generators are not moved, so that how often a run is
    validated cannot be seen in its weights.

    Args:
        model: is put into eval and inference mode, and back.
        source: the data, from its beginning.
        accelerator: the hardware.
        step: `validation_step` or `test_step`.
        seed: of the run.
        interrupted: is asked before each batch.

    Raises:
        DataError: there is not a single batch.
        ModelError: the step returned something else than numbers by name.
    """
    means = MetricMeans(accelerator)
    device_generator = accelerator.generator_state()
    key = mix(seed, EVALUATION_STREAM)
    count = 0
    try:
        accelerator.seed_generator(key)
        with evaluating(model, accelerator.sharded), isolated_generators(key):
            for batch in accelerator.prepare_dataloader(source.iterate(Cursor())):
                if interrupted():
                    return None
                with accelerator.forward_context():
                    outputs = step(batch.data)
                if not isinstance(outputs, dict):
                    raise ModelError(
                        f"validation_step returned a {type(outputs).__name__}; expected a dictionary of metrics."
                    )
                values = {name: value for name, value in outputs.items() if name not in NOT_METRICS}
                means.add(values, outputs.get("weight", batch.size) if batch.size else 0)
                count += 1
            if not count:
                raise DataError("the validation loader is empty: it gave no batch. Return None if there is no data.")
            return means.since_epoch().values()
    finally:
        if device_generator is not None:
            accelerator.set_generator_state(device_generator)
