"""The hello world: a perceptron with one hidden layer, for regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from aetheria.core import AetherModel
from aetheria.registry import Registry

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["SimpleMLP"]


@Registry.register_model("SimpleMLP")
class SimpleMLP(AetherModel):
    """Two linear layers with a ReLU between them, trained on the mean squared error with Adam.

    Args:
        input_size: features of one sample.
        hidden_size: units of the hidden layer.
        output_size: targets of one sample.
        learning_rate: step size of Adam.
    """

    def __init__(
        self,
        input_size: int = 10,
        hidden_size: int = 64,
        output_size: int = 1,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.layers = nn.Sequential(
            nn.Linear(input_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, output_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns the predictions, [batch, output_size], for features of shape [batch, input_size]."""
        predictions: Tensor = self.layers(features)
        return predictions

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns the mean squared error of a batch of (features, targets)."""
        features, targets = batch
        return {"loss": functional.mse_loss(self(features), targets)}

    def predict_step(self, batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Returns the predictions for a batch of features, with or without their targets."""
        predictions: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return predictions

    def tensor_plan(self, ranks: int) -> dict[str, ParallelStyle]:
        """Returns how ranks compute a layer together: each some of the hidden units."""
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel  # noqa: PLC0415 - a second

        return {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel()}

    def configure_optimizers(self) -> Optimizer:
        """Returns Adam over all parameters, with a constant learning rate."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
