"""A short digest of weights, for telling whether they are the same."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from aetheria.core.shards import add_up_over, offsets_of, part_of

__all__ = ["fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns a short digest of weights, taken where they are: one sum over the bits of each, one transfer.

    Of sharded weights it is that of the whole ones; every rank asks, at the same time.

    It tells runs apart that have gone different ways; unlike `weights_digest` it does not resist somebody who wants two
    models to have the same one.
    """
    sums = [_sum_of_bits(part_of(tensor), tensor.shape, offsets_of(tensor)) for tensor in tensors.values()]
    if not sums:
        return ""
    own = torch.stack([value.to(sums[0].device) for value in sums])
    together = add_up_over(list(tensors.values()), own).tolist()
    content = b"".join(name.encode() + struct.pack("<q", bits) for name, bits in zip(tensors, together, strict=True))
    return sha256(content).hexdigest()[:16]


_COLUMNS = 251
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 20  # elements of a block that are weighted together


def _sum_of_bits(part: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """Returns the sum over a block's bits, each weighted by its place in the whole.

    Two numbers that change places must not go unnoticed: each counts by its column, if the whole is written in rows of
    251. In a block of a tensor an element is in the column that it has in the whole.
    """
    if part.is_complex():
        part, shape, offsets = torch.view_as_real(part.detach()), (*shape, 2), (*offsets, 0)
    bits = part.detach().contiguous().view(_INTEGERS[part.element_size()])
    if tuple(part.shape[1:]) == tuple(shape[1:]):  # whole rows lie next to one another in the whole, too
        return _sum_of_row(bits.reshape(-1), offsets[0] * math.prod(shape[1:]) if shape else 0)
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    rows = max(1, _AT_ONCE // max(1, math.prod(part.shape[1:])))
    for first in range(0, len(bits), rows):
        block = bits[first : first + rows]
        place = torch.zeros((), dtype=torch.int64, device=part.device)
        for dimension, length in enumerate(block.shape):
            begin = offsets[dimension] + (first if dimension == 0 else 0)
            along = torch.arange(begin, begin + length, device=part.device) * math.prod(shape[dimension + 1 :])
            place = place.unsqueeze(-1) + along.remainder_(_COLUMNS)
        total += (block * place.remainder_(_COLUMNS).mul_(2).add_(1)).sum(dtype=torch.int64)
    return total


def _sum_of_row(bits: Tensor, first: int) -> Tensor:
    rows = bits.numel() // _COLUMNS
    columns = bits[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64)
    columns[: bits.numel() - rows * _COLUMNS] += bits[rows * _COLUMNS :]
    weights = torch.arange(first, first + _COLUMNS, device=bits.device).remainder_(_COLUMNS).mul_(2).add_(1)
    return (columns * weights).sum()
