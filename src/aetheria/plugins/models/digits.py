"""A small convolutional network that reads handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from aetheria.core import AetherModel, OptimizerPlan, Schedule
from aetheria.plugins.optimizers import warmup_cosine
from aetheria.registry import Registry

__all__ = ["DigitsClassifier"]


@Registry.register_model("DigitsClassifier")
class DigitsClassifier(AetherModel):
    """Two convolutions with batch normalisation, then two linear layers with dropout; about 170,000 parameters.

    Args:
        channels: feature maps of the first convolution; the second has twice as many.
        dropout: probability of dropping a unit, before each linear layer.
        optimizer: registered name of the optimiser.
        learning_rate: its peak step size.
        weight_decay: its weight decay, applied to weights but not to biases and normalisation.
        schedule_steps: optimiser steps until the learning rate, after a short warm-up, has fallen to zero along a
            cosine; None keeps it constant. Give the number of steps the run takes.
    """

    def __init__(
        self,
        channels: int = 32,
        dropout: float = 0.3,
        optimizer: str = "adamw",
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        schedule_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule_steps = schedule_steps
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 4 * 4, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the ten classes.

        Args:
            images: pixel values from 0 to 1, of shape [batch, 1, 8, 8], [batch, 8, 8] or [batch, 64].

        Returns:
            Logits of shape [batch, 10].
        """
        logits: Tensor = self.classifier(self.features(images.reshape(-1, 1, 8, 8)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Returns cross-entropy and accuracy of a batch of (images, labels)."""
        images, labels = batch
        logits = self(images)
        return {
            "loss": functional.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
        }

    def predict_step(self, batch: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """Returns the probabilities of the ten classes, [batch, 10], for images with or without their labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities: Tensor = self(images).softmax(dim=1)
        return probabilities

    def configure_optimizers(self) -> OptimizerPlan:
        """Returns the optimiser; with `schedule_steps`, also a warm-up and cosine, stepped every optimiser step."""
        # Matrices and kernels are decayed; biases, scales and shifts have one dimension and are left alone.
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        groups = [
            {"name": "matrices", "params": matrices, "weight_decay": self.weight_decay},
            {"name": "vectors", "params": vectors, "weight_decay": 0.0},
        ]
        optimizer = Registry.build("optimizer", self.optimizer, {"lr": self.learning_rate}, groups)
        if self.schedule_steps is None:
            return OptimizerPlan(optimizer)
        cosine = warmup_cosine(optimizer, self.schedule_steps, warmup_steps=self.schedule_steps // 10)
        return OptimizerPlan(optimizer, [Schedule(cosine, interval="step")])
