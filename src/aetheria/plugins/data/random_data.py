"""Made-up regression data that can be learned: a linear map and a little noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from aetheria.core import AetherDataModule
from aetheria.registry import Registry

__all__ = ["RandomData"]


@Registry.register_data("RandomData")
class RandomData(AetherDataModule):
    """Batches of (features [batch, features], targets [batch, targets]), drawn once from a generator of its own.

    The targets are a fixed random linear map of standard normal features, scaled to unit variance, plus normal noise:
    the best possible mean squared error is `noise` squared.

    Args:
        samples: training samples; a quarter as many, but at least one, are made for validation.
        features: numbers in one sample.
        targets: numbers to predict.
        noise: standard deviation of what cannot be predicted.
        batch_size: samples in one batch.
        seed: seed of the map, the features and the noise.
    """

    def __init__(
        self,
        samples: int = 1024,
        features: int = 10,
        targets: int = 1,
        noise: float = 0.1,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.samples = samples
        self.features = features
        self.targets = targets
        self.noise = noise
        self.batch_size = batch_size
        self.seed = seed

    def setup(self) -> None:
        """Draws all samples, the same ones for the same arguments."""
        generator = torch.Generator().manual_seed(self.seed)
        linear_map = torch.randn(self.features, self.targets, generator=generator) / self.features**0.5
        self.training = self._draw(self.samples, linear_map, generator)
        self.validation = self._draw(max(1, self.samples // 4), linear_map, generator)

    def _draw(self, samples: int, linear_map: Tensor, generator: torch.Generator) -> TensorDataset:
        features = torch.randn(samples, self.features, generator=generator)
        noise = self.noise * torch.randn(samples, self.targets, generator=generator)
        return TensorDataset(features, features @ linear_map + noise)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Returns the training batches, in random order."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Returns the validation batches, in fixed order."""
        return DataLoader(self.validation, batch_size=self.batch_size)
