"""The data: two spirals, wound into each other, with a little noise. Made on the spot; nothing is downloaded."""

from __future__ import annotations

import math

import torch
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherDataModule, Registry


@Registry.register_data("Spirals")
class Spirals(AetherDataModule):
    """Points in the plane, and which of the two spirals each lies on.

    Args:
        samples: points to train on; a quarter as many are made for validation.
        noise: standard deviation of a point's distance from its spiral.
        batch_size: points in a batch; taken from the configuration where it is not given here.
        seed: seed of the points.
    """

    def __init__(self, samples: int = 2000, noise: float = 0.05, batch_size: int = 64, seed: int = 0) -> None:
        self.samples = samples
        self.noise = noise
        self.batch_size = batch_size
        self.seed = seed

    def setup(self) -> None:
        """Makes the points; called on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        self.training = self._points(self.samples, generator)
        self.validation = self._points(self.samples // 4, generator)

    def _points(self, count: int, generator: torch.Generator) -> TensorDataset:
        """Returns points of shape [count, 2] with their labels of shape [count], 0 or 1."""
        labels = torch.arange(count) % 2
        radius = torch.rand(count, generator=generator).sqrt()
        angle = 3.0 * math.pi * radius + math.pi * labels
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return TensorDataset(points + self.noise * torch.randn(count, 2, generator=generator), labels)

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns the training batches. The order of every epoch follows from the seed of the configuration."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Returns the validation batches."""
        return DataLoader(self.validation, batch_size=self.batch_size)
