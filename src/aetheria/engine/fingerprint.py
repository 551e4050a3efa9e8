"""A short digest of weights, for telling whether they are the same."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor

from aetheria.core.shards import add_up_over, first_element, part_of

__all__ = ["fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns a short digest of weights, taken where they are: one sum over the bits of each, one transfer.

    Of sharded weights it is that of the whole ones; every rank asks, at the same time.

    It tells runs apart that have gone different ways; unlike `weights_digest` it does not resist somebody who wants two
    models to have the same one.
    """
    sums = [_sum_of_bits(part_of(tensor), first_element(tensor)) for tensor in tensors.values()]
    if not sums:
        return ""
    own = torch.stack([value.to(sums[0].device) for value in sums])
    together = add_up_over(list(tensors.values()), own).tolist()
    content = b"".join(name.encode() + struct.pack("<q", bits) for name, bits in zip(tensors, together, strict=True))
    return sha256(content).hexdigest()[:16]


_COLUMNS = 251
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(tensor: Tensor, first: int = 0) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    # Two numbers that change places must not go unnoticed: each counts by its column.
    rows = bits.numel() // _COLUMNS
    columns = bits[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64)
    columns[: bits.numel() - rows * _COLUMNS] += bits[rows * _COLUMNS :]
    # In a part of a tensor the first element is in the column that it has in the whole.
    weights = torch.arange(first, first + _COLUMNS, device=bits.device).remainder_(_COLUMNS).mul_(2).add_(1)
    return (columns * weights).sum()
