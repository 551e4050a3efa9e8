"""The samples that all contestants write and read, and what is done with each of their batches.

A sample begins with its number, 8 bytes, so that any batch says by itself what is in it. What follows are random bytes
that no compression makes smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "KINDS",
    "SHARD_BYTES",
    "SHARD_BYTES_SHORT",
    "SHORT",
    "TOKENS",
    "Kind",
    "blob",
    "fold",
    "numbers_in",
    "reach",
    "row",
    "samples_of",
]

TOKENS, BLOB = 512, 100_000
_STARTS = 1009  # a prime, so that neighbours differ in every byte

Batch = torch.Tensor | list[bytes]


@dataclass(frozen=True)
class Kind:
    """Samples of one size.

    Attributes:
        name: in the tables.
        sample_bytes: of one sample.
        batch_size: samples in a batch.
        count: how many there are.
    """

    name: str
    sample_bytes: int
    batch_size: int
    count: int

    def samples(self, part: int) -> int:
        """Returns how many samples a part of them has, such as the fourth."""
        return self.count // part


KINDS = {
    "rows": Kind("1 KB", 2 * TOKENS, 64, 2_000_000),
    "blobs": Kind("100 KB", BLOB, 16, 30_000),
}
SHORT = 100  # in the short form there is but this part of the samples
SHARD_BYTES, SHARD_BYTES_SHORT = 64 << 20, 2 << 20

_drawn = np.random.default_rng(0).integers(0, 256, 2 * BLOB, dtype=np.uint8)
_drawn_tokens = _drawn[: 2 * (TOKENS + _STARTS)].view(np.uint16)


def row(number: int) -> NDArray[np.uint16]:
    """Returns a sample of 1 KB: uint16 of shape [512]."""
    made = _drawn_tokens[number % _STARTS : number % _STARTS + TOKENS].copy()
    made[:4] = np.array([number], np.uint64).view(np.uint16)
    return made


def blob(number: int) -> bytes:
    """Returns a sample of 100 KB."""
    start = number % _STARTS
    return number.to_bytes(8, "little") + _drawn[start : start + BLOB - 8].tobytes()


def samples_of(kind: str, start: int, stop: int) -> Iterator[Any]:
    """Yields some samples of a kind, by their numbers."""
    return map(row if kind == "rows" else blob, range(start, stop))


def fold(batch: Batch) -> int:
    """Touches every byte of a batch; returns how many samples it has."""
    if isinstance(batch, torch.Tensor):
        batch.numpy().view(np.uint64).sum()
    else:
        for sample in batch:
            np.frombuffer(sample, np.uint64).sum()
    return len(batch)


def numbers_in(batch: Batch) -> NDArray[np.int64]:
    """Returns the numbers of the samples in a batch, int64 of shape [batch].

    Raises:
        TypeError: it is not the batch that everybody is to give.
    """
    if isinstance(batch, torch.Tensor):
        if batch.dtype != torch.uint16 or batch.shape[1:] != (TOKENS,):
            raise TypeError(f"expected uint16 of shape [batch, {TOKENS}]; found {batch.dtype}, {tuple(batch.shape)}.")
        return np.ascontiguousarray(batch.numpy()[:, :4]).view(np.int64).reshape(-1)
    if not isinstance(batch, list) or not all(type(sample) is bytes and len(sample) == BLOB for sample in batch):
        raise TypeError(f"expected a list of bytes, {BLOB:,} each; found {type(batch)} of {type(batch[0])}.")
    return np.array([int.from_bytes(sample[:8], "little") for sample in batch], np.int64)


def reach(numbers: NDArray[np.int64], kind: Kind, count: int) -> float:
    """Returns from how many megabytes of the data some samples come, in pieces of 1 MB.

    Args:
        numbers: of the samples, of shape [n].
        kind: of them.
        count: samples in the data.
    """
    piece = max(1, 1_000_000 // kind.sample_bytes)
    firsts = np.unique(numbers // piece) * piece
    return float((np.minimum(firsts + piece, count) - firsts).sum()) * kind.sample_bytes / 1e6
