"""The model: what it computes, what it is trained on, and how it is optimised."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from aetheria import AetherModel, Registry


@Registry.register_model("SpiralClassifier")
class SpiralClassifier(AetherModel):
    """A perceptron with two hidden layers, for points in the plane.

    Args:
        hidden_size: units in each hidden layer.
        learning_rate: step size of AdamW.
    """

    def __init__(self, hidden_size: int = 64, learning_rate: float = 0.01) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.layers = nn.Sequential(
            nn.Linear(2, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 2),
        )

    def forward(self, points: Tensor) -> Tensor:
        """Returns logits of shape [batch, 2] for points of shape [batch, 2]."""
        logits: Tensor = self.layers(points)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns the loss that is minimised, and any metrics; validation uses the same."""
        points, labels = batch
        logits = self(points)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss": functional.cross_entropy(logits, labels), "accuracy": accuracy}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimiser; with a learning-rate scheduler in a pair, if there is one."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
