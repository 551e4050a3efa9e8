"""Tensors of which every rank holds a part: `torch.distributed.tensor.DTensor`, cut along the first dimension.

The type is not named here: to import it takes as long as all of this package, and who has one has imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up_over", "cut_like", "first_element", "is_sharded", "part_of", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Returns whether this is a tensor of which every rank holds a part."""
    return hasattr(tensor, "to_local")


def part_of(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor, sharing its memory; of an ordinary one, all of it."""
    return cast("Tensor", tensor.to_local()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor. Of a sharded one every rank must ask, at the same time."""
    return cast("Tensor", tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Returns a whole tensor, which every rank has, as another one is held: where that is sharded, its part of it."""
    if not is_sharded(model) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - loaded where there is such a model

    held: Any = model
    return distribute_tensor(tensor.to(model.device), held.device_mesh, held.placements, src_data_rank=None)


def first_element(tensor: Any) -> int:
    """Returns which element of the whole, counted in their order, is the first of this rank's part."""
    if not is_sharded(tensor) or not tensor.numel():
        return 0
    rows, mesh = int(tensor.shape[0]), tensor.device_mesh
    before = min(int(mesh.get_local_rank()) * -(-rows // int(mesh.size())), rows)  # as `torch.chunk` cuts
    return before * (int(tensor.numel()) // rows)


def add_up_over(tensors: Sequence[Any], values: Tensor) -> Tensor:
    """Returns values, one for each tensor, added up over the ranks that hold its parts.

    Args:
        tensors: some of them sharded; all ranks have the same.
        values: of this rank's parts; of an ordinary tensor, the same on every rank.
    """
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return values
    mesh = sharded.device_mesh
    if mesh.get_local_rank():  # what every rank has whole counts once
        values = values * values.new_tensor([is_sharded(tensor) for tensor in tensors])
    dist.all_reduce(values, group=mesh.get_group())
    return values
