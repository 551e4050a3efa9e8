"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, in ten classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from aetheria.core import AetherDataModule
from aetheria.errors import MissingDependencyError
from aetheria.registry import Registry

__all__ = ["DigitsData"]


class _Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images [samples, 1, 8, 8] and labels [samples], read one at a time, the images shifted at random if asked."""

    def __init__(self, images: Tensor, labels: Tensor, *, augment: bool) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.augment:
            # Up to one pixel in each direction. The global generator is the right one here: the loop seeds it for
            # every sample, so that a sample is shifted alike whichever worker reads it and wherever a run continues.
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


@Registry.register_data("DigitsData")
class DigitsData(AetherDataModule):
    """Batches of (images [batch, 1, 8, 8] from 0 to 1, labels [batch]), split once into training and validation.

    The split is stratified (every class keeps its share) and depends on `seed` alone. The images come from the UCI
    "Optical Recognition of Handwritten Digits" set, as scikit-learn ships it: nothing is downloaded.

    Args:
        batch_size: images in one batch.
        validation_fraction: share of the images that is kept for validation.
        augment: whether training images are shifted at random by up to one pixel.
        num_workers: processes that read the training images; 0 reads them in the training process.
        seed: seed of the split.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """

    def __init__(
        self,
        batch_size: int = 64,
        validation_fraction: float = 0.2,
        augment: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.augment = augment
        self.num_workers = num_workers
        self.seed = seed

    def setup(self) -> None:
        """Loads the images and splits them."""
        try:
            from sklearn.datasets import load_digits  # noqa: PLC0415 - optional, and slow to import
            from sklearn.model_selection import train_test_split  # noqa: PLC0415
        except ImportError as error:
            raise MissingDependencyError.of("scikit-learn", "examples", "DigitsData") from error
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
        labels = torch.from_numpy(digits.target).long()
        training, validation = train_test_split(
            range(len(labels)), test_size=self.validation_fraction, random_state=self.seed, stratify=labels
        )
        self.training = _Digits(images[training], labels[training], augment=self.augment)
        self.validation = _Digits(images[validation], labels[validation], augment=False)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Returns the training batches, in random order."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Returns the validation batches, in fixed order."""
        return DataLoader(self.validation, batch_size=4 * self.batch_size)
