"""The science: what is learnt, and from what."""

from __future__ import annotations

import inspect
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["AetherDataModule", "AetherModel", "MicroBatch", "OptimizerPlan", "Schedule", "Scheduler"]

Scheduler = LRScheduler | ReduceLROnPlateau


@dataclass(frozen=True)
class Schedule:
    """One learning-rate scheduler and when it is stepped.

    Attributes:
        scheduler: any scheduler of `torch.optim.lr_scheduler`.
        interval: "step" (after every optimiser step that was taken, never after a dropped one) or "epoch".
        monitor: the epoch metric that `ReduceLROnPlateau` looks at, for instance "val_loss".
    """

    scheduler: Scheduler
    interval: Literal["step", "epoch"] = "epoch"
    monitor: str | None = None


@dataclass(frozen=True)
class OptimizerPlan:
    """What `AetherModel.configure_optimizers` may return when one optimiser and one scheduler do not say it all.

    Attributes:
        optimizer: one optimiser, of any number of parameter groups. A group may carry a "name"; its learning rate is
            then reported as `learning_rate.<name>`, otherwise as `learning_rate.<index>`.
        schedules: the schedulers, each with its interval.
    """

    optimizer: Optimizer
    schedules: Sequence[Schedule] = ()


class _RemembersArguments(ABCMeta):
    """Notes the constructor's arguments on the instance before `__init__` runs, so that `__init__` may read them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        if isinstance(instance, cls):
            # Past nn.Module.__setattr__, which refuses to work before nn.Module.__init__ has run.
            object.__setattr__(instance, "hyperparameters", _bound_arguments(cls, args, kwargs))
            instance.__init__(*args, **kwargs)
        return instance


def _bound_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return {}  # __init__ is about to raise the same error, with its own name in the traceback
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[1:])  # without self
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and not arguments.get(name):
            arguments.pop(name, None)
    return arguments


class AetherModel(nn.Module, ABC, metaclass=_RemembersArguments):
    """A model that knows how it is trained, and alone decides how it is optimised.

    The constructor's arguments are remembered in `hyperparameters` and stored in every snapshot, so that
    `aetheria.Predictor` rebuilds the model without a configuration.

    Attributes:
        hyperparameters: the constructor's arguments by name, defaults included.
        weight_unit: what `weight` in a step's dictionary counts; "samples" unless the model says "tokens".
    """

    hyperparameters: dict[str, Any]
    weight_unit: str = "samples"

    def save_hyperparameters(self, *, ignore: Iterable[str] = ()) -> None:
        """Chooses which constructor arguments are stored; without this call all of them are.

        Args:
            ignore: names that must not be stored, for instance a module handed in from outside. A Predictor then
                asks for them.
        """
        ignored = set(ignore)
        self.hyperparameters = {name: value for name, value in self.hyperparameters.items() if name not in ignored}

    @abstractmethod
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the loss of one micro-batch.

        Returns:
            A dictionary with at least "loss": a scalar with a gradient, the **mean** over the micro-batch. It may
            hold "weight": what that mean is weighted by (a number or a scalar tensor: samples or tokens; the number
            of samples when absent), "sample_loss": a tensor of shape [batch], and any other scalar as a metric.
        """

    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the metrics of one evaluation batch, in eval and inference mode. By default the training step."""
        return self.training_step(batch)

    def test_step(self, batch: Any) -> dict[str, Tensor]:
        """Computes the metrics of one test batch. By default the validation step."""
        return self.validation_step(batch)

    def predict_step(self, batch: Any) -> Any:
        """Computes the predictions of one batch, for the Predictor. By default `self(batch)`."""
        return self(batch)

    @abstractmethod
    def configure_optimizers(self) -> Optimizer | tuple[Optimizer, Scheduler] | OptimizerPlan:
        """Returns the optimiser; with a scheduler in a pair (stepped per epoch), or an `OptimizerPlan`."""


class AetherDataModule(ABC):
    """Where the samples come from. The loaders may be `torch.utils.data.DataLoader`s, sequences or iterables."""

    def prepare_data(self) -> None:  # noqa: B027 - a hook, not an obligation
        """Downloads or converts; called once per node, before `setup`. Must not set attributes."""

    def setup(self) -> None:  # noqa: B027 - a hook, not an obligation
        """Loads and splits; called on every rank."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[Any]:
        """Returns the loader of the training batches."""

    def val_dataloader(self) -> Iterable[Any] | None:
        """Returns the loader of the validation batches, or None."""
        return None

    def test_dataloader(self) -> Iterable[Any] | None:
        """Returns the loader of the test batches, or None."""
        return None


@dataclass(slots=True)
class MicroBatch:
    """What a loader hands to the loop: the user's batch and what the sampler knows about it.

    Where several ranks train, they take their micro-batches side by side: the samples of all of them together lie next
    to one another in the order. At the end of the data there may be fewer samples than ranks; a rank that is left
    without one gets somebody else's, so that it has something to compute on, with a size of 0, so that it counts for
    nothing.

    Attributes:
        data: the batch as the collate function made it.
        size: the number of samples in it that count.
        ids: the stable ids of those samples, int64 of shape [size]; None for iterables, which have none.
        total: the number of samples in the micro-batches of all ranks; `size` where there is one rank.
        all_ids: the ids of those.
        positions: how many places in the order of the data it spans; `total` where nothing is passed over.
    """

    data: Any
    size: int
    ids: Any = None
    total: int = -1
    all_ids: Any = None
    positions: int = -1

    def __post_init__(self) -> None:
        if self.total < 0:
            self.total, self.all_ids = self.size, self.ids
        if self.positions < 0:
            self.positions = self.total
