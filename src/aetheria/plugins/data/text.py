"""Real English text that every Python brings along: the reference manual, as `pydoc` prints it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aetheria.core import AetherDataModule
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["TextData"]


class _Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a byte sequence that lie end to end, each with its next bytes."""

    def __init__(self, text: Tensor, block_size: int) -> None:
        self.text = text
        self.block_size = block_size

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        window = self.text[start : start + self.block_size + 1].long()
        return window[:-1], window[1:]


@Registry.register_data("TextData")
class TextData(AetherDataModule):
    """Batches of (bytes [batch, block_size], the bytes that follow [batch, block_size]), int64.

    The text is `pydoc_data.topics`, about 450 kB of English prose and code; it differs a little from one version of
    Python to the next. Its last part is kept for validation, so that no window of it overlaps with training.

    Args:
        block_size: bytes in one window.
        batch_size: windows in one batch.
        validation_fraction: share of the text, at its end, that is kept for validation.
        num_workers: processes that cut the windows; 0 cuts them in the training process, which is cheap.

    Raises:
        ConfigError: a part of the text is shorter than one window.
    """

    def __init__(
        self,
        block_size: int = 128,
        batch_size: int = 16,
        validation_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        self.block_size = block_size
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers

    def setup(self) -> None:
        """Joins the topics, in alphabetical order, and splits the text."""
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte that only this class needs

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = len(tokens) - round(self.validation_fraction * len(tokens))
        if min(cut, len(tokens) - cut) <= self.block_size:
            raise ConfigError(
                f"TextData splits {len(tokens)} bytes into {cut} for training and {len(tokens) - cut} for validation; "
                f"each part must be longer than block_size={self.block_size}. "
                "Lower block_size or move validation_fraction."
            )
        self.training = _Windows(tokens[:cut], self.block_size)
        self.validation = _Windows(tokens[cut:], self.block_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Returns the training windows, in random order."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Returns the validation windows, in fixed order."""
        return DataLoader(self.validation, batch_size=self.batch_size)
