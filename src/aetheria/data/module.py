"""The data module for those who have their loaders already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aetheria.core import AetherDataModule

__all__ = ["LoaderDataModule"]


class LoaderDataModule(AetherDataModule):
    """A data module around loaders that exist.

    Args:
        train: the training loader: a DataLoader, a list of batches, or an iterable of batches.
        val: the validation loader, or None.
        test: the test loader, or None.
    """

    def __init__(
        self, train: Iterable[Any], val: Iterable[Any] | None = None, test: Iterable[Any] | None = None
    ) -> None:
        self._train, self._val, self._test = train, val, test

    def train_dataloader(self) -> Iterable[Any]:
        return self._train

    def val_dataloader(self) -> Iterable[Any] | None:
        return self._val

    def test_dataloader(self) -> Iterable[Any] | None:
        return self._test
